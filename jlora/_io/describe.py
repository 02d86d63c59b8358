"""Adapters and random keys as JSON values beside numbered or named arrays."""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import misshapen, not_floating
from .._core.tree import check_trainable
from .._tables import listed
from ..errors import CheckpointError, ConfigError
from ..factors import FORMS, Factors, Leaf, Spec, Trainable
from ..methods import METHODS, low_rank_pair
from ..quantised import is_quantized
from .disk import Fault, Json

_LEAVES = ("a", "b", "magnitude")
_UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError)


def describe(trainable: Trainable) -> Json:
    """Returns everything of an adapter but its arrays, as JSON values.

    Examples:
      >>> import jax.numpy as jnp
      >>> describe(Trainable(full={"head": jnp.ones(2)}))
      {'lora': [], 'full': ['head']}
    """
    return {
        "lora": [[path, f.spec.to_dict()] for path, f in trainable.lora.items()],
        "full": list(trainable.full),
    }


def arrays(trainable: Trainable) -> Iterator[tuple[int, str, str, Leaf]]:
    """Yields `(number, path, leaf, array)` of an adapter's arrays, in its order.

    The number counts the paths of factors, and those of full leaves, each from 0.
    """
    for i, (path, factors) in enumerate(trainable.lora.items()):
        for leaf in _LEAVES:
            if getattr(factors, leaf) is not None:
                yield i, path, leaf, getattr(factors, leaf)
    for i, (path, x) in enumerate(trainable.full.items()):
        yield i, path, "full", x


def check_whole(
    trainable: Trainable,
    fault: Fault = CheckpointError,
    what: str = "Not saved, it could not be loaded",
) -> None:
    """Raises a `fault` if an adapter is not one that `rebuild` would return.

    Whatever writes an adapter asks first, so nothing is saved that cannot be loaded.

    Raises:
      fault: lists every misfit, after the words `what`.
      TreeError: if `trainable` is not a `Trainable`.
    """
    check_trainable(trainable)
    wrong = _faults(trainable)
    if wrong:
        raise fault(f"{what}: {listed(wrong)}.")


def _faults(trainable: Trainable) -> list[str]:
    """Returns in words what makes an adapter one that `rebuild` does not return."""
    wrong: list[str] = []
    for path, factors in trainable.lora.items():
        if not _is_name(path):
            wrong.append(f"the path {path!r} is not a text")
        elif not isinstance(factors, Factors):
            wrong.append(f"{path!r} holds {type(factors).__name__}, not Factors")
        else:
            wrong += _odd(path, factors.spec) or _misfits(path, factors)
    for path, x in trainable.full.items():
        if not _is_name(path):
            wrong.append(f"the path {path!r} is not a text")
        elif not (hasattr(x, "shape") and hasattr(x, "dtype")):
            wrong.append(f"the full leaf {path!r} is {type(x).__name__}, not an array")
        elif is_quantized(x):
            wrong.append(f"the full leaf {path!r} is quantised: train dense weights")
    if not wrong:
        return [
            f"{leaf!r} of {path!r} is a shape, without numbers"
            for _, path, leaf, x in arrays(trainable)
            if isinstance(x, jax.ShapeDtypeStruct)
        ]
    return wrong


def _is_name(path: object) -> bool:
    """Returns whether `path` is a text that UTF-8 can hold."""
    try:
        return isinstance(path, str) and bool(path.encode() or True)
    except UnicodeEncodeError:
        return False


def check_width(dtypes: Mapping[str, np.dtype]) -> None:
    """Raises a CheckpointError if JAX would cut an array of one of these dtypes."""
    for name, dtype in dtypes.items():
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise CheckpointError(
                f"{name!r} is {dtype}, which needs "
                'jax.config.update("jax_enable_x64", True).'
            )


def rebuild(about: object, found: Mapping[tuple[str, str], Leaf]) -> Trainable:
    """Returns the adapter that `describe` described, with arrays by path and leaf.

    Raises:
      CheckpointError: if it is not a description, or does not fit the arrays; lists
        every misfit.
    """
    match about:
        case {"lora": [*lora], "full": [*full]}:
            pass
        case _:
            raise CheckpointError("The description of the adapter is missing.")
    wrong: list[str] = []
    specs: dict[str, Spec] = {}
    for item in lora:
        match item:
            case [str(path), dict(fields)] if path not in specs and _is_name(path):
                spec = _spec(path, fields, wrong)
                if spec is not None:
                    specs[path] = spec
            case _:
                wrong.append(f"{item!r:.100} is not a path with its settings")
    if not all(map(_is_name, full)) or len({*full}) != len(full):
        wrong.append("the leaves trained in full are not a list of distinct paths")
    if wrong:
        raise _unfit(wrong)
    used = {(path, leaf) for path in specs for leaf in _LEAVES} & found.keys()
    wanted = {(path, "full") for path in full}
    wrong += [
        f"array {leaf!r} of {path!r} is missing"
        for path, leaf in sorted(wanted - found.keys())
    ]
    wrong += [
        f"array {leaf!r} of {path!r} belongs to nothing"
        for path, leaf in sorted(found.keys() - used - wanted)
    ]
    factors = {}
    for path, spec in specs.items():
        a, b, magnitude = (found.get((path, leaf)) for leaf in _LEAVES)
        factors[path] = Factors(a, b, spec, magnitude)
        wrong += _misfits(path, factors[path])
    if wrong:
        raise _unfit(wrong)
    return Trainable(factors, {path: found[path, "full"] for path in full})


