"""How does a step grow with the chips of a slice, and with adapters in one program?

    python -m benchmarks.slices
    python -m benchmarks.slices --parts adapters

Nothing runs: libtpu compiles ahead of time. The base is cut over all chips. Adapters of
one program are whole on their chip, with the rows of their own batch.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax

import jlora

from . import common, llms, scale

MODEL, LENGTH = "Llama-3-1B", 128
TOPOLOGIES = {
    1: "v5e:2x2",
    2: "v5e:2x2",
    4: "v5e:2x2",
    8: "v5e:2x4",
    16: "v5e:4x4",
    32: "v5e:4x8",
    64: "v5e:8x8",
}
LAID_OUT = "Llama-3-8B"
CHIPS, ADAPTERS = (1, 8, 64), (1, 8, 64)
ROWS, ON = 8, 8  # of a chip's or an adapter's batch, and chips that train adapters
PARTS = {  # what the page says of each
    "layout": f"""\
## What lies on a chip

{LAID_OUT}, cut by FSDP over 1 to 64 chips: GiB on each chip before a step. The base
and full fine-tuning shrink with every chip. FSDP cuts a weight along one axis, so it
cuts only one of the two factors; the other one is whole on each chip. On 64 chips A, B
and their moments then take more than the base. With `spread=True` they shrink with it.
""",
    "fixed": f"""\
## More chips, the same batch

{MODEL}, cut by FSDP, {max(CHIPS)} rows of {LENGTH} tokens in all.
""",
    "growing": f"""\
## More chips, a batch that grows with them

{MODEL}, cut by FSDP, {ROWS} rows of {LENGTH} tokens for each chip.
""",
    "adapters": f"""\
## More adapters in one program

`vmap` over stacked adapters trains them together on one base, {MODEL}. Each of {ON}
chips holds whole adapters with their batches of {ROWS} rows, and the base is cut over
all chips. The floor is the frozen model on all rows.
""",
}


def sweep_step(case: scale.Case, plan: jlora.Plan, count: int) -> common.Step:
    """Returns the step of `count` adapters, `case.rows` rows of a batch for each."""
    where, params = scale.layout(case), llms.weights(llms.SHAPES[case.model])
    batch = llms.batch(case.rows, case.length)
    trainable, *batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype),
        (scale.adapter(case, plan), *batch),
    )

    def stream(x: jax.Array) -> jax.Array:
        # vmap puts the chips of the adapters before.
        return jax.lax.with_sharding_constraint(x, where.whole)

    lora = jlora.apply_lora(
        lambda params, x: llms.logits(params, x, stream), on_merge="error"
    )

    def loss(trainable: Any, frozen: Any, x: Any, targets: Any) -> jax.Array:
        return llms.loss(lora(frozen, trainable, x), targets)

    each = jax.vmap(loss, (0, None, 0, 0), spmd_axis_name=scale.AXES[0])
    frozen = scale.place(params, where.base)
    # Adam works on each number separately: the sum trains each adapter by itself.
    return scale.placed_step(
        lambda *args: each(*args).sum(),
        trainable,
        where.rows,
        where.whole,
        frozen,
        *scale.place(batch, where.rows),
    )


def points(part: str) -> list[tuple[scale.Case, int]]:
    """Returns the cases of a part, with all rows, and how many adapters share them."""

    def case(chips: int, rows: int, model: str = MODEL) -> scale.Case:
        return scale.Case(model, TOPOLOGIES[chips], chips, 1, rows, LENGTH)

    if part == "layout":
        return [(case(n, n, LAID_OUT), 1) for n in TOPOLOGIES]
    if part == "adapters":
        return [(case(ON, ROWS * n), n) for n in ADAPTERS]
    return [(case(n, max(CHIPS) if part == "fixed" else ROWS * n), 1) for n in CHIPS]


@functools.cache
def floor_of(case: scale.Case) -> common.Figures:
    """Returns what the compiler says of the floor."""
    return scale.compiled(scale.floor_step(case))


@functools.cache
def measure(case: scale.Case, adapters: int, rank: int) -> common.Figures:
    """Returns what the compiler says of the floor, and of jlora's step."""
    plan = scale.plan_of(case, rank, "float32")
    if adapters > 1:
        own = dataclasses.replace(case, rows=case.rows // adapters)
        step = sweep_step(own, plan, adapters)
    else:
        step = scale.lora_step(case, plan)
    return {
        **dataclasses.asdict(case),
        "adapters": adapters,
        common.FLOOR: floor_of(case),
        common.JLORA: scale.compiled(step),
    }


def laid_out(case: scale.Case, rank: int) -> common.Figures:
    """Returns what lies on a chip before a step; nothing is compiled."""
    plan = scale.plan_of(case, rank, "float32")
    names = (common.JLORA, scale.SPREAD, scale.COPIED)
    steps = {name: scale.lora_step(case, plan, name) for name in names}
    _, _, (frozen, *_) = steps[common.JLORA]
    steps[scale.FULL] = scale.full_step(case)
    return {
        **dataclasses.asdict(case),
        "adapters": 1,
        "base_bytes": scale.chip_bytes(frozen),
        "state_bytes": {name: scale.chip_bytes(s[1]) for name, s in steps.items()},
    }


def layout_columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns what lies on a chip, in GiB: the base, and what is trained."""
    lines = [
        (
            str(row["data"]),
            common.fixed(row["base_bytes"], 2, scale.GIB),
            *(common.fixed(x, 2, scale.GIB) for x in row["state_bytes"].values()),
        )
        for row in rows
    ]
    names = rows[0]["state_bytes"] if rows else ()
    return ("chips", "frozen base", *names), lines


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns a line for each case, in GiB and MiB a chip."""
    lines = []
    for row in rows:
        low, own = row[common.FLOOR], row[common.JLORA]
        lines.append(
            (
                str(row["data"]),
                f"{row['rows']} × {row['length']}",
                str(row["adapters"]),
                common.fixed(low["peak_bytes"], 2, scale.GIB),
                common.fixed(own["peak_bytes"], 2, scale.GIB),
                common.ratio(own, low, "peak_bytes"),
                common.fixed(own["state_bytes"], 0, 2**20),
                *(common.fixed(scale.sent(x), 2, scale.GIB) for x in (low, own)),
            )
        )
    head = ("chips", "tokens", "adapters", "floor GiB", "peak GiB", "× floor")
    return (*head, "trained MiB", "floor sends GiB", "sends GiB"), lines


def table(part: str, rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the table of a part."""
    return layout_columns(rows) if part == "layout" else columns(rows)


def main() -> None:
    """Compiles the steps of each part and prints its table."""
    parser = common.parser("slices", __doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--at", type=int, nargs="*", help="chips, or adapters")
    options = parser.parse_args()
    (case, _), *_ = points("layout")
    if scale.compiler_missing(case):
        print(scale.compiler_missing(case))
        return
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    parts = found.get("parts", {})
    for part in options.parts:
        known = {(row["data"], row["adapters"]): row for row in parts.get(part, ())}
        rows = []
        for case, adapters in points(part):
            at = adapters if part == "adapters" else case.chips
            row = known.get((case.data, adapters))
            if not options.at or at in options.at:
                if part == "layout":
                    row = laid_out(case, options.rank)
                else:
                    row = measure(case, adapters, options.rank)
                print(f"compiled: {part}, {at}", flush=True)
            if row:
                rows.append(row)
        parts[part] = rows
        print(common.show(table(part, rows), left=0))
        env = common.environment("TPU v5e, not run")
        common.write(options.json, env, model=MODEL, rank=options.rank, parts=parts)


if __name__ == "__main__":
    main()
