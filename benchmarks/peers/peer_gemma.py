"""google-deepmind/gemma `gemma.peft` on any Linen model; it has no alpha."""

from typing import Any

import common
import in_jax
import in_linen
import jax
import jax.numpy as jnp
from flax import linen as nn
from gemma import peft


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    model = in_linen.Decoder(problem)

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Dense):
            return peft.LoRADense(
                rank=problem.rank, wrapped=module, dtype=jnp.dtype("float32")
            )
        return module

    tokens = jnp.zeros((problem.batch, problem.length), jnp.int32)
    with peft.ModuleInterceptor(replace):
        params = model.init(jax.random.key(0), tokens)["params"]
    original, factors = peft.split_params(params)
    frozen = in_linen.params(problem)
    if jax.tree.structure(original) != jax.tree.structure(frozen):
        raise ValueError("the frozen weights are not those of the model")

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        params = peft.merge_params(frozen, factors)
        with peft.ModuleInterceptor(replace):
            logits = model.apply({"params": params}, tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), frozen


if __name__ == "__main__":
    in_jax.run(make, ("gemma", "flax"))
