"""Leaves read from disk, put where they shall lie; quantised on the way if asked."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.quantize import encoders
from .._core.tree import placed_as
from .._numerics import is_finite
from .._plan.plan import Plan
from ..errors import ConfigError, TreeError
from ..factors import Leaf
from ..quantised import (
    KINDS,
    Quantized,
    encode_like,
    is_quantized,
    like_dense,
    packing,
    repacked,
    shard_counts,
    shard_specs,
)

Quantize = str | Mapping[str, Any] | None  # a kind, or options of `jlora.quantize`
Encoder = Callable[[Any], Quantized]


def encoders_for(
    leaves: Mapping[str, Leaf], plan: Plan | None, quantize: Quantize
) -> dict[str, Encoder]:
    """Returns for each leaf that shall be quantised the function that does it.

    Args:
      leaves: the parameters by path; `Quantized` ones say themselves how.
      plan: see `jlora.quantize`.
      quantize: a kind, options of `jlora.quantize`, or None.

    Raises:
      ConfigError: if `quantize` is none of these, or `plan` comes without it.
    """
    found: dict[str, Encoder] = {
        path: functools.partial(_coded_as, x)
        for path, x in leaves.items()
        if is_quantized(x)
    }
    if quantize is None:
        if plan is not None:
            raise ConfigError("plan= says what to quantise: give quantize= with it.")
        return found
    options = {"kind": quantize} if isinstance(quantize, str) else quantize
    shapes = {path: like_dense(x) for path, x in leaves.items()}
    storage = "native" if jax.default_backend() == "tpu" else "packed"
    try:
        return found | encoders(shapes, plan, **{"storage": storage, **options})
    except TypeError as error:
        raise ConfigError(
            "quantize takes a kind or a mapping of the options of jlora.quantize, got "
            f"{quantize!r}: {error}."
        ) from error


def _coded_as(q: Quantized, x: jax.Array) -> Quantized:
    made = encode_like(x, q)
    return jax.tree.map(lambda own, x: placed_as(own, x), q, made)


def placed(path: str, x: Any, like: Leaf, encoder: Encoder | None = None) -> Leaf:
    """Returns a leaf on its devices.

    Args:
      path: its path.
      x: an array on the host, or `Quantized` of such.
      like: what the leaf shall be like; where that has a sharding, `x` is put there.
      encoder: quantises it; None leaves it as it is.

    Raises:
      TreeError: if an array to be quantised holds NaN or infinity, or if shards would
        cut blocks.
    """
    where = getattr(like, "sharding", None)
    if is_quantized(x):
        return _placed(path, x, where)
    if encoder is not None and not is_finite(x):
        raise TreeError(f"Not quantised: {path!r} holds NaN or infinity.")
    out = jnp.asarray(x) if where is None else jax.device_put(x, where)
    return out if encoder is None else encoder(out)


def _placed(path: str, q: Quantized, where: Any) -> Quantized:
    if not isinstance(where, jax.sharding.NamedSharding):
        put = jnp.asarray if where is None else functools.partial(_put, where=where)
        return _stored(jax.tree.map(put, q), where)
    entries = [*where.spec, *(None for _ in range(q.ndim - len(where.spec)))]
    sizes = dict(where.mesh.shape)
    how = q.packing
    if how is not None:
        count = shard_counts(entries, sizes)[how.axis]
        again = packing(how.axis, q.shape[how.axis], count)
        q = q if how.run % again.run == 0 and count == 1 else repacked(q, again)
    specs = shard_specs(q, entries, sizes)
    if isinstance(specs, str):
        raise TreeError(
            f"{path!r} cannot lie as its sharding says: {specs}. Lay it out over "
            "another axis, or quantise it with another block=."
        )
    put = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(where.mesh, spec)), q, specs
    )
    return _stored(put, where)


def _put(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    return jax.device_put(x, where)


def _stored(q: Quantized, where: Any) -> Quantized:
    """Returns it with a code of four bits an entry where it lies on a TPU."""
    devices = jax.devices() if where is None else where.device_set
    on_tpu = next(iter(devices)).platform == "tpu"
    if on_tpu and KINDS[q.kind].bits == 4:
        return repacked(q, None)
    return q
