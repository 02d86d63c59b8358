"""PiSSA: A and B are the principal part of the weight; the rest stays frozen."""

import jax
import jax.numpy as jnp

from .._numerics import sqrt_halves
from ..factors import Array, Spec
from .init import low_rank_svd, matrices, shaped


def pissa(
    key: jax.Array, w: Array, spec: Spec, dtype: jnp.dtype, *, n_iter: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns A and B with `scale * a @ b` the best rank-r part of the weight.

    With `w = U S Vᵀ`, `a = U_r sqrt(S_r / scale)` and `b = sqrt(S_r / scale) V_rᵀ`, as
    PEFT's `init_lora_weights="pissa"`; `n_iter` gives `"pissa_niter_<n>"`.

    Args:
      key: PRNG key, consumed; only the randomised decomposition uses it.
      w: the weight.
      spec: axes, rank and scale.
      dtype: dtype of both factors.
      n_iter: rounds of subspace iteration of a randomised decomposition, which costs
        `O(in * out * rank)`; None for the exact one, `O(in * out * min(in, out))`.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> w = np.arange(12, dtype=np.float32).reshape(3, 4)
      >>> spec = Spec(rank=2, alpha=4.0)
      >>> init = jax.jit(pissa, static_argnums=(2, 3))
      >>> a, b = map(np.asarray, init(jax.random.key(0), w, spec, np.float32))
      >>> np.allclose(spec.scale * a @ b, w, atol=1e-4)  # this weight has rank 2
      True

    References:
      Meng et al., 2024, PiSSA, https://arxiv.org/abs/2404.02948
    """
    flat, rank = matrices(w, spec.axes), spec.rank
    if n_iter is None:
        u, s, vt = jnp.linalg.svd(flat, full_matrices=False)
    else:
        u, s, vt = low_rank_svd(key, flat, rank, n_iter)
    a, b = sqrt_halves(u[..., :rank], s[..., :rank], vt[..., :rank, :], spec.scale)
    return shaped(a, b, spec, w.shape, dtype)
