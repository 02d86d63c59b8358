"""The axes of weights and factors, labelled: what an array is laid out by.

Every axis of a factor is one `Atom`. Every axis of a weight is a group of atoms: mostly
one, several after a reshape joined axes, none for an axis of size one.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Atom(NamedTuple):
    """An axis, or a part of one after a split.

    Attributes:
      name: `(i,)` for axis `i` of the leaf, `(i, 0)` and `(i, 1)` for its parts after a
        reshape; a negative first entry for an axis that the leaf does not have.
      size: length of the axis.
    """

    name: tuple[int, ...]
    size: int

    @property
    def root(self) -> int:
        """The axis of the leaf that this atom comes from; negative if there is none."""
        return self.name[0]


RANK = Atom((-1,), 0)  # labels the rank axis of a factor; its size is never read
# Roots of axes that the leaf does not have.
INDEX, BROADCAST, OTHER, STACKED = -2, -3, -4, -6

Group = tuple[Atom, ...]
Labels = tuple[Atom, ...]
Step = Callable[[Any, Labels], tuple[Any, Labels]]  # on an array and its labels


@functools.lru_cache(maxsize=1024)
def leaf_dims(shape: tuple[int, ...]) -> tuple[Group, ...]:
    """Returns the groups of an untouched leaf."""
    return tuple((Atom((i,), n),) for i, n in enumerate(shape))


def size(group: Group) -> int:
    """Returns the length of an axis made of `group`."""
    return math.prod(atom.size for atom in group)


def regroup(x: jax.Array, labels: Labels, groups: Sequence[Group]) -> jax.Array:
    """Returns `x` with one axis for each of `groups`, which hold all its labels."""
    flat = [atom for group in groups for atom in group]
    x = lax.transpose(x, [labels.index(atom) for atom in flat])
    sizes = dict(zip(flat, x.shape, strict=True))
    return lax.reshape(x, [math.prod(sizes[a] for a in group) for group in groups])


def lay_out(
    x: jax.Array, labels: Labels, want: Sequence[Atom], shape: tuple[int, ...]
) -> jax.Array:
    """Returns `x` with its axes in the order `want`, broadcast, reshaped to `shape`."""
    absent = [atom for atom in want if atom not in labels]
    if absent:
        x = lax.reshape(x, (*x.shape, *(1 for _ in absent)))
    order = [(*labels, *absent).index(atom) for atom in want]
    if order != sorted(order):
        x = lax.transpose(x, order)
    if absent:
        x = jnp.broadcast_to(x, [atom.size for atom in want])
    return x if x.shape == tuple(shape) else lax.reshape(x, shape)
