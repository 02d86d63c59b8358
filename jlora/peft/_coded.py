"""Quantised torch tensors as quantised leaves: their axes moved, split and stacked."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..quantised import (
    KINDS,
    Quantized,
    pack_on_host,
    unpack_on_host,
    usual_packing,
)
from . import layers
from ._places import Cut, Place

Blocks = tuple[int, ...]


def leaf_of(
    tensors: Mapping[Place, Quantized], shape: tuple[int, ...], dtype: Any
) -> Quantized | None:
    """Returns the leaf that quantised tensors make up.

    Codes and scales are those of the tensors. The result is None if the blocks of the
    tensors are not blocks along the axes of the leaf, or the tensors differ in kind.

    Args:
      tensors: on the host.
      shape: that of the leaf.
      dtype: what the leaf stands for.
    """
    several = list(tensors.values())
    kinds = {q.kind for q in several}
    found = {
        _blocks(place, shape, [q.block(i) for i in range(q.ndim)])
        for place, q in tensors.items()
    }
    alike = len(kinds) == len(found) == 1
    if not alike or any(q.offset is not None for q in several):
        return None
    blocks, (kind,) = found.pop(), kinds
    if blocks is None:
        return None
    counts = tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True))
    narrow = np.uint8 if KINDS[kind].bits == 4 else several[0].codes.dtype
    codes = np.zeros(shape, narrow)
    scales = np.zeros(counts, np.result_type(*map(_scale_dtype, several)))
    for place, q in tensors.items():
        grid = _grid_place(place, shape, blocks)
        if grid is None:
            return None
        layers.weight_in(place, _codes(q), codes)
        layers.weight_in(grid, _scales(q), scales)
    how = None
    if KINDS[kind].bits == 4:
        how = usual_packing(shape, blocks)
        codes = pack_on_host(codes, how)
    return Quantized(codes, scales, None, kind, blocks, np.dtype(dtype), how)


def _codes(q: Quantized) -> np.ndarray:
    codes = np.asarray(q.codes)
    return codes if q.packing is None else unpack_on_host(codes, q.packing)


def _scale_dtype(q: Quantized) -> np.dtype:
    return np.dtype(q.scales.dtype)


def _scales(q: Quantized) -> np.ndarray:
    """Returns the scales, an entry a block."""
    scales = q.scales
    wide = np.asarray(scales.dense() if isinstance(scales, Quantized) else scales)
    counts = [-(-n // q.block(i)) for i, n in enumerate(q.shape)]
    return np.broadcast_to(wide, counts)


def _blocks(place: Place, shape: tuple[int, ...], own: Sequence[int]) -> Blocks | None:
    """Returns the blocks along the leaf's axes of a tensor whose blocks are `own`."""
    sizes = place.sizes(shape)
    found = [1] * len(shape)
    for group, whole in zip(place.groups, own, strict=True):
        block = whole
        for k, i in enumerate(reversed(group)):
            n, last = sizes[i], k == len(group) - 1
            if block >= n:
                if block % n and not last:
                    return None
                found[i], block = n, max(block // n, 1)
            elif n % block and not last:
                return None
            else:
                found[i], block = block, 1
    cut = [at is not None for at in place.index]
    if any(b > 1 and c for b, c in zip(found, cut, strict=True)):
        return None
    return tuple(found)


def _grid_place(place: Place, shape: tuple[int, ...], blocks: Blocks) -> Place | None:
    """Returns the place of the scales, in the array of the leaf's scales.

    The result is None if the leaf's share of a tensor cuts a block.
    """
    if place.cut is None:
        return place
    block = math.prod(blocks[i] for i in place.groups[place.cut.axis])
    start, stop, total = place.cut[:3]
    if start % block or (stop % block and stop != total):
        return None
    cut = Cut(start // block, -(-stop // block), -(-total // block), place.cut.axis)
    return dataclasses.replace(place, cut=cut)
