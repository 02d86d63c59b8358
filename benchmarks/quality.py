"""What do ranks, placements and methods learn on a real model, with one budget?"""

import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import jlora
from examples.sentiment import assets, config, loop, task

from . import common

HEAD = ("**/head/*",)
QV = "**/attention/{query,value}/kernel"
ATTENTION = "**/attention/*/kernel"


@dataclasses.dataclass(frozen=True)
class Run:
    """A way to fine-tune.

    Attributes:
      group: what it is compared in.
      config: what is trained.
      lr: learning rate of the factors, or of all weights.
      ratio: the rate of B over that of A.
      base: how the frozen weights are stored, see `common.stored`.
    """

    group: str
    config: jlora.LoraConfig
    lr: float = 1e-3
    ratio: float = 1.0
    base: str = "float32"


def lora(targets: Any = QV, **settings: Any) -> jlora.LoraConfig:
    """Returns a config with the head trained in full."""
    settings = {"rank": 8, "alpha": 16, **settings}
    return jlora.LoraConfig(targets=targets, exclude=HEAD, train=HEAD, **settings)


RUNS = {
    "head only": Run("baseline", jlora.LoraConfig(targets=(), train=HEAD)),
    "full fine-tune": Run("baseline", jlora.LoraConfig(targets=(), train="**"), 5e-5),
    **{
        f"LoRA, rank {rank}, q and v": Run("rank", lora(rank=rank))
        for rank in (1, 2, 4, 8, 16, 64)
    },
    "rsLoRA, rank 64, q and v": Run("rank", lora(rank=64, rslora=True)),
    "LoRA, rank 8, attention": Run("placement", lora(ATTENTION)),
    "LoRA, rank 8, all linear": Run("placement", lora("all-linear")),
    "DoRA, rank 8, q and v": Run("method", lora(method="dora")),
    "PiSSA, rank 8, q and v": Run("method", lora(init="pissa")),
    "LoRA+, rank 8, q and v": Run("method", lora(), lr=2.5e-4, ratio=16),
    "VeRA, rank 256, q and v": Run(
        "method", lora(rank=256, alpha=256, method="vera"), lr=1e-2
    ),
    **{
        f"LoRA, rank 8, q and v, base in {base}": Run("base", lora(), base=base)
        for base in common.STORED
    },
}


def optimizer(run: Run, head_lr: float) -> optax.GradientTransformation:
    """Returns AdamW with the rates of `run` and of the head."""
    whole = run.lr if not run.config.targets and run.config.train != HEAD else head_lr
    slow, fast = optax.adamw(run.lr), optax.adamw(run.lr * run.ratio)
    return optax.multi_transform(
        {"a": slow, "b": fast, "magnitude": slow, "full": optax.adamw(whole)},
        jlora.optim.labels,
    )


def train(name: str, found: task.Task, options: config.Options) -> common.Figures:
    """Returns what one run learns, and how long it takes."""
    run = RUNS[name]
    x = (found.train.ids[:2], found.train.mask[:2])
    plan = jlora.plan(found.model.apply, found.variables, *x, config=run.config)
    key = jax.random.key(options.seed)
    frozen, trainable = jlora.split(key, found.variables, plan)
    frozen = common.stored(frozen, plan, run.base)
    state = loop.create_state(
        jlora.apply_lora(found.model.apply),
        trainable,
        optimizer(run, options.head_lr),
    )
    epoch = len(found.train.labels) // options.batch_size
    state, history = loop.fit(
        state,
        frozen,
        found.train,
        found.test,
        steps=min(options.epochs * epoch, options.steps or sys.maxsize),
        size=options.batch_size,
        seed=options.seed,
        save=lambda *_: None,
        history=loop.History(),
        name=f"{name}, seed {options.seed}",
    )
    return {
        "run": name,
        "group": run.group,
        "seed": options.seed,
        "trained": plan.trained_count,
        "base_bytes": common.nbytes(frozen),
        "environment": common.environment(),
        "seconds": history.seconds,
        "accuracy": history.test[-1].accuracy,
        "test": [point._asdict() for point in history.test],
        "train_loss": [round(point.loss, 4) for point in history.train],
    }


def earlier(path: Path, settings: common.Figures) -> common.Figures:
    """Returns what a file of the same settings holds, so that a run goes on.

    Each later result has its own environment.
    """
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("settings") == settings:
        return found
    return {"environment": common.environment(), "settings": settings, "results": []}


def rows(results: Sequence[common.Figures]) -> list[common.Figures]:
    """Returns a row for each run: means over seeds, and the spread of accuracies."""
    out = []
    for name in RUNS:
        own = [r for r in results if r["run"] == name]
        if own:
            accuracies = [r["accuracy"] for r in own]
            out.append(
                {
                    "run": name,
                    "group": own[0]["group"],
                    "trained": own[0]["trained"],
                    "accuracy": statistics.mean(accuracies),
                    "each": accuracies,
                    "loss": statistics.mean(r["test"][-1]["loss"] for r in own),
                    "seconds": statistics.median(r["seconds"] for r in own),
                }
            )
    return out


def columns(found: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table."""
    head = ("run", "trained", "test accuracy", "seeds", "test loss", "seconds")
    lines = [
        (
            row["run"],
            f"{row['trained']:,}",
            common.fixed(row["accuracy"], 3),
            " / ".join(common.fixed(x, 3) for x in row["each"]),
            common.fixed(row["loss"], 3),
            common.fixed(row["seconds"], 0),
        )
        for row in found
    ]
    return head, lines


def main() -> None:
    """Trains each run with each seed that the file lacks, and writes after each."""
    parser = common.parser("quality", __doc__)
    parser.add_argument("--run", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, help="stop here, for a quick look")
    flags = parser.parse_args()
    base = config.parse([])
    minilm = assets.fetch_any(assets.MINILM, base.cache)
    reviews = assets.fetch(assets.REVIEWS, base.cache)
    settings = {"epochs": flags.epochs, "dtype": flags.dtype, "steps": flags.steps}
    shown = {**settings, "batch": base.batch_size, "lr": base.lr}
    file = earlier(flags.json, shown)
    results = file["results"]
    done = {(r["seed"], r["run"]) for r in results}
    for seed, name in itertools.product(flags.seed, flags.run):
        if (seed, name) in done:
            continue
        options = dataclasses.replace(base, seed=seed, **settings)
        found = task.load_task(*minilm, reviews, dtype=flags.dtype, seed=seed)
        results.append(train(name, found, options))
        common.write(flags.json, file["environment"], settings=shown, results=results)
    print(common.show(columns(rows(results))))


if __name__ == "__main__":
    main()
