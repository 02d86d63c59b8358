"""The model as a Flax Linen module, for the libraries that adapt those."""

from typing import Any

import common
import in_jax
import jax
from flax import linen as nn


class Decoder(nn.Module):
    """The shared model; its matrices are `layer0_q` and so on, `nn.Dense` each."""

    problem: common.Problem

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits."""
        rest = {}
        for key, value in in_jax.without_matrices(self.problem.weights()).items():
            if key.startswith("layer"):
                rest[key] = {
                    name: self.param(f"{key}_{name}", lambda _, norm=norm: norm)
                    for name, norm in value.items()
                }
            else:
                rest[key] = self.param(key, lambda _, value=value: value)
        features = {name: shape[1] for name, shape in self.problem.shapes().items()}

        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            dense = nn.Dense(features[name], use_bias=False, name=f"{layer}_{name}")
            return dense(x)

        return in_jax.forward(rest, tokens, linear)


def params(problem: common.Problem) -> dict[str, Any]:
    """Returns the shared weights as the module names them."""
    tree: dict[str, Any] = {}
    for key, value in problem.weights().items():
        if key.startswith("layer"):
            for name, own in value.items():
                matrix = name in common.MATRICES
                tree[f"{key}_{name}"] = {"kernel": own} if matrix else own
        else:
            tree[key] = value
    return tree
