"""Splits parameters into (frozen, trainable)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import paths
from .._checks import check_key
from .._numerics import key_of_path
from .._plan.plan import Plan
from .._plan.row import Row
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Factors, Leaf, Trainable
from ..methods import method_of, residual
from ..methods.moments import Statistics
from ..transform.compat import is_staging
from .tree import MISSING, Tree, check_plan, placed_as

Quantize = Callable[[jax.Array], jax.Array]


def split(
    key: jax.Array,
    params: Tree,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[Tree, Trainable]:
    """Returns `(frozen, trainable)`: the parameters to keep and those to train.

    `frozen` is `params` with `MISSING` where `plan` trains leaves in full. For
    `init="pissa"` and the like, the initial update is subtracted from the weight, which
    becomes `w - scale * a @ b`, rounded once. `split` works under `jax.jit` and
    `jax.eval_shape`. While B (or A) is zero, every operation of the adapted function
    gives the same bits as in the original one; under `jax.jit`, XLA may fuse the two
    differently and so round them differently. Leaves trained in full are the arrays of
    `params` themselves: copy `trainable` before you donate it, if you need `params`
    later.

    Args:
      key: PRNG key, consumed. A leaf's factors depend only on the key and its path.
      params: the tree that `plan` was made for.
      plan: what to adapt, from `jlora.plan`.
      statistics: for `init="eva"`, `"corda"` and `"lora_ga"`, from
        `activation_statistics` and `gradient_statistics`.
      quantize: for `init="loftq"`, `array -> array` of one shape: the values that a
        quantised weight stands for.

    Returns:
      `(frozen, trainable)`; `merge(frozen, trainable)` is `params` again, up to one
      rounding of a changed weight (`init="loftq"`: as near as rank and bits allow).

    Raises:
      ConfigError: if `key` is not a PRNG key or `plan` is not a `Plan`; if an init
        lacks its statistics or `quantize`, or a function given as init returns wrong
        shapes; lists the leaves.
      TreeError: if `params` is not the tree that `plan` was made for, or an adapted
        weight holds NaN or infinity (not checked under a transformation).

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
      >>> config = jlora.LoraConfig(rank=2, targets="w1", train=("w2",))
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> frozen, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> jax.tree.map(jnp.shape, frozen)
      {'w1': (4, 8), 'w2': Missing()}
      >>> trainable.lora["w1"].a.shape, trainable.full["w2"].shape
      ((4, 2), (8, 2))
    """
    check_key("key", key)
    leaves, treedef = paths.flatten(params)
    check_plan(leaves, plan)
    extra = _extras(plan, statistics or Statistics(), quantize)
    _check_finite({p: leaves[p] for p in plan.adapted})
    dtype = jnp.dtype(plan.config.dtype or "float32")
    lora: dict[str, Factors] = {}
    full: dict[str, Leaf] = {}
    changed: dict[str, jax.Array] = {}
    for row in plan.rows():
        if row.spec is not None:
            own, w = key_of_path(key, row.path), leaves[row.path]
            lora[row.path], base = _initialised(own, w, row, dtype, extra[row.path])
            if base is not w:
                changed[row.path] = placed_as(w, base)
        elif row.status == "full":
            full[row.path] = leaves[row.path]
    frozen = [
        MISSING if path in full else changed.get(path, leaf)
        for path, leaf in leaves.items()
    ]
    return treedef.unflatten(frozen), Trainable(lora, full)


def _extras(
    plan: Plan, statistics: Statistics, quantize: Quantize | None
) -> dict[str, tuple[Any, ...]]:
    """Returns what each init takes besides the weight, or raises if some is missing."""
    if not (quantize is None or callable(quantize)):
        raise ConfigError(
            "quantize must be a function from a weight to its quantised values, got "
            f"{type(quantize).__name__}."
        )
    sources = {
        "inputs": (statistics.inputs, "statistics=jlora.activation_statistics(...)"),
        "gradients": (
            statistics.gradients,
            "statistics=jlora.gradient_statistics(...)",
        ),
        "quantize": (
            {
                row.path: functools.partial(_quantised, row.path, quantize)
                for row in plan.rows()
                if quantize is not None
            },
            "quantize=, a function from a weight to its quantised values",
        ),
    }
    extra: dict[str, tuple[Any, ...]] = {}
    wrong = []
    for row in plan.rows():
        if row.spec is None:
            continue
        extra[row.path] = ()
        if row.init is not None and row.init.needs in sources:
            known, remedy = sources[row.init.needs]
            if row.path not in known:
                wrong.append(f"{row.path!r}: init {row.spec.init!r}, give {remedy}")
                continue
            extra[row.path] = (known[row.path],)
            wrong += _statistic_misfits(row, row.init.needs, known[row.path])
    if wrong:
        raise ConfigError(f"split lacks what some inits need: {listed(wrong)}.")
    return extra


def _quantised(path: str, quantize: Quantize, w: jax.Array) -> jax.Array:
    values = quantize(w)
    if jnp.shape(values) != w.shape:
        raise ConfigError(
            f"quantize returned shape {jnp.shape(values)} for {path!r}, a weight of "
            f"shape {w.shape}: return the values that the quantised weight stands for."
        )
    return values


def _statistic_misfits(row: Row, needs: str, given: Any) -> list[str]:
    """Returns in words where a statistic does not fit the leaf's shape."""
    if row.spec is None or needs == "quantize":
        return []
    _, n_in, _ = row.spec.axes.sizes(row.shape)
    batch = tuple(row.shape[i] for i in row.spec.axes.batch)
    want, got = row.shape, given
    if needs == "inputs":
        want, got = (*batch, n_in, n_in), given.second
    if tuple(got.shape) == want:
        return []
    return [f"{row.path!r}: statistics of shape {tuple(got.shape)}, it needs {want}"]


