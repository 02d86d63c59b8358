"""Trained rows: single rows of an embedding table, as for new tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from ..factors import Factors, Spec
from .method import LeafAxes, Method, Shape, lora_axes


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """A picks the rows, one-hot, and B is what is added to them."""
    spec = factors.spec
    (axis,) = spec.axes.fan_in
    ids = jnp.asarray(spec.rows)
    a = jax.nn.one_hot(ids, spec.shape[axis], axis=0, dtype=factors.b.dtype)
    return a, factors.b


def _dense(factors: Factors, dtype: Any) -> jax.Array:
    """The rows at their places in a table of zeros."""
    spec = factors.spec
    (axis,) = spec.axes.fan_in
    table = jnp.zeros(spec.shape, dtype)
    places = (*(slice(None) for _ in range(axis)), jnp.asarray(spec.rows))
    rows = jnp.moveaxis(factors.b.astype(dtype), 0, axis)
    return table.at[places].set(rows, unique_indices=True)


def _axes(spec: Spec) -> LeafAxes:
    return {"b": lora_axes(spec)["b"]}


def _start(key: jax.Array, shape: Shape, spec: Spec, dtype: jnp.dtype) -> Factors:
    del key
    return Factors(None, jnp.zeros(token_rows.shapes(spec, shape)["b"], dtype), spec)


token_rows = Method(axes=_axes, pair=_pair, start=_start, dense=_dense)
