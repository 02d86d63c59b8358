"""IA3: keys, values and hidden activations are multiplied by trained vectors.

References:
  Liu et al., 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
  In-Context Learning, https://arxiv.org/abs/2205.05638
"""

import jax.numpy as jnp

from ..hooks import Array, Extra, Hooks, Params
from .method import Method, adding


def ia3() -> Method:
    """Returns the method; all vectors start at one."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Params:
        layers = params["layers"]
        key_kernel, up_kernel = layers["key"]["kernel"], layers["up"]["kernel"]
        return {
            "keys": jnp.ones(key_kernel[:, 0].shape),
            "values": jnp.ones(key_kernel[:, 0].shape),
            "hidden": jnp.ones(up_kernel[:, 0].shape),
        }

    return adding(init, lambda added: Extra(added, scaled))


def scaled(own: Params) -> Hooks:
    """Returns the hooks that multiply by one layer's vectors."""

    def keys_values(k: Array, v: Array) -> tuple[Array, Array]:
        return k * own["keys"].reshape(k.shape[2:]), v * own["values"].reshape(
            v.shape[2:]
        )

    return Hooks(keys_values=keys_values, hidden=lambda x: x * own["hidden"])
