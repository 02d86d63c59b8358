"""CorDA: the principal part of a weight, weighted by how large its inputs are."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from .._numerics import HIGHEST, sqrt_halves
from ..factors import Array, Spec
from .init import matrices, shaped
from .moments import InputMoments


def corda(
    key: jax.Array,
    w: Array,
    spec: Spec,
    dtype: jnp.dtype,
    moments: InputMoments,
    *,
    mode: Literal["ipm", "kpm"] = "ipm",
) -> tuple[jax.Array, jax.Array]:
    """Returns A and B from the decomposition of the inputs' moments times the weight.

    With `C` the damped second moments of the inputs and `C w = U S Vᵀ`,
    `a = C⁻¹ U_r sqrt(S_r / scale)` and `b = sqrt(S_r / scale) V_rᵀ`, as PEFT's
    `init_lora_weights="corda"`. `C` is divided by the mean of its diagonal, so inputs
    that are alike in all directions give PiSSA. PEFT divides each batch by its largest
    entry instead, which moves a factor between A and B.

    Args:
      key: not used.
      w: the weight.
      spec: axes, rank and scale.
      dtype: dtype of both factors.
      moments: of the inputs, from `jlora.activation_statistics`.
      mode: `"ipm"`, instruction previewed: the r largest components, to learn the task
        of these inputs; `"kpm"`, knowledge preserved: the r smallest, to keep what the
        model knows about them.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> second = np.diag(np.array([9.0, 1.0, 1.0], np.float32))
      >>> moments = InputMoments(second, np.zeros(3, np.float32), np.float32(9))
      >>> w, spec = np.eye(3, 4, dtype=np.float32), Spec(rank=1, alpha=1.0)
      >>> init = jax.jit(corda, static_argnums=(2, 3))
      >>> a, b = map(np.asarray, init(jax.random.key(0), w, spec, np.float32, moments))
      >>> abs((a @ b)[:, 0]).round(3)  # of equal rows the one with the largest inputs
      array([1., 0., 0.], dtype=float32)

    References:
      Yang et al., 2024, CorDA, https://arxiv.org/abs/2406.05223
    """
    del key
    flat, rank = matrices(w, spec.axes), spec.rank
    n, n_in, _ = flat.shape
    second = moments.second.reshape(n, n_in, n_in).astype(flat.dtype)
    c, inverse = jax.vmap(_damped)(second)
    product = jnp.matmul(c, flat, precision=HIGHEST)
    u, s, vt = jnp.linalg.svd(product, full_matrices=False)
    k = s.shape[-1]
    part = slice(0, rank) if mode == "ipm" else slice(k - rank, k)
    u = jnp.matmul(inverse, u[..., part], precision=HIGHEST)
    a, b = sqrt_halves(u, s[..., part], vt[..., part, :], spec.scale)
    return shaped(a, b, spec, w.shape, dtype)


def _damped(second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a matrix with a number added to its diagonal, and its inverse.

    The matrix is scaled to a diagonal of mean 1. The number added to its diagonal is
    0.01 at first, and doubles until the matrix times its inverse is the identity up to
    an error of 0.05.
    """
    eye = jnp.eye(second.shape[0], dtype=second.dtype)
    mean = jnp.mean(jnp.diagonal(second))
    c = second / jnp.maximum(mean, jnp.finfo(second.dtype).tiny)

    def inverted(damp: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = jnp.linalg.inv(c + damp * eye)
        product = jnp.matmul(c + damp * eye, inverse, precision=HIGHEST)
        return inverse, jnp.linalg.norm(product - eye)

    def is_poor(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        damp, _, error = state
        return ~(error < 0.05) & (damp < 1e6)

    def double(state: tuple[jax.Array, jax.Array, jax.Array]):
        damp = 2 * state[0]
        return damp, *inverted(damp)

    first = jnp.asarray(0.01, second.dtype)
    damp, inverse, _ = lax.while_loop(is_poor, double, (first, *inverted(first)))
    return c + damp * eye, inverse
