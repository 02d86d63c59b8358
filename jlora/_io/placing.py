"""Leaves read from disk, put where they shall lie; quantised on the way if asked."""

import contextlib
import functools
import math
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
    has_own_entries,
    is_quantized,
    like_dense,
    packing,
    repacked,
    shard_counts,
    shard_specs,
)

_PAGES = 2**18  # bytes from which an array gets pages of its own
_SLICE = 1 * 2**20  # bytes of an array to quantise at once

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
    # Neither way in the background, where leaves would wait in a queue.
    if encoder is None:
        return jax.block_until_ready(jax.device_put(x, where))
    if is_quantized(like) or not _is_host(where):
        _check_finite(path, x)
        mesh = getattr(where, "mesh", None)
        own = jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else None
        with own or contextlib.nullcontext():
            return jax.block_until_ready(encoder(jax.device_put(x, where)))
    return jax.tree.map(functools.partial(_put, where=where), encoded(path, x, encoder))


def encoded(path: str, x: np.ndarray, encoder: Encoder) -> Quantized:
    """Returns an array on the host quantised there, slice by slice if it is large.

    Raises:
      TreeError: if it holds NaN or infinity.
    """
    form = encoder(jax.ShapeDtypeStruct(x.shape, x.dtype))
    out = jax.tree.map(_empty, form)
    for cut in _slices(x, form, encoder):
        part = np.ascontiguousarray(x[cut])
        _check_finite(path, part)
        q = jax.block_until_ready(encoder(jax.device_put(part)))
        for own, new in zip(*map(jax.tree.leaves, (out, q)), strict=True):
            own[cut] = np.asarray(new)
    return out


def _slices(
    x: np.ndarray, form: Quantized, encoder: Encoder
) -> list[tuple[slice, ...]]:
    """Returns parts of an array that can be quantised one by one."""
    free = [i for i in range(x.ndim) if has_own_entries(form, i)]
    count = -(-x.nbytes // _SLICE)
    if count < 2 or not free or is_quantized(form.scales):
        return [()]
    axis = max(free, key=lambda i: x.shape[i])
    step = -(-x.shape[axis] // count)
    shape = [step if i == axis else n for i, n in enumerate(x.shape)]
    part = encoder(jax.ShapeDtypeStruct(tuple(shape), x.dtype))
    if jax.tree.structure(part) != jax.tree.structure(form):
        return [()]
    before = (slice(None),) * axis
    return [(*before, slice(n, n + step)) for n in range(0, x.shape[axis], step)]


def _empty(form: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an array of zeros in pages of its own, if it is large.

    Between arrays that stay, the heap keeps holes of those that do not: a third of the
    model that is read.
    """
    size = math.prod(form.shape) * form.dtype.itemsize
    if size < _PAGES:
        return np.zeros(form.shape, form.dtype)
    return np.frombuffer(mmap.mmap(-1, size), form.dtype).reshape(form.shape)


def _check_finite(path: str, x: np.ndarray) -> None:
    if not is_finite(x):
        raise TreeError(f"Not quantised: {path!r} holds NaN or infinity.")


def _is_host(where: Any) -> bool:
    """Returns whether an array lies on one device that is the host."""
    devices = jax.devices()[:1] if where is None else [*where.device_set]
    return len(devices) == 1 and devices[0].platform == "cpu"


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
