"""Leaves read from disk, put where they shall lie; quantised on the way if asked."""

import functools
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from .._core.quantize import encoders
from .._core.tree import coded_as
from .._numerics import is_finite
from .._plan.plan import Plan
from ..errors import ConfigError, TreeError
from ..factors import Leaf
from ..quantised import (
    KINDS,
    Quantized,
    is_quantized,
    like_dense,
    packing,
    repacked,
    shard_counts,
    shard_specs,
)

_PAGES = 2**18  # bytes from which an array gets pages of its own

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
        path: functools.partial(coded_as, x)
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
    if encoder is None:
        return jax.device_put(x, where)
    check_finite(path, x)
    out = jax.device_put(x, where)
    # Not in the background, where leaves to be quantised would wait in a queue.
    return jax.tree.map(_set_apart, jax.block_until_ready(encoder(out)))


def check_finite(path: str, x: np.ndarray) -> None:
    """Raises a TreeError if an array to be quantised holds NaN or infinity."""
    if not is_finite(x):
        raise TreeError(f"Not quantised: {path!r} holds NaN or infinity.")


def _set_apart(x: jax.Array) -> jax.Array:
    """Returns an array on the host in pages of its own.

    Between arrays that stay, the heap keeps holes of those that do not: a third of the
    model that is read.
    """
    devices = x.sharding.device_set
    if x.nbytes < _PAGES or len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return x
    own = np.frombuffer(mmap.mmap(-1, x.nbytes), x.dtype).reshape(x.shape)
    own[...] = np.asarray(x)
    return jax.device_put(own, x.sharding)


def _placed(path: str, q: Quantized, where: Any) -> Quantized:
    if not isinstance(where, jax.sharding.NamedSharding):
        put = functools.partial(_put, where=where)
        return _stored(jax.tree.map(put, q), where)
    entries = [*where.spec, *(None for _ in range(q.ndim - len(where.spec)))]
    sizes = dict(where.mesh.shape)
    how = q.packing
    count = 1 if how is None else shard_counts(entries, sizes)[how.axis]
    if how is not None and count > 1:  # each shard holds both codes of a byte
        q = repacked(q, packing(how.axis, q.shape[how.axis], count))
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


def _put(x: np.ndarray, where: Any) -> jax.Array:
    return jax.device_put(x, where)


def _stored(q: Quantized, where: Any) -> Quantized:
    """Returns it with a code of four bits an entry where it lies on a TPU."""
    devices = jax.devices() if where is None else where.device_set
    on_tpu = next(iter(devices)).platform == "tpu"
    if on_tpu and KINDS[q.kind].bits == 4:
        return repacked(q, None)
    return q
