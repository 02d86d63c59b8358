"""What does a training step of a large model take on each chip of a slice?

    python -m benchmarks.scale
    python -m benchmarks.scale --models Llama-3-70B --steps floor jlora

Nothing runs: libtpu, and XLA for GPUs, compile ahead of time. A step is the gradient of
A and B of all linear weights and AdamW; the floor is that of a bias of the frozen
model. Figures of steps that are not asked for stay in the file.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

from . import common, gpu, llms, tpu
from .collectives import KINDS, by_kind, collectives

AXES = ("data", "model")
GIB = 2**30
# What a program may take of a chip's memory, by the compilers' own messages.
ROOM = {"v5e": 15.75 * GIB, "v5p": 95.74 * GIB, "H100": 79.1 * GIB}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice: the topology, and its chips by FSDP and tensor parallelism.

    `kind` is `"bf16"`, or the codes that the base is stored as.
    """

    model: str
    topology: str = "v5e:2x2"
    data: int = 1
    model_axis: int = 1
    rows: int = 1
    length: int = 1024
    kind: str = "bf16"

    @property
    def chips(self) -> int:
        """The number of chips in use."""
        return self.data * self.model_axis

    @property
    def chip(self) -> str:
        """The kind of chip."""
        return self.topology.split(":")[0]


CASES = (
    Case("Gemma-2B"),
    Case("Llama-3-8B", "v5e:2x4", data=4, model_axis=2, rows=8, length=2048),
    Case("Llama-3-8B", "H100:8", data=4, model_axis=2, rows=8, length=2048),
    Case("Mixtral-8x7B", "v5e:8x8", data=8, model_axis=8, rows=16, length=2048),
    Case("Llama-3-70B", "v5p:4x4x4", data=16, model_axis=4, rows=16, length=2048),
)
SPREAD, COPIED, FULL = "jlora, spread", "jlora, copied", "full fine-tune"
STEPS = (common.FLOOR, common.JLORA, SPREAD, COPIED, FULL)
ONE_CHIP = (common.FLOOR, common.JLORA, FULL)  # the others are the same there


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a case lie: parameters, rows of the batch, and the rest."""

    base: Any
    rows: jax.NamedSharding
    whole: jax.NamedSharding

    def stream(self, x: jax.Array) -> jax.Array:
        """Returns the residual stream, cut over the batch."""
        return jax.lax.with_sharding_constraint(x, self.rows)


def compiler_missing(case: Case) -> str:
    """Returns what to install for the chips of a case, or nothing."""
    module = {"H100": gpu, "cpu": None}.get(case.chip, tpu)
    return module.MISSING if module and find_spec(module.COMPILER) is None else ""


def layout(case: Case) -> Layout:
    """Returns where the arrays of a case lie, on chips that are only described."""
    if case.chip == "cpu":
        described = jax.devices()
    elif case.chip == "H100":
        described = gpu.cards(case.chips)
    else:
        described = tpu.chips(case.topology)
    shape = (case.data, case.model_axis)
    chips = np.array(described[: case.chips]).reshape(shape)
    mesh = jax.sharding.Mesh(chips, AXES)
    axes = [name if n > 1 else None for name, n in zip(AXES, shape, strict=True)]

    def over(spec: Any) -> jax.NamedSharding:
        return jax.NamedSharding(mesh, spec)

    base = jax.tree.map(over, llms.layout(llms.SHAPES[case.model], *axes))
    return Layout(base, over(jax.P("data")), over(jax.P()))


def place(shapes: Any, shardings: Any) -> Any:
    """Returns shapes that say where they lie; one sharding, or one for each."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: x.update(sharding=shardings), shapes)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def placed_step(
    loss: Callable[..., Any], trained: Any, own: Any, whole: Any, *rest: Any
) -> common.Step:
    """Returns a step whose state lies as `own` says; moments lie as their leaf."""
    step, state, rest = common.training_step(loss, trained, *rest, abstract=True)
    like = jax.tree.structure(trained)

    def is_whole_tree(x: Any) -> bool:
        return jax.tree.structure(x) == like

    def laid_out(x: Any) -> Any:
        return place(x, own if is_whole_tree(x) else whole)

    return step, jax.tree.map(laid_out, state, is_leaf=is_whole_tree), rest


