"""LoftQ: A and B make up for what quantising the weight loses."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .._numerics import HIGHEST, at_least_float32, sqrt_halves
from ..factors import Array, Leaf, Spec
from ..quantised import is_quantized
from .init import like_weight, matrices, shaped


def loftq(
    key: jax.Array,
    w: Array,
    spec: Spec,
    dtype: jnp.dtype,
    quantize: Callable[[jax.Array], Leaf],
    *,
    n_iter: int = 1,
) -> tuple[jax.Array, jax.Array, Leaf]:
    """Returns A, B and a base: the quantised weight, and its best rank-r repair.

    Each iteration sets `base = quantize(w - scale * a @ b)`, and then `scale * a @ b`
    to the best rank-r part of `w - base`. PEFT's `init_lora_weights="loftq"` does not
    divide by the scale, so its product is off by that factor.

    Args:
      key: not used.
      w: the weight.
      spec: axes, rank and scale.
      dtype: dtype of both factors.
      quantize: `array -> array` of the weight's shape, float32 to float32: the values
        that the quantised weight stands for; or `array -> Quantized`.
      n_iter: how many iterations. More are not always better: check the error that is
        left.

    Returns:
      `(a, b, base)`; shapes `[*batch, *fan_in, rank]`, `[*batch, rank, *fan_out]` and
      that of the weight. The base is `Quantized` if `quantize` returns that.

    Examples:
      >>> import jax, numpy as np
      >>> w = np.arange(12, dtype=np.float32).reshape(3, 4)
      >>> spec = Spec(rank=2, alpha=4.0)
      >>> init = jax.jit(loftq, static_argnums=(2, 3, 4))
      >>> fours = lambda x: 4 * (x // 4)
      >>> found = init(jax.random.key(0), w, spec, np.float32, fours)
      >>> a, b, base = map(np.asarray, found)
      >>> base[2], np.allclose(base + spec.scale * a @ b, w, atol=1e-4)
      (array([8., 8., 8., 8.], dtype=float32), True)

    References:
      Li et al., 2023, LoftQ, https://arxiv.org/abs/2310.08659
    """
    del key
    wide, rank = at_least_float32(w.dtype), spec.rank
    whole = jnp.asarray(w).astype(wide)
    base: Leaf = whole
    rest = whole
    a = b = None
    for _ in range(n_iter):
        base = quantize(rest)
        if is_quantized(base):
            base = dataclasses.replace(base, dtype=np.dtype(w.dtype))
        values = base.dense() if is_quantized(base) else base
        lost = matrices(whole - values.astype(wide), spec.axes)
        u, s, vt = jnp.linalg.svd(lost, full_matrices=False)
        a, b = sqrt_halves(u[..., :rank], s[..., :rank], vt[..., :rank, :], spec.scale)
        repair = spec.scale * jnp.matmul(a, b, precision=HIGHEST)
        rest = whole - like_weight(repair, spec.axes, w.shape)
    assert a is not None
    assert b is not None
    base = base if is_quantized(base) else base.astype(w.dtype)
    return *shaped(a, b, spec, w.shape, dtype), base
