"""The training loop: plain Flax and Optax, with jlora's trees in a `TrainState`."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from tqdm import tqdm

import jlora

from .data import Examples, batch_at

Predict = Callable[[jax.Array, jax.Array], jax.Array]
EVALUATIONS_PER_EPOCH = 2


class Point(NamedTuple):
    """Mean loss and accuracy of the weights after `step` steps."""

    step: int
    loss: float
    accuracy: float


class History(NamedTuple):
    """What was measured so far: training steps, evaluations, total wall time."""

    train: tuple[Point, ...] = ()
    test: tuple[Point, ...] = ()
    seconds: float = 0.0


def make_optimizer(*, lr: float, full_lr: float) -> optax.GradientTransformation:
    """Returns AdamW with one learning rate for the factors and one for whole leaves."""
    factors, full = optax.adamw(lr), optax.adamw(full_lr)
    return optax.multi_transform(
        {"a": factors, "b": factors, "magnitude": factors, "full": full},
        jlora.optim.labels,
    )


def create_state(
    apply: Callable, trainable: jlora.Trainable, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the state at step 0.

    It holds copies: each step donates the state's buffers, and a leaf trained in full
    is still the base model's own array.
    """
    trainable = jax.tree.map(jnp.copy, trainable)
    state = TrainState.create(apply_fn=apply, params=trainable, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(
    state: TrainState, frozen: Any, batch: Examples
) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
    """Returns the next state, and loss and accuracy before it.

    `frozen` is an argument: closed over, its arrays would be constants of the program.
    """

    def loss_fn(trainable: jlora.Trainable) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn(frozen, trainable, batch.ids, batch.mask)
        return loss_and_accuracy(logits, batch.labels)

    metrics, grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), metrics


def loss_and_accuracy(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy and the share of right answers."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


def predict(forward: Predict, examples: Examples, *, size: int) -> np.ndarray:
    """Returns `[N, C]` logits, computed in batches of `size`, all of one shape."""
    count = len(examples.labels)
    rows = np.arange(-(-count // size) * size).reshape(-1, size) % count
    logits = [forward(examples.ids[some], examples.mask[some]) for some in rows]
    return np.concatenate(jax.device_get(logits))[:count]


def milestones(first: int, last: int, epoch: int) -> list[int]:
    """Returns the steps to measure at: `first`, parts of an epoch of steps, `last`."""
    parts = range(EVALUATIONS_PER_EPOCH * last // epoch + 1)
    marks = {part * epoch // EVALUATIONS_PER_EPOCH for part in parts}
    return sorted({first} | {mark for mark in marks | {last} if mark > first})


def fit(
    state: TrainState,
    frozen: Any,
    train: Examples,
    test: Examples,
    *,
    steps: int,
    size: int,
    seed: int,
    save: Callable[[TrainState, History], None],
    history: History,
    name: str = "train",
) -> tuple[TrainState, History]:
    """Returns the state after `steps` steps in all, and what was measured on the way.

    Args:
      state: where to start; its `step` says which batch is next. Consumed.
      frozen: the frozen side that goes with `state.params`.
      train: sentences to learn from.
      test: sentences to measure on.
      steps: the step to stop at.
      size: batch size.
      seed: of the data order.
      save: called with state and history after each epoch and at the end.
      history: what was measured before `state`.
      name: label of the progress bar.
    """
    apply = jax.jit(state.apply_fn)
    epoch = len(train.labels) // size
    first = int(state.step)
    began = time.perf_counter() - history.seconds

    def measure(step: int, trainable: jlora.Trainable) -> Point:
        forward = functools.partial(apply, frozen, trainable)
        logits = predict(forward, test, size=size)
        return Point(step, *map(float, loss_and_accuracy(logits, test.labels)))

    with tqdm(desc=f"   {name}", initial=first, total=steps, unit="step") as bar:
        for start, stop in itertools.pairwise(milestones(first, steps, epoch)):
            metrics = []
            for step in range(start, stop):
                batch = batch_at(train, step, size=size, seed=seed)
                state, measured = train_step(state, frozen, batch)
                metrics.append(measured)
                # One step behind, so that the device never waits for the host.
                loss, accuracy = jax.device_get(metrics[-2:][0])
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}", False)
                bar.update()
            history = History(
                (*history.train, *_points(start, metrics)),
                (*history.test, measure(stop, state.params)),
                time.perf_counter() - began,
            )
            if stop % epoch == 0 or stop == steps:
                save(state, history)
    return state, history


def _points(start: int, metrics: list[tuple[jax.Array, jax.Array]]) -> list[Point]:
    return [
        Point(step, float(loss), float(accuracy))
        for step, (loss, accuracy) in enumerate(jax.device_get(metrics), start)
    ]
