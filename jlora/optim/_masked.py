"""An optimizer for one tree that holds both sides."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._checks import check_optimizer
from ..factors import Leaf
from ._labels import mask

if TYPE_CHECKING:
    import optax


def masked(
    tx: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` for trees that hold the frozen side too, as in Flax's `TrainState`.

    Optimizer state exists only for the leaves of `Trainable`s. `tx` is given only their
    gradients, so a global norm is theirs. `optax.apply_updates` does not change a bit
    of any other leaf, with or without weight decay (outside `jax.jit` XLA may flush a
    subnormal number to zero). Under one `jax.jit` the gradients of frozen leaves are
    not computed. `optax.MultiSteps` goes inside: `masked(optax.MultiSteps(...))`.

    Args:
      tx: any optax transformation, chains, schedules and `optax.MultiSteps` included.

    Raises:
      ConfigError: if `tx` is not an optimizer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jlora
      >>> params = {
      ...     "frozen": {"w": jnp.ones(4)},
      ...     "trainable": jlora.Trainable(full={"head": jnp.ones(2)}),
      ... }
      >>> tx = jlora.optim.masked(optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> [x.size for x in jax.tree.leaves(state)]  # count, and two moments of the head
      [1, 2, 2]
    """
    import optax

    check_optimizer("optim.masked", tx)
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.masked(tx, mask)

    def update(
        updates: "optax.Updates",
        state: "optax.OptState",
        params: "optax.Params | None" = None,
        **extra: Any,
    ) -> tuple["optax.Updates", "optax.OptState"]:
        updates, state = inner.update(updates, state, params, **extra)
        like = updates if params is None else params
        updates = jax.tree.map(
            lambda trained, u, p: u if trained else _nothing(p),
            mask(updates),
            updates,
            like,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _nothing(leaf: Leaf) -> jax.Array:
    """Returns minus zero, the number that changes no bit of the one it is added to."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return -jnp.zeros_like(leaf)
    return jnp.zeros_like(leaf)
