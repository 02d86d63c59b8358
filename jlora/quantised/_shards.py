"""How the arrays of a quantised array lie over devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ._node import Quantized


def shard_specs(
    q: Quantized, entries: Sequence[Any], sizes: Mapping[Any, int]
) -> Quantized | str:
    """Returns `q` with a `PartitionSpec` in place of each array.

    Codes lie as the array would. Scales lie as the codes do, along each axis on which
    they have an entry for each shard.

    Args:
      q: the quantised array, or shapes.
      entries: for each axis the mesh axis, or axes, over which it is cut; None if it is
        not.
      sizes: the length of each mesh axis.

    Returns:
      The specs, or in words why shards would cut a block.
    """
    shape = q.shape
    for axis, count in enumerate(shard_counts(entries, sizes)):
        fault = _fault(q, axis, shape[axis], count)
        if fault:
            return fault
    scales: Any = jax.P(*_kept(q.scales.shape, entries))
    if isinstance(q.scales, Quantized):
        own = _kept(q.scales.shape, entries)
        scales = shard_specs(q.scales, own, sizes)
        if isinstance(scales, str):
            return f"{scales} (of the scales: leave out double quantisation)"
    offset = None
    if q.offset is not None:
        offset = jax.P(*_kept(q.offset.shape, entries))
    return dataclasses.replace(q, codes=jax.P(*entries), scales=scales, offset=offset)


def shard_counts(entries: Sequence[Any], sizes: Mapping[Any, int]) -> list[int]:
    """Returns into how many shards each axis is cut; arguments as in `shard_specs`."""
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    return [math.prod(sizes[n] for n in own if n is not None) for own in named]


def _kept(shape: Sequence[int], entries: Sequence[Any]) -> list[Any]:
    """Returns the entries of the axes that an array has, and does not repeat."""
    return [e if n > 1 else None for n, e in zip(shape, entries, strict=True)]


def _fault(q: Quantized, axis: int, n: int, count: int) -> str:
    """Returns in words why `axis`, of length `n`, is not cut into `count` shards."""
    if count == 1:
        return ""
    block = q.block(axis)
    here = f"axis {axis} of {n} entries is cut into {count} shards"
    if n % count:
        return f"{here} of different lengths"
    if block < n and (n // count) % block:
        return f"{here} of {n // count}, which are not whole blocks of {block}"
    packing = q.packing
    if packing is None or packing.axis % q.ndim != axis:
        return ""
    if packing.pad or (n // count) % (2 * packing.run):
        return (
            f"{here} of {n // count}, which are not whole pieces of "
            f"{2 * packing.run} entries that share bytes"
        )
    return ""
