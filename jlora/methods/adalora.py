"""AdaLoRA: the update as a singular value decomposition whose rank can shrink.

References:
  Zhang et al., 2023, AdaLoRA, https://arxiv.org/abs/2303.10512
"""

import jax
import jax.numpy as jnp

from ..factors import Factors, Leaf, Spec
from ..quantised import whole
from .method import LeafAxes, Method, lora_axes

DEVIATION = 0.02  # of the initial singular vectors, as in the authors' code


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns A with its columns scaled by the singular values, `magnitude`, and B."""
    axes = factors.spec.axes
    n_batch = len(axes.batch)
    values = jnp.expand_dims(
        whole(factors.magnitude), [n_batch + i for i in range(len(axes.fan_in))]
    )
    a = factors.a
    return a * jnp.broadcast_to(values.astype(a.dtype), a.shape), factors.b


def _axes(spec: Spec) -> LeafAxes:
    return {**lora_axes(spec), "magnitude": (*spec.axes.batch, None)}


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    """Returns normal singular vectors and singular values of zero."""
    shapes = adalora.shapes(spec, w.shape)
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
    init=_init,
)
