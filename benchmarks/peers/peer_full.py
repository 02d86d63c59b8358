"""Full fine-tuning: every weight is trained."""

import common
import in_jax
import jax


def make(problem: common.Problem) -> tuple[in_jax.Loss, common.Tree, None]:
    """Returns the loss, all weights, and nothing frozen."""

    def loss(weights: common.Tree, _: None, tokens: jax.Array) -> jax.Array:
        logits = in_jax.forward(weights, tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, problem.weights(), None


if __name__ == "__main__":
    in_jax.run(make)
