"""A gate for each token: a number that multiplies the low-rank term of this token."""

from collections.abc import Collection

import jax
import jax.numpy as jnp

from ..errors import ConfigError
from .compat import Equation, place
from .interpret import Context
from .trail import Source
from .values import Weight


def gated(
    ctx: Context,
    x: jax.Array,
    source: Source | None,
    weight: Weight,
    eqn: Equation,
    summed: Collection[int] = (),
) -> tuple[jax.Array, Source | None]:
    """Returns the input of A times the gate, and how that follows from its roots.

    A gate of zeros makes the term an exact zero: the base's own bits stay.

    Args:
      ctx: with the gate, or without one.
      x: the activation, or ones for looked-up positions.
      source: how `x` follows from its roots.
      weight: what it meets.
      eqn: where.
      summed: the axes of `x` that the product sums over, or that the weight has too.

    Raises:
      ConfigError: if the leading axes of `x` are not those of the gate.
    """
    gate = ctx.gate
    if gate is None:
        return x, source
    n = gate.ndim
    if x.shape[:n] != gate.shape or any(i < n for i in summed):
        raise no_gate(
            weight,
            eqn,
            f"meets an activation of shape {x.shape} that does not begin with the "
            f"gate's axes {gate.shape}",
        )

    def times(x: jax.Array, gate: jax.Array) -> jax.Array:
        gate = jnp.broadcast_to(
            gate.reshape(*gate.shape, *(1,) * (x.ndim - n)), x.shape
        )
        if gate.dtype == bool:
            return jnp.where(gate, x, jnp.zeros_like(x))
        return x * gate.astype(x.dtype)

    return times(x, gate), source and source.then(times, gate)


def no_gate(weight: Weight, eqn: Equation | None, why: str) -> ConfigError:
    """Returns the error of a use of `weight` that a gate cannot reach."""
    at = "" if eqn is None else f" in `{eqn.primitive.name}`{place(eqn)}"
    return ConfigError(
        f"lora_gate does not reach {weight.parts[0].path!r}, which{at} {why}. Give a "
        "gate whose axes are the leading axes of all activations, such as [batch, "
        "tokens], or leave this leaf out with exclude=."
    )
