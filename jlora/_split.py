"""Taking parameters apart into (frozen, trainable), and putting them together again."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import paths
from ._checks import check_key, misshapen
from ._numerics import key_of_path
from ._plan.plan import Plan
from ._plan.resolve import init_of
from ._plan.row import Row
from ._tables import listed
from .errors import ConfigError, TreeError
from .factors import Factors, Trainable
from .methods import find_init, method_of, residual
from .methods.moments import Statistics
from .transform.compat import is_staging
from .transform.stage import is_array


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


def split(
    key: jax.Array,
    params: Any,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    quantize: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[Any, Trainable]:
    """Returns `(frozen, trainable)`: the parameters to keep and those to train.

    `frozen` is `params` with holes where `plan` trains leaves in full, and without what
    `init="pissa"` and the like put into A and B: that is `w - scale * a @ b`, rounded
    once. Works under `jax.jit` and `jax.eval_shape`. With B (or A) zero, every
    operation of the adapted function gives the bits of the original one; one `jax.jit`
    may fuse, and so round, the two differently. Leaves trained in full are those of
    `params` themselves: copy `trainable` before donating it, if `params` is needed
    later.

    Args:
      key: PRNG key, consumed. A leaf's factors depend on the key and its path alone.
      params: the tree that `plan` was made for.
      plan: what to adapt, from `jlora.plan`.
      statistics: for `init="eva"`, `"corda"` and `"lora_ga"`, from
        `activation_statistics` and `gradient_statistics`.
      quantize: for `init="loftq"`, `array -> array` of one shape: the values that a
        quantised weight stands for.

    Returns:
      `(frozen, trainable)`; `merge(frozen, trainable)` is `params` again, to the one
      rounding of a changed weight (`init="loftq"`: as near as rank and bits allow).

    Raises:
      ConfigError: if `key` is no PRNG key or `plan` no `Plan`; if an init lacks its
        statistics or `quantize`, or a function given as init returns other shapes;
        lists the leaves.
      TreeError: if `params` is not the tree that `plan` was made for, or an adapted
        weight holds NaN or infinity (not looked for under a transformation).

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
    lora: dict[str, Factors] = {}
    full: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for row in plan.rows():
        if row.spec is not None:
            own = key_of_path(key, row.path)
            dtype = jnp.dtype(plan.config.dtype or "float32")
            w = leaves[row.path]
            lora[row.path], base = _start(own, w, row, plan, dtype, extra[row.path])
            if base is not w:
                changed[row.path] = _placed_as(w, base)
        elif row.status == "full":
            full[row.path] = leaves[row.path]
    frozen = [
        MISSING if path in full else changed.get(path, leaf)
        for path, leaf in leaves.items()
    ]
    return treedef.unflatten(frozen), Trainable(lora, full)


def _extras(
    plan: Plan, statistics: Statistics, quantize: Callable | None
) -> dict[str, tuple[Any, ...]]:
    """Returns what each init takes besides the weight, or an error for what lacks."""
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
        found = find_init(init_of(plan.config, row.path))
        if found is None or method_of(row.spec).start is not None:
            continue
        if found.needs in sources:
            known, remedy = sources[found.needs]
            if row.path not in known:
                wrong.append(f"{row.path!r}: init {row.spec.init!r}, give {remedy}")
                continue
            extra[row.path] = (known[row.path],)
            wrong += _statistic_misfits(row, found.needs, known[row.path])
    if wrong:
        raise ConfigError(f"split lacks what some inits need: {listed(wrong)}.")
    return extra


def _quantised(path: str, quantize: Callable, w: jax.Array) -> jax.Array:
    values = quantize(w)
    if jnp.shape(values) != w.shape:
        raise ConfigError(
            f"quantize returned shape {jnp.shape(values)} for {path!r}, a weight of "
            f"shape {w.shape}: return the values that the quantised weight stands for."
        )
    return values


def _statistic_misfits(row: Row, needs: str, given: Any) -> list[str]:
    """Returns in words where a statistic is not of the leaf's shape."""
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


