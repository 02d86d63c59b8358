"""`hand_back`: factors of jlora in the tree of another library."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from .._core.algebra import with_axes
from .._core.rebase import changed_base
from .._core.tree import check_trainable
from .._numerics import at_least_float32, is_finite
from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Leaf, Trainable
from ..transform.compat import is_staging
from ._adopt import Alpha, layout_of, scales_of
from ._pairs import Node, Pair, array, library_of, nodes_of, pairs_of, replaced
from ._rules import Library

Tree = TypeVar("Tree")


def hand_back(
    like: Tree,
    trainable: Trainable,
    library: Library | str,
    *,
    alpha: Alpha = None,
    rslora: bool = False,
) -> Tree:
    """Returns `like`, a library's own tree, with the factors of `trainable` in it.

    It undoes `adopt`, and takes adapters that jlora trained. The update of each weight
    stays the same: a rank below the tree's is filled up with zeros, and what the
    library does not multiply by goes into B. The base weights are those of `like`.

    Args:
      like: as `params` of `adopt`: weights and factors of a model that the library put
        LoRA into, fresh or not.
      trainable: factors of plain LoRA for the weights that `like` has factors for.
      library: as in `adopt`.
      alpha: as in `adopt`: what the library's code has for this model.
      rslora: as in `adopt`.

    Raises:
      TreeError: lists weights that only one side adapts, ranks above the tree's, other
        methods than plain LoRA, activated LoRA, leaves trained in full, factors for a
        base that their initialisation changed, numbers too large for the tree's
        dtypes, and as `adopt`.
      ConfigError: as `adopt`.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> tree = {"kernel": jnp.ones((3, 4)), "kernel_lora_a": jnp.ones((3, 2))}
      >>> tree |= {"kernel_lora_b": jnp.zeros((2, 4))}
      >>> _, trainable = jlora.adopt(tree, "qwix", alpha=4.0)
      >>> doubled = jlora.adapters.scale(trainable, 2.0)
      >>> back = jlora.hand_back(tree, doubled, "qwix", alpha=4.0)
      >>> back.keys() == tree.keys()
      True
    """
    rules = library_of(library)
    nodes = nodes_of(like)
    pairs = {pair.path: pair for pair in pairs_of(nodes, rules)}
    check_trainable(trainable)
    _check_sides(pairs, trainable, rules)
    scales = scales_of(list(pairs.values()), nodes, rules, alpha, rslora)
    values: dict[str, Leaf] = {}
    faults: list[str] = []
    for path, pair in pairs.items():
        made = _written(pair, nodes, trainable.lora[path], scales[path])
        if isinstance(made, str):
            faults.append(made)
        else:
            values |= made
    if faults:
        raise TreeError(
            f"These factors have no place in the tree of {rules.name!r}: "
            f"{listed(faults)}."
        )
    return replaced(like, values)


def _check_sides(
    pairs: Mapping[str, Pair], trainable: Trainable, library: Library
) -> None:
    faults = [
        f"{path!r} has method {f.spec.method!r}, parts or rows"
        for path, f in trainable.lora.items()
        if f.spec.method != "lora" or f.spec.parts or f.spec.rows
    ]
    faults += [
        f"{path!r} is activated LoRA, which acts only after its invocation"
        for path, f in trainable.lora.items()
        if f.spec.invocation
    ]
    faults += [
        f"{path!r} is for a base changed by init={f.spec.init!r}: jlora.rebase gives "
        "an adapter of the original"
        for path, f in trainable.lora.items()
        if changed_base(f)
    ]
    faults += [f"{path!r} is trained in full: combine it" for path in trainable.full]
    faults += [
        f"the tree has no factors for {path!r}"
        for path in trainable.lora
        if path not in pairs
    ]
    faults += [
        f"the adapter has no factors for {path!r}"
        for path in pairs
        if path not in trainable.lora
    ]
    if faults:
        raise TreeError(
            f"The adapter and the tree of {library.name!r} do not adapt the same, as "
            f"plain LoRA: {listed(faults)}."
        )


def _written(
    pair: Pair, nodes: Mapping[str, Node], factors: Factors, scale: Any
) -> dict[str, Leaf] | str:
    """Returns both leaves of `pair` with the update of `factors`, or a fault."""
    a, b, w = (array(p, nodes[p]) for p in (pair.a, pair.b, pair.weight))
    layout = layout_of(pair, w.shape, a.shape, b.shape, factors.spec)
    if isinstance(layout, str):
        return layout
    if sorted(factors.spec.axes.order) != list(range(len(w.shape))):
        return f"{pair.path!r} has {len(w.shape)} axes, its factors are for others"
    own = with_axes(factors, layout.axes)
    rank = a.shape[layout.a.index((layout.rank,))]
    if own.rank > rank:
        return f"{pair.path!r} needs rank {own.rank}, the tree has {rank}"
    ratio = own.scale / scale(rank).scale
    wide = at_least_float32(own.b.dtype)
    own_b = own.b if math.isclose(ratio, 1) else own.b.astype(wide) * ratio
    at = len(layout.axes.batch)
    new_a = _padded(jnp.asarray(own.a), -1, rank)
    new_b = _padded(jnp.asarray(own_b), at, rank)
    new_a, new_b = layout.written(new_a, new_b, a, b)
    made = {pair.a: new_a.astype(a.dtype), pair.b: new_b.astype(b.dtype)}
    if not is_staging(made) and not all(map(is_finite, made.values())):
        return (
            f"{pair.path!r} holds NaN or infinity, or numbers too large for {b.dtype}"
        )
    return made


def _padded(x: Any, axis: int, size: int) -> Any:
    more = [(0, 0)] * x.ndim
    more[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, more)
