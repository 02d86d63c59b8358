"""As `peer_manual.py`, with the tokens in one axis for the low-rank term.

The same algebra; XLA on CPU is slow at thin products of arrays with three axes.
"""

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
            out = x @ weights[layer][name]
            low_rank = (x.reshape(-1, x.shape[-1]) @ own["a"]) @ own["b"]
            return out + low_rank.reshape(out.shape)

        logits = in_jax.forward(weights, tokens[:, :-1], linear)
        return in_jax.next_token_loss(logits, tokens)

    return loss, problem.factors(), problem.weights()


if __name__ == "__main__":
    in_jax.run(make)
