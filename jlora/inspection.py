"""What adapters and models are and how they differ, without running a model."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ._io.describe import arrays
from ._io.disk import Path
from ._io.models import open_model
from ._numerics import is_finite
from ._tables import count, nbytes, table
from .export import Progress
from .factors import Factors, Trainable
from .methods import plain


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of an adapter.

    Attributes:
      path: its name.
      method: how it is adapted, `"full"` for a leaf trained in full.
      shape: shapes of A and B in words, or the leaf's own.
      rank: size of the rank axis; 0 for a full leaf.
      scale: the multiplier of `A B`; NaN for a full leaf.
      trained: how many numbers.
      dtype: of its arrays.
      norm: Frobenius norm of the update; of a full leaf its own.
      effective_rank: the exponential of the entropy of the update's singular values,
        the mean over batch axes; NaN for a full leaf or no update.
      finite: whether all numbers are finite.
    """

    path: str
    method: str
    shape: str
    rank: int
    scale: float
    trained: int
    dtype: str
    norm: float
    effective_rank: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Inspection:
    """An adapter in numbers; printing it shows the table and what is odd.

    Attributes:
      leaves: one for each path.
      warnings: in words, what looks wrong.
      trained_count: how many numbers it has.
      nbytes: and bytes.

    Examples:
      >>> import numpy as np
      >>> from jlora.factors import Spec
      >>> f = Factors(np.ones((3, 2)), np.zeros((2, 4)), Spec(rank=2, alpha=2))
      >>> found = inspect(Trainable({"w": f}))
      >>> found.trained_count, found.leaves[0].norm
      (14, 0.0)
      >>> found.warnings
      ('no update yet (A or B is zero) in 1 of 1 leaves: w',)
    """

    leaves: tuple[Leaf, ...]
    warnings: tuple[str, ...]
    trained_count: int
    nbytes: int

    def __str__(self) -> str:
        head = ("leaf", "method", "shape", "rank", "scale", "‖ΔW‖", "eff. rank")
        lines = [
            (
                leaf.path,
                leaf.method,
                leaf.shape,
                str(leaf.rank or ""),
                "" if math.isnan(leaf.scale) else f"{leaf.scale:.4g}",
                f"{leaf.norm:.3g}",
                "" if math.isnan(leaf.effective_rank) else f"{leaf.effective_rank:.1f}",
            )
            for leaf in self.leaves
        ]
        told = [f"warning: {text}" for text in self.warnings]
        total = f"{count(self.trained_count)} numbers, {nbytes(self.nbytes)}"
        return "\n".join([table(head, lines, right=head[3:]), total, *told])


def inspect(trainable: Trainable) -> Inspection:
    """Returns what an adapter is: its leaves, norms, effective ranks, and warnings.

    Norms and singular values come from the Gram matrices of A and B, in float64 on the
    host; no update is formed. What a DoRA magnitude does is not in them.

    Args:
      trainable: the adapter.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Spec
      >>> f = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), Spec(rank=2, alpha=2))
      >>> print(inspect(Trainable({"w": f})))
      leaf  method  shape      rank  scale  ‖ΔW‖  eff. rank
      ────  ──────  ─────────  ────  ─────  ────  ─────────
      w     lora    3×2 · 2×4     2      1  6.93        1.0
      14 numbers, 56 B

    References:
      Roy and Vetterli, 2007, The effective rank, EUSIPCO
    """
    leaves = [_adapted(path, f) for path, f in trainable.lora.items()]
    leaves += [_full(path, x) for path, x in trainable.full.items()]
    every = [x for _, _, _, x in arrays(trainable)]
    return Inspection(
        tuple(leaves),
        tuple(_oddities(leaves)),
        sum(x.size for x in every),
        sum(x.nbytes for x in every),
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two adapters or models differ.

    Attributes:
      path: the leaf.
      what: in words.
      relative: norm of the difference over the larger norm; NaN if not comparable.
    """

    path: str
    what: str
    relative: float = math.nan


def diff(a: Trainable, b: Trainable) -> tuple[Difference, ...]:
    """Returns how two adapters differ; nothing if they are equal bit for bit.

    Updates are compared, `scale * A B`: factors may differ although these agree.

    Args:
      a: an adapter.
      b: another one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Spec
      >>> f = Factors(jnp.ones((3, 1)), jnp.ones((1, 4)), Spec(rank=1, alpha=1))
      >>> g = dataclasses.replace(f, b=2 * f.b)
      >>> [(d.path, d.relative) for d in diff(Trainable({"w": f}), Trainable({"w": g}))]
      [('w', 0.5)]
    """
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
    """Returns how two models on disk differ, one leaf of both in memory.

    Args:
      a: see `export.merge_files`.
      b: the other.
      progress: wraps the names as they are gone through.

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
            told.append(Difference(name, f"in the {place} alone"))
        else:
            told += _arrays_differ(name, one.read(name), other.read(name))
    return tuple(told)


def singular_values(factors: Factors) -> np.ndarray:
    """Returns those of the update `scale * A B`, `[*batch, rank]`, largest first.

    Args:
      factors: of any method; what a DoRA magnitude does is not seen.

    Returns:
      float64 array on the host.

    Examples:
      >>> import numpy as np
      >>> from jlora.factors import Spec
      >>> f = Factors(np.eye(3, 2), np.diag([3.0, 4.0]), Spec(rank=2, alpha=4))
      >>> singular_values(f)
      array([8., 6.])
    """
    gram_a, gram_b = grams(*matrices(factors))
    values, vectors = np.linalg.eigh(gram_a)
    half = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    middle = np.swapaxes(half, -1, -2) @ gram_b @ half
    squares = np.linalg.eigvalsh(middle)[..., ::-1]
    return abs(factors.scale) * np.sqrt(np.maximum(squares, 0))


def _adapted(path: str, f: Factors) -> Leaf:
    own = [x for x in (f.a, f.b, f.magnitude) if x is not None]
    finite = all(is_finite(np.asarray(x)) for x in own)
    values = singular_values(f) if finite else np.full((1, f.rank), math.nan)
    return Leaf(
        path=path,
        method=f.spec.method if f.spec.parts is None else "lora, parts",
        shape=" · ".join("×".join(map(str, x.shape)) for x in own),
        rank=f.rank,
        scale=f.scale,
        trained=sum(x.size for x in own),
        dtype=", ".join(sorted({str(x.dtype) for x in own})),
        norm=float(np.sqrt(np.sum(values**2))),
        effective_rank=_effective_rank(values),
        finite=finite,
    )


def _full(path: str, x: Any) -> Leaf:
    return Leaf(
        path=path,
        method="full",
        shape="×".join(map(str, x.shape)),
        rank=0,
        scale=math.nan,
        trained=x.size,
        dtype=str(x.dtype),
        norm=float(np.linalg.norm(as_float64(x).ravel())),
        effective_rank=math.nan,
        finite=is_finite(np.asarray(x)),
    )


def _effective_rank(values: np.ndarray) -> float:
    total = values.sum(axis=-1, keepdims=True)
    used = total[..., 0] > 0
    if not used.any():
        return math.nan
    share = values[used] / total[used]
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1)
    return float(np.exp(entropy).mean())


