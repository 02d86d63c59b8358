"""LoRA on some slices of a fused weight, such as q and v of one q-k-v kernel."""

import jax
import jax.numpy as jnp
from jax import lax

from ..factors import Factors, FusedParts, Leaf, Spec
from .kaiming import kaiming
from .method import Method, Shape


def _cut(spec: Spec, shape: Shape) -> Shape:
    """Returns `shape` with the parts' axis as long as the largest adapted part.

    Entries beyond a part's own size are never read.
    """
    own = _parts(spec)
    longest = max(own.sizes[i] for i in own.adapted)
    return tuple(longest if i == own.axis else n for i, n in enumerate(shape))


def _parts(spec: Spec) -> FusedParts:
    assert spec.parts is not None
    return spec.parts


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    return Factors(*kaiming(key, _cut(spec, w.shape), spec, dtype), spec)


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns A, and B with each part's rows at that part's place, zeros elsewhere."""
    spec = factors.spec
    own = _parts(spec)
    axes, b = spec.axes, factors.b
    of_rank = len(axes.batch)
    of_out = of_rank + 1 + axes.fan_out.index(own.axis)
    total = sum(own.sizes)
    rows = []
    first = 0
    for i in own.adapted:
        rank, size, before = own.ranks[i], own.sizes[i], sum(own.sizes[:i])
        block = lax.slice_in_dim(b, first, first + rank, axis=of_rank)
        block = lax.slice_in_dim(block, 0, size, axis=of_out)
        widths = [(0, 0, 0)] * b.ndim
        widths[of_out] = (before, total - before - size, 0)
        share = spec.part_scale(rank) / spec.scale
        rows.append(lax.pad(block * share, jnp.zeros((), b.dtype), widths))
        first += rank
    return factors.a, jnp.concatenate(rows, axis=of_rank)


fused_parts = Method(covered=_cut, pair=_pair, init=_init)
