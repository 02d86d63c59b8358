"""Tells what an adapter is, leaf by leaf, without its model."""

import dataclasses
import math

import numpy as np

from .._checks import check_known
from .._core import algebra
from .._io.describe import arrays, check_whole
from .._numerics import is_finite
from .._tables import count, listed, nbytes, printable, table
from ..errors import TreeError
from ..factors import Factors, Leaf, Trainable
from ..methods import trained_leaves


@dataclasses.dataclass(frozen=True)
class InspectedLeaf:
    """One leaf of an adapter.

    Attributes:
      path: its name.
      method: how it is adapted; `"full"` for a leaf trained in full.
      shape: shapes of A and B in words, or the leaf's own.
      rank: size of the rank axis; 0 for a full leaf.
      scale: the multiplier of `A B`; NaN for a full leaf.
      trained: how many numbers are trained.
      dtype: dtype of its arrays.
      norm: Frobenius norm of the update, or of the leaf itself if it is a full one.
      effective_rank: the exponential of the entropy of the update's singular values,
        as a mean over batch axes; NaN for a full leaf or if there is no update.
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
      warnings: what looks wrong, in words.
      trained_count: how many numbers are trained.
      nbytes: how many bytes they take.

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

    leaves: tuple[InspectedLeaf, ...]
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

    Norms and singular values come from QR decompositions of A and B, in float64 on the
    host. No update is formed. They leave out what a DoRA magnitude does.

    Args:
      trainable: the adapter.

    Raises:
      TreeError: if factors and settings do not fit together; lists every misfit.

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
    check_known("inspection.inspect", trainable)
    check_whole(trainable, TreeError, "This is not a whole adapter")
    leaves = [_adapted(path, f) for path, f in trainable.lora.items()]
    leaves += [_full(path, x) for path, x in trainable.full.items()]
    every = [x for _, _, _, x in arrays(trainable)]
    return Inspection(
        tuple(leaves),
        tuple(_oddities(leaves)),
        sum(x.size for x in every),
        sum(x.nbytes for x in every),
    )


def singular_values(factors: Factors) -> np.ndarray:
    """Returns the singular values of `scale * A B`, `[*batch, rank]`, descending.

    Args:
      factors: of any method; what a DoRA magnitude does is left out.

    Returns:
      float64 array on the host.

    Examples:
      >>> import numpy as np
      >>> from jlora.factors import Spec
      >>> f = Factors(np.eye(3, 2), np.diag([3.0, 4.0]), Spec(rank=2, alpha=4))
      >>> singular_values(f)
      array([8., 6.])
    """
    values = algebra.singular_values(algebra.on_host(factors), np)
    missing = factors.rank - values.shape[-1]  # above what the weight's size allows
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def _adapted(path: str, f: Factors) -> InspectedLeaf:
    own = [x for x in (f.a, f.b, f.magnitude) if x is not None]
    finite = all(is_finite(np.asarray(x)) for x in own)
    values = singular_values(f) if finite else np.full((1, f.rank), math.nan)
    return InspectedLeaf(
        path=path,
        method=f.spec.method if f.spec.parts is None else "lora, parts",
        shape=" · ".join("×".join(map(str, x.shape)) for x in own),
        rank=f.rank,
        scale=f.scale,
        trained=sum(x.size for x in trained_leaves(f).values()),
        dtype=", ".join(sorted({str(x.dtype) for x in own})),
        norm=float(np.sqrt(np.sum(values**2))),
        effective_rank=_effective_rank(values),
        finite=finite,
    )


def _full(path: str, x: Leaf) -> InspectedLeaf:
    return InspectedLeaf(
        path=path,
        method="full",
        shape="×".join(map(str, x.shape)),
        rank=0,
        scale=math.nan,
        trained=x.size,
        dtype=str(x.dtype),
        norm=float(np.linalg.norm(algebra.as_float64(x).ravel())),
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


def _oddities(leaves: list[InspectedLeaf]) -> list[str]:
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
        f"{what} {len(found)} of {len(leaves)} leaves: "
        + listed([printable(leaf.path) for leaf in found], 3, ", ")
        for what, found in groups.items()
        if found
    ]
    dtypes = sorted({leaf.dtype for leaf in adapted})
    if len(dtypes) > 1:
        told.append(f"factors of several dtypes: {', '.join(dtypes)}")
    return told
