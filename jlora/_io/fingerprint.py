"""Fingerprints, which tell one model's weights from another's without keeping them."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_known
from ..factors import PyTree
from ..paths import flatten
from ..quantised import KINDS, is_quantized, unpack
from ..transform.stage import is_array


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Paths, shapes, dtypes and a hash of the numbers of a model's leaves.

    Attributes:
      leaves: what each leaf is and its hash, by path.

    Examples:
      >>> import numpy as np
      >>> one, other = fingerprint({"w": np.zeros(2)}), fingerprint({"w": np.ones(2)})
      >>> one == fingerprint({"w": np.zeros(2)}), one == other
      (True, False)
    """

    leaves: Mapping[str, str]


def fingerprint(params: PyTree) -> Fingerprint:
    """Returns the fingerprint of a model, the same on any number of devices.

    The hash is computed where the weights are, sharded or not, in one pass over them.
    It has 64 bits for each leaf, which tell every accidental change; it does not
    protect against somebody who wants equal ones. Of a quantised leaf, codes and scales
    are hashed, wherever two codes share a byte. Leaves that are missing in `frozen`
    are left out, so that `frozen` and the whole parameters agree on what both have.

    Args:
      params: any pytree of arrays, such as `frozen`.

    Examples:
      >>> import jax.numpy as jnp
      >>> fingerprint({"w": jnp.ones((2, 3))}).leaves
      {'w': 'float32[2, 3] 6fdfe4575c17447a'}
    """
    check_known("checkpoint.fingerprint", params)
    leaves, _ = flatten(params)
    arrays = {path: _arrays(x) for path, x in leaves.items() if is_array(x)}
    words = jax.device_get([[*map(_words, own)] for own in arrays.values()])
    hashes = dict(zip(arrays, map(_joined, words), strict=True))
    return Fingerprint(
        {
            path: f"{_form(x)} {hashes[path]}" if path in hashes else repr(x)
            for path, x in leaves.items()
        }
    )


def _arrays(x: Any) -> list[Any]:
    """Returns the arrays of a leaf; of four bits each code by itself."""
    if not is_quantized(x):
        return [x]
    codes = x.codes
    if x.packing is not None:
        codes = unpack(codes, x.packing)
    elif KINDS[x.kind].bits == 4:
        codes = codes.astype(jnp.uint8)
    rest = [y for y in (x.scales, x.offset) if y is not None]
    return [codes, *(own for y in rest for own in _arrays(y))]


def _words(x: Any) -> jax.Array:
    """Returns the hash of an array.

    It waits for a sum over several devices. On CPUs, sums that are under way at the
    same time can wait for each other for ever, within a process and between several.
    """
    words = _hash(_bits(x))
    several = isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
    return jax.block_until_ready(words) if several else words


def _joined(words: Sequence[Any]) -> str:
    """Returns the hash of a leaf from those of its arrays."""
    one, *others = ((int(a) << 32) | int(b) for a, b in words)
    for other in others:
        one = (one * 0x9E3779B97F4A7C15 + other) % 2**64
    return f"{one:016x}"


def _form(x: Any) -> str:
    told = f"{x.dtype}{list(x.shape)}"
    if not is_quantized(x):
        return told
    double = f", scales in {x.scales.kind}" if is_quantized(x.scales) else ""
    return f"{x.kind} of {told} in blocks of {list(x.blocks)}{double}"


def as_fingerprint(params: PyTree | Fingerprint) -> Fingerprint:
    """Returns the fingerprint of parameters, or the one given."""
    return params if isinstance(params, Fingerprint) else fingerprint(params)


def differences(
    saved: Mapping[str, str], base: Fingerprint, without: Collection[str]
) -> list[str]:
    """Returns in words where `base` is not the model of the fingerprint `saved`.

    Leaves in `without`, those trained in full, do not belong to the base.
    """
    found = []
    for path in sorted({*saved, *base.leaves} - {*without}):
        was, now = saved.get(path), base.leaves.get(path)
        if was is None or now is None:
            found.append(f"{path!r} is " + ("not in the base" if was else "new in it"))
        elif was.rpartition(" ")[0] != now.rpartition(" ")[0]:
            found.append(_other(path, now.rpartition(" ")[0], was.rpartition(" ")[0]))
        elif was != now:
            found.append(f"{path!r} has other numbers")
    return found


def _other(path: str, now: str, was: str) -> str:
    """Returns in words that a leaf is of another form than it was."""
    told = f"{path!r} is {now}, was {was}"
    (kind, of, _), (_, of_now, _) = (form.partition(" of ") for form in (was, now))
    if of and not of_now:
        return f"{told} (quantise it as then, with jlora.quantize, kind={kind!r})"
    return f"{told} (give the dense weights)" if of_now and not of else told


def _bits(x: jax.Array | np.ndarray | np.generic) -> jax.Array | np.ndarray:
    """Returns the bits of an array as unsigned integers of at most four bytes."""
    if isinstance(x, np.ndarray | np.generic):
        x = np.ascontiguousarray(x)[..., None]
        return x.view(f"u{min(x.dtype.itemsize, 4)}")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    return _as_unsigned(x)


@jax.jit
def _as_unsigned(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_ or jnp.iinfo(jnp.uint8).bits > _width(x.dtype):
        return x.astype(jnp.uint8)[..., None]
    words = {8: jnp.uint8, 16: jnp.uint16}.get(_width(x.dtype), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, words)
    return bits if _width(x.dtype) > 32 else bits[..., None]


def _width(dtype: np.dtype) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if dtype != jnp.bool_ else 8


@jax.jit
def _hash(bits: jax.Array) -> jax.Array:
    """Returns two sums over the words, each of which is mixed with its place."""
    words = bits.astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place += iota * jnp.uint32(stride)
    mixed = _mix(words ^ _mix(place + jnp.uint32(1)))
    again = _mix(mixed + jnp.uint32(0x9E3779B9))
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in (mixed, again)])


def _mix(x: jax.Array) -> jax.Array:
    """Returns MurmurHash3's finalizer of each word."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
