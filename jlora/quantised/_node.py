"""`Quantized`: codes and scales that stand for an array."""

import dataclasses
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from .. import _exports, _state_dicts
from ..errors import TreeError
from ._pack import Packing
from ._typed import typed_as
from ._widen import widen

# Methods of an array that a function may call on its parameters.
_METHODS = frozenset(["T", "mT", "astype", "at", "dot", "reshape", "sum", "transpose"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array stored as codes and scales: `table[codes] * scales + offset`.

    A pytree node that stands where the array stood. `jlora.quantize` makes it, and
    `jlora.apply_lora` computes with it. The product of code and scale is taken in
    float32 and rounded once, to `dtype`.

    Attributes:
      codes: `[*shape]`, or with one axis half as long where two share a byte.
      scales: as many axes as the array, each shorter by its entry of `blocks`; itself
        `Quantized` with double quantisation.
      offset: added after the scale, with as many axes as the scales; mostly None.
      kind: static; `"nf4"`, `"int4"`, `"int8"`, or `"float8_e4m3"` where read.
      blocks: static; how many entries along each axis share a scale. The last block of
        an axis may be shorter.
      dtype: static; dtype of the array that it stands for.
      packing: static; where two codes share a byte; None for a code an entry.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> q = jlora.quantize({"w": jnp.ones((128, 4))}, kind="nf4")["w"]
      >>> q
      Quantized(nf4 of float32[128,4], blocks (64, 1), 288 bytes)
      >>> q.shape, q.dtype, q.codes.shape, q.scales.shape, float(q.dense()[0, 0])
      ((128, 4), dtype('float32'), (64, 4), (2, 4), 1.0)
      >>> q.block(0), q.block(1), q.float_scales().shape
      (64, 1, (2, 4))

    References:
      Dettmers et al., 2023, QLoRA, https://arxiv.org/abs/2305.14314
    """

    codes: Any
    scales: Any
    offset: Any = None
    kind: str = dataclasses.field(default="int8", metadata={"static": True})
    blocks: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    dtype: Any = dataclasses.field(
        default=np.dtype("float32"), metadata={"static": True}
    )
    packing: Packing | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        _state_dicts.register(Quantized)  # Flax may be imported by now

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        shape = list(self.codes.shape)
        if self.packing is not None:
            axis = self.packing.axis
            shape[axis] = self.packing.length(shape[axis])
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """How many axes the array has."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """How many numbers the array has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the codes and scales take in a file or on a CPU."""
        bits = sum(
            math.prod(x.shape) * (4 if "int4" in str(x.dtype) else 8 * x.dtype.itemsize)
            for x in jax.tree.leaves(self)
        )
        return (bits + 7) // 8

    def block(self, axis: int) -> int:
        """Returns how many entries along `axis` share a scale; it may be negative."""
        axis = axis if axis < 0 else axis - self.ndim
        return self.blocks[axis] if -axis <= len(self.blocks) else 1

    def dense(self) -> jax.Array:
        """Returns the array that it stands for, `[*shape]` in `dtype`."""
        return typed_as(self.codes, widen, self)

    def float_scales(self) -> jax.Array:
        """Returns the scales as float32."""
        if isinstance(self.scales, Quantized):
            return widen(self.scales)
        return self.scales.astype(jnp.float32)

    def _fault(self) -> str:
        return (
            f"A quantised weight ({self!r}) met an operation of JAX. Call the function "
            "through jlora.apply_lora: apply_lora(fn)(params, jlora.Trainable(), x) "
            "works without an adapter too. jlora.merge(params, jlora.Trainable()) "
            "makes the weights dense."
        )

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TreeError(self._fault())

    # What a function that expects an array does first.
    __jax_array__ = __array__ = __getitem__ = __iter__ = _refuse
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __pow__ = _refuse

    def __getattr__(self, name: str) -> Any:
        known = name in _METHODS
        raise AttributeError(self._fault() if known else f"no attribute {name!r}")

    def __repr__(self) -> str:
        try:
            shape = ",".join(map(str, self.shape))
            told = f"{self.kind} of {self.dtype.name}[{shape}], blocks {self.blocks}"
            return f"Quantized({told}, {self.nbytes} bytes)"
        except (AttributeError, TypeError):  # a tree_map put something else there
            fields = f"codes={self.codes!r}, scales={self.scales!r}"
            return f"Quantized({fields}, kind={self.kind!r})"


def _described(
    kind: str, blocks: tuple[int, ...], dtype: Any, packing: Packing | None
) -> list[Any]:
    """Returns the static fields as JSON has them."""
    how = None if packing is None else dataclasses.astuple(packing)
    return [kind, blocks, np.dtype(dtype).name, how]


def _rebuilt(kind: str, blocks: list[int], dtype: str, how: list[int] | None) -> Any:
    packing = None if how is None else Packing(*how)
    return kind, tuple(blocks), np.dtype(dtype), packing


_exports.register(Quantized, _described, _rebuilt)


def is_quantized(x: object) -> TypeGuard[Quantized]:
    """Returns whether `x` is a quantised array."""
    return isinstance(x, Quantized)


def has_quantized(tree: Any) -> bool:
    """Returns whether a leaf of `tree` is a quantised array."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def like_dense(x: Any) -> Any:
    """Returns the shape and dtype that a quantised array stands for; else `x`."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x
