"""Activated LoRA: from which token on an adapter acts."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..errors import TreeError
from ..factors import Trainable


def invocation_gate(trainable: Trainable, tokens: ArrayLike) -> jax.Array:
    """Returns the tokens on which an activated adapter acts, for `lora_gate=`.

    They are the last occurrence of its invocation (`LoraConfig.invocation`) and all
    that follows, as in PEFT. A sequence without it is the base model's.

    Since the tokens before keep the base's own activations, a key-value cache that the
    base filled up to the invocation serves the adapter too: go on from it with
    `lora_gate=True`.

    Args:
      trainable: an adapter that was planned with `LoraConfig(invocation=...)`.
      tokens: `[..., length]` integers.

    Returns:
      Booleans of the shape of `tokens`.

    Raises:
      TreeError: if the adapter has no invocation.

    Examples:
      >>> from jlora.factors import Factors, Spec
      >>> own = Factors(jnp.ones((3, 1)), jnp.ones((1, 2)),
      ...               Spec(rank=1, alpha=1.0, invocation=(7, 8)))
      >>> tokens = jnp.array([[7, 8, 1, 7, 8, 2], [7, 1, 8, 2, 3, 7]])
      >>> invocation_gate(Trainable({"w": own}), tokens).astype(int)
      Array([[0, 0, 0, 1, 1, 1],
             [0, 0, 0, 0, 0, 0]], dtype=int32)

    References:
      Greenewald et al., 2025, Activated LoRA, https://arxiv.org/abs/2504.12397
    """
    found = {f.spec.invocation for f in trainable.lora.values()}
    if len(found) != 1 or () in found:
        raise TreeError(
            f"The leaves of this adapter have the invocations {sorted(found)}. Plan an "
            "activated adapter with jlora.LoraConfig(invocation=ids)."
        )
    (ids,) = found
    tokens = jnp.asarray(tokens)
    length = tokens.shape[-1]
    if len(ids) > length:
        return jnp.zeros(tokens.shape, bool)
    n = length - len(ids) + 1
    starts = jnp.stack([tokens[..., i : i + n] == x for i, x in enumerate(ids)]).all(0)
    last = n - 1 - jnp.argmax(jnp.flip(starts, -1), axis=-1)
    last = jnp.where(starts.any(-1), last, length)
    place = jax.lax.broadcasted_iota(last.dtype, tokens.shape, tokens.ndim - 1)
    return place >= jnp.broadcast_to(last[..., None], tokens.shape)
