"""Reports what an adapter is and what it has learnt, as a table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_known
from .._core.algebra import as_float64, delta, matrices, norm, on_host
from .._core.tree import Missing, check, flatten_frozen, widened
from .._numerics import is_finite, root_of_squares
from .._tables import count, html, nbytes, table
from ..factors import Factors, Leaf, PyTree, Trainable
from ..methods import method_of, trained_leaves
from ..methods.dora import TINY, dense_gain
from ..methods.init import like_weight
from ..transform.stage import is_array

_HEAD = ("leaf", "shape", "rank", "trained", "‖ΔW‖", "‖ΔW‖/‖W‖", "")


@dataclasses.dataclass(frozen=True)
class ReportedLeaf:
    """One trained leaf.

    Attributes:
      path: its name.
      shape: the weight's shape.
      rank: size of the rank axis; 0 for a leaf trained in full.
      trained: how many numbers are trained.
      update: Frobenius norm of what is added to the weight, or of the leaf itself if
        it is trained in full.
      relative: `update` divided by the norm of the weight; NaN for a full leaf.
      finite: whether all trained numbers are finite.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    trained: int
    update: float
    relative: float
    finite: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """An adapter in numbers; printing it shows the table.

    Attributes:
      entries: one for each trained leaf.
      trained_count: how many numbers are trained.
      total_count: how many numbers the parameters have.
      adapter_bytes: how many bytes the trained numbers take.
      model_bytes: how many bytes the parameters take, as they are stored.
      dense_bytes: how many they take without quantisation.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> frozen = {"w": jnp.ones((4, 8)), "head": jlora.MISSING}
      >>> found = jlora.report(frozen, jlora.Trainable(full={"head": jnp.ones(8)}))
      >>> found.trained_count, found.total_count, found.adapter_bytes
      (8, 40, 32)
    """

    entries: tuple[ReportedLeaf, ...]
    trained_count: int
    total_count: int
    adapter_bytes: int
    model_bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        shown = table(_HEAD, self._lines(), right=_HEAD[2:6])
        return f"{shown}\n{self._summary()}"

    def _repr_html_(self) -> str:
        return html(_HEAD, self._lines(), self._summary())

    def _summary(self) -> str:
        share = 100 * self.trained_count / max(self.total_count, 1)
        quantised = self.dense_bytes != self.model_bytes
        return (
            f"trained {self.trained_count:,} of {self.total_count:,} parameters "
            f"({share:.2f} %); adapter {nbytes(self.adapter_bytes)}, "
            f"model {nbytes(self.model_bytes)}"
            + (f" ({nbytes(self.dense_bytes)} dense)" if quantised else "")
        )

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (
                e.path,
                "×".join(map(str, e.shape)),
                str(e.rank or "full"),
                count(e.trained),
                f"{e.update:.3g}" if e.rank else "",
                f"{e.relative:.2e}" if e.rank else "",
                "" if e.finite else "NaN or infinity",
            )
            for e in self.entries
        ]


def report(frozen: PyTree, trainable: Trainable) -> Report:
    """Returns what is trained, its size, and how far it moved each weight.

    The norm of an update is computed from a QR decomposition of A, in float64 on the
    host, so it is accurate where updates cancel (see `rebase`). The dense update is
    formed only for DoRA, also in float64. Quantised weights are widened one at a time.

    Args:
      frozen: from `split`.
      trainable: from `split`, trained or not.

    Raises:
      TreeError: if the two do not fit together.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"]
      >>> config = jlora.LoraConfig(rank=2)
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> print(jlora.report(*jlora.split(jax.random.key(0), params, plan)))
      leaf  shape  rank  trained  ‖ΔW‖  ‖ΔW‖/‖W‖
      ────  ─────  ────  ───────  ────  ────────
      w     4×8       2       24     0  0.00e+00
      trained 24 of 48 parameters (50.00 %); adapter 96 B, model 192 B
    """
    leaves, _ = flatten_frozen(frozen)
    check(leaves, trainable)
    check_known("report", leaves, trainable)
    entries = [
        _adapted(path, leaves[path], factors)
        for path, factors in trainable.lora.items()
    ]
    entries += [_full(path, x) for path, x in trainable.full.items()]
    kept = [x for x in leaves.values() if not isinstance(x, Missing) and is_array(x)]
    model = [*kept, *trainable.full.values()]
    arrays = jax.tree.leaves(trainable)
    return Report(
        entries=tuple(entries),
        trained_count=sum(e.trained for e in entries),
        total_count=sum(x.size for x in model),
        adapter_bytes=sum(x.nbytes for x in arrays),
        model_bytes=sum(x.nbytes for x in model),
        dense_bytes=sum(x.size * x.dtype.itemsize for x in model),
    )


def _adapted(path: str, w: Leaf, f: Factors) -> ReportedLeaf:
    w = widened(w)
    moved = (_norm if method_of(f.spec).gain is None else _moved)(w, f)
    base = float(root_of_squares(jnp.asarray(w).astype(jnp.float32)))
    return ReportedLeaf(
        path=path,
        shape=tuple(w.shape),
        rank=f.rank,
        trained=sum(x.size for x in trained_leaves(f).values()),
        update=moved,
        relative=moved / base if base else float("nan"),
        finite=all(map(is_finite, jax.tree.leaves(f))),
    )


def _full(path: str, x: Leaf) -> ReportedLeaf:
    return ReportedLeaf(
        path=path,
        shape=tuple(x.shape),
        rank=0,
        trained=x.size,
        update=float(np.linalg.norm(np.asarray(x, dtype=np.float32).ravel())),
        relative=float("nan"),
        finite=is_finite(x),
    )


def _moved(w: Leaf, f: Factors) -> float:
    """Returns how far a magnitude and an update together move `w`.

    In float64, as the weight and what it became are nearly the same. A column without
    an update, whose magnitude is its length up to rounding, has not moved.
    """
    if not _is_here(w, f):
        w = w.astype(jnp.float32)
        total = w + delta(f)
        return float(root_of_squares(total * dense_gain(f, total) - w))
    axes, base = f.spec.axes, as_float64(w)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass
        product = np.matmul(*matrices(on_host(f)))
        change = like_weight(product, axes, base.shape, np)
        total = base + change
        length = np.sqrt(np.sum(total**2, axis=axes.fan_in, keepdims=True))
        own = (*axes.batch, *axes.fan_out)
        m = np.transpose(as_float64(f.magnitude), [own.index(i) for i in sorted(own)])
        m = np.expand_dims(m, axes.fan_in)
        still = ~change.any(axis=axes.fan_in, keepdims=True)
        still &= np.abs(m - length) <= 4 * jnp.finfo(f.magnitude.dtype).eps * length
        gain = np.where(still, 1, m / np.maximum(length, np.sqrt(TINY)))
        return float(np.linalg.norm(total * gain - base))


def _is_here(w: Leaf, f: Factors) -> bool:
    """Returns whether this host holds all of a weight and its factors."""
    leaves = [w, *jax.tree.leaves(f)]
    return all(getattr(x, "is_fully_addressable", True) for x in leaves)


def _norm(w: Leaf, f: Factors) -> float:
    """Returns the norm of the update, in float64 if this host holds all of it."""
    return float(norm(on_host(f), np)) if _is_here(w, f) else float(norm(f))
