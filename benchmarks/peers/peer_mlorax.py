"""yongchanghao/MLoRAx on Linen: it merges on the fly, from weights in a closure."""

import logging
from typing import Any

import common
import in_jax
import in_linen
import jax
import jax.numpy as jnp
import mlorax


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, None]:
    """Returns the loss, the factors, and nothing: the closure holds the weights."""
    logging.disable(logging.INFO)
    model = in_linen.Decoder(problem)
    spec = mlorax.LoRASpec(
        rank=problem.rank,
        alpha=float(problem.rank),
        rules=[f"_{name}.kernel" for name in common.MATRICES],
    )

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens)

    params = jax.tree.map(jnp.asarray, in_linen.params(problem))
    factors, lora_apply, _ = mlorax.lora_init(
        spec, model, params=params, apply_fn=apply
    )

    def loss(factors: Any, _: None, tokens: jax.Array) -> jax.Array:
        logits = lora_apply(factors, tokens=tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), None


if __name__ == "__main__":
    in_jax.run(make, ("mlorax", "flax"))
