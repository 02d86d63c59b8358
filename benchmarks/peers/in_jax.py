"""The model, the loss and the training step of every peer that runs on JAX."""

from collections.abc import Callable, Iterable
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax

Linear = Callable[[jax.Array, str, str], jax.Array]  # (x, layer, matrix) -> y
Loss = Callable[[Any, Any, jax.Array], jax.Array]  # (trained, frozen, tokens)
Make = Callable[[common.Problem], tuple[Loss, Any, Any]]


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Returns `x` over its root mean square, times `gain`."""
    mean = jnp.mean(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + common.EPSILON) * gain


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention with heads of 64; all arrays are `[batch, t, d]`."""
    batch, t, d = q.shape
    q, k, v = (z.reshape(batch, t, d // common.HEAD, common.HEAD) for z in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / common.HEAD**0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
    return mixed.reshape(batch, t, d)


def forward(weights: Any, tokens: jax.Array, linear: Linear | None = None) -> jax.Array:
    """Returns the logits; `linear` does the six products of a block, if given."""

    def plain(x: jax.Array, layer: str, name: str) -> jax.Array:
        return x @ weights[layer][name]

    linear = linear or plain
    x = jnp.take(weights["embed"], tokens, axis=0)
    x = x + weights["position"][: tokens.shape[1]]
    layers = sum(key.startswith("layer") for key in weights)
    for layer in [f"layer{i}" for i in range(layers)]:
        y = rms_norm(x, weights[layer]["norm1"])
        y = attention(*(linear(y, layer, name) for name in "qkv"))
        x = x + linear(y, layer, "o")
        y = rms_norm(x, weights[layer]["norm2"])
        x = x + linear(jax.nn.gelu(linear(y, layer, "w1")), layer, "w2")
    return rms_norm(x, weights["norm"]) @ weights["embed"].T


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of `tokens` from the second on."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def without_matrices(weights: common.Tree) -> common.Tree:
    """Returns only the embeddings and norms."""
    return {
        key: without_matrices(value) if isinstance(value, dict) else jnp.asarray(value)
        for key, value in weights.items()
        if key not in common.MATRICES
    }


def same_factors(tree: Any, problem: common.Problem) -> Any:
    """Returns a library's tree of factors with the shared numbers in it."""
    factors = problem.factors()
    wanted, found = len(jax.tree.leaves(factors)), len(jax.tree.leaves(tree))
    if found != wanted:
        raise ValueError(f"{found} factors, not {wanted}: what was adapted differs")

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        value = common.find_factor(factors, jax.tree_util.keystr(path))
        if value.shape != leaf.shape:
            raise ValueError(f"{path}: {leaf.shape}, not {value.shape}")
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(place, tree)


def run(make: Make, packages: Iterable[str] = ()) -> None:
    """Trains what `make` gives, `(loss, trained, frozen)`, and prints the figures."""
    problem = common.read_flags()
    loss, trained, frozen = make(problem)
    tx = optax.adamw(**common.ADAMW, weight_decay=common.WEIGHT_DECAY)

    def update(state: Any, frozen: Any, tokens: jax.Array) -> Any:
        trained, optimizer = state
        value, gradient = jax.value_and_grad(loss)(trained, frozen, tokens)
        updates, optimizer = tx.update(gradient, optimizer, trained)
        return (optax.apply_updates(trained, updates), optimizer), value

    trained, frozen = jax.tree.map(jnp.array, (trained, frozen))
    state = (trained, tx.init(trained))
    batches = list(jnp.asarray(problem.tokens()))
    jitted = jax.jit(update, donate_argnums=0)
    compiled = jitted.lower(state, frozen, batches[0]).compile()

    def step(tokens: jax.Array) -> float:
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, frozen, tokens))
        return float(value)

    figures = common.measure(step, batches, problem.steps) | {
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    common.report(("jax", "jaxlib", "optax", *packages), figures)
