"""Adapter layers: a small perceptron with a residual after parts of each layer.

Houlsby puts one after attention and one after the perceptron, Pfeiffer only the second.
The norms stay frozen here; Houlsby's paper trains them too. Lin's has its own norm.

References:
  Houlsby et al., 2019, Parameter-Efficient Transfer Learning for NLP,
  https://arxiv.org/abs/1902.00751
  Pfeiffer et al., 2020, AdapterFusion, https://arxiv.org/abs/2005.00247
  Lin et al., 2020, Exploring Versatile Generative Language Model Via
  Parameter-Efficient Transfer Learning, https://arxiv.org/abs/2004.03829
"""

import jax
import jax.numpy as jnp

from ..hooks import Array, Extra, Hooks, Params
from .method import Method, adding


def adapter(x: Array, own: Params) -> Array:
    """Returns `x + gelu(norm(x) down) up`, with biases; `[B, T, D]`.

    The norm is the identity where `own` has none.
    """
    h = jax.nn.standardize(x) * own["scale"] + own["bias"] if "scale" in own else x
    h = jax.nn.gelu(h @ own["down"] + own["down_bias"])
    return x + h @ own["up"] + own["up_bias"]


def start(key: Array, layers: int, width: int, size: int) -> Params:
    """Returns adapters of `layers` layers that change nothing: `up` is zero."""
    down = jax.random.normal(key, (layers, width, size)) * width**-0.5
    return {
        "down": down,
        "down_bias": jnp.zeros((layers, size)),
        "up": jnp.zeros((layers, size, width)),
        "up_bias": jnp.zeros((layers, width)),
    }


def houlsby(size: int) -> Method:
    """Returns the method with two bottlenecks of `size` a layer."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Params:
        layers, width = params["layers"]["query"]["kernel"].shape[:2]
        one, two = jax.random.split(key)
        return {
            "attention": start(one, layers, width, size),
            "mlp": start(two, layers, width, size),
        }

    def hooks(own: Params) -> Hooks:
        return Hooks(
            attention=lambda x: adapter(x, own["attention"]),
            mlp=lambda x: adapter(x, own["mlp"]),
        )

    return adding(init, lambda added: Extra(added, hooks))


def pfeiffer(size: int, norm: bool = False) -> Method:
    """Returns the method with one bottleneck of `size` a layer; Lin's with `norm`."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Params:
        layers, width = params["layers"]["query"]["kernel"].shape[:2]
        added = start(key, layers, width, size)
        if norm:
            added |= {"scale": jnp.ones((layers, width))}
            added |= {"bias": jnp.zeros((layers, width))}
        return added

    def hooks(own: Params) -> Hooks:
        return Hooks(mlp=lambda x: adapter(x, own))

    return adding(init, lambda added: Extra(added, hooks))
