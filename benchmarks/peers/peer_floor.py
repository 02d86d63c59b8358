"""The floor: each product's output has a gradient, and no weight has one.

Vectors added to the first `q`, `k` and `v` are trained in place of factors, so that the
backward pass runs through the frozen model as far as factors need it, which is not to
the embeddings. No LoRA can be cheaper.
"""

import common
import in_jax
import jax
import jax.numpy as jnp


def make(problem: common.Problem) -> tuple[in_jax.Loss, common.Tree, common.Tree]:
    """Returns the loss, the vectors, and the frozen weights."""

    def loss(shift: common.Tree, weights: common.Tree, tokens: jax.Array) -> jax.Array:
        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            out = x @ weights[layer][name]
            first = layer == "layer0" and name in shift
            return out + shift[name] if first else out

        logits = in_jax.forward(weights, tokens[:, :-1], linear)
        return in_jax.next_token_loss(logits, tokens)

    zeros = jnp.zeros(problem.width)
    return loss, dict.fromkeys("qkv", zeros), problem.weights()


if __name__ == "__main__":
    in_jax.run(make)
