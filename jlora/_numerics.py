"""Numbers: the dtype and precision of sums, random keys by path, finiteness."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .factors import Array, Axes, FusedParts

Fault = type[Exception]  # the class of the errors that the caller's user sees
HIGHEST = jax.lax.Precision.HIGHEST
COMPLEX = {jnp.dtype("complex64"), jnp.dtype("complex128")}
K = TypeVar("K")
DOUBLE = {jnp.dtype("float64"), jnp.dtype("complex128")}


def at_least_float32(*dtypes: Any) -> Any:
    """Returns the dtype in which products and sums of `dtypes` are taken.

    It is complex if one of them is.
    """
    kinds = set(map(jnp.dtype, dtypes))
    if kinds.isdisjoint(COMPLEX):
        return jnp.float64 if jnp.dtype("float64") in kinds else jnp.float32
    return jnp.complex64 if kinds.isdisjoint(DOUBLE) else jnp.complex128


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns `x` in `dtype`; of a complex `x` the real part, if `dtype` is real."""
    return (x if jnp.dtype(dtype) in COMPLEX else jnp.real(x)).astype(dtype)


def dtype_of_sums(operands: Any, out: Any) -> Any:
    """Returns the dtype in which a product with the result dtype `out` sums.

    It is `out`, except where only one of `out` and the dtype of the operands is
    complex. Then `cast` the result to `out`.
    """
    same_kind = (jnp.dtype(operands) in COMPLEX) == (jnp.dtype(out) in COMPLEX)
    return out if same_kind else at_least_float32(operands)


@functools.lru_cache(maxsize=256)
def is_inexact(dtype: Any) -> bool:
    """Returns whether `dtype` is a real or complex floating-point dtype."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


@functools.lru_cache(maxsize=256)
def dtype_of_activation(x: Any, w: Any, out: Any) -> Any:
    """Returns the dtype in which an activation meets factors.

    It is the wider one of the activation's and the weight's, so the low-rank term is as
    exact as the base product. For integers the result's counts too. Below 16 bits no
    factor keeps enough digits.

    Args:
      x: dtype of the activation.
      w: dtype of the weight.
      out: dtype of their product.
    """
    among = [x, w] if is_inexact(x) else [w, out]
    inexact = {jnp.dtype(d) for d in among if is_inexact(d)}
    usable = {d for d in inexact if d.itemsize >= 2}
    return usable.pop() if len(usable) == 1 else at_least_float32(*usable)


def key_of_path(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one leaf, which depends on `key` and its path only."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def root_of_squares(x: Array) -> jax.Array:
    """Returns the root of the sum of the squares of all entries, of any axes.

    `jnp.linalg.norm` would flatten the array, which JAX refuses where it is cut along
    explicit axes of a mesh.
    """
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x))))


def sqrt_halves(
    u: jax.Array, s: jax.Array, vt: jax.Array, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns `u sqrt(s / scale)` and `sqrt(s / scale) vt`: an SVD as two factors."""
    half = jnp.sqrt(s / scale)
    return u * half[..., None, :], half[..., :, None] * vt


def is_finite(x: Array) -> bool:
    """Returns whether an array holds neither NaN nor infinity.

    A NumPy array is checked on the host, a JAX array on its device.

    Examples:
      >>> is_finite(np.ones(2)), is_finite(jnp.array([1.0, jnp.nan]))
      (True, False)
    """
    return not not_finite({"": x})


def not_finite(named: Mapping[K, Array]) -> list[K]:
    """Returns the names of the arrays that hold NaN or infinity.

    It waits for arrays on devices once, for all of them. While a function is traced,
    arrays with known numbers are looked at all the same; leave tracers out.
    """
    inexact = {k: x for k, x in named.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    # NumPy first: files are written without starting a device.
    on_host = {k: x for k, x in inexact.items() if isinstance(x, np.ndarray)}
    if len(on_host) == len(inexact):
        return [k for k, x in on_host.items() if not _all_finite(x)]
    # One by one: a program for all of thousands takes a minute to compile.
    with jax.ensure_compile_time_eval():
        finite = jax.device_get([_finite(x) for x in inexact.values()])
    return [k for k, good in zip(inexact, finite, strict=True) if not good]


def _all_finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(_widened(x)).all())


