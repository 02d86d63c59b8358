"""The leaves of a model that an adapter may be for."""

import dataclasses
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from .._io import processes
from .._io.shards import Slot
from .._plan.plan import Plan
from .._plan.resolve import axes_of
from .._plan.row import Row
from ..factors import Axes, Leaf, PyTree, Spec
from ..paths import flatten
from ..quantised import Quantized, is_quantized
from ._places import Place
from .layers import weight_out

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct | Quantized


def is_shaped(x: Leaf) -> TypeGuard[Shaped]:
    """Returns whether a leaf of parameters is an array or the shape of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def on_host(leaf: Leaf) -> np.ndarray:
    """Returns a leaf as a dense array on the host; a quantised one is widened.

    Every process must call it where processes share the leaf.
    """
    leaf = processes.on_host(leaf)
    return np.asarray(leaf.dense() if is_quantized(leaf) else leaf)


def is_same(place: Place, leaf: Leaf, slot: Slot) -> bool | None:
    """Returns whether a tensor has the leaf's numbers, None if they are not known."""
    if leaf is None or isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    if slot.shape != place.shape(leaf.shape):
        return False
    tensor = slot.read()
    own = weight_out(place, on_host(leaf)).astype(tensor.dtype)
    return np.array_equal(own, tensor)


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