def floor_step(case: Case) -> common.Step:
    """Returns the step of a bias that is added in each layer."""
    where, shape = layout(case), llms.SHAPES[case.model]
    batch = place(llms.batch(case.rows, case.length), where.rows)
    shift = {"bias": jax.ShapeDtypeStruct((shape.width,), jnp.bfloat16)}

    def loss(shift: Any, params: Any, x: Any, targets: Any) -> jax.Array:
        out = llms.logits(params, x, lambda h: where.stream(h + shift["bias"]))
        return llms.loss(out, targets)

    params = place(llms.weights(shape), where.base)
    return placed_step(loss, shift, where.whole, where.whole, params, *batch)


def full_step(case: Case) -> common.Step:
    """Returns the step of every parameter, with moments of the same dtype."""
    where = layout(case)
    batch = place(llms.batch(case.rows, case.length), where.rows)

    def loss(params: Any, x: Any, targets: Any) -> jax.Array:
        return llms.loss(llms.logits(params, x, where.stream), targets)

    params = llms.weights(llms.SHAPES[case.model])
    return placed_step(loss, params, where.base, where.whole, *batch)


def plan_of(case: Case, rank: int, dtype: str) -> jlora.Plan:
    """Returns the plan for all linear weights of a case."""
    x, _ = llms.batch(case.rows, case.length)
    config = jlora.LoraConfig(rank=rank, dtype=dtype)
    params = llms.weights(llms.SHAPES[case.model])
    return jlora.plan(llms.logits, params, x, config=config)


def adapter(case: Case, plan: jlora.Plan) -> jlora.Trainable:
    """Returns the shapes of A and B."""
    params = llms.weights(llms.SHAPES[case.model])
    make = functools.partial(jlora.split, plan=plan)
    return jax.eval_shape(make, jax.random.key(0), params)[1]


def lora_step(case: Case, plan: jlora.Plan, name: str = common.JLORA) -> common.Step:
    """Returns the step of A and B, laid out as `name` says."""
    where, params = layout(case), llms.weights(llms.SHAPES[case.model])
    batch = place(llms.batch(case.rows, case.length), where.rows)
    trainable = adapter(case, plan)
    shardings, frozen = where.base, params
    if case.kind != "bf16":
        options: Any = {"scale_dtype": "bfloat16", "storage": "native"}
        frozen = jlora.quantize(params, plan, kind=case.kind, **options)
        shardings = jlora.shardings(where.base, frozen)
    own: Any = where.whole
    if name != COPIED:
        own = jlora.shardings(where.base, trainable, spread=name == SPREAD)
    lora = jlora.apply_lora(
        lambda params, x: llms.logits(params, x, where.stream), on_merge="error"
    )

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return llms.loss(lora(frozen, trainable, x), targets)

    frozen = place(frozen, shardings)
    return placed_step(loss, trainable, own, where.whole, frozen, *batch)


def make_step(case: Case, name: str, rank: int) -> tuple[common.Step, common.Figures]:
    """Returns a step by its name, and how long its plan took."""
    if name in (common.FLOOR, FULL):
        return (floor_step if name == common.FLOOR else full_step)(case), {}
    start = time.process_time()
    plan = plan_of(case, rank, "float32")
    seconds = time.process_time() - start
    return lora_step(case, plan, name), {"plan_seconds": seconds}


