"""LoRA-GA: the first step of LoRA goes where a full fine-tune's first step would."""

import jax
import jax.numpy as jnp

from ..factors import Array, Spec
from .init import low_rank_svd, matrices, shaped

GAMMA = 16  # PEFT's `stable_gamma`


def lora_ga(
    key: jax.Array, w: Array, spec: Spec, dtype: jnp.dtype, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns A and B from the singular vectors of the weight's gradient.

    With `gradient = U S Vᵀ`, `a = U[:, :r]` and
    `b = out^(1/4) / sqrt(16) S[r:2r] V[:, r:2r]ᵀ`, as PEFT's
    `init_lora_weights="lora_ga"` with its defaults `direction="ArB2r"` and
    `scale="stable"`. PEFT keeps the singular values in B; the paper does not.

    Args:
      key: PRNG key, consumed by the randomised decomposition (of rank `4r`).
      w: the weight, of which only the shape is used.
      spec: axes and rank; `2 * rank` must fit into `min(fan_in, fan_out)`.
      dtype: dtype of both factors.
      gradient: mean gradient of the loss, from `jlora.gradient_statistics`.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> gradient = np.diag(np.array([4.0, 3.0, 2.0, 1.0], np.float32))
      >>> w, spec = np.zeros_like(gradient), Spec(rank=2, alpha=2.0)
      >>> init = jax.jit(lora_ga, static_argnums=(2, 3))
      >>> found = init(jax.random.key(0), w, spec, np.float32, gradient)
      >>> a, b = map(np.asarray, found)
      >>> abs(a.T).round(2)  # the directions of the two largest, 4 and 3
      array([[1., 0., 0., 0.],
             [0., 1., 0., 0.]], dtype=float32)

    References:
      Wang et al., 2024, LoRA-GA, https://arxiv.org/abs/2407.05000
    """
    flat, rank = matrices(gradient, spec.axes), spec.rank
    _, n_in, n_out = flat.shape
    u, s, vt = low_rank_svd(key, flat, min(4 * rank, n_in, n_out), n_iter=4)
    second = slice(rank, 2 * rank)
    gain = n_out**0.25 / GAMMA**0.5
    b = gain * s[:, second, None] * vt[:, second]
    return shaped(u[..., :rank], b, spec, w.shape, dtype)
