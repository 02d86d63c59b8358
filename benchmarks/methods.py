"""What does a training step of each method cost beside plain LoRA's?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.methods import METHODS

from . import common, models


def steps(model: models.Model, rank: int) -> dict[str, common.Step]:
    """Returns a training step for each method, on one set of weights and one batch."""
    params, (x, targets) = common.example(model)
    lora = jlora.apply_lora(model.apply, on_merge="error")

    def loss(trainable: Any, frozen: Any, x: jax.Array, targets: jax.Array) -> Any:
        return common.cross_entropy(lora(frozen, trainable, x), targets)

    found = {}
    for method in METHODS:
        config = jlora.LoraConfig(rank=rank, method=method)
        plan = jlora.plan(model.apply, params, x, config=config)
        frozen, trainable = jax.jit(lambda p, plan=plan: jlora.split(KEY, p, plan))(
            params
        )
        del frozen  # it is `params`
        found[method] = common.training_step(loss, trainable, params, x, targets)
    return found


KEY = jax.random.key(1)


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows for a table, with multiples of plain LoRA."""
    base = common.row_of(rows, "lora")
    head = ("method", "trained", "ms", "× lora", "GFLOP", "temp MiB", "temp × lora")
    lines = [
        (
            row["step"],
            f"{row['trained']:,}",
            common.fixed(row.get("seconds"), 0, 1e-3),
            common.ratio(row, base, "seconds"),
            common.fixed(row["flops"], 2, 1e9),
            common.fixed(row["temp_bytes"], 1, 2**20),
            common.ratio(row, base, "temp_bytes"),
        )
        for row in rows
    ]
    return head, lines


def main() -> None:
    """Compares the methods on one decoder."""
    parser = common.parser("methods", __doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="0: do not time")
    options = parser.parse_args()
    size = models.Size(width=options.width, layers=options.layers)
    with jax.numpy_dtype_promotion("standard"):
        found = steps(models.KINDS["linen"](size), options.rank)
        trained = {
            k: sum(map(jnp.size, jax.tree.leaves(s[1][0]))) for k, s in found.items()
        }
        figures = common.measure(found, options.rounds)
    rows = [{"step": k, "trained": trained[k], **own} for k, own in figures.items()]
    print(common.show(columns(rows)))
    case = {"rank": options.rank, **dataclasses.asdict(size)}
    common.write(options.json, common.environment(), case=case, training=rows)


if __name__ == "__main__":
    main()
