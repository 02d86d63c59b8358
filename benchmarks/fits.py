"""Does a LoRA step of a large model over codes fit on small TPUs?

    python -m benchmarks.fits

Nothing runs: libtpu compiles ahead of time. The step is the gradient of A and B of all
linear weights, and AdamW. A chip of v5e has 16 GB.
"""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec

import jax

from . import common, llms, scale, tpu
from .scale import Case

CASES = (
    Case("Gemma-7B", kind="nf4"),
    Case("Llama-3-8B", kind="nf4"),
    Case("Llama-3-8B", kind="int8"),
    Case("Llama-3-70B", "v5e:2x4", data=8, rows=8, kind="nf4"),
)


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table."""
    lines = [
        (
            row["model"],
            row["kind"],
            str(row["data"]),
            f"{row['rows']} × {row['length']}",
            *common.memory_cells(row, 2, scale.GIB),
            "yes" if row["peak_bytes"] < scale.ROOM["v5e"] else "no",
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
    if find_spec(tpu.COMPILER) is None:
        print(tpu.MISSING)
        return
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for case in CASES:
        if case.model in options.models:
            plan = scale.plan_of(case, options.rank, "bfloat16")
            figures = scale.compiled(scale.lora_step(case, plan))
            rows.append({**dataclasses.asdict(case), "rank": options.rank, **figures})
            print(f"compiled: {case}", flush=True)
    print(common.show(columns(rows)))
    common.write(options.json, common.environment("TPU v5e, not run"), rows=rows)


if __name__ == "__main__":
    main()
