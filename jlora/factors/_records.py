"""The trainable side: factors A and B of each adapted weight, and whole leaves."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from .. import _exports, _state_dicts
from .._tables import alike, count, folded, html, listed
from ..errors import ConfigError
from ._scale import scale_fault

PyTree = Any  # the user's: parameters, arguments, results
Array = jax.Array | np.ndarray  # on a device, or on the host
Form = Literal["auto", "factored", "merged"]  # of the value of an adapted product
FORMS: tuple[str, ...] = get_args(Form)
Leaf = Any  # an array, or what a tree_map put there: a shape, a PartitionSpec, None


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a weight by role; together they are all its axes, each once.

    Attributes:
      batch: axes along which each entry has its own matrix (experts, stacked layers).
      fan_in: axes that the operation sums over (an embedding's vocabulary).
      fan_out: axes that remain in the result.

    Examples:
      A query kernel `[features, heads, width]`:

      >>> axes = Axes(fan_in=(0,), fan_out=(1, 2))
      >>> axes.sizes((64, 4, 16))
      (1, 64, 64)
      >>> axes.a_shape((64, 4, 16), rank=8), axes.b_shape((64, 4, 16), rank=8)
      ((64, 8), (8, 4, 16))
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
        """Returns A's shape, `[*batch, *fan_in, rank]`, from a weight's `shape`.

        `rank` is the size of the rank axis.
        """
        return (*(shape[i] for i in (*self.batch, *self.fan_in)), rank)

    def b_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Returns B's shape, `[*batch, rank, *fan_out]`, from a weight's `shape`.

        `rank` is the size of the rank axis.
        """
        batch = (shape[i] for i in self.batch)
        return (*batch, rank, *(shape[i] for i in self.fan_out))

    def weight_shape(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the weight's shape, from the shapes `a` and `b` of its factors.

        Examples:
          >>> Axes(fan_in=(1,), fan_out=(0,)).weight_shape((64, 8), (8, 16))
          (16, 64)
        """
        sizes = (*a[:-1], *b[len(self.batch) + 1 :])
        return tuple(sizes[self.order.index(i)] for i in range(len(sizes)))


@dataclasses.dataclass(frozen=True)
class FusedParts:
    """Slices of a fused weight along one axis, each with its own rank.

    Attributes:
      axis: the fan-out axis of the weight that the parts lie along; from the end if
        negative.
      sizes: length of each part. Their sum is the length of the axis.
      ranks: rank of each part; 0 for a part that is not adapted.

    Examples:
      LoRA on q and v of a kernel `[64, 192]` that holds q, k and v:

      >>> FusedParts(axis=-1, sizes=(64, 64, 64), ranks=(8, 0, 8)).rank
      16
    """

    axis: int
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def adapted(self) -> tuple[int, ...]:
        """The parts that have factors, by number."""
        return tuple(i for i, rank in enumerate(self.ranks) if rank)

    @property
    def rank(self) -> int:
        """The sum of all ranks."""
        return sum(self.ranks)


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
      method: a name in `jlora.methods.METHODS`.
      init: how A and B are initialised.
      shape: the weight's shape, where the leaves do not tell it (VeRA, token rows).
      seed: of VeRA's shared matrices.
      rows: the ids of the trained rows, for token rows.
      parts: slices of a fused weight. `rank` is then the sum of their ranks.
      form: how the value of a product is computed, see `apply_lora`.
      invocation: the token ids after which an activated adapter acts, else empty.

    Raises:
      ConfigError: if rank and alpha give no scale: it must be a positive number that
        float32 holds.

    Examples:
      >>> spec = Spec(rank=16, alpha=32.0)
      >>> spec.scale, spec.part_scale(4), dataclasses.replace(spec, rslora=True).scale
      (2.0, 8.0, 8.0)
      >>> Spec.from_dict(spec.to_dict()) == spec
      True
    """

    op: str = "linear"
    axes: Axes = dataclasses.field(default_factory=Axes)
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    method: str = "lora"
    init: str = "kaiming"
    shape: tuple[int, ...] = ()
    seed: int = 0
    rows: tuple[int, ...] = ()
    parts: FusedParts | None = None
    form: Form = "auto"
    invocation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fault = scale_fault(self.alpha, self._highest_rank, self.rslora)
        if fault:
            raise ConfigError(f"Spec: {fault}.")

    @property
    def _highest_rank(self) -> int:
        parts = self.parts
        return self.rank if parts is None else max(parts.ranks, default=0)

    @property
    def scale(self) -> float:
        """The multiplier of `A B`: `alpha / rank`, rsLoRA `alpha / sqrt(rank)`.

        With `parts`, the multiplier of the part with the highest rank.
        """
        return self.part_scale(self._highest_rank)

    def part_scale(self, rank: int) -> float:
        """Returns the multiplier of a part of rank `rank`."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Spec":
        """Returns the spec that `to_dict` described.

        Args:
          fields: what `to_dict` returned, as it is or read back from JSON.

        Raises:
          TypeError: for unknown or missing fields.
        """
        fields = dict(fields)
        fields["axes"] = Axes(**tuples(fields["axes"]))
        if fields.get("parts") is not None:
            fields["parts"] = FusedParts(**tuples(fields["parts"]))
        return cls(**tuples(fields))


_PLAIN = Spec(rank=1, alpha=1.0)


def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `fields` with tuples for lists.

    Examples:
      >>> tuples({"rank": 2, "rows": [5, 7]})
      {'rank': 2, 'rows': (5, 7)}
    """
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The low-rank factors of one weight: it acts as `w + scale * a @ b`.

    A pytree: `a`, `b` and `magnitude`, if the method has one, are leaves. `spec` is
    static, so an adapter describes itself.

    Attributes:
      a: `[*batch, *fan_in, rank]`; for VeRA `[*batch, rank]`; None for token rows.
      b: `[*batch, rank, *fan_out]`; for VeRA `[*batch, *fan_out]`.
      spec: static; the axes, rank, alpha and so on.
      magnitude: None; for DoRA the lengths of the columns, `[*batch, *fan_out]`; for
        AdaLoRA the singular values, `[*batch, rank]`; for LoRA-XS its matrix R,
        `[*batch, rank, rank]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> f = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=4))
      >>> f.scale, f.rank
      (2.0, 2)
      >>> f
      Factors(a=float32[3,2], b=float32[2,4], rank=2, alpha=4)
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

    def __repr__(self) -> str:
        told = {"a": _text(self.a), "b": _text(self.b)}
        if self.magnitude is not None:
            told["magnitude"] = _text(self.magnitude)
        told |= {"rank": str(self.rank), "alpha": str(self.spec.alpha)}
        if self.spec.rows:
            told["rows"] = f"({listed(map(str, self.spec.rows), 8, ', ')})"
        for field in dataclasses.fields(self.spec):
            value = getattr(self.spec, field.name)
            if field.name not in told and value != getattr(_PLAIN, field.name):
                told[field.name] = repr(value)
        return f"Factors({', '.join(f'{k}={v}' for k, v in told.items())})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trainable:
    """What is trained: the factors of adapted weights and the leaves trained in full.

    `flax.serialization` writes and restores it if Flax is imported before it is made.

    Attributes:
      lora: `Factors` by the path of their weight.
      full: arrays by path.

    Examples:
      >>> import jax.numpy as jnp
      >>> own = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=4))
      >>> Trainable({f"layer_{i}/kernel": own for i in range(12)}, {"b": jnp.ones(4)})
      Trainable(
        172 parameters,
        lora={
          'layer_{0..11}/kernel (×12)': Factors(a=float32[3,2], ..., rank=2, alpha=4),
        },
        full={
          'b': float32[4],
        },
      )
    """

    lora: Mapping[str, Factors] = dataclasses.field(default_factory=dict)
    full: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _state_dicts.register(Trainable, Factors)  # Flax may be imported by now

    def __contains__(self, path: object) -> bool:
        """Whether the leaf `path` is adapted or trained in full."""
        return path in self.lora or path in self.full

    def __repr__(self) -> str:
        n = _size(self)
        counted = [f"{count(n)} parameters"] if n else []
        fields = {"lora": self.lora, "full": self.full}
        short = ", ".join([*counted, *(f"{k}={_text(v)}" for k, v in fields.items())])
        if len(short) < 80 and "\n" not in short:
            return f"Trainable({short})"
        long = [*counted, *(f"{k}={_text(v, long=True)}" for k, v in fields.items())]
        return "Trainable(\n" + "".join(f"  {line},\n" for line in long) + ")"

    def _repr_html_(self) -> str:
        fields = [x for x in (self.lora, self.full) if isinstance(x, Mapping)]
        lines = [line for field in fields for line in _lines(field)]
        caption = f"{count(_size(self))} parameters"
        return html(("leaf", "trained", "parameters"), lines, caption)


def _text(x: Leaf, long: bool = False) -> str:
    """Returns what `x` shows of itself; arrays their dtype and shape, not numbers."""
    if isinstance(x, Mapping):
        lines = [f"{name!r}: {text}" for name, text, _ in _lines(x)]
        if long and lines:
            return "{\n" + "".join(f"    {line},\n" for line in lines) + "  }"
        return f"{{{', '.join(lines)}}}"
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return repr(x)
    return f"{getattr(dtype, 'name', dtype)}[{','.join(map(str, shape))}]"


def _lines(leaves: Mapping[str, Leaf]) -> list[tuple[str, str, str]]:
    """Returns `(name, text, size)` for leaves by path; those alike share a line."""
    return [
        (folded(paths), text, count(_size([leaves[p] for p in paths])))
        for paths, text in alike((path, _text(x)) for path, x in leaves.items())
    ]


def _size(tree: PyTree) -> int:
    """Returns how many numbers the arrays of `tree` hold."""
    shapes = [getattr(x, "shape", None) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) for shape in shapes if isinstance(shape, tuple))


_state_dicts.register(Trainable, Factors)
_exports.register(Trainable)
_exports.register(
    Factors, lambda spec: [spec.to_dict()], lambda fields: [Spec.from_dict(fields)]
)
