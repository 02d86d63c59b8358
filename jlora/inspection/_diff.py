"""Compares two adapters or models, without running a model."""

import dataclasses
import math

import jax
import numpy as np

from .._checks import check_known
from .._core.algebra import as_float64, lora_spec, norm, on_host
from .._io.describe import check_whole
from .._io.disk import Path, Progress
from .._io.models import open_model
from ..errors import TreeError
from ..factors import Factors, Leaf, Trainable
from ..quantised import is_quantized


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two adapters or models differ.

    Attributes:
      path: the leaf.
      what: the difference in words.
      relative: norm of the difference over the larger norm; NaN if not comparable.
    """

    path: str
    what: str
    relative: float = math.nan


def diff(a: Trainable, b: Trainable) -> tuple[Difference, ...]:
    """Returns how two adapters differ; `()` if they are equal bit for bit.

    Updates `scale * A B` are compared: factors may differ although updates agree.

    Args:
      a: an adapter.
      b: another one.

    Raises:
      TreeError: if factors and settings of one do not fit together.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Spec
      >>> f = Factors(jnp.ones((3, 1)), jnp.ones((1, 4)), Spec(rank=1, alpha=1))
      >>> g = dataclasses.replace(f, b=2 * f.b)
      >>> (found,) = diff(Trainable({"w": f}), Trainable({"w": g}))
      >>> found.path, round(found.relative, 6)
      ('w', 0.5)
    """
    check_known("inspection.diff", a, b)
    for adapter in (a, b):
        check_whole(adapter, TreeError, "This is not a whole adapter")
    told = []
    for path in dict.fromkeys([*a.lora, *b.lora, *a.full, *b.full]):
        if path in a.lora and path in b.lora:
            told += _factors_differ(path, a.lora[path], b.lora[path])
        elif path in a.full and path in b.full:
            told += _arrays_differ(path, a.full[path], b.full[path])
        else:
            told.append(Difference(path, f"{_kind(path, a)} → {_kind(path, b)}"))
    return tuple(told)


def diff_files(
    a: Path, b: Path, *, progress: Progress = iter
) -> tuple[Difference, ...]:
    """Returns how two models on disk differ, with one leaf of each in memory.

    Args:
      a: a model; for the formats see `export.merge_files`.
      b: another one.
      progress: wraps the iteration over the names.

    Raises:
      CheckpointError: if a file cannot be read.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     a, b = (os.path.join(folder, f"{n}.safetensors") for n in "ab")
      ...     jlora.export.safetensors(a, {"w": np.ones(2), "bias": np.ones(2)})
      ...     jlora.export.safetensors(b, {"w": np.ones(2), "bias": np.zeros(2)})
      ...     [(d.path, d.relative) for d in diff_files(a, b)]
      [('bias', 1.0)]
    """
    one, other = open_model(a), open_model(b)
    told = []
    for name in progress(list(dict.fromkeys([*one.shapes, *other.shapes]))):
        if name not in other.shapes or name not in one.shapes:
            place = "first" if name in one.shapes else "second"
            told.append(Difference(name, f"only in the {place}"))
        else:
            told += _leaves_differ(name, one.read(name), other.read(name))
    return tuple(told)


def _factors_differ(path: str, a: Factors, b: Factors) -> list[Difference]:
    told = []
    for name in (field.name for field in dataclasses.fields(a.spec)):
        one, other = getattr(a.spec, name), getattr(b.spec, name)
        if one != other:
            told.append(Difference(path, f"{name}: {one} → {other}"))
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    if not told and len(leaves[0]) == len(leaves[1]) and all(map(_equal, *leaves)):
        return []
    one, other = on_host(a), on_host(b)
    n = len(a.spec.axes.batch)
    if (
        a.spec.axes != b.spec.axes
        or one.a.shape[:-1] != other.a.shape[:-1]
        or one.b.shape[n + 1 :] != other.b.shape[n + 1 :]
    ):
        return [*told, Difference(path, "factors of weights of different shapes")]
    change = Factors(
        np.concatenate([one.a, other.a], axis=-1),
        np.concatenate([one.b, -other.b], axis=n),
        lora_spec(a.spec, one.rank + other.rank),
    )
    larger = max(norm(one, np), norm(other, np))
    relative = float(norm(change, np) / larger) if larger else 0.0
    told.append(Difference(path, f"update differs by {relative:.2e}", relative))
    if a.magnitude is not None and b.magnitude is not None:
        told += [
            dataclasses.replace(d, what=f"magnitude: {d.what}")
            for d in _arrays_differ(path, a.magnitude, b.magnitude)
        ]
    return told


def _leaves_differ(path: str, a: Leaf, b: Leaf) -> list[Difference]:
    """Returns how two leaves of models differ; quantised ones in what they mean."""
    kinds = [x.kind if is_quantized(x) else "dense" for x in (a, b)]
    told = []
    if kinds[0] != kinds[1]:
        told.append(Difference(path, f"{kinds[0]} → {kinds[1]}"))
    dense = (np.asarray(x.dense()) if is_quantized(x) else x for x in (a, b))
    return told + _arrays_differ(path, *dense)


def _arrays_differ(path: str, a: Leaf, b: Leaf) -> list[Difference]:
    if a.shape != b.shape or a.dtype != b.dtype:
        one, other = (f"{x.dtype}{list(x.shape)}" for x in (a, b))
        return [Difference(path, f"{one} → {other}")]
    if _equal(a, b):
        return []
    one, other = as_float64(a), as_float64(b)
    with np.errstate(invalid="ignore"):
        change = one - other
        larger = max(np.linalg.norm(one.ravel()), np.linalg.norm(other.ravel()))
        relative = float(np.linalg.norm(change.ravel()) / larger) if larger else 0.0
    largest = float(np.abs(change).max())
    what = f"differs by {relative:.2e}, at most {largest:.2e} in one number"
    return [Difference(path, what, relative)]


def _kind(path: str, adapter: Trainable) -> str:
    if path in adapter.lora:
        return "factors"
    return "trained in full" if path in adapter.full else "absent"


def _equal(a: Leaf, b: Leaf) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
