"""Several adapters side by side: which leaves they have, and whether these fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import paths
from .._core.algebra import lora_spec, weight_sizes
from .._core.merge import merge
from .._core.tree import Missing
from .._numerics import at_least_float32
from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Spec, Trainable
from ..methods import find_init, low_rank_pair, method_of
from ..methods.init import matrices, shaped


def sequence(name: str, trainables: Any) -> list[Trainable]:
    """Returns the adapters as a list, or raises what to write instead."""
    if isinstance(trainables, Trainable):
        raise TreeError(
            f"{name} takes a sequence of adapters: write {name}([x, y]), or {name}([x])"
            " for one."
        )
    found = list(trainables)
    wrong = [
        f"number {i} is a {type(x).__name__}"
        for i, x in enumerate(found)
        if not isinstance(x, Trainable)
    ]
    if wrong:
        raise TreeError(f"{name} takes jlora.Trainable adapters, {', '.join(wrong)}.")
    if not found:
        raise TreeError(f"{name} needs at least one adapter, got none.")
    return found


def weights_for(name: str, trainables: Sequence[Trainable], weights: Any) -> list[Any]:
    """Returns one weight for each adapter; ones for None.

    Python numbers stay what they are, so that a weight of 1 is known to be one.
    """
    if weights is None:
        return [1] * len(trainables)
    found = list(weights)
    if len(found) != len(trainables):
        raise TreeError(
            f"{name} got {len(trainables)} adapters and {len(found)} weights. Give "
            "one weight for each."
        )
    return found


def union(trees: Sequence[Any]) -> list[str]:
    """Returns the keys of all mappings, each once, in the order of appearance."""
    return list(dict.fromkeys(path for tree in trees for path in tree))


def check_fit(name: str, trainables: Sequence[Trainable]) -> None:
    """Raises a TreeError that lists the leaves that are not of one weight."""
    wrong = []
    for path in union([t.lora for t in trainables]):
        own = [(i, t.lora[path]) for i, t in enumerate(trainables) if path in t.lora]
        first = own[0][1]
        for i, factors in own[1:]:
            if factors.spec.axes != first.spec.axes or factors.spec.op != first.spec.op:
                wrong.append(
                    f"{path!r} of adapter {i} is for a {factors.spec.op} with "
                    f"{factors.spec.axes}, that of adapter {own[0][0]} for a "
                    f"{first.spec.op} with {first.spec.axes}"
                )
            elif _sizes(factors) != _sizes(first):
                wrong.append(
                    f"{path!r} of adapter {i} is for a weight of sizes "
                    f"{_sizes(factors)}, that of adapter {own[0][0]} of "
                    f"{_sizes(first)}"
                )
    for path in union([t.full for t in trainables]):
        shapes = {tuple(t.full[path].shape) for t in trainables if path in t.full}
        if len(shapes) > 1:
            wrong.append(f"the full leaf {path!r} has shapes {sorted(shapes)}")
    if wrong:
        raise TreeError(
            f"{name} needs adapters of one model: {listed(wrong)}. Adapters are of "
            "one model if jlora.plan gives their leaves the same axes."
        )


def _sizes(factors: Factors) -> tuple[int, ...]:
    """Returns the sizes that A and B tell of the weight."""
    if not (is_lora(factors.spec) or rescales(factors.spec)):
        a, b = jax.eval_shape(low_rank_pair, factors)
        factors = Factors(a, b, factors.spec)
    return weight_sizes(factors)


def changed_base(factors: Factors) -> bool:
    """Returns whether the start of these factors took something out of the weight."""
    init = find_init(factors.spec.init)
    return init is not None and init.changes_base


def check_one_base(name: str, trainables: Sequence[Trainable]) -> None:
    """Raises a TreeError that lists the leaves that belong to a base of their own."""
    wrong = [
        f"{path!r} of adapter {i} began with init {f.spec.init!r}"
        for i, t in enumerate(trainables)
        for path, f in t.lora.items()
        if changed_base(f)
    ]
    if wrong:
        raise TreeError(
            f"{name} needs adapters of the original base, but these are for a changed "
            f"one: {listed(wrong)}. Take jlora.rebase(adapter, initial) of each."
        )


Base = Mapping[str, Any] | None


def leaves_of(params: Any) -> Base:
    """Returns the base parameters by path, or None where none are given."""
    if params is None:
        return None
    return paths.flatten(params, is_leaf=lambda x: isinstance(x, Missing))[0]


def base_weight(base: Base, path: str) -> Any:
    """Returns the base weight of `path`, or raises a TreeError that names it."""
    if base is None:
        raise TreeError(f"{path!r} needs its base weight. Pass params=.")
    leaf = base.get(path)
    if leaf is None or isinstance(leaf, Missing):
        near = paths.nearest(path, tuple(base), n=1)
        raise TreeError(
            f"params= has no weight {path!r}"
            + (f" (nearest: {near[0]!r})" if near else "")
            + ". Give the base model's whole parameters, those that jlora.split was "
            "given; its frozen side lacks the leaves trained in full."
        )
    return leaf


def is_lora(spec: Spec) -> bool:
    """Returns whether the leaves of `spec` are A and B of the whole weight."""
    return spec.method == "lora" and not spec.rows and spec.parts is None


def rescales(spec: Spec) -> bool:
    """Returns whether the method multiplies the whole weight, as DoRA does."""
    return method_of(spec).gain is not None


def as_lora(path: str, factors: Factors, base: Base) -> Factors:
    """Returns the leaf as plain LoRA with the same update; LoRA stays as it is.

    A magnitude over the whole weight (DoRA) has an update of full rank: it becomes one
    factor, beside an identity.
    """
    spec = factors.spec
    if is_lora(spec):
        return factors
    if rescales(spec):
        return _dora_update(factors, base_weight(base, path))
    a, b = low_rank_pair(factors)
    rank = a.shape[-1]
    wide = at_least_float32(b.dtype)
    b = (b.astype(wide) * factors.scale).astype(b.dtype)
    return Factors(a, b, lora_spec(spec, rank))


def _dora_update(factors: Factors, w: Any) -> Factors:
    """Returns the whole change that DoRA makes to `w`, exactly, as plain factors."""
    wide = w.astype(at_least_float32(w.dtype))
    (merged,) = merge([wide], Trainable({"0": factors}))
    change = matrices(merged - wide, factors.spec.axes)
    n, n_in, n_out = change.shape
    spec = lora_spec(factors.spec, min(n_in, n_out))
    eye = jnp.eye(spec.rank, dtype=change.dtype)
    eye = jnp.broadcast_to(eye, (n, *eye.shape))
    pair = (eye, change) if n_in <= n_out else (change, eye)
    a, b = shaped(*pair, spec, w.shape, change.dtype)
    return Factors(a.astype(factors.a.dtype), b.astype(factors.b.dtype), spec)


def check_base(name: str, needed: dict[str, str], base: Base) -> None:
    """Raises a TreeError that lists the leaves that need the base weights."""
    if base is not None or not needed:
        return
    lines = listed(f"{path!r}: {why}" for path, why in needed.items())
    raise TreeError(
        f"{name} needs the base weights of these leaves: {lines}. Pass params=, the "
        "parameters that jlora.split was given."
    )


DORA = "DoRA's change depends on the base weight"
FULL = "a leaf trained in full is a value; its change is the distance from the base"
