"""What does a LoRA step of a large model take on each chip of a slice?

    python -m benchmarks.scale

Nothing runs: libtpu compiles ahead of time. The step is the gradient of A and B of all
linear weights and AdamW; the floor is that of a bias of the frozen model. *Spread* is
`jlora.shardings(..., spread=True)`.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

from . import common, llms, tpu

AXES = ("data", "model")


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


CASES = (
    Case("Gemma-2B"),
    Case("Llama-3-8B", "v5e:2x4", data=4, model_axis=2, rows=8, length=2048),
    Case("Llama-3-70B", "v5p:4x4x4", data=16, model_axis=4, rows=16, length=2048),
)
STEPS = ("floor", "jlora", "jlora, spread")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a case lie: parameters, rows of the batch, and the rest."""

    base: Any
    rows: jax.sharding.Sharding
    whole: jax.sharding.Sharding

    def stream(self, x: jax.Array) -> jax.Array:
        """Returns the residual stream, cut over the batch."""
        return jax.lax.with_sharding_constraint(x, self.rows)


def layout(case: Case) -> Layout:
    """Returns where the arrays of a case lie, on chips that are only described."""
    from jax.experimental import topologies

    os.environ.update(tpu.HOST)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=case.topology
    )
    shape = (case.data, case.model_axis)
    chips = np.array(described.devices[: case.data * case.model_axis])
    mesh = jax.sharding.Mesh(chips.reshape(shape), AXES)
    axes = [name if n > 1 else None for name, n in zip(AXES, shape, strict=True)]

    def over(spec: Any) -> jax.sharding.Sharding:
        return jax.NamedSharding(mesh, spec)

    base = jax.tree.map(over, llms.layout(llms.SHAPES[case.model], *axes))
    return Layout(base, over(jax.P("data")), over(jax.P()))


def place(shapes: Any, shardings: Any) -> Any:
    """Returns shapes that say where they lie; one sharding, or one for each."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: x.update(sharding=shardings), shapes)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def floor_step(case: Case) -> common.Step:
    """Returns the step of a bias that is added in each layer."""
    where, shape = layout(case), llms.SHAPES[case.model]
    batch = place(llms.batch(case.rows, case.length), where.rows)
    shift = {"bias": jax.ShapeDtypeStruct((shape.width,), jnp.bfloat16)}

    def loss(shift: Any, params: Any, x: Any, targets: Any) -> jax.Array:
        out = llms.logits(params, x, lambda h: where.stream(h + shift["bias"]))
        return llms.loss(out, targets)

    params = place(llms.weights(shape), where.base)
    step, state, rest = common.training_step(loss, shift, params, *batch, abstract=True)
    return step, place(state, where.whole), rest


def lora_step(
    case: Case, rank: int, dtype: str, *, spread: bool = False
) -> common.Step:
    """Returns the step of A and B; moments lie as their leaf."""
    where, params = layout(case), llms.weights(llms.SHAPES[case.model])
    x, targets = place(llms.batch(case.rows, case.length), where.rows)
    config = jlora.LoraConfig(rank=rank, dtype=dtype)
    plan = jlora.plan(llms.logits, params, x, config=config)
    _, trainable = jax.eval_shape(
        lambda key, params: jlora.split(key, params, plan), jax.random.key(0), params
    )
    shardings, frozen = where.base, params
    if case.kind != "bf16":
        options = {"scale_dtype": "bfloat16", "storage": "native"}
        frozen = jlora.quantize(params, plan, kind=case.kind, **options)
        shardings = jlora.shardings(where.base, frozen)
    frozen = place(frozen, shardings)
    own = jlora.shardings(where.base, trainable, spread=spread)
    lora = jlora.apply_lora(
        lambda params, x: llms.logits(params, x, where.stream), on_merge="error"
    )

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return llms.loss(lora(frozen, trainable, x), targets)

    step, (trained, moments), rest = common.training_step(
        loss, place(trainable, own), frozen, x, targets, abstract=True
    )

    def of_leaves(x: Any) -> Any:
        return place(x, own if isinstance(x, jlora.Trainable) else where.whole)

    moments = jax.tree.map(
        of_leaves, moments, is_leaf=lambda x: isinstance(x, jlora.Trainable)
    )
    return step, (place(trained, own), moments), rest


def compiled(step: common.Step) -> common.Figures:
    """Returns what the compiler says of a step, in bytes a chip."""
    start = time.perf_counter()
    fn, state, rest = step
    memory = fn.lower(state, *rest).compile().memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table, with multiples of each model's floor."""
    fields = ("argument_bytes", "temp_bytes", "peak_bytes")
    lines = []
    for row in rows:
        own = [r for r in rows if r["model"] == row["model"]]
        chips = row["data"] * row["model_axis"]
        slice_ = f"{chips} × {row['topology'].split(':')[0]}"
        lines.append(
            (
                row["model"],
                f"{slice_}, {row['rows']} × {row['length']}",
                row["step"],
                *(common.fixed(row[field], 2, 2**30) for field in fields),
                common.ratio(row, common.row_of(own, "floor"), "peak_bytes"),
            )
        )
    sizes = ("argument GiB", "temp GiB", "peak GiB", "peak × floor")
    return ("model", "chips, tokens", "step", *sizes), lines


def main() -> None:
    """Compiles the steps and prints the table."""
    parser = common.parser("scale", __doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", nargs="*", default=[c.model for c in CASES])
    options = parser.parse_args()
    if find_spec("libtpu") is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for case in CASES:
        if case.model not in options.models:
            continue
        several = case.data * case.model_axis > 1
        for name in STEPS if several else STEPS[:2]:
            if name == "floor":
                step = floor_step(case)
            else:
                spread = name != "jlora"
                step = lora_step(case, options.rank, "float32", spread=spread)
            figures = compiled(step)
            rows.append({**dataclasses.asdict(case), "step": name, **figures})
            print(f"compiled: {case.model}, {name}", flush=True)
    print(common.show(columns(rows), left=3))
    env = common.environment("TPU, ahead of time")
    common.write(options.json, env, rank=options.rank, rows=rows)


if __name__ == "__main__":
    main()
