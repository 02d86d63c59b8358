"""Codes of four bits, two in a byte.

An axis of `n` codes is cut into pieces of `2 * run`. A byte holds one code of the first
half of a piece, in its low bits, and the one at the same place in the second half. The
run is long, since then a compiler unpacks a piece as two whole arrays: nibbles that lie
side by side cost a TPU several times the bytes. A shard must hold whole pieces.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where two codes share a byte.

    Attributes:
      axis: the axis that is half as long in bytes; negative, counted from the end.
      run: half the length of a piece.
      pad: 1 if the axis is odd, so that its last code is none; else 0.
    """

    axis: int
    run: int
    pad: int = 0

    def length(self, in_bytes: int) -> int:
        """Returns the length of the axis from its length in bytes."""
        return 2 * in_bytes - self.pad

    def place(self, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns in which byte the codes `at` lie, and by how many bits to shift it.

        A negative position stays negative.
        """
        within = at % (2 * self.run)
        byte = at // (2 * self.run) * self.run + within % self.run
        shift = (within // self.run * 4).astype(jnp.uint8)
        return jnp.where(at < 0, at, byte), shift


def packing(axis: int, n: int, pieces: int = 1) -> Packing:
    """Returns how to pack `axis`, of `n` codes, in pieces that shards can hold."""
    whole = n % (2 * pieces) == 0
    return Packing(axis, n // (2 * pieces) if whole else (n + 1) // 2, n % 2)


def usual_packing(shape: Sequence[int], blocks: Sequence[int]) -> Packing:
    """Returns how to pack codes of a shape: along their blocks, on an even axis."""
    order = [(b > 1, n % 2 == 0, n) for n, b in zip(shape, blocks, strict=True)]
    axis = order.index(max(order))
    return packing(axis - len(shape), shape[axis])


def pack(codes: jax.Array, how: Packing) -> jax.Array:
    """Returns codes, uint8 below 16, as bytes of two."""
    axis = how.axis % codes.ndim
    if how.pad:
        widths = [(0, how.pad if i == axis else 0) for i in range(codes.ndim)]
        codes = jnp.pad(codes, widths)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    halves = codes.reshape(*before, -1, 2, how.run, *after)
    low, high = (lax.index_in_dim(halves, i, axis + 1, keepdims=False) for i in (0, 1))
    return (low | (high << 4)).reshape(*before, -1, *after)


def pack_on_host(codes: np.ndarray, how: Packing) -> np.ndarray:
    """Returns `pack` of an array on the host."""
    axis = how.axis % codes.ndim
    if how.pad:
        widths = [(0, how.pad if i == axis else 0) for i in range(codes.ndim)]
        codes = np.pad(codes, widths)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    halves = codes.reshape(*before, -1, 2, how.run, *after)
    low, high = (halves.take(i, axis + 1) for i in (0, 1))
    return (low | (high << 4)).reshape(*before, -1, *after)


def unpack_on_host(packed: np.ndarray, how: Packing) -> np.ndarray:
    """Returns `unpack` of an array on the host."""
    axis = how.axis % packed.ndim
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    bytes_ = packed.reshape(*before, -1, how.run, *after)
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis + 1).reshape(*before, -1, *after)
    return codes.take(range(how.length(packed.shape[axis])), axis) if how.pad else codes


def unpack(packed: jax.Array, how: Packing) -> jax.Array:
    """Returns the codes of `pack` as uint8."""
    axis = how.axis % packed.ndim
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    bytes_ = packed.reshape(*before, -1, 1, how.run, *after)
    halves = [2 if i == axis + 1 else 1 for i in range(bytes_.ndim)]
    shift = jnp.array([0, 4], jnp.uint8).reshape(halves)
    codes = ((bytes_ >> shift) & 15).reshape(*before, -1, *after)
    if how.pad:
        codes = lax.slice_in_dim(codes, 0, how.length(packed.shape[axis]), axis=axis)
    return codes


def repacked(q: Any, how: Packing | None) -> Any:
    """Returns a quantised array with its codes packed so; None for a code an entry."""
    if q.packing == how:
        return q
    codes = q.codes if q.packing is None else unpack(q.codes, q.packing)
    codes = codes.astype("uint4") if how is None else pack(codes.astype(jnp.uint8), how)
    return dataclasses.replace(q, codes=codes, packing=how)
