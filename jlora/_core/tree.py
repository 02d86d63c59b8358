"""Joins the two sides of parameters, frozen and trainable, and checks that they fit."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export

from .. import paths
from .._checks import misshapen, not_floating
from .._plan.plan import Plan
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Factors, Leaf, PyTree, Trainable
from ..quantised import Quantized, encode_like, is_quantized, like_dense, typed_as
from ..transform.compat import is_staging
from ..transform.stage import is_array

Tree = TypeVar("Tree")


@jax.tree_util.register_static
class Missing:
    """Stands in `frozen` for a leaf that is trained in full; a node without leaves."""

    def __repr__(self) -> str:
        return "Missing()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Missing)

    def __hash__(self) -> int:
        return hash(Missing)


MISSING = Missing()
export.register_pytree_node_serialization(
    Missing,
    serialized_name="jlora.Missing",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: MISSING,
    from_children=lambda aux_data, children: aux_data,
)


def check_plan(leaves: Mapping[str, Leaf], plan: Plan) -> None:
    """Raises a TreeError that lists where `leaves` are not those of `plan`.

    Raises a ConfigError if `plan` is not a `Plan`.
    """
    if not isinstance(plan, Plan):
        raise ConfigError(
            f"plan must be a jlora.Plan, got {type(plan).__name__}. Make one with "
            "jlora.plan(fn, params, *args, config=config)."
        )
    planned = {row.path: row for row in plan.rows()}
    wrong = [f"{p!r} is not in the plan" for p in leaves if p not in planned]
    wrong += [f"{p!r} is not in the parameters" for p in planned if p not in leaves]
    wrong += [
        f"{p!r} has shape {leaf.shape}, the plan has {planned[p].shape}"
        for p, leaf in leaves.items()
        if p in planned and is_array(leaf) and leaf.shape != planned[p].shape
    ]
    if wrong:
        raise TreeError(
            f"These parameters are not the ones the plan was made for: "
            f"{listed(wrong)}. Make a new plan for them."
        )


def combine(frozen: Tree, trainable: Trainable) -> Tree:
    """Returns the parameter tree with the leaves trained in full put in their places.

    `frozen` may also be the whole parameters, as when an adapter is restored: a leaf
    trained in full then replaces the original one. The low-rank factors are left out:
    adapted weights are those of `frozen`. To add the factors, use `merge`.

    Args:
      frozen: from `split`, or the whole parameters.
      trainable: from `split`, or restored.

    Raises:
      TreeError: if the two are not from one `split`.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> frozen = {"w": jnp.ones(2), "head": jlora.MISSING}
      >>> combine(frozen, jlora.Trainable(full={"head": jnp.zeros(2)}))["head"]
      Array([0., 0.], dtype=float32)
    """
    leaves, treedef = flatten_frozen(frozen)
    check(leaves, trainable)
    return treedef.unflatten(
        trainable.full.get(path, leaf) for path, leaf in leaves.items()
    )


def flatten_frozen(frozen: PyTree) -> tuple[dict[str, Leaf], Any]:
    """Returns the leaves of `frozen` by path, `MISSING` among them, and the treedef.

    The treedef has a leaf at each `MISSING`, so it unflattens to whole parameters.
    """
    return paths.flatten(frozen, is_leaf=lambda x: isinstance(x, Missing))


def widened(w: Leaf) -> Leaf:
    """Returns the array that a quantised leaf stands for, laid out as its codes.

    Any other leaf comes back as it is, and of shapes the shape.
    """
    if not is_quantized(w):
        return w
    if isinstance(w.codes, jax.ShapeDtypeStruct):
        return like_dense(w)
    return placed_as(w.codes, _dense(w))


@jax.jit
def _dense(w: Quantized) -> jax.Array:
    return w.dense()


def coded_as(w: Quantized, x: jax.Array) -> Quantized:
    """Returns `x` quantised and laid out as the leaf `w` that it replaces."""
    return jax.tree.map(placed_as, w, encode_like(x, w))


def placed_as(w: Leaf, x: jax.Array) -> jax.Array:
    """Returns `x` laid out over devices as the weight `w` that it replaces."""
    if not isinstance(w, jax.Array):
        return x
    if is_staging(w, x):
        return typed_as(w, lambda x: x, x)
    if x.sharding == w.sharding:
        return x
    return jax.device_put(x, w.sharding)


def check(leaves: Mapping[str, Leaf], trainable: Trainable) -> None:
    """Raises a TreeError that lists every misfit between the two sides."""
    check_trainable(trainable)
    wrong = []
    for path, factors in trainable.lora.items():
        if path not in leaves or isinstance(leaves[path], Missing):
            near = paths.nearest(path, tuple(leaves), n=1) if len(wrong) < 10 else ()
            wrong.append(
                f"factors for {path!r}, which frozen does not have"
                + (f" (nearest: {near[0]!r})" if near else "")
            )
        elif not isinstance(factors, Factors):
            wrong.append(f"{path!r} holds {type(factors).__name__}, not Factors")
        else:
            wrong += _misfits(path, leaves[path], factors)
    for path, x in trainable.full.items():
        if path not in leaves:
            wrong.append(f"a full leaf {path!r}, which frozen does not have")
        elif is_array(leaves[path]) and leaves[path].shape != x.shape:
            wrong.append(
                f"a full leaf {path!r} of shape {x.shape}, where frozen has "
                f"{leaves[path].shape}"
            )
    wrong += [
        f"no leaf for the missing {path!r}"
        for path, leaf in leaves.items()
        if isinstance(leaf, Missing) and path not in trainable.full
    ]
    if wrong:
        raise TreeError(
            f"frozen and trainable do not fit together: {listed(wrong)}. "
            "Take both from one jlora.split."
        )


def check_trainable(trainable: object, name: str = "trainable") -> None:
    """Raises a TreeError if the argument `name` is not a `Trainable`."""
    if not isinstance(trainable, Trainable):
        raise TreeError(
            f"{name} must be a jlora.Trainable, got {type(trainable).__name__}. "
            "Take it from jlora.split; mind the order (frozen, trainable, *args)."
        )


def _misfits(path: str, w: Leaf, factors: Factors) -> list[str]:
    if not (is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)):
        return [f"{path!r} is not a floating-point array, so it takes no factors"]
    spec = factors.spec
    if sorted(spec.axes.order) != list(range(w.ndim)):
        n = len(spec.axes.order)
        return [f"{path!r} has {w.ndim} axes, its factors are for {n}"]
    if spec.shape and spec.shape != tuple(w.shape):
        return [f"{path!r} has shape {w.shape}, its factors are for {spec.shape}"]
    odd = not_floating(path, factors)
    return odd or misshapen(path, factors, tuple(w.shape))
