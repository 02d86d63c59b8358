"""How the gradient keeps the result of a product for the equation that reads it.

A product with batch axes, such as queries with keys in each head, keeps its operands
with the batch axes first. XLA makes such a copy, and then keeps only the copy. What
else the gradient needs of the array it should take from that copy.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax import lax

from . import compat
from .compat import Equation, Jaxpr, Literal, Var

Readers = Mapping[Var, Sequence[Equation | None]]


class View(NamedTuple):
    """An array reshaped to `split`, with its axes in `order`, then reshaped to `shape`.

    The last step joins axes that lie side by side.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, x: jax.Array) -> jax.Array:
        """Returns the view of `x`."""
        x = lax.transpose(lax.reshape(x, self.split), self.order)
        return lax.reshape(x, self.shape)

    def back(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Returns the array of `shape` that `x` is the view of."""
        x = lax.reshape(x, [self.split[i] for i in self.order])
        back = [self.order.index(i) for i in range(len(self.order))]
        return lax.reshape(lax.transpose(x, back), shape)

    def rows(self, n: int) -> "View":
        """Returns the same view of each of `n` arrays that are stacked in front."""
        order = (0, *(i + 1 for i in self.order))
        return View((n, *self.split), order, (n, *self.shape))


def readers(jaxpr: Jaxpr) -> dict[Var, list[Equation | None]]:
    """Returns the equations that read each variable, and None for the code's return."""
    found: dict[Var, list[Equation | None]] = {}
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if not isinstance(v, Literal):
                found.setdefault(v, []).append(eqn)
    for v in jaxpr.outvars:
        if not isinstance(v, Literal):
            found.setdefault(v, []).append(None)
    return found


def view_of(var: Var, read: Readers) -> View | None:
    """Returns how the only reader of `var` keeps it; None if that is not another way.

    Between them may be reshapes, transposes and calls.
    """
    shape = compat.kind(var).shape
    if not all(isinstance(n, int) for n in shape):
        return None  # a program exported for any number of rows
    order = tuple(range(len(shape)))
    while True:
        (eqn, *more) = read.get(var) or (None,)
        if eqn is None or more:
            return None
        side = eqn.invars.index(var)
        name = eqn.primitive.name
        if name == "dot_general":
            return _kept_by(eqn, side, shape, order)
        if name == "jit":
            inner = compat.inner_code(eqn)
            var, read = inner.invars[side], readers(inner.jaxpr)
            continue
        if name == "transpose":
            order = tuple(order[i] for i in eqn.params["permutation"])
        elif name == "reshape":
            new = compat.kind(eqn.outvars[0]).shape
            grown = _reshaped(shape, order, new)
            if grown is None:
                return None
            shape, order = grown
        else:
            return None
        (var,) = eqn.outvars


def _kept_by(
    eqn: Equation, side: int, split: tuple[int, ...], order: tuple[int, ...]
) -> View | None:
    """Returns how the gradient keeps an operand; None if that is how it lies.

    It is multiplied by the gradient of the result, over its free axes. Its axes are
    those of `split` in `order`.
    """
    contracted, batch = (axes[side] for axes in eqn.params["dimension_numbers"])
    free = [i for i in range(len(order)) if i not in {*contracted, *batch}]
    order = tuple(order[i] for i in (*batch, *free, *contracted))
    long = [i for i in order if split[i] != 1]
    if long == sorted(long):
        return None
    sizes = compat.kind(eqn.invars[side]).shape
    joined = (math.prod(sizes[i] for i in axes) for axes in (free, contracted))
    return View(split, order, (*(sizes[i] for i in batch), *joined))


def _reshaped(
    shape: Sequence[int], order: Sequence[int], new: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the view `(shape, order)` after a reshape to `new`.

    The result is None where the reshape joins axes: that is no view.
    """
    parts: dict[int, list[int]] = {}  # of each axis, the new axes that split it
    rest = list(range(len(new)))
    for axis in order:
        parts[axis] = []
        while rest and math.prod(new[i] for i in parts[axis]) < shape[axis]:
            parts[axis].append(rest.pop(0))
        if math.prod(new[i] for i in parts[axis]) != shape[axis]:
            return None
    parts[order[-1]] += rest  # axes of size one at the end
    if math.prod(new[i] for i in rest) != 1:
        return None
    split = [i for axis in range(len(shape)) for i in parts[axis]]
    return tuple(new[i] for i in split), tuple(split.index(i) for i in range(len(new)))
