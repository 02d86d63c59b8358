"""What does a LoRA training step cost on one TPU v5e chip, by its compiler's figures?

Nothing runs: libtpu compiles ahead of time for a described chip, on any machine.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from . import common, models

# What libtpu asks a real host for.
HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
COMPILER = "libtpu"
MISSING = "libtpu is not installed: pip install '.[tpu-aot]' on Python 3.12 or newer."
MODEL = models.Size(
    width=2048,
    layers=8,
    batch=4,
    length=2048,
    vocab=32_000,
    head=128,
    dtype="bfloat16",
)
# In a scanned body, gradients reach each layer's input: the two floors are one.
STEPS = tuple(name for name in common.STEPS if name != common.STRICT)


def chips(topology: str = "v5e:2x2") -> Sequence[Any]:
    """Returns the chips of a described slice."""
    from jax.experimental import topologies

    os.environ.update(HOST)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def one_chip() -> jax.sharding.Sharding:
    """Returns the placement on one chip of a described TPU v5e host."""
    return jax.sharding.SingleDeviceSharding(chips()[0])


def placed(step: common.Step, sharding: jax.sharding.Sharding) -> common.Step:
    """Returns a step on shapes that says where its arguments lie."""
    fn, *trees = step

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state, rest = jax.tree.map(place, trees)
    return fn, state, rest


def environment(
    device: str = "TPU v5e, one chip, compiled ahead of time",
) -> common.Figures:
    """Returns what figures of this compiler depend on."""
    libtpu = importlib.metadata.version("libtpu")
    return {**common.environment(device), "libtpu": libtpu}


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table, with multiples of the floor."""
    floor = common.row_of(rows, common.FLOOR)
    units = dict(zip(common.COMPILER, (1e12, 1e9, 2**30, 2**30), strict=True))
    lines = [
        (
            row["step"],
            *(common.fixed(row[field], 2, unit) for field, unit in units.items()),
            common.ratio(row, floor, "bytes"),
            common.ratio(row, floor, "peak_bytes"),
        )
        for row in rows
    ]
    measures = ("TFLOP", "GB moved", "temp GiB", "peak GiB")
    return ("step", *measures, "bytes × floor", "peak × floor"), lines


def main() -> None:
    """Compiles the steps of one model, by default the one of the committed table."""
    parser = common.parser("tpu", __doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kind", choices=models.KINDS, default="scan")
    for field in dataclasses.fields(models.Size):
        parser.add_argument(
            f"--{field.name}", type=field.type, default=getattr(MODEL, field.name)
        )
    parser.add_argument("--steps", nargs="*", choices=common.STEPS, default=STEPS)
    options = parser.parse_args()
    if find_spec(COMPILER) is None:
        print(MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    size = models.Size(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(MODEL)}
    )
    sharding = one_chip()
    steps = common.training_steps(
        models.KINDS[options.kind](size),
        options.rank,
        names=options.steps,
        abstract=True,
    )
    rows = []
    for name, step in steps.items():
        _, figures = common.compile_step(placed(step, sharding))
        rows.append({"step": name, "rank": options.rank, **figures})
        print(f"compiled: {name}", flush=True)
    print(f"JAX {jax.__version__}, one TPU v5e chip, not run")
    print(common.show(columns(rows)))
    common.write(
        options.json,
        environment(),
        model={"kind": options.kind, **dataclasses.asdict(size)},
        rows=rows,
    )


if __name__ == "__main__":
    main()
