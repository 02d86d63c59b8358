"""What does a LoRA training step of MiniLM cost, and what is the floor?"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jlora
from examples.sentiment.model import BertConfig, SentenceClassifier
from jlora.tables import table

Step = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def training_step(loss: Callable[..., jax.Array], trained: Any, *fixed: Any) -> Step:
    """Returns a jitted AdamW step, its state, and the arguments it leaves alone."""
    tx = optax.adamw(1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, *fixed: Any) -> Any:
        trained, opt_state = state
        value, gradient = jax.value_and_grad(loss)(trained, *fixed)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    trained = jax.tree.map(jnp.copy, trained)
    return step, (trained, tx.init(trained)), fixed


def by_hand(model: nn.Module, factors: dict[str, jlora.Factors]) -> Callable[..., Any]:
    """Returns the model with `s (x A) B` added to each layer, left to autodiff."""

    def side_path(
        next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        out = next_call(*args, **kwargs)
        path = "/".join(("params", *context.module.path, "kernel"))
        if isinstance(context.module, nn.Dense) and path in factors:
            own = factors[path]
            out = out + own.scale * ((args[0] @ own.a) @ own.b)
        return out

    def apply(params: Any, *args: Any) -> Any:
        with nn.intercept_methods(side_path):
            return model.apply(params, *args)

    return apply


def build(rank: int, batch: int, length: int, size: BertConfig) -> dict[str, Step]:
    """Returns the steps to compare, by name, on one model and one batch."""
    model = SentenceClassifier(size)
    keys = jax.random.split(jax.random.key(0), 4)
    ids = jax.random.randint(keys[0], (batch, length), 0, size.vocab_size)
    mask = jnp.ones((batch, length), bool)
    classes = jax.random.randint(keys[1], (batch,), 0, 2)
    params = jax.jit(model.init)(keys[2], ids, mask)

    def loss_of(logits: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
        return losses.mean()

    config = jlora.LoraConfig(rank=rank)
    plan = jlora.plan(model.apply, params, ids, mask, config=config)
    frozen, trainable = jlora.split(keys[3], params, plan)
    lora = jlora.apply_lora(model.apply, on_merge="error")

    def shifted(shift: jax.Array, params: Any) -> jax.Array:
        table = params["params"]["embeddings"]["token_type"]["embedding"]
        moved = {"embedding": table + shift[None]}
        embeddings = {**params["params"]["embeddings"], "token_type": moved}
        return loss_of(
            model.apply(
                {"params": {**params["params"], "embeddings": embeddings}}, ids, mask
            )
        )

    def full(params: Any) -> jax.Array:
        return loss_of(model.apply(params, ids, mask))

    def merged(trainable: Any, frozen: Any) -> jax.Array:
        return full(jlora.merge(frozen, trainable))

    def plain(trainable: Any, frozen: Any) -> jax.Array:
        return loss_of(by_hand(model, trainable.lora)(frozen, ids, mask))

    def adapted(trainable: Any, frozen: Any) -> jax.Array:
        return loss_of(lora(frozen, trainable, ids, mask))

    return {
        "floor": training_step(shifted, jnp.zeros(size.hidden_size), params),
        "jlora": training_step(adapted, trainable, frozen),
        "side path, autodiff": training_step(plain, trainable, frozen),
        "merge on the fly": training_step(merged, trainable, frozen),
        "full fine-tune": training_step(full, params),
    }


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the figures of each step; steps are timed in turn."""
    compiled, states, figures = {}, {}, {}
    for name, (step, state, fixed) in steps.items():
        compiled[name] = step.lower(state, *fixed).compile()
        states[name] = state
        memory = compiled[name].memory_analysis()
        cost = compiled[name].cost_analysis()
        figures[name] = {
            "GFLOP": cost["flops"] / 1e9,
            "GB moved": cost["bytes accessed"] / 1e9,
            "temp MiB": memory.temp_size_in_bytes / 2**20,
            "optimizer MiB": sum(x.nbytes for x in jax.tree.leaves(state[1])) / 2**20,
        }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, (_, _, fixed) in steps.items():
            start = time.perf_counter()
            states[name], loss = compiled[name](states[name], *fixed)
            jax.block_until_ready((states[name], loss))
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        figures[name]["ms"] = 1e3 * statistics.median(times)
    return figures


def show(figures: dict[str, dict[str, float]]) -> str:
    """Returns the figures as a table, with multiples of the floor."""
    floor = figures["floor"]
    columns = ("GFLOP", "GB moved", "temp MiB", "optimizer MiB")
    head = ("step", "ms", "× floor", *columns, "temp × floor")
    lines = [
        (
            name,
            f"{own['ms']:.0f}",
            f"{own['ms'] / floor['ms']:.2f}",
            *(f"{own[column]:.2f}" for column in columns),
            f"{own['temp MiB'] / floor['temp MiB']:.2f}",
        )
        for name, own in figures.items()
    ]
    return table(head, lines, right=tuple(head[1:]))


def main() -> None:
    """Runs the comparison that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--width", type=int, default=384, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = BertConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        intermediate_size=4 * options.width,
    )
    steps = build(options.rank, options.batch, options.length, size)
    figures = measure(steps, options.rounds)
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    print(show(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
