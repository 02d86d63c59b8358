"""google/qwix on NNX, as google/tunix trains it: split on `nnx.LoRAParam`."""

from typing import Any

import common
import in_jax
import in_nnx
import jax
import jax.numpy as jnp
import qwix
from flax import nnx


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    provider = qwix.LoraProvider(
        module_path=r"layer\d+/.*", rank=problem.rank, alpha=float(problem.rank)
    )
    tokens = jnp.zeros((problem.batch, problem.length), jnp.int32)
    model = qwix.apply_lora_to_model(
        in_nnx.Decoder(problem), provider, tokens, rngs=nnx.Rngs(0)
    )
    graphdef, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, factors, frozen)(tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), frozen


if __name__ == "__main__":
    in_jax.run(make, ("qwix", "flax"))
