"""google/flax `nnx.LoRA`, put around each `nnx.Linear` by hand; it has no alpha."""

from typing import Any

import common
import in_jax
import in_nnx
import jax
from flax import nnx


def make(problem: common.Problem) -> tuple[in_jax.Loss, Any, Any]:
    """Returns the loss, the factors, and the frozen weights."""

    def wrap(linear: nnx.Linear) -> nnx.LoRA:
        fan_in, fan_out = linear.kernel.shape
        rngs = nnx.Rngs(0)
        return nnx.LoRA(fan_in, problem.rank, fan_out, base_module=linear, rngs=rngs)

    model = in_nnx.Decoder(problem, wrap)
    graphdef, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, factors, frozen)(tokens[:, :-1])
        return in_jax.next_token_loss(logits, tokens)

    return loss, in_jax.same_factors(factors, problem), frozen


if __name__ == "__main__":
    in_jax.run(make, ("flax",))
