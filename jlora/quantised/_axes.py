"""Steps on the axes of a quantised array that leave it quantised."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._node import Quantized

# `(array, what stands for a missing entry) -> array`; on codes, scales and offset
Fun = Callable[[jax.Array, Any], jax.Array]
Positions = Mapping[int, jax.Array]  # by axis; negative where there is no entry
# `(array, positions, what stands for a missing entry) -> array`
Pick = Callable[[jax.Array, Positions, Any], jax.Array]


def has_own_entries(q: Quantized, axis: int) -> bool:
    """Returns whether every entry along `axis` has its own scale and bytes."""
    axis %= q.ndim
    packed = q.packing is not None and q.packing.axis % q.ndim == axis
    return q.shape[axis] == 1 or (q.block(axis) == 1 and not packed)


def rearranged(
    q: Quantized,
    fun: Fun,
    touched: Sequence[int],
    origin: Sequence[int] | None = None,
    empty: Any = 0,
) -> Quantized:
    """Returns `q` with `fun` applied to the codes, the scales and the offset.

    Args:
      q: the array. Its axes `touched` have their own entries.
      fun: `(array, empty) -> array`: picks, reverses or moves entries along axes, the
        same in each array.
      touched: the axes that it acts on.
      origin: for each axis of the result the old axis, -1 for a new one; None if axes
        stay.
      empty: what `fun` puts into the scales where there is no entry.
    """
    origin = range(q.ndim) if origin is None else origin

    def spread(x: jax.Array) -> jax.Array:
        """Returns `x` with an entry for each that `fun` may pick."""
        shape = [q.shape[i] if i in touched else n for i, n in enumerate(x.shape)]
        return x if list(x.shape) == shape else jnp.broadcast_to(x, shape)

    scales = q.scales
    if isinstance(scales, Quantized):
        if all(has_own_entries(scales, i) for i in touched):
            scales = rearranged(scales, fun, touched, origin, empty)
        else:
            scales = fun(spread(scales.dense()), empty)
    else:
        scales = fun(spread(scales), empty)
    offset = None if q.offset is None else fun(spread(q.offset), 0)
    blocks = tuple(1 if i < 0 else q.block(i) for i in origin)
    packing = q.packing
    if packing is not None:
        now = list(origin).index(packing.axis % q.ndim)
        packing = dataclasses.replace(packing, axis=now - len(origin))
    return dataclasses.replace(
        q,
        codes=fun(q.codes, 0),
        scales=scales,
        offset=offset,
        blocks=blocks,
        packing=packing,
    )


def looked_up(
    q: Quantized,
    pick: Pick,
    positions: Positions,
    origin: Sequence[int] | None = None,
    empty: Any = 0,
) -> Quantized:
    """Returns the entries of `q` at computed positions; only they are read.

    Entries that share a scale or a byte do so no longer.

    Args:
      q: the array.
      pick: picks entries from the codes, the scales and the offset. The axes of
        positions come first in its result, or are of size one.
      positions: for each axis along which it picks, where.
      origin: as in `rearranged`.
      empty: what stands for the scale of a missing entry.
    """
    origin = range(q.ndim) if origin is None else origin

    def of_blocks(x: jax.Array | Quantized) -> Positions:
        """Returns the positions in `x`, which has an entry for each block."""
        return {
            i: jnp.minimum(at, 0)
            if x.shape[i] == 1
            else jnp.where(at < 0, at, at // q.block(i))
            for i, at in positions.items()
        }

    scales: Any = q.scales
    if isinstance(scales, Quantized):
        scales = looked_up(scales, pick, of_blocks(scales), origin, empty)
    else:
        scales = pick(scales, of_blocks(scales), empty)
    offset = None
    if q.offset is not None:
        offset = pick(q.offset, of_blocks(q.offset), 0)
    packing, in_codes, shift = q.packing, dict(positions), None
    if packing is not None:
        axis = packing.axis % q.ndim
        if axis in positions:
            in_codes[axis], shift = packing.place(positions[axis])
            packing = None
        else:
            now = list(origin).index(axis)
            packing = dataclasses.replace(packing, axis=now - len(origin))
    codes = pick(q.codes, in_codes, 0)
    if shift is not None:
        shift = lax.expand_dims(shift, range(shift.ndim, codes.ndim))
        codes = (codes >> jnp.broadcast_to(shift, codes.shape)) & 15
    blocks = tuple(1 if i < 0 or i in positions else q.block(i) for i in origin)
    return dataclasses.replace(
        q, codes=codes, scales=scales, offset=offset, blocks=blocks, packing=packing
    )


def split_axis(q: Quantized, axis: int, sizes: Sequence[int]) -> Quantized:
    """Returns `q` with an axis of own entries split into several."""
    own = {axis: list(sizes)}

    def split(x: jax.Array, _: Any) -> jax.Array:
        parts = [own.get(i, [n]) for i, n in enumerate(x.shape)]
        return lax.reshape(x, [n for part in parts for n in part])

    origin = [i for i in range(q.ndim) for _ in own.get(i, [i])]
    return rearranged(q, split, [axis], origin)


def joined(several: Sequence[Quantized], axis: int) -> Quantized | None:
    """Returns arrays side by side along an axis of own entries; None if they differ."""
    first = several[0]
    axis %= first.ndim
    alike = [_static(q) for q in several]
    if any(fields != alike[0] for fields in alike):
        return None
    if not all(has_own_entries(q, axis) for q in several):
        return None
    scales = [q.float_scales() for q in several]
    if not any(isinstance(q.scales, Quantized) for q in several):
        scales = [q.scales for q in several]
    return dataclasses.replace(
        first,
        codes=lax.concatenate([q.codes for q in several], axis),
        scales=jnp.concatenate(scales, axis),
        offset=None,
    )


def _static(q: Quantized) -> tuple[Any, ...]:
    return q.kind, q.blocks, q.dtype, q.packing, q.offset is None, q.codes.dtype
