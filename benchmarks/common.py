"""The training steps that are compared, how they are measured, and what is written."""

import argparse
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora._tables import table

from .models import Model

Figures = dict[str, Any]
Step = tuple[
    Any, Any, tuple[Any, ...]
]  # a jitted step, its state, the arguments it only reads
Columns = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # head and lines
RESULTS = Path(__file__).parent / "results"
FLOOR, STRICT, JLORA = "floor", "floor, input left out", "jlora"
STEPS = (
    FLOOR,
    STRICT,
    JLORA,
    "side path, autodiff",
    "merge on the fly",
    "full fine-tune",
)
STORED = ("bfloat16", "int8", "nf4", "nf4, double")  # how a base can be stored
COMPILER = ("flops", "bytes", "temp_bytes", "peak_bytes")


def filled(shapes: Any) -> Any:
    """Returns weights for a tree of shapes: normal, over the square root of the fan-in.

    Compiling a model's own random start takes longer than a small step.
    """
    rng = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) < 2:
            return jnp.ones(shape.shape, shape.dtype)
        values = rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(values / math.prod(shape.shape[:-1]) ** 0.5, shape.dtype)

    return jax.tree.map(fill, shapes)


def example(model: Model, *, abstract: bool = False) -> tuple[Any, tuple[Any, Any]]:
    """Returns parameters and a batch, or only their shapes."""
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key)
    if abstract:
        return params, jax.eval_shape(model.batch, key)
    return filled(params), model.batch(key)


def adapter(
    model: Model, params: Any, x: Any, rank: int, targets: Any = "all-linear"
) -> jlora.Trainable:
    """Returns the shapes of an adapter; the frozen side is `params` itself."""
    config = jlora.LoraConfig(rank=rank, targets=targets)
    plan = jlora.plan(model.apply, params, x, config=config)
    key = jax.random.key(1)
    return jax.eval_shape(lambda params: jlora.split(key, params, plan)[1], params)


def stored(frozen: Any, plan: jlora.Plan, base: str) -> Any:
    """Returns the frozen side as it is stored: cast, or its linear weights quantised.

    Args:
      frozen: from `jlora.split`.
      plan: what is linear.
      base: one of `STORED`, or `"float32"` for `frozen` as it is.
    """
    if base == "float32":
        return frozen
    if base == "bfloat16":
        return jax.tree.map(lambda x: x.astype(base) if x.ndim > 1 else x, frozen)
    kind, _, double = base.partition(", ")
    return jlora.quantize(frozen, plan, kind=kind, double=bool(double))


def training_step(
    loss: Callable[..., Any], trained: Any, *rest: Any, abstract: bool = False
) -> Step:
    """Returns a jitted AdamW step, its state, and the arguments it only reads.

    `loss(trained, *rest)` is what falls. The step donates its state.
    """
    tx = optax.adamw(1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, *rest: Any) -> Any:
        trained, opt_state = state
        value, gradient = jax.value_and_grad(loss)(trained, *rest)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    def start(trained: Any) -> Any:
        return jax.tree.map(jnp.copy, trained), tx.init(trained)

    state = jax.eval_shape(start, trained) if abstract else start(trained)
    return step, state, rest


def training_steps(
    model: Model,
    rank: int,
    *,
    names: Iterable[str] = STEPS,
    targets: Any = "all-linear",
    abstract: bool = False,
) -> dict[str, Step]:
    """Returns the steps to compare, by name, on one set of weights and one batch.

    If `abstract`, only on their shapes: such steps can be compiled, not run.
    """
    params, batch = example(model, abstract=abstract)
    trainable = adapter(model, params, batch[0], rank, targets)
    side = jax.eval_shape(lambda key: model.init_side(key, rank), jax.random.key(0))
    shift: Any = model.shift
    if not abstract:
        trainable, side = filled(trainable), filled(side)
        shift = {k: jnp.zeros(s.shape, s.dtype) for k, s in shift.items()}
    lora = jlora.apply_lora(model.apply, on_merge="error")

    def full(params: Any, x: jax.Array, targets: jax.Array, **shift: Any) -> jax.Array:
        return cross_entropy(model.apply(params, x, **shift), targets)

    def merged(trainable: Any, frozen: Any, *batch: Any) -> jax.Array:
        return full(jlora.merge(frozen, trainable), *batch)

    def plain(side: Any, params: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(model.apply_side(params, side, x), targets)

    def adapted(
        trainable: Any, frozen: Any, x: jax.Array, targets: jax.Array
    ) -> jax.Array:
        return cross_entropy(lora(frozen, trainable, x), targets)

    def shifted(shift: Any, params: Any, *batch: Any) -> jax.Array:
        return full(params, *batch, **shift)

    first, last = ({name: shift[name]} for name in ("at_input", "at_first"))
    losses: dict[str, tuple[Any, ...]] = dict(
        zip(
            STEPS,
            (
                (shifted, first, params),
                (shifted, last, params),
                (adapted, trainable, params),
                (plain, side, params),
                (merged, trainable, params),
                (full, params),
            ),
            strict=True,
        )
    )
    return {
        name: training_step(loss, *trees, *batch, abstract=abstract)
        for name, (loss, *trees) in losses.items()
        if name in names
    }


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, computed in float32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )
    return losses.mean()


