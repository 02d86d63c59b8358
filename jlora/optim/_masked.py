"""An optimizer for one tree that holds both sides."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._labels import mask

if TYPE_CHECKING:
    import optax


def masked(
    tx: "optax.GradientTransformation",
) -> "optax.GradientTransformationExtraArgs":
    """Returns `tx` for trees that hold the frozen side too, as in Flax's `TrainState`.

    Optimizer state exists only for the leaves of `Trainable`s, `tx` sees only their
    gradients (a global norm is theirs), and `optax.apply_updates` leaves every
    other leaf bit for bit as it was, weight decay or not (outside `jax.jit` XLA may
    flush a subnormal number to zero). Under one `jax.jit` the gradients of frozen
    leaves are never computed. Put `optax.MultiSteps` inside.

    Args:
      tx: any optax transformation, chains, schedules and `optax.MultiSteps` included.

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

    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.masked(tx, mask)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
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


def _nothing(leaf: Any) -> Any:
    """Returns what leaves the bits of any number alone when added: minus zero."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return -jnp.zeros_like(leaf)
    return jnp.zeros_like(leaf)