def _oddities(leaves: list[Leaf]) -> list[str]:
    adapted = [leaf for leaf in leaves if leaf.rank]
    groups = {
        "NaN or infinity in": [leaf for leaf in leaves if not leaf.finite],
        "no update yet (A or B is zero) in": [
            leaf for leaf in adapted if not leaf.norm
        ],
        "an effective rank below a quarter of the rank in": [
            leaf for leaf in adapted if leaf.effective_rank < leaf.rank / 4
        ],
    }
    told = [
        f"{what} {len(found)} of {len(leaves)} leaves: {_some(found)}"
        for what, found in groups.items()
        if found
    ]
    dtypes = sorted({leaf.dtype for leaf in adapted})
    if len(dtypes) > 1:
        told.append(f"factors of several dtypes: {', '.join(dtypes)}")
    return told


def _some(leaves: list[Leaf], n: int = 3) -> str:
    more = ", …" if len(leaves) > n else ""
    return ", ".join(leaf.path for leaf in leaves[:n]) + more


def _factors_differ(path: str, a: Factors, b: Factors) -> list[Difference]:
    told = []
    names = [field.name for field in dataclasses.fields(a.spec)]
    for name in names:
        one, other = getattr(a.spec, name), getattr(b.spec, name)
        if one != other:
            told.append(Difference(path, f"{name}: {one} → {other}"))
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    if not told and len(leaves[0]) == len(leaves[1]) and all(map(_equal, *leaves)):
        return []
    pairs = matrices(a), matrices(b)
    (a1, b1), (a2, b2) = pairs
    if a1.shape[:-1] != a2.shape[:-1] or b1.shape[-1] != b2.shape[-1]:
        return [*told, Difference(path, "factors of weights of different shapes")]
    wide = np.concatenate([a.scale * a1, -b.scale * a2], axis=-1)
    high = np.concatenate([b1, b2], axis=-2)
    larger = max(a.scale * norm(a1, b1), b.scale * norm(a2, b2))
    relative = norm(wide, high) / larger if larger else 0.0
    told.append(Difference(path, f"update differs by {relative:.2e}", relative))
    if a.magnitude is not None and b.magnitude is not None:
        told += [
            dataclasses.replace(d, what=f"magnitude: {d.what}")
            for d in _arrays_differ(path, a.magnitude, b.magnitude)
        ]
    return told


def _arrays_differ(path: str, a: Any, b: Any) -> list[Difference]:
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
    what = f"differs by {relative:.2e}, one number by {largest:.2e}"
    return [Difference(path, what, relative)]


def _kind(path: str, adapter: Trainable) -> str:
    if path in adapter.lora:
        return "factors"
    return "trained in full" if path in adapter.full else "absent"


def matrices(f: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Returns A `[*batch, in, rank]` and B `[*batch, rank, out]`, for any method."""
    a, b = map(as_float64, plain(f))
    batch = a.shape[: len(f.spec.axes.batch)]
    n, rank = len(batch), a.shape[-1]
    rows = math.prod(a.shape[n:-1])
    columns = math.prod(b.shape[n + 1 :])
    return a.reshape(*batch, rows, rank), b.reshape(*batch, rank, columns)


def grams(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.swapaxes(a, -1, -2) @ a, b @ np.swapaxes(b, -1, -2)


def norm(a: np.ndarray, b: np.ndarray) -> float:
    gram_a, gram_b = grams(a, b)
    return float(np.sqrt(max(np.sum(gram_a * gram_b), 0)))


def as_float64(x: Any) -> np.ndarray:
    return np.asarray(jax.device_get(x)).astype(np.float64)


def _equal(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