def _initialised(
    key: jax.Array, w: Leaf, row: Row, dtype: jnp.dtype, extra: tuple[Any, ...]
) -> tuple[Factors, Leaf]:
    """Returns the factors of `row` and the weight to freeze."""
    spec = row.spec
    assert spec is not None
    method, init = method_of(spec), row.init
    if method.init is not None:
        return method.init(key, row.shape, spec, dtype), w
    assert init is not None
    subject = row.shape if init.needs == "shape" else w
    made = init.fun(key, subject, spec, dtype, *extra)
    if not isinstance(made, tuple) or len(made) != 2 + (init.base == "own"):
        raise ConfigError(f"The init of {row.path!r} must return (a, b), got {made!r}.")
    a, b, *own = made
    a_shape = spec.axes.a_shape(row.shape, spec.rank)
    b_shape = spec.axes.b_shape(row.shape, spec.rank)
    if (jnp.shape(a), jnp.shape(b)) != (a_shape, b_shape):
        raise ConfigError(
            f"The init of {row.path!r} returned shapes {jnp.shape(a)} and "
            f"{jnp.shape(b)}, a weight of shape {row.shape} at rank {spec.rank} needs "
            f"{a_shape} and {b_shape}."
        )
    a, b = jnp.asarray(a).astype(dtype), jnp.asarray(b).astype(dtype)
    base = residual(w, a, b, spec) if init.base == "residual" else (*own, w)[0]
    factors = Factors(a, b, spec)
    return factors if method.finish is None else method.finish(factors, base), base


def _check_finite(weights: dict[str, Leaf]) -> None:
    wrong = []
    for path, w in weights.items():
        if isinstance(w, jax.ShapeDtypeStruct):
            continue
        finite = jnp.isfinite(jnp.asarray(w)).all()
        if not is_staging(finite) and not bool(finite):
            wrong.append(f"{path!r} holds NaN or infinity")
    if wrong:
        raise TreeError(
            f"These weights cannot be adapted: {listed(wrong)}. Check how "
            "they were loaded, or leave them out with exclude=."
        )
