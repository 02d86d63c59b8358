"""Splits parameters into (frozen, trainable)."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import paths
from .._checks import check_key
from .._numerics import key_of_path, not_finite
from .._plan.plan import Plan
from .._plan.row import Row
from .._tables import listed
from ..errors import ConfigError, TreeError
from ..factors import Factors, Leaf, Trainable
from ..methods import INITS, method_of, residual
from ..methods.moments import Statistics
from ..quantised import is_quantized, whole
from ..transform.compat import is_staging
from .quantize import Encoder, encoders
from .tree import MISSING, Tree, check_plan, coded_as, placed_as, widened

Values = Callable[[jax.Array], Leaf]  # what a quantised weight stands for, or codes


def split(
    key: jax.Array,
    params: Tree,
    plan: Plan,
    *,
    statistics: Statistics | None = None,
    quantize: str | Mapping[str, Any] | Values | None = None,
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

    With `quantize="nf4"`, `frozen` holds codes as from
    `jlora.quantize(params, plan, kind="nf4")`. An init that changes the weight sees the
    dense one: `"loftq"` makes up for what these codes lose, and `"pissa"` quantises the
    rest that it leaves (QPiSSA). `params` may also be quantised already. Then an init
    that needs the weight widens it, one leaf at a time, and a changed weight is
    quantised again with the same kind and blocks.

    Args:
      key: PRNG key, consumed. A leaf's factors depend only on the key and its path.
      params: the tree that `plan` was made for.
      plan: what to adapt, from `jlora.plan`.
      statistics: for `init="eva"`, `"corda"` and `"lora_ga"`, from
        `activation_statistics` and `gradient_statistics`.
      quantize: a kind, or a mapping of options of `jlora.quantize`, such as
        `{"kind": "nf4", "double": True}`: quantises `frozen`. Or, for `init="loftq"`,
        a function `array -> array` of one shape: the values that a quantised weight
        stands for; `frozen` holds these.

    Returns:
      `(frozen, trainable)`; `merge(frozen, trainable)` is `params` again, up to one
      rounding of a changed weight (`init="loftq"`: as near as rank and bits allow;
      quantised: up to what the codes of a weight lose).

    Raises:
      ConfigError: if `key` is not a PRNG key or `plan` is not a `Plan`; if an init
        lacks its statistics or `quantize`, or a function given as init returns wrong
        shapes; lists the leaves.
      TreeError: if `params` is not the tree that `plan` was made for, or an adapted
        weight holds NaN or infinity (not checked under a transformation), or a leaf
        to be trained in full is quantised, or one to be quantised is so already.

    Warns:
      UserWarning: names leaves of quantised `params` that their init changed, since
        they are rounded twice; and those of `init="loftq"`, which has nothing to make
        up for and starts as `"kaiming"`.

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
    _check_full(leaves, plan)
    own = _encoders(leaves, plan, quantize)
    values = _values(leaves, quantize, own)
    extra = _extras(plan, leaves, statistics or Statistics(), values)
    _check_finite({p: leaves[p] for p in plan.adapted})
    dtype = jnp.dtype(plan.config.dtype or "float32")
    lora: dict[str, Factors] = {}
    full: dict[str, Leaf] = {}
    changed: dict[str, Leaf] = {}
    for row in plan.rows():
        path, w = row.path, leaves[row.path]
        encoder = own.get(path)
        if row.spec is not None:
            lora[path], changed[path] = _initialised(
                key_of_path(key, path), w, row, dtype, extra[path], encoder
            )
        elif row.status == "full":
            full[path] = w
        elif encoder is not None and not is_quantized(w):
            changed[path] = encoder(w)
    frozen = [
        MISSING if path in full else changed.get(path, leaf)
        for path, leaf in leaves.items()
    ]
    _tell_rounded(leaves, plan)
    return treedef.unflatten(frozen), Trainable(lora, full)


def _encoders(
    leaves: Mapping[str, Leaf], plan: Plan, quantize: Any
) -> dict[str, Encoder]:
    """Returns for each leaf that `frozen` holds quantised what makes its codes."""
    found: dict[str, Encoder] = {
        path: functools.partial(coded_as, w)
        for path, w in leaves.items()
        if is_quantized(w)
    }
    if isinstance(quantize, str):
        quantize = {"kind": quantize}
    if quantize is None or callable(quantize):
        return found
    if not isinstance(quantize, Mapping):
        raise ConfigError(
            "quantize must be a kind, a mapping of options of jlora.quantize, or a "
            "function from a weight to its quantised values, got "
            f"{type(quantize).__name__}."
        )
    try:
        found |= encoders(leaves, plan, **quantize)
        others = [
            row.path
            for row in plan.rows()
            if row.init and row.init.needs == "quantize" and row.path not in found
        ]
        if others and "targets" not in quantize:  # tables, as their init asks for it
            found |= encoders(leaves, plan, **quantize, targets=others)
        return found
    except TypeError as error:
        raise ConfigError(
            "quantize takes a kind or a mapping of the options of jlora.quantize, got "
            f"{quantize!r}: {error}."
        ) from error


def _values(
    leaves: Mapping[str, Leaf], quantize: Any, own: Mapping[str, Encoder]
) -> dict[str, Values]:
    """Returns for each leaf what an init that needs to quantise it calls."""
    if not (quantize is None or callable(quantize)):
        return {
            path: functools.partial(_coded, leaves[path], encoder)
            for path, encoder in own.items()
        }
    coded = [path for path, w in leaves.items() if is_quantized(w)]
    if quantize is not None and coded:
        raise ConfigError(
            f"{listed(map(repr, coded), 3, ', ')} are quantised already, so a function "
            "cannot say what they stand for: leave quantize= out, or give split the "
            "dense weights."
        )
    if quantize is None:
        return {}
    return {path: functools.partial(_quantised, path, quantize) for path in leaves}


def _coded(w: Leaf, encoder: Encoder, x: jax.Array) -> Leaf:
    return encoder(placed_as(w, x))


def _extras(
    plan: Plan,
    leaves: Mapping[str, Leaf],
    statistics: Statistics,
    values: Mapping[str, Values],
) -> dict[str, tuple[Any, ...]]:
    """Returns what each init takes besides the weight, or raises if some is missing."""
    sources = {
        "inputs": (statistics.inputs, "statistics=jlora.activation_statistics(...)"),
        "gradients": (
            statistics.gradients,
            "statistics=jlora.gradient_statistics(...)",
        ),
        "quantize": (values, "the kind, quantize='nf4'"),
    }
    extra: dict[str, tuple[Any, ...]] = {}
    wrong = []
    for row in plan.rows():
        if row.spec is None:
            continue
        extra[row.path] = ()
        if row.init is not None and row.init.needs in sources:
            if row.init.needs == "quantize" and is_quantized(leaves[row.path]):
                continue
            known, remedy = sources[row.init.needs]
            if row.path not in known:
                wrong.append(f"{row.path!r}: init {row.spec.init!r}, give {remedy}")
                continue
            extra[row.path] = (jax.tree.map(whole, known[row.path]),)
            wrong += _statistic_misfits(row, row.init.needs, known[row.path])
    if wrong:
        raise ConfigError(f"split lacks what some inits need: {listed(wrong)}.")
    return extra


def _quantised(path: str, quantize: Values, w: jax.Array) -> Leaf:
    values = quantize(w)
    shape = values.shape if is_quantized(values) else jnp.shape(values)
    if shape != w.shape:
        raise ConfigError(
            f"quantize returned shape {shape} for {path!r}, a weight of "
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
    key: jax.Array,
    w: Leaf,
    row: Row,
    dtype: jnp.dtype,
    extra: tuple[Any, ...],
    encoder: Encoder | None,
) -> tuple[Factors, Leaf]:
    """Returns the factors of `row` and the weight to freeze."""
    spec = row.spec
    assert spec is not None
    method, init = method_of(spec), row.init
    kept = w if encoder is None or is_quantized(w) else encoder(w)
    if method.init is not None:
        return method.init(key, w, spec, dtype), kept
    assert init is not None
    if init.needs == "quantize" and is_quantized(w):
        init = INITS["kaiming"]
    subject: Any = row.shape if init.needs == "shape" else widened(w)
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
    base = kept
    if init.base == "residual":
        base = placed_as(w, residual(subject, a, b, spec))
        base = base if encoder is None else encoder(base)
    elif init.base == "own":
        base = own[0] if is_quantized(own[0]) else placed_as(w, own[0])
    factors = Factors(a, b, spec)
    return factors if method.finish is None else method.finish(factors, base), base


def _check_full(leaves: Mapping[str, Leaf], plan: Plan) -> None:
    wrong = [
        f"{path!r} is trained in full, but it is quantised ({leaves[path].kind})"
        for path in plan.full
        if is_quantized(leaves[path])
    ]
    if wrong:
        raise TreeError(
            f"Codes have no gradient: {listed(wrong)}. Take the dense weights of these "
            "leaves, and leave them out of targets= of jlora.quantize."
        )


def _check_finite(weights: Mapping[str, Leaf]) -> None:
    known = {
        (path, i): x
        for path, w in weights.items()
        for i, x in enumerate(jax.tree.leaves(w))
        if not isinstance(x, jax.ShapeDtypeStruct) and not is_staging(x)
    }
    paths_of = dict.fromkeys(path for path, _ in not_finite(known))
    wrong = [f"{path!r} holds NaN or infinity" for path in paths_of]
    if wrong:
        raise TreeError(
            f"These weights cannot be adapted: {listed(wrong)}. Check how "
            "they were loaded, or leave them out with exclude=."
        )


def _tell_rounded(leaves: Mapping[str, Leaf], plan: Plan) -> None:
    """Warns of inits that find less in a quantised leaf than in a dense one."""
    inits = {
        row.path: row.init
        for row in plan.rows()
        if row.init and row.init.changes_base and is_quantized(leaves[row.path])
    }
    lost = [path for path, init in inits.items() if init.needs == "quantize"]
    twice = [path for path in inits if path not in lost]
    told = []
    if lost:
        told.append(
            f"{listed(map(repr, lost), 5, ', ')} start as init='kaiming': they are "
            "quantised already, so init='loftq' does not know what was lost."
        )
    if twice:
        told.append(
            f"{listed(map(repr, twice), 5, ', ')} are quantised for a second time, "
            "since their init changes them."
        )
    if told:
        told.append("Give split the dense weights and quantize=, the kind.")
        warnings.warn(" ".join(told), stacklevel=3)
