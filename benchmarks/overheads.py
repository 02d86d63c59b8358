"""What do imports, `plan`, staging and compiling cost, and how large is an adapter?"""

import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import jlora
from jlora._tables import nbytes

from . import common, models


def clean_time(
    call: Callable[[Any], Any],
    rounds: int,
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Returns the median time of `call(prepare())` after it is prepared.

    JAX's caches are emptied before each, and the first is not counted.
    """
    times = []
    for _ in range(rounds + 1):
        jax.clear_caches()
        prepared = prepare()
        start = time.perf_counter()
        call(prepared)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def imports(rounds: int) -> dict[str, float]:
    """Returns the median time to import JAX, and jlora after it, in new processes."""
    code = (
        "import time; t = time.perf_counter(); import jax; u = time.perf_counter(); "
        "import jlora; print(u - t, time.perf_counter() - u)"
    )
    command = (sys.executable, "-c", code)
    root = Path(jlora.__file__).parents[1]
    outs = [
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        for _ in range(rounds)
    ]
    times = zip(*(map(float, out.stdout.split()) for out in outs), strict=True)
    return dict(zip(("jax", "jlora"), map(statistics.median, times), strict=True))


def lowering(model: models.Model, rank: int) -> dict[str, Callable[[], Any]]:
    """Returns what traces and lowers, only on shapes, forward and backward passes.

    The base of LoRA's gradient is the floor's: both go through the frozen model.
    """
    params, (x, _) = common.example(model, abstract=True)
    trainable = common.adapter(model, params, x, rank)
    adapted = jlora.apply_lora(model.apply)

    def floor_loss(shift: Any, params: Any, x: Any) -> Any:
        return model.apply(params, x, at_first=shift).sum()

    def loss(trainable: Any, frozen: Any, x: Any) -> Any:
        return adapted(frozen, trainable, x).sum()

    def lower(fn: Any, *args: Any) -> Callable[[], Any]:
        return lambda: jax.jit(lambda *args: fn(*args)).lower(*args)

    shift = model.shift["at_first"]
    return {
        "forward, model": lower(model.apply, params, x),
        "forward, adapted": lower(adapted, params, trainable, x),
        "gradient, floor": lower(jax.grad(floor_loss), shift, params, x),
        "gradient, adapted": lower(jax.grad(loss), trainable, params, x),
    }


def staging(model: models.Model, rank: int, rounds: int) -> dict[str, float]:
    """Returns times to plan, and to trace and lower."""
    params, (x, _) = common.example(model, abstract=True)
    config = jlora.LoraConfig(rank=rank)
    runs = lowering(model, rank)
    runs["plan"] = lambda: jlora.plan(model.apply, params, x, config=config)
    return {
        name: clean_time(lambda _, run=run: run(), rounds) for name, run in runs.items()
    }


def compiling(model: models.Model, rank: int, rounds: int) -> dict[str, float]:
    """Returns times to compile what was lowered."""
    return {
        name: clean_time(lambda lowered: lowered.compile(), rounds, lower)
        for name, lower in lowering(model, rank).items()
    }


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def depth(layers: int, _: int) -> Pair:
    """Returns what lowers the floor's and LoRA's gradient of a narrow decoder."""
    runs = lowering(models.linen(models.Size(width=64, layers=layers, length=64)), 8)
    return runs["gradient, floor"], runs["gradient, adapted"]


def weights(n: int, of: int) -> Pair:
    """Returns the same for a stack of `of` small layers, of which `n` are adapted.

    The first layer is always one of them, so gradients go through all.
    """
    shape = jax.ShapeDtypeStruct((16, 16), "float32")
    params = [shape] * of
    config = jlora.LoraConfig(rank=2, targets=[str(i) for i in range(n)])

    def model(params: Any, x: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    return _pair(model, params, shape, config)


def stacked(n: int, _: int) -> Pair:
    """Returns the same for `n` adapters, each with its own tokens, under `vmap`."""
    shape = jax.ShapeDtypeStruct((64, 64), "float32")
    x = jax.ShapeDtypeStruct((n, 32, 64), "float32")

    def model(params: Any, x: Any) -> Any:
        for w in params:
            x = x + jax.nn.gelu(x @ w)
        return x

    return _pair(model, [shape] * 8, x, jlora.LoraConfig(rank=8), stack=n)


def _pair(
    model: Any, params: Any, x: Any, config: jlora.LoraConfig, stack: int = 0
) -> Pair:
    one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if stack else x
    plan = jlora.plan(model, params, one, config=config)
    adapted = jlora.apply_lora(model)

    def start(key: Any) -> Any:
        filled = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), params)
        return jlora.split(key, filled, plan)[1]

    def starts(key: Any) -> Any:
        return jax.vmap(start)(jax.random.split(key, stack)) if stack else start(key)

    trainable = jax.eval_shape(starts, jax.random.key(0))

    def loss(trainable: Any, params: Any, x: Any) -> Any:
        run = functools.partial(adapted, params)
        return (jax.vmap(run) if stack else run)(trainable, x).sum()

    def floor(x: Any, params: Any) -> Any:
        return model(params, x).sum()

    def lower(fn: Any, *args: Any) -> Callable[[], Any]:
        return lambda: jax.jit(lambda *args: fn(*args)).lower(*args)

    return (
        lower(jax.grad(floor), x, params),
        lower(jax.grad(loss), trainable, params, x),
    )


SWEEPS: dict[str, tuple[Callable[[int, int], Pair], tuple[int, ...]]] = {
    "layers": (depth, (12, 24, 48, 96)),
    "adapted weights": (weights, (1, 20, 200, 2000)),
    "adapters in a stack": (stacked, (1, 4, 16, 64)),
}


def growing(most: int) -> list[common.Figures]:
    """Returns the times of each sweep's points up to the value `most`."""
    rows = []
    for axis, (make, values) in SWEEPS.items():
        for value in values:
            if value > most:
                continue
            row: common.Figures = {"axis": axis, "value": value}
            for step, lower in zip(("floor", "jlora"), make(value, most), strict=True):
                jax.clear_caches()
                start = time.perf_counter()
                lowered = lower()
                row[f"{step} lower"] = time.perf_counter() - start
                start = time.perf_counter()
                lowered.compile()
                row[f"{step} compile"] = time.perf_counter() - start
            rows.append(row)
    return rows


def growth_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the times of the sweeps for a table."""

    def both(row: common.Figures, what: str) -> tuple[str, str, str]:
        base, own = (row[f"{step} {what}"] for step in ("floor", "jlora"))
        return f"{base:.2f} s", f"{own:.2f} s", f"{own / base:.2f}"

    head = ("trace, lower: floor", "jlora", "ratio", "compile: floor", "jlora", "ratio")
    return ("of the gradient", "how many", *head), [
        (row["axis"], f"{row['value']:,}", *both(row, "lower"), *both(row, "compile"))
        for row in rows
    ]


def sizes(model: models.Model, rank: int) -> dict[str, int]:
    """Returns the bytes on disk of an adapter and of the model, both by Orbax."""
    params, (x, _) = common.example(model)
    # Filled: a fresh B is 0 and would compress to nothing.
    trainable = common.filled(common.adapter(model, params, x, rank))
    with tempfile.TemporaryDirectory() as folder:
        jlora.checkpoint.save(Path(folder) / "adapter", trainable)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "model", params)
        return {name: stored(Path(folder) / name) for name in ("adapter", "model")}


def stored(folder: Path) -> int:
    """Returns how many bytes the files below a folder hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


PAIRS = {
    "forward pass": ("forward, model", "forward, adapted"),
    "gradient": ("gradient, floor", "gradient, adapted"),
}


def line(title: str, base: float, own: float) -> tuple[str, str, str, str]:
    """Returns a table row for two times."""
    return title, f"{base:.2f} s", f"{own:.2f} s", f"{own / base:.2f}"


def lines(title: str, seconds: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """Returns a table row for the forward pass, and one for the gradient."""
    return [
        line(f"{title}, {what}", seconds[base], seconds[own])
        for what, (base, own) in PAIRS.items()
    ]


def columns(figures: common.Figures) -> common.Columns:
    """Returns the figures for a table."""
    staged, start, file = figures["staging"], figures["import"], figures["bytes"]
    traced = staged["forward, model"]
    return ("what", "base", "jlora", "ratio"), [
        *lines("trace and lower", staged),
        *lines("compile", figures["compiling"]),
        line("plan, beside tracing the model", traced, staged["plan"]),
        line("import, beside jax", start["jax"], start["jlora"]),
        (
            "file on disk, by Orbax",
            nbytes(file["model"]),
            nbytes(file["adapter"]),
            f"{file['adapter'] / file['model']:.3f}",
        ),
    ]


def main() -> None:
    """Measures a decoder with layers written out one by one."""
    parser = common.parser("overheads", __doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=48, help="of plan and staging")
    parser.add_argument("--compiled", type=int, default=12, help="layers to compile")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=2000, help="of each sweep")
    options = parser.parse_args()
    size = models.Size(width=options.width, layers=options.layers)
    tall = models.linen(size)
    short = models.linen(dataclasses.replace(size, layers=options.compiled))
    figures: common.Figures = {
        "import": imports(options.rounds),
        "staging": staging(tall, options.rank, options.rounds),
        "compiling": compiling(short, options.rank, options.rounds),
        "bytes": sizes(short, options.rank),
        "growth": growing(options.most),
    }
    print(f"{options.layers} layers staged, {options.compiled} compiled and saved")
    print(common.show(columns(figures)))
    print(common.show(growth_columns(figures["growth"]), left=2))
    case = {
        "width": options.width,
        "layers": options.layers,
        "compiled_layers": options.compiled,
        "rank": options.rank,
    }
    common.write(options.json, common.environment(), case=case, **figures)


if __name__ == "__main__":
    main()
