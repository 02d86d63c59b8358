"""Prefix tuning: trained keys and values go before those of each layer.

With `through`, they are the output of a perceptron while they are trained, which the
paper found to be stabler; `folded` gives the plain keys and values to keep.

References:
  Li and Liang, 2021, Prefix-Tuning, https://arxiv.org/abs/2101.00190
"""

import jax
import jax.numpy as jnp

from ..hooks import Array, Extra, Hooks, Params
from .method import Method, adding


def before(own: Params) -> Hooks:
    """Returns the hooks that put keys and values `[P, H * K]` before a layer's own."""

    def keys_values(k: Array, v: Array) -> tuple[Array, Array]:
        def put(added: Array, x: Array) -> Array:
            added = added.reshape(1, -1, *x.shape[2:]).astype(x.dtype)
            return jnp.concatenate([jnp.repeat(added, len(x), axis=0), x], axis=1)

        return put(own["keys"], k), put(own["values"], v)

    return Hooks(keys_values=keys_values)


def prefix(tokens: int) -> Method:
    """Returns the method with `tokens` keys and values a layer."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Params:
        layers, _, width = params["layers"]["key"]["kernel"].shape
        one, two = 0.02 * jax.random.normal(key, (2, layers, tokens, width))
        return {"keys": one, "values": two}

    return adding(init, lambda added: Extra(added, before))


def through(tokens: int, hidden: int) -> Method:
    """Returns the method with a perceptron of width `hidden` that makes the prefix."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Params:
        layers, inner, width = params["layers"]["key"]["kernel"].shape
        keys = jax.random.split(key, 3)
        shape = (hidden, layers, 2, width)
        return {
            "vectors": jax.random.normal(keys[0], (tokens, inner)),
            "into": jax.random.normal(keys[1], (inner, hidden)) * inner**-0.5,
            "out": 0.02 * jax.random.normal(keys[2], shape) * hidden**-0.5,
        }

    return adding(init, lambda added: Extra(folded(added), before))


def folded(added: Params) -> Params:
    """Returns the keys and values that the perceptron makes: what inference needs."""
    h = jnp.tanh(added["vectors"] @ added["into"])
    keys, values = jnp.einsum("ph,hlcw->clpw", h, added["out"])
    return {"keys": keys, "values": values}