def _widened(x: np.ndarray) -> np.ndarray:
    """Returns `x` in a dtype of NumPy's own: it is slow on bfloat16 one by one."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def narrowed(name: str, x: np.ndarray, dtype: Any, fault: Fault) -> np.ndarray:
    """Returns an array on the host cast to `dtype`; all finite numbers stay finite.

    Raises:
      fault: if `dtype` does not hold a number of `x`; says which and what to write.

    Examples:
      >>> narrowed("w", np.array([1.5, np.inf]), "float16", ValueError)
      array([1.5, inf], dtype=float16)
      >>> narrowed("w", np.array([7e4]), "float16", ValueError)
      Traceback (most recent call last):
      ValueError: 'w' holds 70000, but float16 holds at most 65504. Choose bfloat16 or
      float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out = x.astype(dtype, copy=False)
    why = overflow(x, out)
    if why:
        raise fault(f"{name!r} {why}. Choose {wider(dtype)}.")
    return out


def wider(dtype: Any) -> str:
    """Returns in words which dtypes hold what `dtype` does not."""
    if float(jnp.finfo(dtype).max) < 1e38:
        return "bfloat16 or float32"
    return "float64, and switch on jax_enable_x64"


def filled(shape: Sequence[int], dtype: Any, pairs: Iterable[tuple[Any, Any]]) -> Any:
    """Returns zeros with `values` at `index`, for `(index, values)` of `pairs`.

    They are on a device if any of the values is.

    Examples:
      >>> filled((3,), np.float32, [(slice(1, 3), np.ones(2, np.float32))])
      array([0., 1., 1.], dtype=float32)
    """
    pairs = list(pairs)
    if any(isinstance(x, jax.Array) for _, x in pairs):
        return functools.reduce(
            lambda out, pair: out.at[pair[0]].set(pair[1]),
            pairs,
            jnp.zeros(shape, dtype),
        )
    out = np.zeros(shape, dtype)
    for index, values in pairs:
        out[index] = values
    return out


def on_device(name: str, x: np.ndarray, dtype: Any, fault: Fault) -> jax.Array:
    """Returns `narrowed` as a JAX array, which is float64 only if JAX has that on.

    Raises:
      fault: see `narrowed`.
    """
    return jnp.asarray(narrowed(name, x, jax.dtypes.canonicalize_dtype(dtype), fault))


def overflow(x: np.ndarray, out: np.ndarray) -> str:
    """Returns in words what finite number of `x` its cast `out` lost, or an empty text.

    In place of such a number `out` has infinity, NaN in a dtype without infinity, and
    its largest number in one without either.
    """
    if out.dtype == x.dtype or not jnp.issubdtype(out.dtype, jnp.inexact):
        return ""
    most = float(jnp.finfo(out.dtype).max)
    saturates = _all_finite(np.array(np.inf).astype(out.dtype))
    if not saturates and _all_finite(out):
        return ""
    before, after = _widened(x), _widened(out)
    lost = np.abs(before) > 1.25 * most if saturates else ~np.isfinite(after)
    lost &= np.isfinite(before)
    if not lost.any():
        return ""
    largest = np.abs(before[lost]).max()
    return f"holds {largest:.6g}, but {out.dtype} holds at most {most:.6g}"


def add_rounded(
    w: Any,
    changes: Iterable[jax.Array],
    rescale: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Returns `w` plus all changes, rounded once to the dtype of `w`.

    The sum, and what `rescale` makes of it, have at least float32.

    Examples:
      >>> w = jnp.ones(1, jnp.bfloat16)  # holds 1 and 1.0078, nothing in between
      >>> half = jnp.full(1, 0.002)
      >>> float(add_rounded(w, [half, half])[0]), float((w + half + half)[0])
      (1.0078125, 1.0)
    """
    total = w.astype(at_least_float32(w.dtype))
    for change in changes:
        total = total + change
    if rescale is not None:
        total = rescale(total)
    return total.astype(w.dtype)


def python_numbers(value: Any) -> Any:
    """Returns `value` with Python's numbers for NumPy's, which JSON does not take.

    Looks into tuples, `Axes` and `FusedParts`.

    Examples:
      >>> python_numbers(Axes((), (np.int64(0),), (1,)))
      Axes(batch=(), fan_in=(0,), fan_out=(1,))
    """
    match value:
        case np.generic():
            return value.item()
        case tuple():
            return tuple(map(python_numbers, value))
        case Axes() | FusedParts():
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value)(**{k: python_numbers(v) for k, v in fields.items()})
    return value
