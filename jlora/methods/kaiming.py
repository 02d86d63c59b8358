"""The default initialisation: A uniform, B zero."""

import math

import jax
import jax.numpy as jnp

from ..factors import Spec
from .gaussian import embedding_init


def kaiming(
    key: jax.Array, shape: tuple[int, ...], spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns A uniform in ±1/sqrt(fan-in) and B zero; for an embedding A is zero.

    This is PEFT's `init_lora_weights=True`: `kaiming_uniform` with `a=sqrt(5)`, whose
    bound is exactly `1 / sqrt(fan_in)`.

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
      >>> a, b = kaiming(jax.random.key(0), (3, 4), spec, np.float32)
      >>> a.shape, b.shape, bool((abs(a) <= 3**-0.5).all()), float(b.sum())
      ((3, 2), (2, 4), True, 0.0)

    References:
      Hu et al., 2021, LoRA, section 4.1, https://arxiv.org/abs/2106.09685;
      He et al., 2015, https://arxiv.org/abs/1502.01852
    """
    if spec.op == "embedding":
        return embedding_init(key, shape, spec, dtype)
    _, fan_in, _ = spec.axes.sizes(shape)
    bound = 1 / math.sqrt(fan_in)
    a = jax.random.uniform(
        key, spec.axes.a_shape(shape, spec.rank), dtype, -bound, bound
    )
    return a, jnp.zeros(spec.axes.b_shape(shape, spec.rank), dtype)
