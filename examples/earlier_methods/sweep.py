"""Learning rates and seeds of one method, trained as one program under `vmap`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from .hooks import Array, Params
from .methods import Method
from .task import Examples, Task, measure

ADAM = optax.scale_by_adam()
EVALUATED = 64  # examples at once


class Plan(NamedTuple):
    """What all members of a sweep share.

    Attributes:
      examples: how many sentences or stories to learn from.
      steps: optimizer steps.
      size: examples a step.
      head_rate: the head's learning rate; None is the member's own.
    """

    examples: int
    steps: int
    size: int
    head_rate: float | None


def train(
    task: Task,
    method: Method,
    params: Params,
    plan: Plan,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    name: str,
) -> tuple[Any, Any, np.ndarray]:
    """Returns the frozen side, the trained members stacked, and losses `[steps, G]`.

    Args:
      task: what is learnt.
      method: how.
      params: of the task's model, dense or quantised.
      plan: what all members share.
      rates: the learning rate of each of `G` members.
      seeds: the seed of each: of its start and of its order of examples.
      name: label of the progress bar.
    """
    some = task.train.first(plan.size)
    inputs = (some.x, some.mask)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    frozen, _ = method.start(keys[0], task.model, params, inputs)
    trained = jax.vmap(lambda k: method.start(k, task.model, params, inputs)[1])(keys)
    state = jax.vmap(ADAM.init)(trained)
    step = make_step(task.model, method, plan.head_rate)
    losses = []
    orders = [order(plan, seed) for seed in seeds]
    for i in tqdm(range(plan.steps), desc=f"   {name}", unit="step"):
        rows = np.stack([own[i] for own in orders])
        now = np.asarray(rates, np.float32) * schedule(i, plan.steps)
        trained, state, loss = step(trained, state, now, rows, frozen, task.train)
        losses.append(np.asarray(loss))
    return frozen, trained, np.array(losses)


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the rates: up over a tenth of the steps, down to zero."""
    up = max(1, steps // 10)
    return min((step + 1) / up, (steps - step) / (steps - up + 1))


def order(plan: Plan, seed: int) -> np.ndarray:
    """Returns `[steps, size]`, the examples of each step; epochs are permutations."""
    rng, rows = np.random.default_rng(seed), np.zeros(0, np.int64)
    while len(rows) < plan.steps * plan.size:
        rows = np.concatenate([rows, rng.permutation(plan.examples)])
    return rows[: plan.steps * plan.size].reshape(plan.steps, plan.size)


def make_step(model: Any, method: Method, head_rate: float | None) -> Any:
    """Returns the jitted step of all members, whose trees are donated."""
    adapted = method.adapted(model)

    def one(
        trained: Any, state: Any, rate: Array, rows: Array, frozen: Any, data: Examples
    ) -> Any:
        batch = Examples(*(field[rows] for field in data))

        def loss(trained: Any) -> Array:
            logits = adapted(frozen, trained, batch.x, batch.mask)
            return measure(logits, batch)[0] / batch.counts.sum()

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = ADAM.update(gradient, state)

        def stepped(path: Any, x: Array, update: Array) -> Array:
            is_head = "head" in jax.tree_util.keystr(path)
            own = head_rate if is_head and head_rate is not None else rate
            return x - (own * update).astype(x.dtype)

        trained = jax.tree_util.tree_map_with_path(stepped, trained, updates)
        return trained, state, value

    every = jax.vmap(one, (0, 0, 0, 0, None, None))
    return functools.partial(jax.jit, donate_argnums=(0, 1))(every)


def evaluate(
    task: Task, method: Method, frozen: Any, trained: Any, examples: Examples
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean loss and the share of right answers of each member, `[G]`."""
    adapted = method.adapted(task.model)

    def one(trained: Any, frozen: Any, rows: Array, counts: Array, data: Any) -> Any:
        batch = Examples(*(field[rows] for field in data))
        batch = batch._replace(counts=batch.counts * counts[:, None])
        return measure(adapted(frozen, trained, batch.x, batch.mask), batch)

    every = jax.jit(jax.vmap(one, (0, None, None, None, None)))
    total = len(examples.labels)
    sums = []
    for start in range(0, total, EVALUATED):
        rows = np.arange(start, start + EVALUATED)
        counts = (rows < total).astype(np.float32)
        sums.append(every(trained, frozen, rows % total, counts, examples))
    loss, right = np.sum(sums, axis=0)
    count = float(examples.counts.sum())
    return loss / count, right / count


def select(trained: Any, member: int) -> Any:
    """Returns the trees of one member, with the first axis kept."""
    return jax.tree.map(lambda x: x[member : member + 1], trained)


def join(*parts: Any) -> Any:
    """Returns members of several sweeps as one stack."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
