"""What a method is: the leaves that it trains, and the update that they stand for."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..factors import Factors, Leaf, Spec

Shape = tuple[int, ...]
# For each leaf which axis of the weight each of its axes is; None for the rank axis.
LeafAxes = dict[str, tuple[int | None, ...]]


def lora_axes(spec: Spec) -> LeafAxes:
    """Returns the axes of A and B."""
    batch, fan_in, fan_out = spec.axes.batch, spec.axes.fan_in, spec.axes.fan_out
    return {"a": (*batch, *fan_in, None), "b": (*batch, None, *fan_out)}


def same_shape(spec: Spec, shape: Shape) -> Shape:
    """Returns the weight's own shape."""
    del spec
    return shape


def lora_factors(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns A and B as they are."""
    return factors.a, factors.b


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method trains a weight.

    Attributes:
      axes: `spec -> {leaf: axes}`, the leaves of its `Factors`: for each of a leaf's
        axes which axis of the weight it is, None for the rank axis.
      covered: `(spec, weight shape) -> shape`, the sizes of those axes.
      pair: `factors -> (a, b)`, low-rank factors of shapes `[*batch, *fan_in, rank]`
        and `[*batch, rank, *fan_out]` with which the update is `scale * a @ b`.
      init: `(key, w, spec, dtype) -> Factors` of a method with an initialisation of
        its own, `w` an array or `Quantized`; None where `LoraConfig.init` names it.
      fixed: the leaves that are not trained, singular vectors of the weight. They
        have a gradient of zero, and `jlora.optim.masked` keeps no state for them.
      finish: `(factors, w) -> Factors`, adds the leaves that depend on the weight, an
        array or `Quantized`; None if there are none.
      gain: `(factors, w) -> array [*batch, *fan_out]` that multiplies the sum of weight
        and update; None for methods without one.
      dense: `(factors, dtype) -> array`, the update as an array of the weight's shape,
        where there is a cheaper way than the product of `pair`; None for the product.

    Examples:
      >>> spec = Spec(rank=2, alpha=2.0)
      >>> Method().shapes(spec, (8, 16))
      {'a': (8, 2), 'b': (2, 16)}
    """

    axes: Callable[[Spec], LeafAxes] = lora_axes
    covered: Callable[[Spec, Shape], Shape] = same_shape
    pair: Callable[[Factors], tuple[jax.Array, jax.Array]] = lora_factors
    init: Callable[[jax.Array, Leaf, Spec, jnp.dtype], Factors] | None = None
    fixed: tuple[str, ...] = ()
    finish: Callable[[Factors, Leaf], Factors] | None = None
    gain: Callable[[Factors, Leaf], jax.Array] | None = None
    dense: Callable[[Factors, DTypeLike], jax.Array] | None = None

    def shapes(self, spec: Spec, shape: Shape) -> dict[str, Shape]:
        """Returns `{leaf: shape}` for a weight of shape `shape`.

        Args:
          spec: how the weight is adapted.
          shape: the weight's shape.
        """
        sizes = self.covered(spec, shape)
        return {
            leaf: tuple(spec.rank if i is None else sizes[i] for i in axes)
            for leaf, axes in self.axes(spec).items()
        }
