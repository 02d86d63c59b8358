"""Equations that are alike: what one needs, such as a derivative, serves them all.

JAX traces and derives a `jit` once for all its calls, but any other equation anew at
each place. The layers of a model repeat the same few equations.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .compat import INLINE, Equation, Literal, bind, derives

# Primitives whose parameters hold code: JAX derives that once already.
_CODE = {"jaxpr", "call_jaxpr", "call", "branches", "body_jaxpr", "cond_jaxpr"}


class Like:
    """The primitive of an equation, its parameters, and operands that are numbers.

    Equations that are alike have the same object, so it is quick as a key of a cache.
    """

    def __init__(self, eqn: Equation) -> None:
        self.primitive, self.params = eqn.primitive, eqn.params
        self.numbers = tuple(
            v.val if isinstance(v, Literal) else None for v in eqn.invars
        )
        self.is_variable = tuple(not isinstance(v, Literal) for v in eqn.invars)

    def variables(self, operands: Sequence[Any]) -> list[Any]:
        """Returns those of `operands` that are not numbers of the equation."""
        pairs = zip(operands, self.is_variable, strict=True)
        return [x for x, is_variable in pairs if is_variable]

    def bind(self, *arrays: jax.Array) -> list[jax.Array]:
        """Binds the equation on `arrays`, one for each operand that is a variable."""
        rest = iter(arrays)
        pairs = zip(self.numbers, self.is_variable, strict=True)
        return bind(self, *(next(rest) if is_array else x for x, is_array in pairs))

    def bind_one(self, *arrays: jax.Array) -> jax.Array:
        """As `bind`, and returns the only result."""
        (out,) = self.bind(*arrays)
        return out


_known: weakref.WeakValueDictionary[Any, Like] = weakref.WeakValueDictionary()


def like(eqn: Equation) -> Like | None:
    """Returns what `eqn` shares with equations that are alike.

    It is None if a parameter cannot be compared, such as an array.
    """
    numbers = tuple(
        # As bytes: 0 is not -0.
        (v.aval, np.asarray(v.val).tobytes()) if isinstance(v, Literal) else None
        for v in eqn.invars
    )
    key = (eqn.primitive, tuple(eqn.params.items()), numbers)
    try:
        found = _known.get(key)
    except TypeError:
        return None
    if found is None:
        found = _known[key] = Like(eqn)
    return found


def bind_again(eqn: Equation, *values: Any) -> list[jax.Array]:
    """Binds `eqn` on `values`, and derives all equations that are alike only once.

    The equation is then in a `jit` that is inlined, as those of `jax.numpy` are.
    """
    if not any(map(derives, map(type, values))):
        return bind(eqn, *values)
    if eqn.effects or not _CODE.isdisjoint(eqn.params):
        return bind(eqn, *values)
    known = like(eqn)
    if known is None:
        return bind(eqn, *values)
    return _bound(known, *known.variables(values))


@functools.partial(jax.jit, static_argnums=0, inline=INLINE)
def _bound(known: Like, *arrays: jax.Array) -> list[jax.Array]:
    return known.bind(*arrays)
