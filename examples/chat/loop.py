"""The training loop's arithmetic: optimizer, step and evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from examples.sharded.loop import State

from .packing import Batch

Apply = Callable[..., jax.Array]  # (frozen, trainable, tokens, positions, segments)


class Metrics(NamedTuple):
    """What a step tells: mean loss, norm of the gradient, how many tokens it learnt."""

    loss: jax.Array
    norm: jax.Array
    learnt: jax.Array


def learning_rate(
    lr: float, steps: int, *, warmup: float, schedule: str
) -> optax.Schedule:
    """Returns the learning rate of each step: up to `lr`, then as `schedule` says."""
    rising = round(warmup * steps)
    falling = max(steps - rising, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(lr, falling),
        "linear": optax.linear_schedule(lr, 0.0, falling),
        "constant": optax.constant_schedule(lr),
    }[schedule]
    up = optax.linear_schedule(lr / (rising + 1), lr, rising)
    return optax.join_schedules([up, after], [rising])


def make_optimizer(
    rate: optax.Schedule, *, clip: float, weight_decay: float
) -> optax.GradientTransformation:
    """Returns AdamW with clipped gradients."""
    adamw = optax.adamw(rate, weight_decay=weight_decay, mask=jlora.optim.decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def make_step(apply: Apply, tx: optax.GradientTransformation, like: State) -> Any:
    """Returns the jitted step `(frozen, state, parts) -> (state, metrics)`.

    `parts` is the batch, `[parts, rows, length]`. The gradient is that of the mean over
    all tokens to learn, whatever parts they come in: sums are added up, and divided
    once. `frozen` is an argument: closed over, its arrays would be constants of the
    program. The state is donated, and comes back laid out as `like`.
    """

    def step(frozen: Any, state: State, parts: Batch) -> tuple[State, Metrics]:
        def add(total: Any, batch: Batch) -> tuple[Any, None]:
            value = jax.value_and_grad(loss_sum)(state.trainable, apply, frozen, batch)
            return jax.tree.map(jnp.add, total, value), None

        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable)
        (loss, grads), _ = jax.lax.scan(add, zero, parts)
        learnt = jnp.maximum(parts.learnt.sum(), 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g: g / learnt.astype(g.dtype), grads)
        updates, moments = tx.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(loss / learnt, optax.tree.norm(grads), learnt)
        return State(trainable, moments), metrics

    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(step, donate_argnums=1, out_shardings=(where, None))


def loss_sum(
    trainable: jlora.Trainable, apply: Apply, frozen: Any, batch: Batch
) -> jax.Array:
    """Returns the cross-entropy of the tokens to learn, summed."""
    logits = apply(frozen, trainable, batch.tokens, batch.positions, batch.segments)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.learnt.astype(losses.dtype))


_evaluated = jax.jit(loss_sum, static_argnames="apply")


def evaluate(
    apply: Apply,
    frozen: Any,
    trainable: jlora.Trainable,
    batches: Sequence[Batch],
    sharding: NamedSharding,
) -> float:
    """Returns the mean cross-entropy of the tokens to learn in all batches."""
    sums = [
        _evaluated(trainable, apply, frozen, placed(batch, sharding))
        for batch in batches
    ]
    return float(sum(jax.device_get(sums))) / sum(int(b.learnt.sum()) for b in batches)


def in_parts(batch: Batch, parts: int) -> Batch:
    """Returns `[parts, rows / parts, length]` of `[rows, length]`."""
    return Batch(*(x.reshape(parts, -1, x.shape[-1]) for x in batch))


def placed(batch: Batch, sharding: NamedSharding) -> Batch:
    """Returns the batch on its devices, its rows cut as `sharding` cuts the first axis.

    In a program of several processes each holds the whole batch, and puts its own rows.
    """
    rows = sharding.spec[0] if len(sharding.spec) else None
    spec = PartitionSpec(*[None] * (batch.tokens.ndim - 2), rows)
    sharding = NamedSharding(sharding.mesh, spec)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return Batch(*map(put, batch))
