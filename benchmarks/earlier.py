"""What do LoRA and the methods before it cost: a step, a file, and inference?

The model is MiniLM with random weights; each method works in all of its layers.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from examples.earlier_methods import encoder, methods
from examples.earlier_methods.counts import Size, shapes
from examples.earlier_methods.hooks import Params
from examples.earlier_methods.methods.prefix import folded
from jlora._tables import nbytes

from . import common, tpu

FROZEN, MERGED, LORA = "frozen model", "LoRA, merged", "LoRA, rank 8"
METHODS = {
    "head only": methods.head_only,
    "BitFit": methods.bitfit,
    "adapters, Houlsby": lambda: methods.houlsby(8),
    "adapters, Pfeiffer": lambda: methods.pfeiffer(16),
    "prompt": lambda: methods.prompt(16),
    "prefix": lambda: methods.prefix(16),
    "prefix, reparametrised": lambda: methods.through(16, 96),
    "IA3": methods.ia3,
    LORA: methods.lora,
    "DoRA, rank 8": methods.dora,
    "full fine-tuning": methods.full,
}
ONE_PROGRAM = ("head only", "BitFit", "full fine-tuning")  # the model's own
INPUTS = {"1 × 16": (1, 16), "1 × 128": (1, 128), "32 × 16": (32, 16)}
INPUTS["32 × 128"] = (32, 128)
ROUNDS = {"1 × 16": 50, "1 × 128": 15, "32 × 16": 6, "32 × 128": 2}
STEP = (16, 24)  # as in the sweeps
WORDS, HEAD = 30522, 32  # MiniLM's


def model_of(size: Size) -> tuple[Params, Any]:
    """Returns random parameters, and `(params, x, mask, extra=...) -> logits`."""
    layers = shapes(size)

    def table(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, size.width), jnp.float32)

    norm = jax.tree.map(lambda x: table(1), layers["layers"]["output_norm"])
    tables = {"word": table(WORDS), "position": table(512), "token_type": table(2)}
    params = common.filled({**layers, "embeddings": {**tables, "norm": norm}})
    model = functools.partial(encoder.classify, heads=size.width // HEAD)
    return params, model


def batch(rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns ids and a mask of full rows."""
    ids = jax.random.randint(jax.random.key(1), (rows, length), 0, WORDS)
    return ids, jnp.ones(ids.shape, bool)


def started(name: str, params: Params, model: Any) -> tuple[Any, Any, Any]:
    """Returns a method's function, frozen side and trained side, embeddings apart."""
    method = METHODS[name]()
    upper = {k: v for k, v in params.items() if k != "embeddings"}
    width = params["embeddings"]["word"].shape[1]
    inputs = (jnp.ones((2, 3, width)), jnp.ones((2, 3), bool))
    frozen, trained = method.start(jax.random.key(2), model, upper, inputs)
    return method.adapted(model), frozen, trained


def training(size: Size) -> dict[str, common.Step]:
    """Returns a training step of each method."""
    params, model = model_of(size)
    ids, mask = batch(*STEP)
    labels = ids[:, 0] % 2

    def step(name: str) -> common.Step:
        run, frozen, trained = started(name, params, model)

        def loss(trained: Any, frozen: Any, at: Any, ids: Any, mask: Any) -> Any:
            x = encoder.embed({"embeddings": at}, ids)
            return common.cross_entropy(run(frozen, trained, x, mask), labels)

        rest = (frozen, params["embeddings"], ids, mask)
        return common.training_step(loss, trained, *rest)

    return {name: step(name) for name in METHODS}


def inference(size: Size) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns functions of `(*trees, ids, mask)` for inference, with their trees.

    In place of ids they also take the stream `[B, T, D]` before the first layer.

    A method that ends in the model's own weights runs the model's own program, so it
    is not listed. A prefix keeps its keys and values, not what made them.
    """
    params, model = model_of(size)
    upper = {k: v for k, v in params.items() if k != "embeddings"}
    at = params["embeddings"]

    def whole(run: Any, *trees: Any) -> tuple[Any, tuple[Any, ...]]:
        def fn(trees: Any, at: Any, ids: Any, mask: Any) -> Any:
            x = encoder.embed({"embeddings": at}, ids) if ids.ndim == 2 else ids
            return run(*trees, x, mask)

        return jax.jit(fn), (trees, at)

    found = {FROZEN: whole(model, upper)}
    for name in METHODS:
        if name in (*ONE_PROGRAM, "prefix, reparametrised"):
            continue
        run, frozen, trained = started(name, params, model)
        if name == LORA:
            found[MERGED] = whole(model, jlora.merge(frozen, trained))
        found[name] = whole(run, frozen, trained)
    return found


def kept_bytes(name: str, trained: Any) -> int:
    """Returns the size of what has to be stored of one task."""
    if name == "prefix, reparametrised":
        trained = {**trained, "added": folded(trained["added"])}
    return common.nbytes(trained)


def compiled_on(fn: Any, args: Any, sharding: Any = None) -> Any:
    """Returns `fn` compiled for arguments here, or for those of a described chip."""
    if sharding is None:
        return fn.lower(*args).compile()
    place = functools.partial(_placed, sharding=sharding)
    return fn.lower(*jax.tree.map(place, args)).compile()


def _placed(x: jax.Array, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def processor_seconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> Any:
    """Returns the least processor time of each run over rounds; runs take turns.

    With one thread it is the latency of an idle machine; other work hardly moves it.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, call in runs.items():
            start = time.process_time()
            jax.block_until_ready(call())
            found[name].append(time.process_time() - start)
    return {name: min(own[1:]) for name, own in found.items()}


