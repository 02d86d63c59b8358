"""From which arrays an activation follows in few cheap steps: its roots.

The gradient of A is `x^T du` and needs `x`, the activation. The gradient keeps other
arrays anyway: the input of a GELU and its tanh, the residual stream and the scale of a
norm. Where `x` follows cheaply from these, it need not be kept too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np

from . import compat
from .compat import Code, Equation, Literal
from .primitives import ARITHMETIC, CHEAP, JOINS

_MOST = 64  # steps of a chain; a longer one is not cheap


@dataclasses.dataclass(frozen=True)
class Source:
    """How an activation follows from its roots.

    Attributes:
      chain: `roots -> activation`.
      roots: the arrays it starts from.
    """

    chain: Callable[..., jax.Array]
    roots: tuple[jax.Array, ...]

    def then(self, step: Callable[..., jax.Array], *more: jax.Array) -> "Source":
        """Returns the source of `step(activation, *more)`; `more` are roots too."""
        chain, n = self.chain, len(self.roots)
        return Source(
            lambda *roots: step(chain(*roots[:n]), *roots[n:]), (*self.roots, *more)
        )


class Trail:
    """The cheap equations of the code being staged, by the array that each made."""

    def __init__(self) -> None:
        # The arrays are kept alive, so that no other object gets their id.
        self._made: dict[int, tuple[jax.Array, Equation, Sequence[Any]]] = {}

    def note(self, eqn: Equation, operands: Sequence[Any], results: Any) -> None:
        """Notes that `eqn` made `results` of `operands`, if it is cheap.

        A sum of different wide arrays, as the residual stream, is a root: the gradient
        keeps it, and not its parts.
        """
        if _is_cheap(eqn) and not self._is_wide_sum(eqn, operands):
            (result,) = results
            self._made[id(result)] = (result, eqn, operands)

    def source(self, x: jax.Array) -> Source | None:
        """Returns how `x` follows from its roots; None if `x` is a root."""
        steps: list[tuple[Equation, list[int]]] = []
        slots: dict[int, int] = {}  # of an array: steps count from 0, roots from -1
        roots: list[Any] = []

        def slot(v: Any) -> int:
            if id(v) not in slots:
                made = self._made.get(id(v))
                if made is None:
                    roots.append(v)
                    slots[id(v)] = -len(roots)
                else:
                    _, eqn, operands = made
                    inputs = [slot(u) for u in _variables(eqn, operands)]
                    steps.append((eqn, inputs))
                    slots[id(v)] = len(steps) - 1
            return slots[id(v)]

        slot(x)
        if len(steps) > _MOST:
            return None
        if not any(eqn.primitive.name in ARITHMETIC for eqn, _ in steps):
            return None
        return Source(functools.partial(_run, tuple(steps)), tuple(roots))

    def _is_wide_sum(self, eqn: Equation, operands: Sequence[Any]) -> bool:
        """Returns whether `eqn` adds wide arrays that have different wide roots."""
        if eqn.primitive.name not in JOINS:
            return False
        shape = compat.kind(eqn.outvars[0]).shape
        if not all(isinstance(n, int) for n in shape):
            return True  # a program exported for any number of rows
        size = math.prod(shape)
        roots = [self._wide_roots(v, size) for v in _variables(eqn, operands)]
        wide = [own for own in roots if own]
        return len(wide) > 1 and len(set().union(*wide)) > 1

    def _wide_roots(self, v: Any, size: int) -> set[int]:
        """Returns the roots of `v`, by id, that have `size` entries or more."""
        found, seen, todo = set(), set(), [v]
        while todo:
            v = todo.pop()
            if id(v) in seen or math.prod(np.shape(v)) < size:
                continue
            seen.add(id(v))
            if id(v) in self._made:
                _, eqn, operands = self._made[id(v)]
                todo += _variables(eqn, operands)
            else:
                found.add(id(v))
        return found


def _variables(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Returns the operands that are not literals."""
    pairs = zip(eqn.invars, operands, strict=True)
    return [v for atom, v in pairs if not isinstance(atom, Literal)]


def _run(steps: Sequence[tuple[Equation, list[int]]], *roots: jax.Array) -> jax.Array:
    made: list[jax.Array] = []
    for eqn, inputs in steps:
        own = iter(made[i] if i >= 0 else roots[-i - 1] for i in inputs)
        values = [v.val if isinstance(v, Literal) else next(own) for v in eqn.invars]
        made += compat.bind(eqn, *values)
    return made[-1]


def _is_cheap(eqn: Equation) -> bool:
    """Returns whether `eqn` is a cheap step, perhaps with its own derivative (ReLU)."""
    if eqn.primitive.name != "custom_jvp_call":
        return eqn.primitive.name in CHEAP
    return len(eqn.outvars) == 1 and has_only(compat.inner_code(eqn), CHEAP)


def has_only(code: Code, names: Set[str]) -> bool:
    """Returns whether `code`, in calls too, has only primitives of these names."""
    return all(
        has_only(compat.inner_code(eqn), names)
        if eqn.primitive.name == "jit"
        else eqn.primitive.name in names
        for eqn in code.jaxpr.eqns
    )
