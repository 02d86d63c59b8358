"""OLoRA: an orthonormal B from the weight's QR decomposition."""

import jax
import jax.numpy as jnp

from ..factors import Array, Spec
from .init import matrices, shaped


def olora(
    key: jax.Array, w: Array, spec: Spec, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns A, and B with orthonormal rows, from the QR decomposition of `wᵀ`.

    With `wᵀ = Q R`, `b = Q[:, :r]ᵀ` and `a = R[:r]ᵀ`, as PEFT's
    `init_lora_weights="olora"`: the scale is not divided out.

    Args:
      key: not used.
      w: the weight.
      spec: axes and rank.
      dtype: dtype of both factors.

    Returns:
      `(a, b)` with shapes `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`.

    Examples:
      >>> import jax, numpy as np
      >>> w = np.arange(12, dtype=np.float32).reshape(3, 4)
      >>> spec = Spec(rank=2, alpha=4.0)
      >>> init = jax.jit(olora, static_argnums=(2, 3))
      >>> a, b = map(np.asarray, init(jax.random.key(0), w, spec, np.float32))
      >>> np.allclose(b @ b.T, np.eye(2), atol=1e-5)
      True

    References:
      Büyükakyüz, 2024, OLoRA, https://arxiv.org/abs/2406.01775
    """
    del key
    q, r = jnp.linalg.qr(matrices(w, spec.axes).swapaxes(1, 2))
    a = r[:, : spec.rank].swapaxes(1, 2)
    b = q[..., : spec.rank].swapaxes(1, 2)
    return shaped(a, b, spec, w.shape, dtype)
