"""The statistics that data-driven initialisations need: moments and gradients."""

import dataclasses
from collections.abc import Mapping

import jax

from ..factors import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Sums over all inputs of one weight, each flattened to a vector of `n`.

    Attributes:
      second: sum of `x xᵀ`, `[*batch, n, n]`.
      first: sum of `x`, `[*batch, n]`.
      count: how many inputs, `[*batch]`.

    Examples:
      Of two inputs, as `jlora.activation_statistics` sums them up:

      >>> import numpy as np
      >>> x = np.array([[1.0, 2.0], [3.0, 4.0]])
      >>> moments = InputMoments(second=x.T @ x, first=x.sum(axis=0), count=len(x))
      >>> moments.second
      array([[10., 14.],
             [14., 20.]])
    """

    second: Leaf
    first: Leaf
    count: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `split` needs for `init="eva"`, `"corda"` and `"lora_ga"`; a pytree.

    `a | b` has the leaves of both, those of `b` where both have one.

    Attributes:
      inputs: `InputMoments` by the path of their weight, float32.
      gradients: mean gradients, of the weight's shape, by path, float32.

    Examples:
      >>> Statistics() | Statistics()
      Statistics(inputs={}, gradients={})
    """

    inputs: Mapping[str, InputMoments] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            {**self.inputs, **other.inputs}, {**self.gradients, **other.gradients}
        )
