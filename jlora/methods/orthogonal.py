"""An initialisation with both factors away from zero and a product of zero."""

import jax
import jax.numpy as jnp

from .._numerics import HIGHEST
from ..factors import Spec
from .init import shaped


def orthogonal(
    key: jax.Array, shape: tuple[int, ...], spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns random A and B in orthogonal halves of the rank axis.

    With a random orthogonal matrix Q, `A = N Q[0::2] / 10` and `B = Q[1::2]^T N' / 10`
    for standard normal N and N'. So `A B = 0`, and both have a gradient from the first
    step on. This is PEFT's `init_lora_weights="orthogonal"`.

    Args:
      key: PRNG key, consumed.
      shape: the weight's shape.
      spec: axes, rank (even) and operation of the weight.
      dtype: dtype of both factors.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`;
      `a @ b` is zero up to rounding, at most 1e-6 of the factors' product in float32.

    Examples:
      >>> import jax, numpy as np
      >>> spec = Spec(rank=2, alpha=4.0)
      >>> init = jax.jit(orthogonal, static_argnums=(1, 2, 3))
      >>> a, b = map(np.asarray, init(jax.random.key(0), (3, 4), spec, np.float32))
      >>> bool(abs(a).min() > 0), bool(abs(a @ b).max() < 1e-6)
      (True, True)

    References:
      PEFT 0.21, `LoraLayer.orthogonal_init`, https://github.com/huggingface/peft
    """
    n_batch, fan_in, fan_out = spec.axes.sizes(shape)
    half = spec.rank // 2
    keys = jax.random.split(key, 3)
    q = jax.random.orthogonal(keys[0], spec.rank, (n_batch,), jnp.float32)
    left = jax.random.normal(keys[1], (n_batch, fan_in, half)) / 10
    right = jax.random.normal(keys[2], (n_batch, half, fan_out)) / 10
    a = jnp.matmul(left, q[:, 0::2], precision=HIGHEST)
    b = jnp.matmul(q[:, 1::2].swapaxes(1, 2), right, precision=HIGHEST)
    return shaped(a, b, spec, shape, dtype)
