"""The low-rank term written by hand, `x w + (x a) b`, and left to autodiff."""

import common
import in_jax
import jax


def make(problem: common.Problem) -> tuple[in_jax.Loss, common.Tree, common.Tree]:
    """Returns the loss, the factors, and the frozen weights."""

    def loss(
        factors: common.Tree, weights: common.Tree, tokens: jax.Array
    ) -> jax.Array:
        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            own = factors[layer][name]
            return x @ weights[layer][name] + (x @ own["a"]) @ own["b"]

        logits = in_jax.forward(weights, tokens[:, :-1], linear)
        return in_jax.next_token_loss(logits, tokens)

    return loss, problem.factors(), problem.weights()


if __name__ == "__main__":
    in_jax.run(make)
