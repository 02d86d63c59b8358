"""A normal with standard deviation 1/rank, B zero; embeddings the other way."""

import jax
import jax.numpy as jnp

from ..factors import Spec


def gaussian(
    key: jax.Array, shape: tuple[int, ...], spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns A normal with standard deviation `1 / rank` and B zero.

    This is PEFT's `init_lora_weights="gaussian"`, which is used for diffusion models.

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
      >>> a, b = gaussian(jax.random.key(0), (3, 4), spec, np.float32)
      >>> a.shape, b.shape, float(b.sum())
      ((3, 2), (2, 4), 0.0)

    References:
      Hu et al., 2021, LoRA, section 4.1, https://arxiv.org/abs/2106.09685
    """
    if spec.op == "embedding":
        return embedding_init(key, shape, spec, dtype)
    a = jax.random.normal(key, spec.axes.a_shape(shape, spec.rank), dtype) / spec.rank
    return a, jnp.zeros(spec.axes.b_shape(shape, spec.rank), dtype)


def embedding_init(
    key: jax.Array, shape: tuple[int, ...], spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns A (the vocabulary side) zero and B (the feature side) standard normal."""
    a = jnp.zeros(spec.axes.a_shape(shape, spec.rank), dtype)
    return a, jax.random.normal(key, spec.axes.b_shape(shape, spec.rank), dtype)
