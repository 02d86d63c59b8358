"""What do `plan` and tracing cost beside tracing the model itself?"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from examples.sentiment.model import BertConfig, SentenceClassifier
from jlora.tables import table


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Returns the median time of `run`, with JAX's caches empty each time."""
    times = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints the times for a model with layers written out one by one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = BertConfig(num_hidden_layers=options.layers, vocab_size=1000)
    model = SentenceClassifier(size)
    ids = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    mask = jax.ShapeDtypeStruct((8, 32), jnp.bool)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, mask)
    config = jlora.LoraConfig(rank=8)

    def plan() -> jlora.Plan:
        return jlora.plan(model.apply, params, ids, mask, config=config)

    made = plan()
    frozen, trainable = jax.eval_shape(
        lambda p: jlora.split(jax.random.key(0), p, made), params
    )

    def lower(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return lambda: jax.jit(lambda *args: fn(*args)).lower(*args, ids, mask)

    adapted = jlora.apply_lora(model.apply)
    times = {
        "model: trace and lower": seconds(lower(model.apply, params), options.rounds),
        "adapted: trace and lower": seconds(
            lower(adapted, frozen, trainable), options.rounds
        ),
        "plan": seconds(plan, options.rounds),
    }
    base = times["model: trace and lower"]
    print(f"{options.layers} layers, {len(made.adapted)} adapted weights")
    lines = [(k, f"{v:.2f}", f"{v / base:.2f}") for k, v in times.items()]
    print(table(("what", "s", "× model"), lines, right=("s", "× model")))


if __name__ == "__main__":
    main()
