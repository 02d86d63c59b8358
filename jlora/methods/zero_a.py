"""A zero and B random: the default initialisation the other way round."""

import math

import jax
import jax.numpy as jnp

from ..factors import Spec
from .gaussian import embedding_init


def zero_a(
    key: jax.Array, shape: tuple[int, ...], spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns A zero and B uniform in ±1/sqrt(rank); an embedding's B is normal.

    The bound is that of `kaiming` for B, whose fan-in is the rank. So the first step
    moves A, and with it which inputs the update reads.

    Args:
      key: PRNG key, consumed.
      shape: the weight's shape.
      spec: axes, rank and operation of the weight.
      dtype: dtype of both factors.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> spec = Spec(rank=2, alpha=4.0)
      >>> a, b = zero_a(jax.random.key(0), (3, 4), spec, np.float32)
      >>> a.shape, b.shape, float(a.sum()), bool((abs(b) <= 2**-0.5).all())
      ((3, 2), (2, 4), 0.0, True)

    References:
      Hayou et al., 2024, The Impact of Initialization on LoRA Finetuning Dynamics,
      `Init[B]`, https://arxiv.org/abs/2406.08447
    """
    if spec.op == "embedding":
        return embedding_init(key, shape, spec, dtype)
    bound = 1 / math.sqrt(spec.rank)
    b = jax.random.uniform(
        key, spec.axes.b_shape(shape, spec.rank), dtype, -bound, bound
    )
    return jnp.zeros(spec.axes.a_shape(shape, spec.rank), dtype), b
