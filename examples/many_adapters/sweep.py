"""Several adapters trained in one program: `vmap` over adapters, data and rates."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jlora

from .data import ANSWER, PROMPT, Examples, batch_at

Apply = Callable[..., Any]


def answer_loss(
    apply: Apply, frozen: Any, trainable: jlora.Trainable, batch: Examples
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss of the answers' tokens, and the share that is right."""
    tokens, mask = map(jnp.asarray, batch)
    logits = apply(
        frozen, trainable, tokens[:, :-1], None, mask[:, :-1], last=ANSWER
    )  # of the places PROMPT - 1 on
    targets, counts = tokens[:, PROMPT:], mask[:, PROMPT:].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
    total = counts.sum()
    return (losses * counts).sum() / total, (right * counts).sum() / total


def make_optimizer() -> optax.GradientTransformation:
    """Returns Adam whose learning rate is a leaf of its state, one for each adapter."""
    return optax.inject_hyperparams(optax.adam)(learning_rate=0.0)


def start(
    seed: int, count: int, params: Any, plan: jlora.Plan, rates: Sequence[float]
) -> tuple[Any, jlora.Trainable, Any]:
    """Returns the one frozen side, and `count` adapters and optimizer states."""
    keys = jax.random.split(jax.random.key(seed), count)
    frozen, _ = jlora.split(keys[0], params, plan)
    stacked = jax.vmap(lambda key: jlora.split(key, params, plan)[1])(keys)
    state = jax.vmap(make_optimizer().init)(stacked)
    state.hyperparams["learning_rate"] = jnp.asarray(rates, jnp.float32)
    return frozen, stacked, state


def make_step(apply: Apply) -> Callable[..., Any]:
    """Returns the jitted step of all adapters at once; state is donated."""
    tx = make_optimizer()

    def one(trainable: Any, state: Any, frozen: Any, batch: Examples) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return answer_loss(apply, frozen, trainable, batch)[0]

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    every = jax.vmap(one, (0, 0, None, 0))
    return functools.partial(jax.jit, donate_argnums=(0, 1))(every)


def train(
    apply: Apply,
    frozen: Any,
    stacked: jlora.Trainable,
    state: Any,
    tasks: Sequence[Examples],
    *,
    steps: int,
    size: int,
    seed: int,
) -> tuple[jlora.Trainable, np.ndarray, float]:
    """Returns the trained adapters, losses `[steps, adapters]`, and seconds a step."""
    step, losses, began = make_step(apply), [], time.perf_counter()
    with tqdm(total=steps, desc="   three adapters", unit="step") as bar:
        for i in range(steps):
            batch = batch_at(tasks, i, size, seed)
            stacked, state, loss = step(stacked, state, frozen, batch)
            losses.append(np.asarray(loss))
            if i == 0:
                began = time.perf_counter()  # the first one compiles
            bar.set_postfix_str("loss " + " ".join(f"{x:.2f}" for x in losses[-1]))
            bar.update()
    seconds = (time.perf_counter() - began) / max(steps - 1, 1)
    return stacked, np.array(losses), seconds


def evaluate(
    apply: Apply, frozen: Any, stacked: Any, tests: Sequence[Examples]
) -> np.ndarray:
    """Returns loss and share of right tokens for each task, `[tasks, 2]`."""
    batch = Examples(*(np.stack(fields) for fields in zip(*tests, strict=True)))
    axes = (None, None if stacked == jlora.Trainable() else 0, 0)
    measure = jax.vmap(functools.partial(answer_loss, apply), axes)
    return np.stack(jax.jit(measure)(frozen, stacked, batch), axis=1)
