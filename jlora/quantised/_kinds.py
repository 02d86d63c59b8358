"""What a code of each kind stands for, and the code nearest to a number.

References:
  Dettmers et al., 2023, QLoRA, https://arxiv.org/abs/2305.14314 (NF4, appendix E)
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The published table: quantiles of a normal distribution, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Kind(NamedTuple):
    """How a kind of codes stores a number.

    Attributes:
      bits: of a code.
      dtype: of a code that is not packed: the narrow one of its own.
      most: the number that the largest absolute value of a block is divided by.
      block: how many numbers share a scale, unless said otherwise.
      encode: `x / scale -> codes`, as uint8 for four bits, else as `dtype`.
      decode: `(codes, platform) -> float32`, in the unit of the scale.
    """

    bits: int
    dtype: str
    most: float
    block: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array, str], jax.Array]


def _nearest_nf4(x: jax.Array) -> jax.Array:
    table = np.array(NF4, np.float32)
    code = jnp.zeros(x.shape, jnp.uint8)
    for bound in (table[1:] + table[:-1]) / 2:
        code += (x > bound).astype(jnp.uint8)
    return code


def _from_nf4(codes: jax.Array, platform: str) -> jax.Array:
    """Returns the table's entries: looked up on a CPU, chosen bit by bit elsewhere.

    A vector unit has no table, and its compiler writes each entry of one to memory.
    """
    if platform != "cpu":
        values = [jnp.full(codes.shape, value, jnp.float32) for value in NF4]
        return chosen_by_bits(codes, values)
    table = jnp.array(NF4, jnp.float32)
    return table.at[codes].get(mode="promise_in_bounds")


def chosen_by_bits(index: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """Returns entry `index` of `values`, of one shape, by a tree of choices."""
    values, bit = list(values), 0
    while len(values) > 1:
        is_set = ((index >> bit) & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=False)
        odd = values[-1:] if len(values) % 2 else []
        values = [lax.select(is_set, high, low) for low, high in pairs] + odd
        bit += 1
    return values[0]


def _nearest_integer(x: jax.Array, most: int, dtype: str) -> jax.Array:
    return jnp.clip(jnp.round(x), -most, most).astype(dtype)


KINDS = {
    "nf4": Kind(4, "uint4", 1.0, 64, _nearest_nf4, _from_nf4),
    "int4": Kind(
        4,
        "uint4",
        7.0,
        64,
        lambda x: _nearest_integer(x, 7, "int8").astype(jnp.uint8) + jnp.uint8(8),
        lambda codes, _: codes.astype(jnp.float32) - 8,
    ),
    "int8": Kind(
        8,
        "int8",
        127.0,
        512,
        functools.partial(_nearest_integer, most=127, dtype="int8"),
        lambda codes, _: codes.astype(jnp.float32),
    ),
    # For reading: checkpoints of this kind come with a scale for each block.
    "float8_e4m3": Kind(
        8,
        "float8_e4m3fn",
        448.0,
        128,
        lambda x: x.astype(jnp.float8_e4m3fn),
        lambda codes, _: codes.astype(jnp.float32),
    ),
}