def same_program(one: Any, other: Any, args: Sequence[Any]) -> bool:
    """Returns whether two functions of equal arguments lower to the same program."""
    return one.lower(*args[0]).as_text() == other.lower(*args[1]).as_text()


def measured(size: Size, sharding: Any = None) -> common.Figures:
    """Returns the inference figures of each method for each of `INPUTS`.

    On a described chip they are those of the layers, without the embeddings.
    """
    found = inference(size)
    inputs = batch(*STEP)
    rows: list[common.Figures] = []
    for title, shape in INPUTS.items():
        inputs = batch(*shape)
        if sharding is not None:
            inputs = (jnp.ones((*shape, size.width)), inputs[1])
        runs, own = {}, {}
        for name, (fn, trees) in found.items():
            program = compiled_on(fn, (*trees, *inputs), sharding)
            cost = program.cost_analysis() or {}
            own[name] = {"flops": cost.get("flops"), "bytes": cost["bytes accessed"]}
            runs[name] = functools.partial(program, *trees, *inputs)
        if sharding is None:
            for name, seconds in processor_seconds(runs, ROUNDS[title]).items():
                own[name]["seconds"] = seconds
        rows += [{"inputs": title, "row": name, **f} for name, f in own.items()]
        print(f"inference: {title}", flush=True)
    (base, trees), (merged, others) = found[FROZEN], found[MERGED]
    args = [(*t, *inputs) for t in (trees, others)]
    return {"inference": rows, "same_program": same_program(base, merged, args)}


def training_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns a line for each method's training step, beside LoRA's."""
    base = next(row for row in rows if row["row"] == LORA)
    head = ("method", "trained", "kept", "step ms", "time × LoRA")
    head += ("temp MiB", "temp × LoRA")
    return head, [
        (
            row["row"],
            f"{row['trained']:,}",
            nbytes(row["kept_bytes"]),
            common.fixed(row.get("seconds"), 0, 1e-3),
            common.ratio(row, base, "seconds"),
            common.fixed(row["temp_bytes"], 1, 2**20),
            common.ratio(row, base, "temp_bytes"),
        )
        for row in rows
    ]


def inference_columns(rows: Sequence[common.Figures], field: str) -> common.Columns:
    """Returns a line for each method: one figure over the frozen model's."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    found = {(row["row"], row["inputs"]): row for row in rows}
    there = [at for at in INPUTS if (FROZEN, at) in found]
    return ("method", *there), [
        (
            name,
            *(common.ratio(found[name, at], found[FROZEN, at], field) for at in there),
        )
        for name in names
    ]


def main() -> None:
    """Measures here, or compiles for one TPU v5e chip."""
    parser = common.parser("earlier", __doc__)
    parser.add_argument("--target", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7, help="steps; 0: do not time")
    options = parser.parse_args()
    size = Size(384, options.layers)
    if options.target == "tpu":
        _ahead(options.json.with_suffix(".tpu.json"), size)
        return
    steps = training(size)
    about = {name: _described(name, step) for name, step in steps.items()}
    figures = common.measure(steps, options.rounds)  # donates what steps start from
    rows = [{**about[name], **own} for name, own in figures.items()]
    shown = {"step": STEP, "layers": options.layers}
    env = common.environment()
    found = {"training environment": env, "training": rows, **measured(size)}
    common.write(options.json, env, settings=shown, **found)


def _described(name: str, step: common.Step) -> common.Figures:
    """Returns what a step trains, and how many bytes are kept of it."""
    trained = step[1][0]
    count = sum(x.size for x in jax.tree.leaves(trained))
    return {"row": name, "trained": count, "kept_bytes": kept_bytes(name, trained)}


def _ahead(path: Path, size: Size) -> None:
    if find_spec(tpu.COMPILER) is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    # The compiler counts a loop's body once: one layer has no loop.
    found = measured(size._replace(layers=1), tpu.one_chip())
    common.write(path, tpu.environment(), **found)


if __name__ == "__main__":
    main()
