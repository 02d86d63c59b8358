"""How long does a step of eight users' adapters take in SkyRL-tx, and in jlora?

Run from the root of the project, where `skyrl-tx==0.3.0`, PEFT and what jlora needs
are installed, with `PYTHONPATH=. python benchmarks/peers/mixed_skyrl.py`. Both train
the shared model with one batch row for each adapter. A step is the gradients of all
rows, added to what is accumulated, and AdamW of each adapter. SkyRL-tx has its own
layers and accumulated gradients, and an optimizer for each adapter, which updates one
at a time, as its engine does; jlora has `pool.Trainer`. The losses are compared.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import in_jax
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tx.layers.lora import LoRALinear
from tx.tinker.backends.jax import AccumulatedGradients

import jlora

COUNT, ROUNDS, TOLERANCE = 8, 15, 1e-4
RATE = common.ADAMW["learning_rate"]
Step = Callable[[jax.Array], jax.Array]
Parts = tuple[Step, Callable[[], Any]]  # forward and backward; all optimizers


def row_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of each row."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(-1)


def skyrl(problem: common.Problem) -> Parts:
    """Returns a step of SkyRL-tx's."""
    layers: dict[str, dict[str, nnx.Module]] = {}
    weights = jax.tree.map(jnp.asarray, problem.weights())
    factors = problem.factors()
    for layer, own in factors.items():
        layers[layer] = {}
        for name, pair in own.items():
            linear = LoRALinear(
                *weights[layer][name].shape,
                sharding=(None, None),
                max_lora_adapters=COUNT,
                max_lora_rank=problem.rank,
                use_bias=False,
                kernel_init=nnx.initializers.zeros_init(),
                rngs=nnx.Rngs(0),
            )
            linear.kernel[...] = weights[layer][name]
            linear.lora_A[...] = jnp.stack([jnp.asarray(pair["a"])] * COUNT)
            layers[layer][name] = linear
    model = nnx.Dict({k: nnx.Dict(v) for k, v in layers.items()})
    rest = in_jax.without_matrices(weights)
    ids = jnp.arange(COUNT)

    def is_lora(path: Any, _: Any) -> bool:
        return "lora_A" in path or "lora_B" in path

    graph, lora, frozen = nnx.split(model, is_lora, ...)

    def loss(lora: Any, frozen: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = nnx.merge(graph, lora, frozen)

        def linear(x: jax.Array, layer: str, name: str) -> jax.Array:
            return own[layer][name](x, ids)

        found = row_losses(in_jax.forward(rest, tokens[:, :-1], linear), tokens)
        return found.sum(), found

    @functools.partial(jax.jit, donate_argnums=0)
    def forward_backward(held: Any, lora: Any, frozen: Any, tokens: jax.Array) -> Any:
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(lora, frozen, tokens)
        return held.add(grads, ids), found

    @nnx.jit
    def update(held: Any, lora: Any, optimizer: Any, index: jax.Array) -> Any:
        optimizer.update(lora, held.get_mean(index))
        return held.reset_adapter(index)

    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=RATE, weight_decay=0.0)
    optimizers = [nnx.Optimizer(model, tx, wrt=is_lora) for _ in range(COUNT)]
    state = {"held": AccumulatedGradients.create(lora, COUNT)}

    def gradients(tokens: jax.Array) -> jax.Array:
        state["held"], found = forward_backward(state["held"], lora, frozen, tokens)
        return found

    def step() -> Any:
        for i, optimizer in enumerate(optimizers):
            state["held"] = update(state["held"], lora, optimizer, jnp.asarray(i))
        return jax.tree.leaves(lora)

    return gradients, step


def ours(problem: common.Problem) -> Parts:
    """Returns a step of `jlora.pool.Trainer`."""
    params = jax.tree.map(jnp.asarray, problem.weights())
    targets = tuple(f"*/{name}" for name in common.MATRICES)
    config = jlora.LoraConfig(rank=problem.rank, targets=targets)
    tokens = jax.ShapeDtypeStruct((1, problem.length), jnp.int32)
    plan = jlora.plan(in_jax.forward, params, tokens, config=config)
    frozen, fresh = jlora.split(jax.random.key(0), params, plan)
    fresh = in_jax.same_factors(fresh, problem)

    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        return row_losses(in_jax.forward(params, tokens[:, :-1]), tokens)

    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=RATE, weight_decay=0.0)
    trainer, ids = jlora.pool.Trainer(losses, tx), jnp.arange(COUNT)
    add = jax.jit(trainer.add, donate_argnums=0)
    forward_backward = jax.jit(trainer.forward_backward, donate_argnums=0)
    optim_step = jax.jit(trainer.optim_step, donate_argnums=0)
    slots = trainer.create(fresh, COUNT)
    for i in range(COUNT):
        slots = add(slots, i, fresh, learning_rate=RATE)
    state = {"slots": slots}

    def gradients(tokens: jax.Array) -> jax.Array:
        found, state["slots"] = forward_backward(state["slots"], frozen, ids, tokens)
        return found

    def step() -> Any:
        state["slots"], _ = optim_step(state["slots"])
        return state["slots"].step

    return gradients, step


def main() -> int:
    """Prints the times, in turn; the exit code is 1 if the losses differ."""
    worst = 0.0
    for width in (256, 512):
        problem = common.Problem(width=width, batch=COUNT, length=64)
        batches = jnp.asarray(problem.tokens())
        with nnx.use_eager_sharding(False):  # its layers name axes of a mesh
            sides = {"skyrl-tx": skyrl(problem), "jlora": ours(problem)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        found: dict[str, list[jax.Array]] = {name: [] for name in sides}
        for i in range(ROUNDS + common.WARM_UP):
            turn = [*sides][:: 1 if i % 2 else -1]
            for name in turn:
                gradients, step = sides[name]
                start = time.perf_counter()
                loss = jax.block_until_ready(gradients(batches[i % len(batches)]))
                half = time.perf_counter()
                jax.block_until_ready(step())
                found[name].append(loss)
                if i >= common.WARM_UP:
                    times[name].append((half - start, time.perf_counter() - half))
        one, other = (jnp.stack(found[name]) for name in sides)
        apart = float(abs(one / other - 1).max())
        worst = max(worst, apart)
        medians = {
            name: [statistics.median(x) for x in zip(*own, strict=True)]
            for name, own in times.items()
        }
        pairs = zip(times["skyrl-tx"], times["jlora"], strict=True)
        ratio = statistics.median(sum(x) / sum(y) for x, y in pairs)
        about = {"width": width, "seconds": medians, "skyrl-tx over jlora": ratio}
        print(json.dumps(about | {"losses apart": apart}))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
