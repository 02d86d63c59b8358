"""The trainable side: factors A and B of each adapted weight, and whole leaves."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

Leaf = Any  # an array, or what a tree_map put there: a shape, a PartitionSpec, None


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a weight by role; together they are all its axes, each once.

    Attributes:
      batch: axes with a matrix of their own each (experts, stacked layers).
      fan_in: axes that the operation sums over (an embedding's vocabulary).
      fan_out: axes that remain in the result.
    """

    batch: tuple[int, ...] = ()
    fan_in: tuple[int, ...] = (0,)
    fan_out: tuple[int, ...] = (1,)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the weight in the order batch, fan-in, fan-out."""
        return (*self.batch, *self.fan_in, *self.fan_out)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns the products of the batch, fan-in and fan-out sizes of `shape`."""
        return (
            math.prod(shape[i] for i in self.batch),
            math.prod(shape[i] for i in self.fan_in),
            math.prod(shape[i] for i in self.fan_out),
        )

    def a_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Returns the shape of A, `[*batch, *fan_in, rank]`, for a weight's shape."""
        return (*(shape[i] for i in (*self.batch, *self.fan_in)), rank)

    def b_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Returns the shape of B, `[*batch, rank, *fan_out]`, for a weight's shape."""
        batch = (shape[i] for i in self.batch)
        return (*batch, rank, *(shape[i] for i in self.fan_out))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How one weight is adapted; static, hashable, the same words as `LoraConfig`.

    Attributes:
      op: the operation that uses the weight: `"linear"`, `"embedding"` or `"conv"`.
      axes: roles of the weight's axes.
      rank: size of the rank axis.
      alpha: the scale's numerator.
      rslora: divide by the square root of the rank instead of the rank.
      dropout: drop rate on the input of A, active when a `lora_key` is given.
      method: `"lora"`.
      init: how A and B start.
    """

    op: str = "linear"
    axes: Axes = dataclasses.field(default_factory=Axes)
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    method: str = "lora"
    init: str = "kaiming"

    @property
    def scale(self) -> float:
        """The multiplier of `A B`: `alpha / rank`, rsLoRA `alpha / sqrt(rank)`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Spec":
        """Returns the spec that `to_dict` described.

        Raises:
          TypeError: for unknown or missing fields.
        """
        axes = {role: tuple(indices) for role, indices in fields["axes"].items()}
        return cls(**{**fields, "axes": Axes(**axes)})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank factors of one weight: it acts as `w + scale * a @ b`.

    A pytree: `a`, `b` (and `magnitude`, if the method has one) are leaves, the rest is
    static, so an adapter describes itself.

    Attributes:
      a: `[*batch, *fan_in, rank]`.
      b: `[*batch, rank, *fan_out]`.
      spec: static; axes, rank, alpha and the like.
      magnitude: None, or an array for methods that rescale.

    Examples:
      >>> import jax.numpy as jnp
      >>> f = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=4))
      >>> f.scale, f.rank
      (2.0, 2)
    """

    a: Leaf
    b: Leaf
    spec: Spec = dataclasses.field(metadata={"static": True})
    magnitude: Leaf = None

    @property
    def rank(self) -> int:
        """Size of the rank axis."""
        return self.spec.rank

    @property
    def scale(self) -> float:
        """The multiplier of `a @ b`."""
        return self.spec.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained: the factors of adapted weights and the leaves trained in full.

    Attributes:
      lora: `Factors` by the path of their weight.
      full: arrays by path.

    Examples:
      >>> Trainable()
      Trainable(lora={}, full={})
    """

    lora: Mapping[str, Factors] = dataclasses.field(default_factory=dict)
    full: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)

    def __contains__(self, path: object) -> bool:
        """Whether the leaf `path` is adapted or trained in full."""
        return path in self.lora or path in self.full
