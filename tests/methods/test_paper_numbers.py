"""Numbers of the papers that need no pretrained weights: counts, and one trend."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("standard_dtypes")


def attention(p, x):
    """The four projections of every layer; what mixes the tokens adds no weights."""

    def layer(x, p):
        groups = p["q"].shape[-1] // p["v"].shape[-1]
        mixed = x @ p["q"] + jnp.tile(x @ p["k"] + x @ p["v"], (1, groups))
        return x + mixed @ p["o"], None

    return jax.lax.scan(layer, x, p)[0]


def shapes(layers, width, kv_width=None):
    widths = {"q": width, "k": kv_width or width, "v": kv_width or width, "o": width}
    return {
        name: jax.ShapeDtypeStruct((layers, width, out), "float32")
        for name, out in widths.items()
    }


def trained(layers, width, rank, targets=("q", "v"), kv_width=None):
    params = shapes(layers, width, kv_width)
    x = jax.ShapeDtypeStruct((2, width), "float32")
    config = jlora.LoraConfig(rank=rank, targets=targets)
    return jlora.plan(attention, params, x, config=config).trained_count


COUNTS = {
    "RoBERTa-base, rank 8, q and v": ((12, 768, 8), 294_912),
    "GPT-2 medium, rank 4, q and v": ((24, 1024, 4), 393_216),
    "GPT-3, rank 1, q and v": ((96, 12288, 1), 4_718_592),
    "GPT-3, rank 8, q and v": ((96, 12288, 8), 37_748_736),
    # The 18 M budget of LoRA's table 5: fewer matrices, higher rank.
    "GPT-3, rank 8, q": ((96, 12288, 8, "q"), 18_874_368),
    "GPT-3, rank 4, q and v": ((96, 12288, 4), 18_874_368),
    "GPT-3, rank 2, all four": ((96, 12288, 2, "*"), 18_874_368),
    "Llama-3.2-3B, rank 32, q and v": ((28, 3072, 32, ("q", "v"), 1024), 9_175_040),
}


@pytest.mark.parametrize("name", COUNTS)
def test_trained_numbers_are_those_of_the_papers(name):
    model, count = COUNTS[name]
    assert trained(*model) == count


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_a_square_matrix_costs_two_d_rank(rank):
    assert trained(1, 512, rank, "q") == 2 * 512 * rank


def test_rank_5_of_a_1000_by_1000_matrix_trains_one_percent():
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
    x = jax.ShapeDtypeStruct((1, 1000), "float32")
    config = jlora.LoraConfig(rank=5, targets="w")
    plan = jlora.plan(lambda p, x: x @ p["w"], params, x, config=config)
    assert plan.trained_count == 10_000
    assert plan.trained_count / 1000**2 == 0.01


def linear(p, x):
    return x @ p["w"]


def start(rank, rslora, size=128):
    params = {"w": jnp.zeros((size, size))}
    config = jlora.LoraConfig(rank=rank, alpha=16, targets="w", rslora=rslora)
    plan = jlora.plan(linear, params, jnp.ones((1, size)), config=config)
    return jlora.split(jax.random.key(0), params, plan)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_first_step_shrinks_with_the_rank_unless_rank_stabilised(rslora):
    """A step of B on one example moves its own output by `scale² ‖Aᵀ x‖²`.

    That falls as 1 / rank with `alpha / rank`, and is the same at every rank with
    `alpha / sqrt(rank)`: why rsLoRA scales so.
    """
    x = np.random.default_rng(0).normal(size=(64, 128)).astype("float32")
    moved = {}
    for rank in (4, 64):
        own = start(rank, rslora)[1].lora["w"]
        moved[rank] = np.mean((own.scale * x @ np.asarray(own.a)) ** 2) * rank
    law = 1.0 if rslora else 64 / 4
    assert moved[4] / moved[64] == pytest.approx(law, rel=0.15)


def final_loss(rank, rslora, steps=50):
    """Loss over the first loss after some steps of Adam towards a random matrix."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 128)), "float32")
    y = x @ jnp.asarray(rng.normal(size=(128, 128)) / math.sqrt(128), "float32")
    frozen, trainable = start(rank, rslora)
    lora_fn = jlora.apply_lora(linear)
    tx = optax.adam(1e-3)

    @jax.jit
    def run(trainable):
        def step(carry, _):
            trainable, state = carry

            def loss(trainable):
                return jnp.mean((lora_fn(frozen, trainable, x) - y) ** 2)

            value, gradient = jax.value_and_grad(loss)(trainable)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(trainable, updates), state), value

        carry = (trainable, tx.init(trainable))
        return jax.lax.scan(step, carry, None, length=steps)[1]

    losses = run(trainable)
    return float(losses[-1] / losses[0])


def test_high_ranks_learn_only_when_rank_stabilised():
    """rsLoRA's trend: a high rank learns no faster than a low one without it."""
    plain = {rank: final_loss(rank, rslora=False) for rank in (4, 64)}
    stable = {rank: final_loss(rank, rslora=True) for rank in (4, 64)}
    assert stable[64] < 0.6 * stable[4]
    assert stable[64] < 0.6 * plain[64]
