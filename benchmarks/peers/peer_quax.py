"""patrick-kidger/quax: its example's `LoraArray` under `quaxify`; it has no alpha."""

from typing import Any

import common
import equinox as eqx
import in_jax
import jax
import jax.numpy as jnp
import quax
from quax.examples.lora import LoraArray


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    params = jax.tree.map(jnp.asarray, problem.weights())
    trained = jax.tree.map(lambda _: False, params)
    for layer, own in problem.factors().items():
        for name, factors in own.items():
            array = LoraArray(
                params[layer][name], rank=problem.rank, key=jax.random.key(0)
            )
            params[layer][name] = eqx.tree_at(
                lambda array: (array.a, array.b), array, (factors["a"], factors["b"])
            )
            trained[layer][name] = eqx.tree_at(
                lambda array: (array.a, array.b),
                jax.tree.map(lambda _: False, array),
                (True, True),
            )
    factors, frozen = eqx.partition(params, trained)

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        forward = quax.quaxify(in_jax.forward)
        logits = forward(eqx.combine(factors, frozen), tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, factors, frozen


if __name__ == "__main__":
    in_jax.run(make, ("quax", "equinox"))
