"""What a method is: which leaves it trains, and the update that they stand for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..factors import Factors, Spec

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def lora_shapes(spec: Spec, shape: Shape) -> Shapes:
    """Returns the shapes of A and B for a weight of shape `shape`."""
    return {
        "a": spec.axes.a_shape(shape, spec.rank),
        "b": spec.axes.b_shape(shape, spec.rank),
    }


def lora_factors(factors: Factors) -> tuple[Any, Any]:
    """Returns A and B as they are."""
    return factors.a, factors.b


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method trains a weight.

    Attributes:
      shapes: `(spec, weight shape) -> {leaf: shape}`, the leaves of its `Factors`.
      plain: `factors -> (a, b)`, low-rank factors of shapes `[*batch, *fan_in, rank]`
        and `[*batch, rank, *fan_out]` with which the update is `scale * a @ b`.
      start: `(key, weight shape, spec, dtype) -> Factors` of a method that starts in
        its own way; None for those that `init` starts.
      finish: `(factors, w) -> Factors`, adds what depends on the weight; None for
        nothing.
      gain: `(factors, w) -> array [*batch, *fan_out]` that multiplies the sum of weight
        and update; None for methods without one.
      reference: the paper.
    """

    shapes: Callable[[Spec, Shape], Shapes] = lora_shapes
    plain: Callable[[Factors], tuple[Any, Any]] = lora_factors
    start: Callable[[jax.Array, Shape, Spec, jnp.dtype], Factors] | None = None
    finish: Callable[[Factors, Any], Factors] | None = None
    gain: Callable[[Factors, Any], Any] | None = None
    reference: str = ""
