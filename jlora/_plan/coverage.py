"""How much of a model a plan adapts, and which patterns miss blocks."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from .. import paths
from .._tables import listed
from ..transform.discover import Use
from .row import Row

_NUMBER = re.compile(r"\d+")
_PRODUCTS = ("dot_general", "ragged_dot_general", "ragged_dot")
_CONVOLUTION = "conv_general_dilated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of a model a plan adapts. Printing it shows it as the plan does.

    A block is what repeats: the leaves whose paths begin alike up to their first number
    (`layers/3/...`), or one layer of a stack that the function scans over. Blocks
    without a weight of a linear operation do not count.

    Attributes:
      adapted_blocks: how many blocks have an adapted leaf.
      blocks: how many there are.
      weights: which share of the parameters the adapted leaves are, from 0 to 1. Of a
        fused weight, or a table with trained rows, only the adapted part counts.
      flops: which share of a token's FLOPs they take, two for each number of a weight
        in a matrix product, of all experts. None if there are no products, or if there
        are convolutions, which use a number once for each position.
      gaps: in words, the patterns of `targets` that name a weight which only some of
        the blocks that look alike have.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"0": {"q": jnp.ones((4, 4))}, "1": {"mix": jnp.ones((4, 4))}}
      >>> fn = lambda p, x: jnp.tanh(x @ p["0"]["q"]) @ p["1"]["mix"]
      >>> config = jlora.LoraConfig(rank=2, targets="*/q")
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> plan.coverage.adapted_blocks, plan.coverage.blocks, plan.coverage.weights
      (1, 2, 0.5)
      >>> print(plan.coverage)
      adapted: 1 of 2 blocks, 50.0 % of the weights, 50.0 % of a token's FLOPs
      '*/q' is in 1 of 2 blocks: the others have another kind of layer, such as '1/mix'
    """

    adapted_blocks: int
    blocks: int
    weights: float
    flops: float | None
    gaps: tuple[str, ...] = ()

    def __str__(self) -> str:
        shares = [f"{100 * self.weights:.1f} % of the weights"]
        if self.blocks:
            shares.insert(0, f"{self.adapted_blocks} of {self.blocks} blocks")
        if self.flops is not None:
            shares.append(f"{100 * self.flops:.1f} % of a token's FLOPs")
        told = listed(self.gaps, separator="\n")
        return "\n".join(filter(None, [f"adapted: {', '.join(shares)}", told]))


def coverage_of(rows: Sequence[Row], patterns: Sequence[str]) -> Coverage:
    """Returns how much of a model is adapted; linear in leaves and patterns.

    Args:
      rows: the leaves.
      patterns: the globs that name what is adapted.
    """
    stacks = _stacks(rows)
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        if row.op and (block := stacks.get(row.path) or block_of(row.path)):
            blocks.setdefault(block, []).append(row)
    sizes = {name: max(map(_layers, own)) for name, own in blocks.items()}
    adapted = [name for name, own in blocks.items() if any(map(_is_adapted, own))]
    return Coverage(
        adapted_blocks=sum(sizes[name] for name in adapted),
        blocks=sum(sizes.values()),
        weights=_share(rows, rows),
        flops=_flops(rows),
        gaps=tuple(_gaps(blocks, patterns)),
    )


def block_of(path: str) -> str:
    """Returns a path up to its first number, empty if it has none.

    Examples:
      >>> block_of("layers/12/attn/q"), block_of("embed")
      ('layers/12', '')
    """
    found = _NUMBER.search(path)
    return path[: found.end()] if found else ""


def _stacks(rows: Sequence[Row]) -> dict[str, str]:
    """Returns for each leaf of scanned layers the highest folder of that stack.

    In it every weight of a linear operation is stacked as often as the leaf.
    """
    depths: dict[str, set[int]] = {}
    for row in rows:
        for folder in _folders(row.path) if row.op else ():
            depths.setdefault(folder, set()).add(_layers(row))
    found: dict[str, str] = {}
    for row in rows:
        if row.op and _layers(row) > 1 and not block_of(row.path):
            whole = (f for f in _folders(row.path) if depths[f] == {_layers(row)})
            found[row.path] = next(whole, row.path)
    return found


def _folders(path: str) -> Iterator[str]:
    """Yields what holds a path, from outside in."""
    for end in re.finditer("/", path):
        yield path[: end.start()]


def _layers(row: Row) -> int:
    """Returns how many layers are stacked in a leaf."""
    sizes = (math.prod(row.shape[i] for i in use.stacked) for use in row.uses)
    return max(sizes, default=1)


def _is_adapted(row: Row) -> bool:
    return row.status == "adapted"


def _part(row: Row) -> float:
    """Returns how many of a leaf's numbers are adapted."""
    spec = row.spec
    if row.status != "adapted" or spec is None:
        return 0.0
    if spec.parts is not None:
        own = sum(spec.parts.sizes[i] for i in spec.parts.adapted)
        return row.size * own / sum(spec.parts.sizes)
    if spec.rows:
        table = math.prod(row.shape[i] for i in spec.axes.fan_in)
        return row.size * len(spec.rows) / table
    return row.size


def _share(some: Sequence[Row], every: Sequence[Row]) -> float:
    return sum(map(_part, some)) / max(sum(row.size for row in every), 1)


def _flops(rows: Sequence[Row]) -> float | None:
    """Returns the share of a token's FLOPs, None where sizes do not tell."""

    def has(row: Row, *ops: str) -> bool:
        uses: tuple[Use, ...] = row.uses
        return any(use.op in ops for use in uses)

    products = [row for row in rows if has(row, *_PRODUCTS)]
    if not products or any(has(row, _CONVOLUTION) for row in rows):
        return None
    full = [row for row in products if not (row.spec and row.spec.rows)]
    return _share(full, products)


def _gaps(
    blocks: Mapping[str, Sequence[Row]], patterns: Sequence[str]
) -> Iterator[str]:
    """Yields which patterns miss blocks that look alike, though they could match there.

    A pattern that asks for certain numbers misses others on purpose.
    """
    alike: dict[str, list[str]] = {}
    for block in blocks:
        alike.setdefault(_NUMBER.sub("*", block), []).append(block)
    every = {row.path: block for block, own in blocks.items() for row in own}
    for pattern in patterns:
        hits: dict[str, str] = {}
        for path in paths.select(pattern, every):
            hits.setdefault(every[path], path)
        kinds = dict.fromkeys(_NUMBER.sub("*", block) for block in hits)
        for kind in kinds:
            own = [b for b in alike[kind] if b in hits]
            one = own[0]
            rest = [b for b in alike[kind] if b not in hits]
            lost = [b for b in rest if _fits(pattern, hits[one], one, b)]
            if lost:
                there = {row.path.removeprefix(one) for row in blocks[one]}
                inner = [row.path for row in blocks[lost[0]]]
                new = [p for p in inner if p.removeprefix(lost[0]) not in there]
                other = (new or inner)[0]
                yield (
                    f"{pattern!r} is in {len(own)} of {len(own) + len(lost)} blocks: "
                    f"the others have another kind of layer, such as {other!r}"
                )


def _fits(pattern: str, path: str, block: str, other: str) -> bool:
    """Returns whether a pattern would match a leaf of `block` in another block."""
    return paths.matches(pattern, other + path.removeprefix(block))