def chip_bytes(tree: Any) -> int:
    """Returns what placed shapes take of each chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def compiled(step: common.Step) -> common.Figures:
    """Returns what the compiler says of a step, in bytes a chip, and its CPU seconds.

    The TPU's compiler refuses a program that does not fit: its peak is None.
    """
    fn, state, rest = step
    start, program = time.process_time(), None
    try:
        program = fn.lower(state, *rest).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    seconds = time.process_time() - start
    memory = {"argument_bytes": chip_bytes((state, rest))}
    memory |= dict.fromkeys(("temp_bytes", "peak_bytes"))
    return {
        **(common.memory_of(program) if program else memory),
        "state_bytes": chip_bytes(state),
        "sent_bytes": by_kind(collectives(program.as_text())) if program else {},
        "compile_seconds": seconds,
    }


def title(row: common.Figures) -> str:
    """Returns what a row is about: the model, its chips and its tokens."""
    chips, chip = row["data"] * row["model_axis"], row["topology"].split(":")[0]
    mesh = f"FSDP {row['data']} × tensor {row['model_axis']}, " if chips > 1 else ""
    tokens = f"{row['rows']} × {row['length']} tokens"
    return f"{row['model']} on {chips} × {chip}, {mesh}{tokens}"


def grouped(rows: Sequence[common.Figures]) -> dict[str, list[common.Figures]]:
    """Returns the rows of each model on its chips, by their title."""
    out: dict[str, list[common.Figures]] = {}
    for row in rows:
        out.setdefault(title(row), []).append(row)
    return out


def sent(row: common.Figures) -> float:
    """Returns the bytes that a chip sends in a step."""
    return sum(row["sent_bytes"].values())


def over_floor(
    rows: Sequence[common.Figures],
    row: common.Figures,
    size: Callable[[common.Figures], float],
) -> str:
    """Returns a row's size as a multiple of the floor's, if the floor was compiled."""
    low = [size(r) for r in rows if r["step"] == common.FLOOR]
    fitted = row["peak_bytes"] is not None
    return common.fixed(size(row) / low[0] if any(low) and fitted else None, 2)


def room(row: common.Figures) -> float:
    """Returns the memory that a program may take of a chip."""
    return ROOM.get(row["topology"].split(":")[0], math.inf)


def memory_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the memory of the steps of one model, in GiB a chip."""
    lines = [
        (
            row["step"],
            *common.memory_cells(row, 2, GIB),
            over_floor(rows, row, lambda r: r["peak_bytes"]),
            common.fixed(row["state_bytes"], 2, GIB),
            "yes" if (row["peak_bytes"] or math.inf) < room(row) else "no",
            common.fixed(row.get("plan_seconds"), 2),
            common.fixed(row["compile_seconds"], 0),
        )
        for row in rows
    ]
    sizes = ("argument GiB", "temp GiB", "peak GiB", "× floor", "trained GiB")
    return ("step", *sizes, "fits", "plan s", "compile s"), lines


def sent_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns what a chip sends in the steps of one model, in GiB."""
    kinds = [kind for kind in KINDS if any(kind in row["sent_bytes"] for row in rows)]
    lines = [
        (
            row["step"],
            *(common.fixed(row["sent_bytes"].get(k, 0), 2, GIB) for k in kinds),
            common.fixed(sent(row), 2, GIB),
            over_floor(rows, row, sent),
        )
        for row in rows
        if row["sent_bytes"]
    ]
    return ("sent, GiB", *kinds, "all", "× floor"), lines


def keep(path: Path, rank: int, rows: dict[tuple[str, str], common.Figures]) -> None:
    """Writes rows, by their title and step, in the order of cases and steps."""
    titles = [title(dataclasses.asdict(case)) for case in CASES]
    keys = [(text, name) for text in titles for name in STEPS]
    kept = [rows[key] for key in keys if key in rows]
    common.write(path, common.environment("not run"), rank=rank, rows=kept)


def main() -> None:
    """Compiles the steps that are asked for, and prints the tables."""
    parser = common.parser("scale", __doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", nargs="*", default=[c.model for c in CASES])
    parser.add_argument("--chips", nargs="*", default=[c.chip for c in CASES])
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    rows = {(title(row), row["step"]): row for row in found.get("rows", ())}
    for case in CASES:
        if case.model not in options.models or case.chip not in options.chips:
            continue
        if compiler_missing(case):
            print(compiler_missing(case))
            continue
        for name in STEPS if case.chips > 1 else ONE_CHIP:
            if name in options.steps:
                step, extra = make_step(case, name, options.rank)
                row = {**dataclasses.asdict(case), "step": name, **extra}
                row["commit"] = common.commit()
                rows[title(row), name] = row | compiled(step)
                print(f"compiled: {title(row)}, {name}", flush=True)
                # After each, so that a run that is cut short is not lost.
                keep(options.json, options.rank, rows)
    for text, own in grouped(list(rows.values())).items():
        print(f"\n{text}\n{common.show(memory_columns(own))}")
        if any(map(sent, own)):
            print(common.show(sent_columns(own)))


if __name__ == "__main__":
    main()
