"""The leaves of a model that an adapter may be for."""

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from .._plan.plan import Plan
from .._plan.resolve import axes_of
from .._plan.row import Row
from ..factors import Axes, Leaf, PyTree, Spec
from ..paths import flatten

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def is_shaped(x: Leaf) -> TypeGuard[Shaped]:
    """Returns whether a leaf of parameters is an array or the shape of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


@dataclasses.dataclass(frozen=True, eq=False)
class TargetLeaf:
    """A leaf of the model that an adapter may be for."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Shaped | None  # None for a plan
    op: str
    axes: Axes | None
    tied: bool | None
    planned: str  # "", "adapted", "full" or "frozen"
    spec: Spec | None = None


def leaves_of(params_or_plan: PyTree | Plan) -> list[TargetLeaf]:
    """Returns the leaves of parameters, or of a plan with what it says of them."""
    if isinstance(params_or_plan, Plan):
        return [_planned(row) for row in params_or_plan.rows() if row.shape]
    found, _ = flatten(params_or_plan)
    return [
        TargetLeaf(path, tuple(x.shape), x.dtype, x, "", None, None, "")
        for path, x in found.items()
        if is_shaped(x)
    ]


def _planned(row: Row) -> TargetLeaf:
    ops = [use for use in row.uses if use.route == "factored"]
    both = row.op == "embedding" and any(use.op != "gather" for use in ops)
    spec = row.spec
    axes = spec.axes if spec else axes_of(row) if ops else None
    return TargetLeaf(
        row.path,
        row.shape,
        jnp.dtype(row.dtype),
        None,
        spec.op if spec else row.op,
        axes,
        both if row.op == "embedding" else None,
        row.status if row.status in ("adapted", "full") else "frozen",
        spec,
    )
