"""From which arrays an activation follows in few cheap steps: its roots.

The gradient of A is `x^T du` and needs `x`, the activation. The gradient keeps other
arrays anyway: the input of a GELU and its tanh, the residual stream and the scale of a
norm. Where `x` follows cheaply from these, it need not be kept too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np

from . import compat
from .alike import Like, like
from .compat import Code, Equation
from .primitives import ARITHMETIC, CHEAP, JOINS

_MOST = 64  # steps of a chain; a longer one is not cheap


@dataclasses.dataclass(frozen=True)
class Chain:
    """Cheap equations one after the other: `roots -> activation`.

    Attributes:
      steps: each equation, and for each of its variables a number: of the step that
        made it, or of a root, which counts down from -1.
    """

    steps: tuple[tuple[Like, tuple[int, ...]], ...]

    def __call__(self, *roots: jax.Array) -> jax.Array:
        """Returns the activation."""
        made: list[jax.Array] = []
        for known, inputs in self.steps:
            made += known.bind(*(made[i] if i >= 0 else roots[-i - 1] for i in inputs))
        return made[-1]


@dataclasses.dataclass(frozen=True)
class Longer:
    """A chain and a step after it: `step(chain(*roots), *more)`.

    Attributes:
      chain: a chain of `n` roots.
      n: how many there are.
      step: `(activation, *more) -> activation`.
    """

    chain: Callable[..., jax.Array]
    n: int
    step: Callable[..., jax.Array]

    def __call__(self, *roots: jax.Array) -> jax.Array:
        """Returns the activation."""
        return self.step(self.chain(*roots[: self.n]), *roots[self.n :])


@dataclasses.dataclass(frozen=True)
class Cast:
    """The step that casts an activation to `dtype`."""

    dtype: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x` in the dtype."""
        return x.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Source:
    """How an activation follows from its roots.

    Attributes:
      chain: `roots -> activation`. Chains and steps that are alike are equal, so JAX
        lowers what is done with them once.
      roots: the arrays it starts from.
    """

    chain: Callable[..., jax.Array]
    roots: tuple[jax.Array, ...]

    def then(self, step: Callable[..., jax.Array], *more: jax.Array) -> "Source":
        """Returns the source of `step(activation, *more)`; `more` are roots too."""
        chain = Longer(self.chain, len(self.roots), step)
        return Source(chain, (*self.roots, *more))


def cast_both(
    x: jax.Array, source: Source | None, dtype: Any
) -> tuple[jax.Array, Source | None]:
    """Returns `x` in `dtype`, and how that follows from roots."""
    return x.astype(dtype), source and source.then(Cast(dtype))


class Trail:
    """The cheap equations of the code being staged, by the array that each made."""

    def __init__(self) -> None:
        # The arrays are kept alive, so that no other object gets their id.
        self._made: dict[int, tuple[jax.Array, Like, Sequence[Any]]] = {}

    def note(self, eqn: Equation, operands: Sequence[Any], results: Any) -> None:
        """Notes that `eqn` made `results` of `operands`, if it is cheap.

        A sum of different wide arrays, as the residual stream, is a root: the gradient
        keeps it, and not its parts.
        """
        known = like(eqn) if _is_cheap(eqn) else None
        if known is not None:
            inputs = known.variables(operands)
            if not self._is_wide_sum(eqn, inputs):
                (result,) = results
                self._made[id(result)] = (result, known, inputs)

    def source(self, x: jax.Array) -> Source | None:
        """Returns how `x` follows from its roots; None if `x` is a root."""
        steps: list[tuple[Like, tuple[int, ...]]] = []
        slots: dict[int, int] = {}  # of an array: steps count from 0, roots from -1
        roots: list[Any] = []
        found, todo = set[int](), [x]
        while todo:
            v = todo[-1]
            made = self._made.get(id(v))
            if id(v) in slots:
                todo.pop()
            elif made is None:
                roots.append(v)
                slots[id(v)] = -len(roots)
            elif id(v) in found:  # the steps before it are there
                _, known, inputs = made
                steps.append((known, tuple(slots[id(w)] for w in inputs)))
                slots[id(v)] = len(steps) - 1
            elif len(found) == _MOST:
                return None
            else:
                found.add(id(v))
                todo += reversed(made[2])
        if not any(known.primitive.name in ARITHMETIC for known, _ in steps):
            return None
        return Source(Chain(tuple(steps)), tuple(roots))

    def _is_wide_sum(self, eqn: Equation, inputs: Sequence[Any]) -> bool:
        """Returns whether `eqn` adds wide `inputs` that have different wide roots."""
        if eqn.primitive.name not in JOINS:
            return False
        shape = compat.kind(eqn.outvars[0]).shape
        if not all(isinstance(n, int) for n in shape):
            return True  # a program exported for any number of rows
        size = math.prod(shape)
        roots = [self._wide_roots(v, size) for v in inputs]
        wide = [own for own in roots if own]
        return len(wide) > 1 and len(set().union(*wide)) > 1

    def _wide_roots(self, v: Any, size: int) -> set[int]:
        """Returns the roots of `v`, by id, that have `size` entries or more.

        What is more than `_MOST` steps away counts as a root.
        """
        found, seen, todo = set(), set(), [v]
        while todo:
            v = todo.pop()
            if id(v) in seen or math.prod(np.shape(v)) < size:
                continue
            seen.add(id(v))
            if id(v) in self._made and len(seen) <= _MOST:
                todo += self._made[id(v)][2]
            else:
                found.add(id(v))
        return found


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
