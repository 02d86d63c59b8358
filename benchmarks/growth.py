"""How does the cost of a LoRA step grow, beside the floor's?

Each axis is swept by itself. A slope is that of a line through the logarithms: with 1,
cost grows in proportion; with 0, it does not grow. *Added* is what LoRA adds to the
floor without the input's gradient.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import common, models

STEPS = (common.FLOOR, common.STRICT, common.JLORA)
FIELDS = {"flops": "FLOPs", "bytes": "bytes", "temp_bytes": "temp", "seconds": "time"}
ADDED = "added"


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured: a Linen decoder and how it is adapted."""

    size: models.Size
    rank: int = 8
    targets: Any = "all-linear"


def sweeps(base: models.Size) -> dict[str, dict[int, Point]]:
    """Returns the points of each axis by their value on it, from `base` up."""

    def sized(field: str, value: int) -> Point:
        return Point(dataclasses.replace(base, **{field: value}))

    def adapted(layers: int) -> Point:
        first = tuple(f"params/layer_{i}/*/kernel" for i in range(layers))
        return dataclasses.replace(sized("layers", 4 * base.layers), targets=first)

    layers = [n * base.layers for n in (1, 2, 4)]
    scales = (1, 2, 4, 8)
    return {
        "tokens": {
            n * base.batch * base.length: sized("batch", n * base.batch) for n in scales
        },
        "width": {n * base.width: sized("width", n * base.width) for n in scales},
        "rank": {8 * n: Point(base, rank=8 * n) for n in scales},
        "depth": {n: sized("layers", n) for n in layers},
        # Of a fixed depth, and always the first layer: gradients go as far.
        "adapted weights": {6 * n: adapted(n) for n in layers},
    }


def measure(point: Point, rounds: int) -> dict[str, common.Figures]:
    """Returns the figures of each step."""
    steps = common.training_steps(
        models.linen(point.size), point.rank, names=STEPS, targets=point.targets
    )
    return common.measure(steps, rounds)


def curve(
    rows: Sequence[common.Figures], axis: str, step: str, field: str
) -> tuple[list[int], list[float]]:
    """Returns an axis's values and a step's figures; `ADDED` is the step LoRA adds."""
    if step == ADDED:
        values, cost = curve(rows, axis, common.JLORA, field)
        _, floor = curve(rows, axis, common.STRICT, field)
        return values, [a - b for a, b in zip(cost, floor, strict=True)]
    own = [
        row
        for row in rows
        if row["axis"] == axis and row["step"] == step and field in row
    ]
    return [row["value"] for row in own], [row[field] for row in own]


def slope(values: Sequence[float], cost: Sequence[float]) -> float | None:
    """Returns the slope in logarithms; None if a cost is not above 0."""
    if not cost or min(cost) <= 0:
        return None
    return float(np.polyfit(np.log(values), np.log(cost), 1)[0])


def slopes(rows: Sequence[common.Figures]) -> list[common.Figures]:
    """Returns a row of slopes for each axis and step."""
    return [
        {"axis": axis, "step": step}
        | {field: slope(*curve(rows, axis, step, field)) for field in FIELDS}
        for axis in dict.fromkeys(row["axis"] for row in rows)
        for step in (common.FLOOR, common.JLORA, ADDED)
    ]


def columns(fitted: Sequence[common.Figures]) -> common.Columns:
    """Returns the slopes for a table."""
    lines = [
        (row["axis"], row["step"], *(common.fixed(row[f], 2) for f in FIELDS))
        for row in fitted
    ]
    return ("cost against", "step", *FIELDS.values()), lines


def main() -> None:
    """Sweeps each axis and fits slopes."""
    parser = common.parser("growth", __doc__)
    parser.add_argument("--axis", nargs="*", help="default: all")
    parser.add_argument("--width", type=int, default=256, help="the smallest")
    parser.add_argument("--layers", type=int, default=2, help="the fewest")
    parser.add_argument("--batch", type=int, default=2, help="the smallest")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8, help="0: do not time")
    options = parser.parse_args()
    base = models.Size(
        options.width, options.layers, options.batch, options.length, vocab=256
    )
    chosen = {
        axis: points
        for axis, points in sweeps(base).items()
        if not options.axis or axis in options.axis
    }
    # Axes meet in a point or two, which are measured once.
    every = dict.fromkeys(p for points in chosen.values() for p in points.values())
    figures = {point: measure(point, options.rounds) for point in every}
    rows = [
        {"axis": axis, "value": value, "step": name, **own}
        for axis, points in chosen.items()
        for value, point in points.items()
        for name, own in figures[point].items()
    ]
    fitted = slopes(rows)
    print(common.show(columns(fitted), left=2))
    common.write(
        options.json,
        common.environment(),
        base=dataclasses.asdict(base),
        rows=rows,
        slopes=fitted,
    )


if __name__ == "__main__":
    main()
