"""google/qwix on Linen: `LoraProvider` intercepts the products of the model."""

from typing import Any

import common
import in_jax
import in_linen
import jax
import jax.numpy as jnp
import qwix
from flax import traverse_util


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""
    provider = qwix.LoraProvider(
        module_path=r"layer\d+_.*", rank=problem.rank, alpha=float(problem.rank)
    )
    model = qwix.apply_lora_to_model(in_linen.Decoder(problem), provider)
    tokens = jnp.zeros((problem.batch, problem.length), jnp.int32)
    params = traverse_util.flatten_dict(model.init(jax.random.key(0), tokens)["params"])
    factors = {path: leaf for path, leaf in params.items() if "lora" in path[-1]}
    frozen = traverse_util.flatten_dict(in_linen.params(problem))
    if frozen.keys() != params.keys() - factors.keys():
        raise ValueError("the frozen weights are not those of the model")

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        params = traverse_util.unflatten_dict({**frozen, **factors})
        logits = model.apply({"params": params}, tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), frozen


if __name__ == "__main__":
    in_jax.run(make, ("qwix", "flax"))
