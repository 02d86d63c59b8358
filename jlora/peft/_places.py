"""Places: which torch tensor holds a leaf, or a slice of it."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .._io.torch_models import head_of
from ..factors import Axes

At = int | tuple[int, int]  # a place on an axis of a leaf: one index, or (start, stop)

# Roles of the tensor's own axes: e experts, o out, i in.
KINDS = {
    "linear": "oi",
    "packed": "oi",
    "conv1d": "io",
    "embedding": "io",
    "conv": "oi",
    "experts": "eoi",
    "experts_t": "eio",
    "parameter": "oi",
    "other": "",
}


class Cut(NamedTuple):
    """The share of a tensor that a leaf is.

    Attributes:
      start: where it begins on its axis.
      stop: where it ends.
      total: the size of the tensor's axis.
      axis: which axis of the tensor.
    """

    start: int
    stop: int
    total: int
    axis: int


UNKNOWN = -1  # the order of a parameter of which no rule tells
_REGISTERED = ("gate_up_proj", "down_proj")  # by the experts of transformers


@dataclasses.dataclass(frozen=True)
class Place:
    """One torch tensor that holds a leaf, or a slice of it.

    Attributes:
      name: the tensor's name.
      kind: see `Entry`.
      index: for each axis of the leaf, what the tensor holds of it: one index, a slice
        `(start, stop)`, or None for the whole axis.
      groups: for each axis of the tensor, the leaf's axes that make it up.
      tied: a second name of the tensor in models that tie it.
      feature_groups: feature groups of a convolution.
      parts: the leaf's axes that select a part of a fused weight.
      cut: the share of the tensor that the leaf is; None if it is all of it.
      order: number of the rule, in the order in which torch's module registers its
        parameters.
    """

    name: str
    kind: str
    index: tuple[At | None, ...]
    groups: tuple[tuple[int, ...], ...]
    tied: str | None = None
    feature_groups: int = 1
    parts: tuple[int, ...] = ()
    order: int = 0
    cut: Cut | None = None

    @property
    def module(self) -> str:
        """The tensor's name without `.weight`; the whole name of a bare parameter."""
        end = ".in_proj_weight" if self.kind == "packed" else ".weight"
        return self.name.removesuffix(end)

    @property
    def roles(self) -> str:
        """A letter for each axis of the tensor: o out, i in, e expert."""
        roles = KINDS[self.kind]
        return roles + "i" * (len(self.groups) - len(roles)) if roles else ""

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the slice in this tensor, for a leaf of `shape`."""
        return tuple(
            n if at is None else 1 if isinstance(at, int) else at[1] - at[0]
            for n, at in zip(shape, self.index, strict=True)
        )

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of this tensor, for a leaf of `shape`."""
        sizes = self.sizes(shape)
        own = [math.prod(sizes[i] for i in group) for group in self.groups]
        if self.cut is not None:
            own[self.cut.axis] = self.cut.total
        return tuple(own)

    def own_part(self, tensor: np.ndarray) -> np.ndarray:
        """Returns what of the tensor is the leaf's."""
        if self.cut is None:
            return tensor
        before = (slice(None),) * self.cut.axis
        return tensor[(*before, slice(self.cut.start, self.cut.stop))]

    def axes(self) -> Axes:
        """Returns the roles that the leaf's axes have in the layer."""
        roles = {i: r for r, group in zip(self.roles, self.groups, strict=True)
                 for i in group}  # fmt: skip
        stacked = [i for i, at in enumerate(self.index) if isinstance(at, int)]
        roles |= dict.fromkeys(stacked, "e") | dict.fromkeys(self.parts, "o")
        batch, fan_in, fan_out = (
            tuple(i for i in range(len(self.index)) if roles.get(i) == role)
            for role in "eio"
        )
        return Axes(batch, fan_in, fan_out)


def is_order(names: Sequence[str]) -> bool:
    """Returns whether a module may register its parameters in this order.

    Examples:
      >>> is_order(["down_proj", "gate_up_proj"]), is_order(["up", "down"])
      (False, True)
    """
    known = [_REGISTERED.index(name) for name in names if name in _REGISTERED]
    return known == sorted(known)


def own_place(name: str, ndim: int, kind: str) -> Place:
    """Returns the place of a leaf that is a torch tensor as it is.

    Args:
      name: the tensor's name.
      ndim: how many axes it has.
      kind: see `Entry`.
    """
    groups = tuple((i,) for i in range(ndim))
    last = name.rpartition(".")[2]
    order = _REGISTERED.index(last) if last in _REGISTERED else UNKNOWN
    return Place(name, kind, (None,) * ndim, groups, tied_head(name), order=order)


def tied_head(name: str, names: Collection[str] = ()) -> str | None:
    """Returns the tensor of the output head that a table may be too, by its name.

    Args:
      name: a tensor's name.
      names: those of the model, as far as they are known.
    """
    module = name.removesuffix(".weight")
    head = None if module == name else head_of(module, names)
    return None if head is None else f"{head}.weight"


def untied(placed: Iterable[tuple[Place, ...]]) -> list[tuple[Place, ...]]:
    """Returns the places of a model, without ties to names of other leaves."""
    placed = list(placed)
    own = {place.name for places in placed for place in places}
    return [
        tuple(
            dataclasses.replace(place, tied=None) if place.tied in own else place
            for place in places
        )
        for places in placed
    ]
