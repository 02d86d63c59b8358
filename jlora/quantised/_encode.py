"""From an array to codes and scales."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import TreeError
from ._kinds import KINDS
from ._node import Quantized
from ._pack import Packing, pack, packing

SECOND_BLOCK = 256  # scales that share one, with double quantisation


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to quantise an array; static.

    Attributes:
      kind: a name in `KINDS`.
      block: how many numbers share a scale; None for the kind's own.
      double: whether the scales are quantised too, to 8 bits.
      scale_dtype: dtype of the scales.
      packed: whether two codes of four bits share a byte.
    """

    kind: str
    block: int | None = None
    double: bool = False
    scale_dtype: str = "float32"
    packed: bool = True


def blocks_along(
    shape: Sequence[int],
    axes: Sequence[int],
    block: int,
    shards: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Returns the block's length along each axis: `block` numbers along `axes`.

    The last of `axes` is filled first. Of an axis that is cut into `shards`, a block is
    as long as still divides a shard.

    Examples:
      >>> blocks_along((8, 16, 100), (0, 1), 64), blocks_along((100, 4), (0,), 512)
      ((4, 16, 1), (100, 1))
      >>> blocks_along((1024, 4), (0,), 512, shards=(8, 1))
      (128, 1)
    """
    blocks = [1] * len(shape)
    for i in sorted(axes, reverse=True):
        blocks[i] = max(min(shape[i], block), 1)
        if shards is not None and shards[i] > 1:
            shard = shape[i] // shards[i]
            fits = (n for n in range(min(shard, block), 0, -1) if shard % n == 0)
            blocks[i] = next(fits, 1)
        block //= blocks[i]
        if block <= 1:
            break
    return tuple(blocks)


def encode(
    w: jax.Array,
    axes: Sequence[int],
    scheme: Scheme,
    shards: Sequence[int] | None = None,
) -> Quantized:
    """Returns `w` as codes, with blocks along `axes`.

    Args:
      w: a floating-point array.
      axes: the axes of `w` that a product sums over.
      scheme: the kind, and how.
      shards: into how many shards each axis is cut; None if it is not.
    """
    kind = KINDS[scheme.kind]
    own = None if scheme.block else shards  # a block that was asked for stays
    blocks = blocks_along(w.shape, axes, scheme.block or kind.block, own)
    codes, scales = _codes(w, scheme.kind, blocks, scheme.scale_dtype)
    how = None
    if kind.bits == 4 and scheme.packed:
        how = _packing(w.shape, axes, shards or [1] * w.ndim)
        codes = pack(codes, how)
    else:
        codes = codes.astype(kind.dtype)
    offset = None
    if scheme.double:
        scales = _doubly(scales)
    return Quantized(codes, scales, offset, scheme.kind, blocks, np.dtype(w.dtype), how)


def encode_like(w: jax.Array, q: Quantized) -> Quantized:
    """Returns `w` as codes of the kind, blocks, storage and dtype of `q`.

    Args:
      w: an array of the shape of `q`.
      q: a quantised array.

    Raises:
      TreeError: if `q` has an offset: no kind of jlora's own has.
    """
    if q.offset is not None:
        raise TreeError(
            f"{q!r} has an offset for each block, which is only read: make it dense "
            "with jlora.merge, and then call jlora.quantize."
        )
    return _like(w, q)


def _like(w: jax.Array, q: Quantized) -> Quantized:
    blocks = tuple(q.block(i) for i in range(q.ndim))
    old = q.scales
    double = isinstance(old, Quantized)
    dtype = "float32" if double else jnp.dtype(old.dtype).name
    codes, scales = _codes(w, q.kind, blocks, dtype)
    codes = codes.astype(q.codes.dtype) if q.packing is None else pack(codes, q.packing)
    if double:
        scales = _doubly_like(scales, old)
    return dataclasses.replace(q, codes=codes, scales=scales)


def _packing(
    shape: Sequence[int], axes: Sequence[int], shards: Sequence[int]
) -> Packing:
    axis = max(axes, key=lambda i: (shape[i] % (2 * shards[i]) == 0, shape[i]))
    return packing(axis - len(shape), shape[axis], shards[axis])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _codes(
    w: jax.Array, name: str, blocks: tuple[int, ...], scale_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the codes, of the shape of `w`, and the scales."""
    kind = KINDS[name]
    x = w.astype(jnp.float32)
    counts = [-(-n // block) for n, block in zip(w.shape, blocks, strict=True)]
    widths = [
        (0, count * block - n)
        for n, count, block in zip(w.shape, counts, blocks, strict=True)
    ]
    parts = [n for pair in zip(counts, blocks, strict=True) for n in pair]
    cut = jnp.pad(x, widths).reshape(parts)
    within = tuple(range(1, len(parts), 2))
    largest = jnp.max(jnp.abs(cut), axis=within, keepdims=True)
    scales = (largest / kind.most).astype(scale_dtype)
    # Rounded up, the scale could make the largest number of the dtype infinite.
    highest = min(float(jnp.finfo(own).max) for own in (w.dtype, jnp.float32))
    beyond = scales.astype(jnp.float32) * kind.most > highest
    beyond &= jnp.isfinite(scales)
    scales = jnp.where(beyond, jnp.nextafter(scales, jnp.zeros_like(scales)), scales)
    wide = scales.astype(jnp.float32)
    codes = kind.encode(cut / jnp.where(wide == 0, 1, wide))
    codes = codes.reshape([n * b for n, b in zip(counts, blocks, strict=True)])
    codes = codes[tuple(slice(n) for n in w.shape)]
    return codes, scales.reshape(counts)


def _doubly(scales: jax.Array) -> Quantized:
    """Returns scales as codes of 8 bits around their mean, in blocks along one axis."""
    scales = scales.astype(jnp.float32)
    mean = jnp.mean(scales, axis=(-2, -1), keepdims=True)
    axis = scales.ndim - 1 if scales.shape[-1] > 1 else scales.ndim - 2
    blocks = blocks_along(scales.shape, (axis,), SECOND_BLOCK)
    codes, second = _codes(scales - mean, "int8", blocks, "float32")
    return Quantized(codes, second, mean, "int8", blocks, np.dtype("float32"))


def _doubly_like(scales: jax.Array, q: Quantized) -> Quantized:
    """Returns scales as codes like `q`, around the mean where `q` has an offset."""
    offset = None
    if q.offset is not None:
        common = [i for i, n in enumerate(q.offset.shape) if n == 1]
        offset = jnp.mean(scales, axis=tuple(common), keepdims=True)
    rest = scales if offset is None else scales - offset
    return dataclasses.replace(_like(rest, q), offset=offset)
