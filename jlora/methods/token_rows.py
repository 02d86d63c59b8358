"""Token rows: only some rows of an embedding table are trained, as for new tokens."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..factors import Factors, Leaf, Spec
from .method import LeafAxes, Method, lora_axes


def _pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns the one-hot rows as A, and what is added to them as B."""
    spec = factors.spec
    (axis,) = spec.axes.fan_in
    ids = jnp.asarray(spec.rows)
    a = jax.nn.one_hot(ids, spec.shape[axis], axis=0, dtype=factors.b.dtype)
    return a, factors.b


def _dense(factors: Factors, dtype: DTypeLike) -> jax.Array:
    """Returns a table of zeros with the rows at their places."""
    spec = factors.spec
    (axis,) = spec.axes.fan_in
    table = jnp.zeros(spec.shape, dtype)
    places = (*(slice(None) for _ in range(axis)), jnp.asarray(spec.rows))
    rows = jnp.moveaxis(factors.b.astype(dtype), 0, axis)
    return table.at[places].set(rows, unique_indices=True)


def _axes(spec: Spec) -> LeafAxes:
    return {"b": lora_axes(spec)["b"]}


def _init(key: jax.Array, w: Leaf, spec: Spec, dtype: jnp.dtype) -> Factors:
    del key
    return Factors(None, jnp.zeros(token_rows.shapes(spec, w.shape)["b"], dtype), spec)


token_rows = Method(axes=_axes, pair=_pair, init=_init, dense=_dense)
