"""AdaLoRA: the update as a singular value decomposition whose rank can shrink.

References:
  Zhang et al., 2023, AdaLoRA, https://arxiv.org/abs/2303.10512
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..factors import Factors, Spec
from .method import LeafAxes, Method, Shape, lora_axes

DEVIATION = 0.02  # of the singular vectors at the start, as in the authors' code


def _pair(factors: Factors) -> tuple[Any, Any]:
    """The singular values, `magnitude`, scale the columns of A."""
    axes = factors.spec.axes
    n_batch = len(axes.batch)
    values = jnp.expand_dims(
        factors.magnitude, [n_batch + i for i in range(len(axes.fan_in))]
    )
    a = factors.a
    return a * jnp.broadcast_to(values.astype(a.dtype), a.shape), factors.b


def _axes(spec: Spec) -> LeafAxes:
    return {**lora_axes(spec), "magnitude": (*spec.axes.batch, None)}


def _start(key: jax.Array, shape: Shape, spec: Spec, dtype: jnp.dtype) -> Factors:
    """Singular vectors normal with deviation 0.02, singular values zero."""
    shapes = adalora.shapes(spec, shape)
    of_a, of_b = jax.random.split(key)
    return Factors(
        DEVIATION * jax.random.normal(of_a, shapes["a"], dtype),
        DEVIATION * jax.random.normal(of_b, shapes["b"], dtype),
        spec,
        jnp.zeros(shapes["magnitude"], dtype),
    )


adalora = Method(
    axes=_axes,
    pair=_pair,
    start=_start,
)
