"""The model as a Flax NNX module, for the libraries that adapt those."""

from collections.abc import Callable

import common
import in_jax
import jax
from flax import nnx

Wrap = Callable[[nnx.Linear], nnx.Module]


class Layer(nnx.Module):
    """The weights of one block; the matrices are `nnx.Linear`, or what wraps them."""

    def __init__(self, own: common.Tree, wrap: Wrap):
        self.norm1 = nnx.Param(own["norm1"])
        self.norm2 = nnx.Param(own["norm2"])
        for name in common.MATRICES:
            linear = nnx.Linear(*own[name].shape, use_bias=False, rngs=nnx.Rngs(0))
            linear.kernel[...] = own[name]
            setattr(self, name, wrap(linear))


class Decoder(nnx.Module):
    """The shared model with the shared weights."""

    def __init__(self, problem: common.Problem, wrap: Wrap = lambda linear: linear):
        weights = jax.tree.map(jax.numpy.asarray, problem.weights())
        self.layers = problem.layers
        self.embed = nnx.Param(weights["embed"])
        self.position = nnx.Param(weights["position"])
        self.norm = nnx.Param(weights["norm"])
        for i in range(problem.layers):
            setattr(self, f"layer{i}", Layer(weights[f"layer{i}"], wrap))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits."""
        rest = {
            name: getattr(self, name)[...] for name in ("embed", "position", "norm")
        }
        for i in range(self.layers):
            own = getattr(self, f"layer{i}")
            rest[f"layer{i}"] = {"norm1": own.norm1[...], "norm2": own.norm2[...]}

        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            return getattr(getattr(self, layer), name)(x)

        return in_jax.forward(rest, tokens, linear)
