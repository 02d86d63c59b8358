"""VeRA: random matrices that all weights of a shape share, and two trained vectors.

References:
  Kopiczko et al., 2023, VeRA, https://arxiv.org/abs/2310.11454
"""

import math

import jax
import jax.numpy as jnp

from ..factors import Factors, Leaf, Spec
from .method import LeafAxes, Method, Shape

INITIAL = 0.1  # of the vector along the rank; the one along the fan-out is zero


def shared(spec: Spec, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the frozen A `[*fan_in, rank]` and B `[rank, *fan_out]`.

    Uniform with He's bound, drawn from `spec.seed`. Weights of one shape share them.
    No file holds them, and under `jit` they are drawn once.
    """
    axes, rank = spec.axes, spec.rank
    fan_in = tuple(spec.shape[i] for i in axes.fan_in)
    fan_out = tuple(spec.shape[i] for i in axes.fan_out)
    of_a, of_b = jax.random.split(jax.random.key(spec.seed))

    def draw(key: jax.Array, shape: Shape, fan: int) -> jax.Array:
        bound = math.sqrt(6 / fan)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    a = draw(of_a, (*fan_in, rank), math.prod(fan_in))
    return a, draw(of_b, (rank, *fan_out), rank)


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns the shared A and B, their columns scaled by the two vectors."""
    axes = factors.spec.axes
    n_batch = len(axes.batch)
    a, b = shared(factors.spec, factors.a.dtype)
    along_rank = [n_batch + i for i in range(len(axes.fan_in))]

    def scaled(matrix: jax.Array, vector: jax.Array, absent: list[int]) -> jax.Array:
        shape = (*factors.a.shape[:n_batch], *matrix.shape)
        vector = jnp.expand_dims(vector, absent)
        return jnp.broadcast_to(matrix, shape) * jnp.broadcast_to(vector, shape)

    return scaled(a, factors.a, along_rank), scaled(b, factors.b, [n_batch])


def _axes(spec: Spec) -> LeafAxes:
    axes = spec.axes
    return {"a": (*axes.batch, None), "b": (*axes.batch, *axes.fan_out)}


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    del key
    shapes = vera.shapes(spec, w.shape)
    return Factors(
        jnp.full(shapes["a"], INITIAL, dtype), jnp.zeros(shapes["b"], dtype), spec
    )


vera = Method(
    axes=_axes,
    pair=_pair,
    init=_init,
)