def _start(
    key: jax.Array,
    w: Any,
    row: Row,
    plan: Plan,
    dtype: jnp.dtype,
    extra: tuple[Any, ...],
) -> tuple[Factors, Any]:
    """Returns the factors of `row` and the weight to freeze."""
    spec = row.spec
    assert spec is not None
    method, init = method_of(spec), find_init(init_of(plan.config, row.path))
    if method.start is not None:
        return method.start(key, row.shape, spec, dtype), w
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


def _placed_as(w: Any, base: jax.Array) -> jax.Array:
    """Returns `base` where `w` is."""
    if not isinstance(w, jax.Array) or is_staging(base) or base.sharding == w.sharding:
        return base
    return jax.device_put(base, w.sharding)


def check_plan(leaves: dict[str, Any], plan: Plan) -> None:
    """Raises a TreeError that lists where `leaves` are not those of `plan`.

    Raises a ConfigError for what is no plan.
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


def _check_finite(weights: dict[str, Any]) -> None:
    wrong = []
    for path, w in weights.items():
        if isinstance(w, jax.ShapeDtypeStruct):
            continue
        finite = jnp.isfinite(jnp.asarray(w)).all()
        if not is_staging(finite) and not bool(finite):
            wrong.append(f"{path!r} holds NaN or infinity")
    if wrong:
        raise TreeError(
            f"Nothing can be learnt from these weights: {listed(wrong)}. Check how they "
            "were loaded, or leave them out with exclude=."
        )


def combine(frozen: Any, trainable: Trainable) -> Any:
    """Returns the parameter tree with the leaves trained in full put in their places.

    `frozen` may also be the whole base parameters, as when an adapter is restored: a
    leaf trained in full takes the place of the base's. The low-rank factors are left
    out: adapted weights are those of `frozen`; with factors added, use `merge`.

    Args:
      frozen: from `split`, or the base parameters.
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


def flatten_frozen(frozen: Any) -> tuple[dict[str, Any], Any]:
    """Returns the leaves of `frozen` by path, holes among them, and the treedef.

    The treedef has a leaf at each hole, so it unflattens to whole parameters.
    """
    return paths.flatten(frozen, is_leaf=lambda x: isinstance(x, Missing))


def check(leaves: dict[str, Any], trainable: Trainable) -> None:
    """Raises a TreeError that lists all that does not fit between the two sides."""
    check_trainable(trainable)
    wrong = []
    for path, factors in trainable.lora.items():
        if path not in leaves or isinstance(leaves[path], Missing):
            near = paths.nearest(path, tuple(leaves), n=1)
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
        f"no leaf for the hole at {path!r}"
        for path, leaf in leaves.items()
        if isinstance(leaf, Missing) and path not in trainable.full
    ]
    if wrong:
        raise TreeError(
            f"frozen and trainable do not fit together: {listed(wrong)}. "
            "Take both from one jlora.split."
        )


def check_trainable(trainable: Any) -> None:
    """Raises a TreeError for what is no `Trainable`."""
    if not isinstance(trainable, Trainable):
        raise TreeError(
            f"trainable must be a jlora.Trainable, got {type(trainable).__name__}. "
            "Take it from jlora.split; mind the order (frozen, trainable, *args)."
        )


def _misfits(path: str, w: Any, factors: Factors) -> list[str]:
    if not (is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)):
        return [f"{path!r} is no floating-point array, so it takes no factors"]
    spec = factors.spec
    if sorted(spec.axes.order) != list(range(w.ndim)):
        n = len(spec.axes.order)
        return [f"{path!r} has {w.ndim} axes, its factors are for {n}"]
    if spec.shape and spec.shape != tuple(w.shape):
        return [f"{path!r} has shape {w.shape}, its factors are for {spec.shape}"]
    odd = [
        f"{name} of {path!r} is {getattr(x, 'dtype', type(x).__name__)}, it must be a "
        "floating-point array"
        for name in ("a", "b", "magnitude")
        if (x := getattr(factors, name)) is not None
        and not (is_array(x) and jnp.issubdtype(x.dtype, jnp.floating))
    ]
    if odd:
        return odd
    return misshapen(path, factors, tuple(w.shape))
