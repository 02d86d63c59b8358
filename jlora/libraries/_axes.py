"""Which axis of a factor is which axis of its weight: read from text or from shapes."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from ..errors import ConfigError
from ..factors import Axes

Group = tuple[str, ...]  # axes of the weight that share an axis of a factor
REST = "..."


@dataclasses.dataclass(frozen=True)
class Layout:
    """A name for each axis of a weight, and those names along the axes of factors.

    Examples:
      >>> layout = read_axes("d h k -> d r, r (h k)")
      >>> layout.axes, layout.rank
      (Axes(batch=(), fan_in=(0,), fan_out=(1, 2)), 'r')
    """

    weight: tuple[str, ...]
    a: tuple[Group, ...]
    b: tuple[Group, ...]

    @property
    def rank(self) -> str:
        """The name that both factors have and the weight has not."""
        (rank,) = (_names(self.a) & _names(self.b)) - {*self.weight}
        return rank

    @property
    def axes(self) -> Axes:
        """Roles of the weight's axes: batch in both factors, else in A or in B."""
        in_a, in_b = _names(self.a), _names(self.b)
        roles = [(name in in_a, name in in_b) for name in self.weight]
        batch, fan_in, fan_out = (
            tuple(i for i, role in enumerate(roles) if role == wanted)
            for wanted in ((True, True), (True, False), (False, True))
        )
        return Axes(batch, fan_in, fan_out)

    @property
    def has_window(self) -> bool:
        """Whether factors lie as those of a convolution: A `[*window, in, r]`.

        So A has each axis of the weight but the last one by itself, less those that
        both have. An einsum over several axes can have them so too.
        """
        axes = self.axes
        last = axes.fan_out == (len(self.weight) - 1,)
        return last and len(axes.fan_in) > 1 and all(len(g) == 1 for g in self.a)

    def expanded(self, ndim: int) -> "Layout":
        """Returns the layout of a weight of `ndim` axes: names in place of `...`."""
        if REST not in self.weight:
            return self
        rest = tuple((f".{i}",) for i in range(ndim - len(self.weight) + 1))

        def without(groups: Sequence[Group]) -> tuple[Group, ...]:
            return tuple(x for g in groups for x in (rest if g == (REST,) else (g,)))

        weight = without([(name,) for name in self.weight])
        return Layout(tuple(x for (x,) in weight), without(self.a), without(self.b))

    def fits(self, weight: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
        """Returns whether these are shapes of a weight and of its factors."""
        if len(weight) != len(self.weight):
            return False
        sizes: dict[str, int] = dict(zip(self.weight, weight, strict=True))
        for groups, shape in ((self.a, a), (self.b, b)):
            if len(groups) != len(shape):
                return False
            for group, size in zip(groups, shape, strict=True):
                if len(group) == 1:
                    sizes.setdefault(group[0], size)
                if math.prod(sizes.get(name, 0) for name in group) != size:
                    return False
        return True

    def role_of(self, name: str) -> str:
        """Returns which of the factors have the axis: "a", "b" or "ab"."""
        return "a" * (name in _names(self.a)) + "b" * (name in _names(self.b))

    def read(self, a: Any, b: Any, weight: Sequence[int]) -> tuple[Any, Any]:
        """Returns A `[*batch, *fan_in, rank]` and B `[*batch, rank, *fan_out]`."""
        axes = self.axes
        batch, fan_in, fan_out = (
            tuple(self.weight[i] for i in own)
            for own in (axes.batch, axes.fan_in, axes.fan_out)
        )
        sizes = dict(zip(self.weight, weight, strict=True))
        return (
            _moved(a, self.a, (*batch, *fan_in, self.rank), sizes),
            _moved(b, self.b, (*batch, self.rank, *fan_out), sizes),
        )

    def written(self, a: Any, b: Any, like_a: Any, like_b: Any) -> tuple[Any, Any]:
        """Returns what `read` read: factors of the shapes of `like_a` and `like_b`.

        Of an axis that is summed over, the first entry holds all.
        """
        axes = self.axes
        batch, fan_in, fan_out = (
            tuple(self.weight[i] for i in own)
            for own in (axes.batch, axes.fan_in, axes.fan_out)
        )
        return (
            _put(a, (*batch, *fan_in, self.rank), self.a, like_a.shape),
            _put(b, (*batch, self.rank, *fan_out), self.b, like_b.shape),
        )


@functools.cache
def read_axes(text: str) -> Layout:
    """Returns the layout that `text` describes.

    Raises:
      ConfigError: if it does not say for each axis of the weight which factor has it.

    Examples:
      >>> read_axes("i o -> i r, r o").b
      (('r',), ('o',))
    """
    sides = re.split(r"\s*->\s*|\s*,\s*", text.strip())
    fault = ""
    if len(sides) != 3 or "->" not in text.split(",")[0]:
        fault = "it must look like 'i o -> i r, r o'"
    else:
        weight, a, b = ([_group(x) for x in _tokens(side)] for side in sides)
        names = tuple(name for group in weight for name in group)
        in_a, in_b = _names(a), _names(b)
        shared = (in_a & in_b) - {*names}
        if any(len(g) != 1 for g in weight) or len({*names}) != len(names):
            fault = "each axis of the weight needs a name of its own"
        elif len(shared) != 1:
            fault = "the two factors must share one name, the rank"
        elif not {*names} <= in_a | in_b or in_a >= {*names} or in_b >= {*names}:
            fault = "each axis of the weight must be in one factor, and not all in one"
        else:
            return Layout(names, tuple(a), tuple(b))
    raise ConfigError(f"axes={text!r} cannot be read: {fault}.")


def layouts(
    weight: Sequence[int], a: Sequence[int], b: Sequence[int], stacked: int | None
) -> list[Layout]:
    """Returns the layouts of these shapes that differ in the update they give.

    A is `[*batch, *fan_in, rank]`, B is `[*batch, rank, *fan_out]`, each with its axes
    in the weight's order; fan-in, or fan-out, may be flat. With `stacked`, all three
    have the axis of a loop there; if none fits, they have none.

    Examples:
      >>> [layout.axes.fan_in for layout in layouts((8, 4, 2), (8, 3), (3, 8), None)]
      [(0,), (1, 2)]
      >>> len(layouts((8, 4, 2), (8, 3), (3, 4, 2), None))
      1
    """
    found: dict[tuple[str, ...], Layout] = {}
    letters = tuple(f".{i}" for i in range(len(weight)))
    for layout in _possible(letters, stacked):
        if layout.fits(weight, a, b):
            roles = tuple(
                layout.role_of(x)
                for x, n in zip(letters, weight, strict=True)
                if n != 1  # an axis of one entry may be anywhere
            )
            found.setdefault(roles, layout)
    if not found and stacked is not None:
        return layouts(weight, a, b, None)
    return list(found.values())


def suits(layout: Layout, axes: Axes) -> bool:
    """Returns whether A has all that an operation sums over, and B what remains."""
    own = layout.axes
    return {*axes.fan_in} <= {*own.fan_in} and {*axes.fan_out} <= {*own.fan_out}


def _possible(letters: tuple[str, ...], stacked: int | None) -> Iterator[Layout]:
    loop = () if stacked is None else (letters[stacked : stacked + 1])
    free = [x for x in letters if x not in loop]
    for roles in itertools.product(("a", "b", "ab"), repeat=len(free)):
        role = dict(zip(free, roles, strict=True))
        ours = [x for x in free if role[x] in ("a", "ab")]
        theirs = [x for x in free if role[x] == "b"]
        batch = [x for x in free if role[x] == "ab"]
        if not theirs or len(ours) == len(batch):
            continue
        for flat_a, flat_b in itertools.product((False, True), repeat=2):
            a = _run(ours, batch, flat_a)
            b = [*((x,) for x in batch), ("r",), *_run(theirs, (), flat_b)]
            a.append(("r",))
            if stacked is not None:
                a.insert(stacked, loop)
                b.insert(stacked, loop)
            yield Layout(letters, tuple(a), tuple(b))


def _run(names: Sequence[str], batch: Sequence[str], flat: bool) -> list[Group]:
    """Returns an axis for each name, or one for all that are not batch axes."""
    if not flat:
        return [(x,) for x in names]
    joined = tuple(x for x in names if x not in batch)
    first = joined[0]
    return [joined if x == first else (x,) for x in names if x in batch or x == first]


def _tokens(side: str) -> list[str]:
    return re.findall(r"\([^()]*\)|[^\s()]+", side)


def _group(token: str) -> Group:
    return tuple(token.strip("()").split())


def _names(groups: Sequence[Group]) -> set[str]:
    return {name for group in groups for name in group}


def _moved(
    x: Any, groups: Sequence[Group], order: Sequence[str], sizes: dict[str, int]
) -> Any:
    """Returns `x` with an axis for each name of `order`; others are summed over."""
    flat = [name for group in groups for name in group]
    single = dict(zip((g[0] for g in groups), x.shape, strict=True))
    x = x.reshape([sizes.get(name, single.get(name)) for name in flat])
    extra = tuple(i for i, name in enumerate(flat) if name not in order)
    if extra:
        x = x.sum(extra)
    flat = [name for name in flat if name in order]
    return x.transpose([flat.index(name) for name in order])


def _put(
    x: Any, order: Sequence[str], groups: Sequence[Group], shape: Sequence[int]
) -> Any:
    """Returns `x`, with an axis for each name of `order`, in the form of `shape`."""
    names = [name for group in groups for name in group]
    x = x.transpose([order.index(name) for name in names if name in order])
    for i, name in enumerate(names):
        if name not in order:
            size = shape[list(groups).index((name,))]
            x = jnp.expand_dims(x, i)
            x = jnp.pad(x, [(0, (size - 1) * (j == i)) for j in range(x.ndim)])
    return x.reshape(shape)
