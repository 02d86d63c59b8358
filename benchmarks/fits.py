"""Does a LoRA step of a large model over codes fit on small TPUs?

    python -m benchmarks.fits

Nothing runs: libtpu compiles ahead of time. The step is the gradient of A and B of all
linear weights, and AdamW. A chip of v5e has 16 GB.
"""

import dataclasses
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

import jlora

from . import common, llms, tpu

V5E_BYTES = 16 * 2**30  # of which the runtime leaves about 15.75 GiB


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to compile: the model, its codes, and how many chips."""

    model: str
    kind: str
    chips: int = 1
    rows: int = 1
    length: int = 1024


CASES = (
    Case("Gemma-7B", "nf4"),
    Case("Llama-3-8B", "nf4"),
    Case("Llama-3-8B", "int8"),
    Case("Llama-3-70B", "nf4", chips=8, rows=8),
)


def step_of(case: Case, rank: int, devices: Sequence[Any]) -> common.Step:
    """Returns the step on shapes that say where they lie."""
    shape = llms.SHAPES[case.model]
    params = llms.weights(shape)
    x, targets = llms.batch(case.rows, case.length)
    config = jlora.LoraConfig(rank=rank, dtype="bfloat16")
    plan = jlora.plan(llms.logits, params, x, config=config)
    _, trainable = jax.eval_shape(
        lambda key, params: jlora.split(key, params, plan), jax.random.key(0), params
    )
    frozen = params
    if case.kind != "bf16":
        frozen = jlora.quantize(
            params, plan, kind=case.kind, scale_dtype="bfloat16", storage="native"
        )
    mesh = jax.sharding.Mesh(np.array(devices[: case.chips]), ("data",))
    specs = llms.layout(shape, "data", None)
    base = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    rows = jax.NamedSharding(mesh, jax.P("data"))

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def stream(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, rows)

    lora = jlora.apply_lora(
        lambda params, x: llms.logits(params, x, stream), on_merge="error"
    )

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return llms.loss(lora(frozen, trainable, x), targets)

    frozen = jax.tree.map(place, frozen, jlora.shardings(base, frozen))
    trainable = jax.tree.map(place, trainable, jlora.shardings(base, trainable))
    fn, (trained, moments), rest = common.training_step(
        loss, trainable, frozen, place(x, rows), place(targets, rows), abstract=True
    )
    shapes = jax.tree.map(lambda x: x.sharding, trainable)
    trained = jax.tree.map(place, trained, shapes)
    whole = jax.NamedSharding(mesh, jax.P())
    moments = jax.tree.map(
        lambda x: (
            jax.tree.map(place, x, shapes)
            if jax.tree.structure(x) == jax.tree.structure(shapes)
            else place(x, whole)
        ),
        moments,
        is_leaf=lambda x: isinstance(x, jlora.Trainable),
    )
    return fn, (trained, moments), rest


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table."""
    fields = ("argument_bytes", "temp_bytes", "peak_bytes")
    lines = [
        (
            row["model"],
            row["kind"],
            str(row["chips"]),
            f"{row['rows']} × {row['length']}",
            *(common.fixed(row[field], 2, 2**30) for field in fields),
            "yes" if row["peak_bytes"] < V5E_BYTES else "no",
        )
        for row in rows
    ]
    sizes = ("argument GiB", "temp GiB", "peak GiB")
    return ("model", "base", "chips", "tokens", *sizes, "fits 16 GB"), lines


def main() -> None:
    """Compiles the steps and prints the table."""
    parser = common.parser("fits", __doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--models", nargs="*", default=sorted(llms.SHAPES))
    options = parser.parse_args()
    if find_spec("libtpu") is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    devices = tpu.chips(8)
    rows = []
    for case in CASES:
        if case.model not in options.models:
            continue
        start = time.perf_counter()
        fn, state, rest = step_of(case, options.rank, devices)
        program = fn.lower(state, *rest).compile()
        memory = program.memory_analysis()
        rows.append(
            {
                **dataclasses.asdict(case),
                "rank": options.rank,
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "peak_bytes": memory.peak_memory_in_bytes,
                "compile_seconds": time.perf_counter() - start,
            }
        )
        print(f"compiled: {case}", flush=True)
    print(common.show(columns(rows)))
    common.write(options.json, common.environment("TPU v5e, not run"), rows=rows)


if __name__ == "__main__":
    main()
