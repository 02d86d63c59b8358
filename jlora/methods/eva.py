"""EVA: A spans the directions along which the weight's inputs vary most."""

import jax
import jax.numpy as jnp

from ..factors import Array, Spec
from .init import shaped
from .moments import InputMoments


def principal(moments: InputMoments) -> tuple[jax.Array, jax.Array]:
    """Returns the principal axes of a weight's inputs and their share of the variance.

    Returns:
      `(axes, shares)`: orthonormal columns `[*batch, n, n]`, the largest entry of each
      positive, and `[*batch, n]`, both from the largest share to the smallest.
    """
    count = moments.count[..., None, None]
    crossed = moments.first[..., :, None] * moments.first[..., None, :]
    variance, axes = jnp.linalg.eigh(moments.second - crossed / count)
    variance, axes = jnp.maximum(variance[..., ::-1], 0), axes[..., ::-1]
    largest = jnp.argmax(jnp.abs(axes), axis=-2, keepdims=True)
    axes = axes * jnp.sign(jnp.take_along_axis(axes, largest, axis=-2))
    total = jnp.sum(variance, axis=-1, keepdims=True)
    return axes, variance / jnp.maximum(total, jnp.finfo(total.dtype).tiny)


def eva(
    key: jax.Array, w: Array, spec: Spec, dtype: jnp.dtype, moments: InputMoments
) -> tuple[jax.Array, jax.Array]:
    """Returns A with the first principal axes of the weight's inputs, and B zero.

    They are the right singular vectors of the centred inputs, as in
    PEFT's `init_lora_weights="eva"`.

    Args:
      key: not used.
      w: the weight, of which only the shape is used.
      spec: axes and rank.
      dtype: dtype of both factors.
      moments: of the inputs, from `jlora.activation_statistics`.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> x = np.array([[0.0, 5.0, 0.0], [0.0, -5.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
      >>> moments = InputMoments(x.T @ x, x.sum(axis=0), np.float32(3))
      >>> w, spec = np.zeros((3, 4), np.float32), Spec(rank=1, alpha=1.0)
      >>> init = jax.jit(eva, static_argnums=(2, 3))
      >>> a, b = map(np.asarray, init(jax.random.key(0), w, spec, np.float32, moments))
      >>> abs(a[:, 0]).round(3)  # the second feature varies most
      array([0., 1., 0.], dtype=float32)

    References:
      Paischer et al., 2024, EVA, https://arxiv.org/abs/2410.07170
    """
    del key
    n, n_in, n_out = spec.axes.sizes(w.shape)
    axes, _ = principal(moments)
    a = axes.reshape(n, n_in, n_in)[..., : spec.rank]
    return shaped(a, jnp.zeros((n, spec.rank, n_out)), spec, w.shape, dtype)
