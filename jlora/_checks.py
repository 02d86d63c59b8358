"""Checks of the arguments of public functions; each says what to write instead."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from .errors import ConfigError, TreeError
from .factors import Factors
from .methods import leaf_shapes
from .transform.compat import is_staging
from .transform.stage import is_array


def check_function(owner: str, fn: object) -> None:
    """Raises a ConfigError if `fn` is a module, or cannot be called."""
    nnx = sys.modules.get("flax.nnx")  # an NNX module has imported it
    if isinstance(fn, getattr(nnx, "Module", ())):
        remedy = (
            "An NNX module holds its parameters: write `graphdef, params = "
            "nnx.split(model)`, and pass `lambda params, *args: "
            "nnx.merge(graphdef, params)(*args)`."
        )
    elif not callable(fn) or (hasattr(fn, "init") and hasattr(fn, "apply")):
        remedy = "Of a module pass its method, as `model.apply`."
    else:
        return
    raise ConfigError(
        f"jlora.{owner} takes the function first, `fn(params, *args)`, got "
        f"{type(fn).__name__}. {remedy}"
    )


def check_optimizer(owner: str, tx: object) -> None:
    """Raises a ConfigError if `tx` is not an optimizer of optax."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        raise ConfigError(
            f"jlora.{owner} takes an optimizer of optax, such as optax.adamw(1e-4), "
            f"got {type(tx).__name__}."
        )


def check_key(name: str, key: object) -> None:
    """Raises a ConfigError unless `key` is one PRNG key, new style or old."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        single = shape == ()
    else:
        single = dtype == jnp.uint32 and len(shape or ()) == 1
    if not single:
        what = type(key).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise ConfigError(
            f"{name} must be one PRNG key, jax.random.key(0), got {what}."
        )


def check_known(owner: str, *trees: object) -> None:
    """Raises a TreeError if a leaf is traced: its numbers are not known then."""
    if is_staging(*trees):
        raise TreeError(
            f"jlora.{owner} needs numbers, which are not known under jit, grad or "
            "vmap. Return the arrays from the transformed function, and call "
            f"jlora.{owner} outside, with what it returned."
        )


def check_params(name: str, params: object) -> None:
    """Raises a ConfigError if an optimizer was not given what it trains."""
    if params is None:
        raise ConfigError(
            f"{name} needs the factors themselves: write "
            "tx.update(gradients, state, trainable)."
        )


def check_positive(**settings: Any) -> None:
    """Raises a ConfigError for the first setting that is not a positive number.

    A traced number, as from `optax.inject_hyperparams`, is not checked.
    """
    for name, value in settings.items():
        if is_staging(value):
            continue
        if isinstance(value, str | None) or not value > 0:
            raise ConfigError(f"{name} must be a positive number, got {value!r}.")


def not_floating(path: str, factors: Factors) -> list[str]:
    """Returns in words which leaves of `factors` are not floating-point arrays."""
    found = {name: getattr(factors, name) for name in ("a", "b", "magnitude")}
    return [
        f"{name} of {path!r} is {getattr(x, 'dtype', type(x).__name__)}, it must be a "
        "floating-point array"
        for name, x in found.items()
        if x is not None and not (is_array(x) and jnp.issubdtype(x.dtype, jnp.floating))
    ]


def misshapen(path: str, factors: Factors, shape: tuple[int, ...]) -> list[str]:
    """Returns what is wrong with the shapes of `factors` for a weight of `shape`.

    Examples:
      >>> import numpy as np
      >>> from jlora.factors import Spec
      >>> f = Factors(np.ones((3, 2)), np.ones((2, 5)), Spec(rank=2, alpha=2))
      >>> misshapen("w", f, (3, 4))
      ["b of 'w' has shape (2, 5), a weight of shape (3, 4) at rank 2 needs (2, 4)"]
    """
    wanted = leaf_shapes(factors.spec, shape)
    found = {name: getattr(factors, name) for name in ("a", "b", "magnitude")}
    shapes = {k: tuple(x.shape) for k, x in found.items() if x is not None}
    return [
        f"{name} of {path!r} has shape {shapes.get(name)}, a weight of shape {shape} "
        f"at rank {factors.spec.rank} needs {wanted.get(name)}"
        for name in found
        if shapes.get(name) != wanted.get(name)
    ]
