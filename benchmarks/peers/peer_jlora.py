"""jlora on the plain function."""

from typing import Any

import common
import in_jax
import jax
import jax.numpy as jnp

import jlora


def make(problem: common.Problem) -> tuple[in_jax.Loss, jlora.Trainable, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    params = jax.tree.map(jnp.asarray, problem.weights())
    tokens = jax.ShapeDtypeStruct((problem.batch, problem.length), jnp.int32)
    targets = tuple(f"*/{name}" for name in common.MATRICES)
    config = jlora.LoraConfig(rank=problem.rank, targets=targets)
    plan = jlora.plan(in_jax.forward, params, tokens, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    apply = jlora.apply_lora(in_jax.forward, on_merge="error")

    def loss(trainable: jlora.Trainable, frozen: Any, tokens: jax.Array) -> jax.Array:
        logits = apply(frozen, trainable, tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(trainable, problem), frozen


if __name__ == "__main__":
    in_jax.run(make)
