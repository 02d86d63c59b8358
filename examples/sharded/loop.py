"""The training loop, as on one device: only layouts and inputs know of a mesh."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import jlora


class State(NamedTuple):
    """What a step changes: the adapter and its optimizer state."""

    trainable: jlora.Trainable
    moments: Any


def create_state(
    trainable: jlora.Trainable, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
    """Returns the state at step 0, with moments beside their leaf.

    `tx.init` runs outside `jax.jit`, where zeros lie as the leaf that they are like.
    The counter is like no leaf, and is put on every device.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x: jax.Array) -> jax.Array:
        return x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole)

    return State(trainable, jax.tree.map(placed, tx.init(trainable)))


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of each token after the first."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    ).mean()


def make_loss(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns the jitted loss `(*sides, tokens) -> loss` of `fn(*sides, tokens)`."""
    return jax.jit(lambda *args: loss_of(fn(*args), args[-1]))


def make_step(
    apply: Callable[..., jax.Array], tx: optax.GradientTransformation, like: State
) -> Any:
    """Returns the jitted step `(state, frozen, tokens, key) -> (state, loss)`.

    `frozen` is an argument: closed over, its arrays would be constants of the program.
    The state is donated. It comes back laid out as `like`: the compiler would choose
    for itself, and the next step would be another program.
    """

    def step(
        state: State, frozen: Any, tokens: jax.Array, key: jax.Array | None
    ) -> tuple[State, jax.Array]:
        def loss(trainable: jlora.Trainable) -> jax.Array:
            return loss_of(apply(frozen, trainable, tokens, lora_key=key), tokens)

        value, grads = jax.value_and_grad(loss)(state.trainable)
        updates, moments = tx.update(grads, state.moments, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return State(trainable, moments), value

    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def fit(
    step: Callable[[State, int], tuple[State, jax.Array]],
    state: State,
    *,
    first: int,
    last: int,
    save: Callable[[State, int], Any],
) -> tuple[State, list[float], float]:
    """Returns the state after `last` steps, the losses, and the seconds they took.

    Args:
      step: takes the state and the number of the step.
      state: where to start; consumed.
      first: the step of `state`.
      last: the step to stop at.
      save: called after each step, with the state and how many steps it has done.
    """
    losses: list[jax.Array] = []
    hidden, began = jax.process_index() != 0, time.perf_counter()
    with tqdm(desc="   train", initial=first, total=last, disable=hidden) as bar:
        for i in range(first, last):
            state, loss = step(state, i)
            losses.append(loss)
            save(state, i + 1)
            # One step behind, so that the devices never wait for the host.
            bar.set_postfix_str(f"loss {float(losses[-2:][0]):.3f}", False)
            bar.update()
    told = [float(loss) for loss in losses]
    return state, told, time.perf_counter() - began
