"""Keras on JAX: `Dense.enable_lora`, which merges on the fly; stateless, with optax."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import common
import in_jax
import jax
import keras


class Decoder(keras.Model):
    """The shared model; its matrices are `Dense` layers `layer0_q` and so on."""

    def __init__(self, problem: common.Problem):
        super().__init__()
        weights = problem.weights()
        self.dense = {}
        for path, own in self.matrices(weights).items():
            layer = keras.layers.Dense(own.shape[1], use_bias=False, name=path)
            layer.build((None, None, own.shape[0]))
            layer.kernel.assign(own)
            layer.enable_lora(problem.rank, lora_alpha=problem.rank)
            self.dense[path] = layer
        self.rest = jax.tree.map(self.frozen, in_jax.without_matrices(weights))
        self.built = True

    @staticmethod
    def matrices(weights: common.Tree) -> common.Tree:
        """Returns the six matrices of each layer by path."""
        return {
            f"{layer}_{name}": own[name]
            for layer, own in weights.items()
            if layer.startswith("layer")
            for name in common.MATRICES
        }

    def frozen(self, value: jax.Array) -> keras.Variable:
        """Returns a weight of the model that is not trained."""
        weight = self.add_weight(
            shape=value.shape, initializer="zeros", trainable=False
        )
        weight.assign(value)
        return weight

    def call(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits."""

        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            return self.dense[f"{layer}_{name}"](x)

        def value(tree: Any) -> Any:
            return {
                key: value(own) if isinstance(own, dict) else own.value
                for key, own in tree.items()
            }

        return in_jax.forward(value(self.rest), tokens, linear)


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    model = Decoder(problem)
    paths = [variable.path for variable in model.trainable_variables]
    factors = {variable.path: variable.value for variable in model.trainable_variables}
    frozen = [variable.value for variable in model.non_trainable_variables]

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        trained = [factors[path] for path in paths]
        logits, _ = model.stateless_call(trained, frozen, tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), frozen


if __name__ == "__main__":
    in_jax.run(make, ("keras",))
