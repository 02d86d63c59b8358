"""The example from end to end: load, plan, train, merge, export, compare."""

import functools
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jlora

from . import assets, report
from .assets import AssetError
from .config import Options, parse
from .data import Examples
from .export import export_orbax, export_safetensors
from .loop import predict
from .runs import Result, run
from .task import Task, load_task, planned, quantised

HEAD = "**/head/*"
CHECKED = 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def configs(options: Options) -> dict[str, jlora.LoraConfig]:
    """Returns what each run trains, by its name."""
    targets = options.targets
    named = {
        "head-only": jlora.LoraConfig(targets=(), train=HEAD),
        "lora": jlora.LoraConfig(
            rank=options.rank,
            alpha=options.alpha,
            targets="all-linear" if targets == ("all-linear",) else targets,
            exclude=HEAD,
            train=HEAD,
            method=options.method,
        ),
    }
    if options.full:
        named["full"] = jlora.LoraConfig(targets=(), train="**")
    return named


def merge_and_check(task: Task, result: Result, options: Options) -> Any:
    """Returns the merged variables, after comparing their logits with the adapter's.

    Both sides multiply in full precision here. Otherwise the fast float32 products
    of a TPU or GPU would hide what is compared.

    Raises:
      RuntimeError: if a logit differs by more than `TOLERANCE`.
    """
    merged = jlora.merge(result.frozen, result.trainable)
    adapted = functools.partial(jax.jit(result.apply), result.frozen, result.trainable)
    plain = functools.partial(jax.jit(task.model.apply), merged)
    some = Examples(*(field[:CHECKED] for field in task.test))
    with jax.default_matmul_precision("highest"):
        a = predict(adapted, some, size=CHECKED)
        b = predict(plain, some, size=CHECKED)
    difference, allowed = np.abs(a - b).max(), TOLERANCE[options.dtype]
    print(f"   merged and unmerged logits differ by at most {difference:.1e}")
    if not difference <= allowed:
        raise RuntimeError(f"Merging changed a logit by {difference}, over {allowed}.")
    return merged


def export(task: Task, result: Result, merged: Any, options: Options) -> None:
    """Writes the adapter and the merged model below `options.out`."""
    shutil.rmtree(options.out / "adapter", ignore_errors=True)
    jlora.checkpoint.save(options.out / "adapter", result.trainable)
    export_orbax(options.out / "merged-orbax", merged["params"])
    export_safetensors(options.out / "merged" / "model.safetensors", merged["params"])
    for name, content in task.files.items():
        (options.out / "merged" / name).write_bytes(content)


def compare(results: Sequence[Result]) -> str:
    """Returns the final table."""
    rows = []
    for result in results:
        numbers = jlora.report(result.frozen, result.trainable)
        rows.append(
            report.Row(
                name=result.name,
                trained=numbers.trained_count,
                total=numbers.total_count,
                accuracy=result.history.test[-1].accuracy,
                seconds=result.history.seconds,
                size=numbers.adapter_bytes,
                model_size=numbers.model_bytes,
            )
        )
    return report.table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example with the flags in `argv`, by default the command line's."""
    options = parse(argv)
    device = jax.devices()[0]
    print(f"JAX {jax.__version__} on {jax.device_count()} × {device.device_kind}")
    try:
        _stages(options)
    except (AssetError, jlora.JloraError) as error:
        sys.exit(str(error))


def _stages(options: Options) -> None:
    times: dict[str, float] = {}
    stage = functools.partial(report.stage, times=times)
    options.out.mkdir(parents=True, exist_ok=True)

    with stage("Fetch model and data"):
        minilm = assets.fetch_any(assets.MINILM, options.cache)
        reviews = assets.fetch(assets.REVIEWS, options.cache)
        print(f"   verified in {options.cache}")

    with stage("Load model and data"):
        task = load_task(*minilm, reviews, dtype=options.dtype, seed=options.seed)
        print(
            f"   {len(task.train.labels)} sentences to train on, "
            f"{len(task.test.labels)} of other reviews to test"
        )

    with stage("Plan what to train"):
        wanted = configs(options)
        if options.quantize != "none":
            task = quantised(task, planned(task, wanted["lora"]), options.quantize)
        plans = {name: planned(task, config) for name, config in wanted.items()}
        print(plans["lora"])

    results = {}
    for name, plan in plans.items():
        with stage(f"Train: {name}"):
            full_lr = options.full_lr if name == "full" else options.head_lr
            results[name] = run(name, plan, task, options, full_lr=full_lr)
            print(f"   test accuracy {results[name].history.test[-1].accuracy:.3f}")

    with stage("Merge"):
        merged = merge_and_check(task, results["lora"], options)

    with stage("Export"):
        export(task, results["lora"], merged, options)
        print(f"   {options.out}/adapter, merged, merged-orbax")

    with stage("Report"):
        table = compare(list(results.values()))
        histories = {name: result.history for name, result in results.items()}
        report.plot(histories, options.out / "curves.png")
        summary = {
            "accuracy": {k: v.test[-1].accuracy for k, v in histories.items()},
            "seconds": times,
            "options": {k: str(v) for k, v in vars(options).items()},
        }
        (options.out / "results.json").write_text(json.dumps(summary, indent=2))
        (options.out / "results.md").write_text(table + "\n")
        print(f"   {options.out}/curves.png, results.md, results.json")

    print(f"\n{table}\n\n{sum(times.values()):.0f} s in all; files in {options.out}")
