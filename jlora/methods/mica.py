"""MiCA: B is fixed, the weight's least singular vectors; A is trained.

References:
  Rüdiger and Raschka, 2026, MiCA, https://arxiv.org/abs/2604.01694
"""

import jax
import jax.numpy as jnp

from ..factors import Factors, Leaf, Spec
from .init import dense, matrices, shaped
from .method import Method


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    """Returns A zero, and B the right singular vectors of the least singular values."""
    del key
    flat = matrices(dense(w), spec.axes)
    _, _, vt = jnp.linalg.svd(flat, full_matrices=False)
    a = jnp.zeros((*flat.shape[:2], spec.rank))
    return Factors(*shaped(a, vt[:, -spec.rank :], spec, w.shape, dtype), spec)


mica = Method(init=_init, fixed=("b",))
