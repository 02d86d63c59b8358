"""Several adapters side by side: which leaves they have, and whether the leaves fit."""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .. import paths
from .._core.algebra import lora_spec, weight_sizes
from .._core.merge import merge
from .._core.rebase import changed_base
from .._core.tree import Missing, widened
from .._numerics import at_least_float32, python_numbers
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Array, Factors, Leaf, PyTree, Spec, Trainable
from ..methods import low_rank_pair, method_of
from ..methods.init import matrices, shaped


def sequence(name: str, trainables: Iterable[Trainable] | Trainable) -> list[Trainable]:
    """Returns the adapters as a list.

    Raises:
      TreeError: if they are not a sequence of adapters, or if there are none.
    """
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
        raise TreeError(f"{name} takes jlora.Trainable adapters, but {listed(wrong)}.")
    if not found:
        raise TreeError(f"{name} needs at least one adapter, got none.")
    return found


def weights_for(
    name: str, trainables: Sequence[Trainable], weights: Iterable[ArrayLike] | None
) -> list[ArrayLike]:
    """Returns one weight for each adapter: 1 for each where `weights` is None.

    Python numbers are not converted, so that a weight of 1 is recognised as such.

    Raises:
      TreeError: if there are more weights than adapters, or fewer.
      ConfigError: if a weight is not a finite number.
    """
    found: list[ArrayLike] = [1] * len(trainables) if weights is None else list(weights)
    if len(found) != len(trainables):
        raise TreeError(
            f"{name} got {len(trainables)} adapters and {len(found)} weights. Give "
            "one weight for each."
        )
    wrong = [repr(weight) for weight in found if not _is_weight(weight)]
    if wrong:
        raise ConfigError(
            f"{name} takes a finite number for each adapter, got {listed(wrong)}."
        )
    return found


def _is_weight(weight: object) -> bool:
    """Returns whether `weight` is a real number, or an array of one number."""
    if isinstance(weight, jax.Array):  # its value may not be known yet
        kinds = (jnp.floating, jnp.integer)
        return not weight.ndim and any(jnp.issubdtype(weight.dtype, k) for k in kinds)
    if isinstance(weight, np.ndarray) and not weight.ndim:
        weight = weight[()]
    number = python_numbers(weight)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return math.isfinite(number)


def checked_rank(rank: int) -> int:
    """Returns `rank`; raises a ConfigError unless it is a positive integer."""
    rank = python_numbers(rank)
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank must be a positive integer, got {rank!r}.")
    return rank


def check_share(**shares: float) -> None:
    """Raises a ConfigError for the first of `shares` that is outside (0, 1]."""
    for name, share in shares.items():
        if not _is_weight(share) or not 0 < share <= 1:
            raise ConfigError(f"{name} must be in (0, 1], got {share!r}.")


def union(trees: Iterable[Iterable[str]]) -> list[str]:
    """Returns the keys of all mappings, each once, in the order of appearance."""
    return list(dict.fromkeys(path for tree in trees for path in tree))


def check_fit(name: str, trainables: Sequence[Trainable]) -> None:
    """Raises a TreeError that lists the leaves that do not adapt the same weight."""
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
            elif factors.spec.invocation != first.spec.invocation:
                wrong.append(
                    f"{path!r} of adapter {i} acts after the tokens "
                    f"{factors.spec.invocation}, that of adapter {own[0][0]} after "
                    f"{first.spec.invocation}"
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
    """Returns the sizes of the weight, from the shapes of A and B."""
    if not (is_lora(factors.spec) or rescales(factors.spec)):
        a, b = jax.eval_shape(low_rank_pair, factors)
        factors = Factors(a, b, factors.spec)
    return weight_sizes(factors)


def check_one_base(name: str, trainables: Sequence[Trainable]) -> None:
    """Raises a TreeError that lists the leaves whose init changed the base."""
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


# The base parameters by path; None where the caller gave none.
Base = Mapping[str, Leaf] | None


def leaves_of(params: PyTree) -> Base:
    """Returns the base parameters by path, or None if `params` is None."""
    if params is None:
        return None
    return paths.flatten(params, is_leaf=lambda x: isinstance(x, Missing))[0]


def base_weight(base: Base, path: str) -> Array:
    """Returns the base weight at `path`; a quantised one is widened.

    Raises:
      TreeError: if the base has no weight there; names `path`.
    """
    if base is None:
        raise TreeError(f"{path!r} needs its base weight. Pass params=.")
    leaf = base.get(path)
    if leaf is None or isinstance(leaf, Missing):
        near = paths.nearest(path, tuple(base), n=1)
        raise TreeError(
            f"params= has no weight {path!r}"
            + (f" (nearest: {near[0]!r})" if near else "")
            + ". Give the base model's whole parameters, those that jlora.split was "
            "given. The frozen side of a split lacks the leaves trained in full."
        )
    return widened(leaf)


def is_lora(spec: Spec) -> bool:
    """Returns whether the method is plain LoRA: A and B, of the whole weight."""
    return spec.method == "lora" and not spec.rows and spec.parts is None


def rescales(spec: Spec) -> bool:
    """Returns whether the method multiplies the whole weight, as DoRA does."""
    return method_of(spec).gain is not None


def as_lora(path: str, factors: Factors, base: Base) -> Factors:
    """Returns the leaf as plain LoRA with the same update; plain LoRA stays as it is.

    The update of DoRA, whose magnitude rescales the whole weight, has full rank: it
    becomes one factor, and the other factor is an identity.
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


def _dora_update(factors: Factors, w: Array) -> Factors:
    """Returns the exact change that DoRA makes to `w`, as plain LoRA."""
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


def dora_leaves(lora: Mapping[str, Factors]) -> dict[str, str]:
    """Returns the leaves of `lora` that need the base weights, and why."""
    return {path: DORA for path, f in lora.items() if rescales(f.spec)}


def check_base(name: str, needed: Mapping[str, str], base: Base) -> None:
    """Raises a TreeError that lists the `needed` leaves if there is no base."""
    if base is not None or not needed:
        return
    lines = listed(f"{path!r}: {why}" for path, why in needed.items())
    raise TreeError(
        f"{name} needs the base weights of these leaves: {lines}. Pass params=, the "
        "parameters that jlora.split was given."
    )


DORA = "DoRA's change depends on the base weight"
FULL = (
    "a leaf trained in full holds its value, and its change is measured from the base"
)
