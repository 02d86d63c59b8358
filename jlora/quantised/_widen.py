"""From codes and scales to the array, in the way that suits each compiler.

All ways give the same bits: the product of the code's number and the scale in float32,
rounded once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._kinds import KINDS, chosen_by_bits
from ._pack import unpack

# Above, the choices take longer than the bytes that they save, by the rates of a v5e.
MOST_CHOICES = 16


@jax.jit
def widen(q: Any) -> jax.Array:
    """Returns the array that a `Quantized` stands for."""
    leaves, tree = jax.tree.flatten(q)

    def on(platform: str) -> Any:
        return lambda *leaves: _widened(tree.unflatten(leaves), platform)

    ways = {"cpu": on("cpu"), "tpu": on("tpu"), "default": on("")}
    return lax.platform_dependent(*leaves, **ways)


def _widened(q: Any, platform: str) -> jax.Array:
    codes = q.codes if q.packing is None else unpack(q.codes, q.packing)
    values = KINDS[q.kind].decode(codes, platform)
    scales = q.scales.astype(jnp.float32) if hasattr(q.scales, "astype") else None
    if scales is None:  # quantised too
        scales = _widened(q.scales, platform)
    blocks = [q.block(i) for i in range(q.ndim)]
    counts = [n for n, b in zip(scales.shape, blocks, strict=True) if b > 1]
    few = q.packing is None and math.prod(counts) <= MOST_CHOICES
    spread = _by_choices if platform == "tpu" and few else _by_parts
    values = spread(values, scales, blocks, jnp.multiply)
    if q.offset is not None:
        values = spread(values, q.offset.astype(jnp.float32), blocks, jnp.add)
    return values.astype(q.dtype)


def _by_parts(values: jax.Array, scales: jax.Array, blocks: Any, op: Any) -> jax.Array:
    """Returns `op(values, scales)`, where axes are cut into blocks if these fit."""
    parts: list[int] = []
    shape: list[int] = []
    for i, (n, block) in enumerate(zip(values.shape, blocks, strict=True)):
        count = scales.shape[i]
        if count == 1 or block == 1:
            parts, shape = [*parts, n], [*shape, count]
        elif n == count * block:
            parts, shape = [*parts, count, block], [*shape, count, 1]
        else:  # the last block is shorter
            scales = jnp.repeat(scales, block, axis=i)
            scales = lax.slice_in_dim(scales, 0, n, axis=i)
            parts, shape = [*parts, n], [*shape, n]
    out = op(lax.reshape(values, parts), lax.reshape(scales, shape))
    return lax.reshape(out, values.shape)


def _by_choices(
    values: jax.Array, scales: jax.Array, blocks: Any, op: Any
) -> jax.Array:
    """Returns `op(values, scales)`, where each entry chooses its scale.

    A reshape between codes and a product makes the TPU's compiler write the widened
    array to memory. Each choice is work for its vector unit, so there may be few.
    """
    for i, (n, block) in enumerate(zip(values.shape, blocks, strict=True)):
        count = scales.shape[i]
        if count == 1 or block == 1:
            continue
        shape = [n if k == i else size for k, size in enumerate(scales.shape)]
        index = lax.broadcasted_iota(jnp.int32, shape, i) // block
        entry = functools.partial(lax.slice_in_dim, scales, axis=i)
        each = [jnp.broadcast_to(entry(k, k + 1), shape) for k in range(count)]
        scales = chosen_by_bits(index, each)
    return op(values, scales)
