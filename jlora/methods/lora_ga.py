"""LoRA-GA: the first step of LoRA goes where a full fine-tune's first step would."""

from typing import Any

import jax
import jax.numpy as jnp

from ..factors import Spec
from .init import low_rank_svd, matrices, shaped

GAMMA = 16  # PEFT's `stable_gamma`


def lora_ga(
    key: jax.Array, w: Any, spec: Spec, dtype: jnp.dtype, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns A and B from the singular vectors of the weight's gradient.

    With `gradient = U S Vᵀ`, `a = U[:, :r]` and
    `b = out^(1/4) / sqrt(16) S[r:2r] V[:, r:2r]ᵀ`, as PEFT's
    `init_lora_weights="lora_ga"` with its defaults `direction="ArB2r"` and
    `scale="stable"`. PEFT keeps the singular values in B, the paper does not.

    Args:
      key: PRNG key, consumed by the randomised decomposition (of rank `4r`).
      w: the weight, of which only the shape is used.
      spec: axes and rank; `2 * rank` must fit into `min(fan_in, fan_out)`.
      dtype: dtype of both factors.
      gradient: mean gradient of the loss, from `jlora.gradient_statistics`.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> w, gradient = jnp.zeros((4, 4)), jnp.diag(jnp.array([4.0, 3, 2, 1]))
      >>> spec = Spec(rank=2, alpha=2.0)
      >>> a, b = lora_ga(jax.random.key(0), w, spec, jnp.float32, gradient)
      >>> jnp.round(abs(a.T), 2).tolist()  # the directions of the two largest, 4 and 3
      [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]

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