def nbytes(tree: Any) -> int:
    """Returns how many bytes the arrays of a tree, or their shapes, take."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(step: Step) -> tuple[Any, Figures]:
    """Returns a step compiled, and what the compiler says of it."""
    fn, state, rest = step
    compiled = fn.lower(state, *rest).compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}  # XLA gives none for a GPU
    return compiled, {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak_bytes(compiled),
        "optimizer_bytes": nbytes(state[1]),
    }


def memory_of(program: Any) -> Figures:
    """Returns the memory of a program, in bytes a device."""
    memory = program.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak_bytes(program),
    }


def memory_cells(row: Figures, digits: int, unit: float) -> tuple[str, ...]:
    """Returns what `memory_of` gave for a table: argument, temp and peak."""
    names = ("argument_bytes", "temp_bytes", "peak_bytes")
    return tuple(fixed(row[name], digits, unit) for name in names)


def peak_bytes(compiled: Any) -> int:
    """Returns the most memory a program holds at once, with its arguments."""
    memory = compiled.memory_analysis()
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform != "cpu":
        return memory.peak_memory_in_bytes
    # XLA's own figure leaves out the temporary memory, which the CPU takes at once.
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, Figures]:
    """Returns the figures of each step; steps are timed in turn, if `rounds`."""
    compiled, states, figures = {}, {}, {}
    for name, step in steps.items():
        compiled[name], figures[name] = compile_step(step)
        states[name] = step[1]

    def once(name: str) -> Any:
        states[name], loss = compiled[name](states[name], *steps[name][2])
        return states[name], loss

    runs = {name: functools.partial(once, name) for name in steps}
    for name, seconds in interleaved(runs, rounds).items():
        figures[name]["seconds"] = seconds
    return figures


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> dict[str, float]:
    """Returns the median time of each run; they take turns, so they share the noise."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm_up + rounds if rounds else 0):
        for name, call in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items() if own}


def environment(devices: str = "") -> Figures:
    """Returns what the figures depend on beside the code."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": devices or jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": _cores(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def processor() -> str:
    """Returns the CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def commit() -> str:
    """Returns the commit measured, with `+` if the code had changes beside it."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        command = ("git", "-C", str(Path(__file__).parents[1]), *args)
        return subprocess.run(command, capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "jlora", "benchmarks/*.py")
    name = git("rev-parse", "--short", "HEAD").stdout.strip()
    return name + ("+" if changed.returncode else "") if name else "unknown"


def row_of(rows: Iterable[Figures], step: str) -> Figures:
    """Returns the row of a step."""
    return next(row for row in rows if row["step"] == step)


def fixed(value: float | None, digits: int, unit: float = 1) -> str:
    """Returns `value` in a unit with so many digits, or a dash for None."""
    return "–" if value is None else f"{value / unit:z.{digits}f}"


def ratio(row: Figures, base: Figures, field: str) -> str:
    """Returns one figure of a row as a multiple of another row's, if it was taken."""
    return fixed(row[field] / base[field] if field in row else None, 2)


def show(columns: Columns, left: int = 1) -> str:
    """Returns a table for the console, all columns but the first set right."""
    head, lines = columns
    return table(head, lines, right=head[left:])


def parser(name: str, question: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the flag that all scripts have."""
    out = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=question)
    out.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    return out


def write(path: Path, env: Figures, **figures: Any) -> None:
    """Writes figures as JSON, with what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": env, **figures}, indent=1) + "\n")
