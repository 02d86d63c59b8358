"""LoRA-XS: `w + s U S R Vᵀ`, of which only the small matrix R is trained.

References:
  Bałazy et al., 2024, LoRA-XS, https://arxiv.org/abs/2405.17604
"""

import math

import jax
import jax.numpy as jnp

from .._numerics import HIGHEST
from ..factors import Factors, Leaf, Spec
from ..quantised import whole
from .init import dense, matrices, shaped
from .method import LeafAxes, Method, lora_axes


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns A times R, `magnitude`, and B."""
    a, r = factors.a, factors.magnitude
    n_batch = len(factors.spec.axes.batch)
    rows = a.reshape(*a.shape[:n_batch], math.prod(a.shape[n_batch:-1]), a.shape[-1])
    mixed = jnp.matmul(rows, whole(r).astype(a.dtype), precision=HIGHEST)
    return mixed.reshape(a.shape), factors.b


def _axes(spec: Spec) -> LeafAxes:
    return {**lora_axes(spec), "magnitude": (*spec.axes.batch, None, None)}


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    """Returns A and B the largest singular vectors, A times their values; R zero."""
    del key
    flat = matrices(dense(w), spec.axes)
    u, s, vt = jnp.linalg.svd(flat, full_matrices=False)
    a = u[..., : spec.rank] * s[:, None, : spec.rank]
    a, b = shaped(a, vt[:, : spec.rank], spec, w.shape, dtype)
    r = jnp.zeros(lora_xs.shapes(spec, w.shape)["magnitude"], dtype)
    return Factors(a, b, spec, r)


lora_xs = Method(axes=_axes, pair=_pair, init=_init, fixed=("a", "b"))