def _spec(path: str, fields: Json, wrong: list[str]) -> Spec | None:
    """Returns the spec of `fields`, or None and a note in `wrong` of each bad field."""
    try:
        spec = Spec.from_dict(fields)
    except ConfigError as error:
        wrong.append(f"{path!r}: {str(error).rstrip('.')}")
        return None
    except _UNREADABLE as error:
        wrong.append(f"the settings of {path!r} are not readable ({error!r:.200})")
        return None
    odd = _odd(path, spec)
    wrong += odd
    return None if odd else spec


def _odd(path: str, spec: Spec) -> list[str]:
    """Returns in words which fields of a spec no method can have."""
    try:
        off = _off(spec)
        hash(spec)
    except _UNREADABLE as error:
        return [f"the settings of {path!r} are not readable ({error!r:.200})"]
    return [f"{name} of {path!r} is {getattr(spec, name)!r:.60}" for name in off]


def _off(spec: Spec) -> list[str]:
    """Returns the fields of a spec that no method can have."""
    axes, parts = spec.axes, spec.parts
    checks = {
        "method": spec.method == "rows" if spec.rows else spec.method in METHODS,
        "rank": type(spec.rank) is int,
        "alpha": type(spec.alpha) in (int, float),
        "rslora": type(spec.rslora) is bool,
        "dropout": type(spec.dropout) in (int, float) and 0 <= spec.dropout < 1,
        "op": spec.op in ("linear", "embedding", "conv"),
        "init": isinstance(spec.init, str),
        "axes": _are_counts(axes.order)
        and sorted(axes.order) == list(range(len(axes.order))),
        "form": spec.form in FORMS,
        "shape": _are_counts(spec.shape),
        "seed": type(spec.seed) is int,
        "rows": _are_counts(spec.rows),
        "invocation": _are_counts(spec.invocation),
        "parts": parts is None
        or (
            type(parts.axis) is int
            and _are_counts(parts.sizes)
            and _are_counts(parts.ranks)
            and len(parts.sizes) == len(parts.ranks) > 0
        ),
    }
    return [name for name, good in checks.items() if not good]


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(
        type(n) is int and 0 <= n < 2**31 for n in values
    )


def _misfits(path: str, factors: Factors) -> list[str]:
    """Returns in words where the arrays are not shaped as the spec says."""
    try:
        shape = factors.spec.shape or _weight_shape(factors)
        return not_floating(path, factors) or misshapen(path, factors, shape)
    except Exception as error:
        return [f"the arrays of {path!r} do not fit its settings ({error!r:.200})"]


def _weight_shape(factors: Factors) -> tuple[int, ...]:
    """Returns the shape of the weight that the factors are for."""
    axes = factors.spec.axes
    n, n_in, n_out = len(axes.batch), len(axes.fan_in), len(axes.fan_out)
    as_is = factors.spec.method in ("lora", "dora") and factors.spec.parts is None
    pair = low_rank_pair if as_is else functools.partial(jax.eval_shape, low_rank_pair)
    a, b = pair(factors)
    more = a.ndim - (n + n_in + 1), b.ndim - (n + n_out + 1)
    if more == (1, 1):
        raise ValueError("of a stack, take each of jlora.adapters.unstack(x)")
    if more != (0, 0):
        raise ValueError(f"{a.ndim} and {b.ndim} axes for {axes}")
    return axes.weight_shape(a.shape, b.shape)


def _unfit(wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The adapter is damaged, or of another version of jlora: {listed(wrong)}."
    )


def key_to_dict(key: jax.Array) -> Json:
    """Returns a random key, of the new kind or the old, as JSON values."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(key) if typed else key)
    return {
        "impl": str(jax.random.key_impl(key)) if typed else None,
        "shape": list(data.shape),
        "data": data.ravel().tolist(),
    }


def key_from_dict(fields: Json) -> jax.Array:
    """Returns the random key that `key_to_dict` described."""
    data = jnp.asarray(np.array(fields["data"], np.uint32).reshape(fields["shape"]))
    if fields["impl"] is None:
        return data
    return jax.random.wrap_key_data(data, impl=fields["impl"])
