"""The GRPO example: its loss, and that rewards rise, on a tiny model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from examples.chat.model import DecoderConfig, forward, init
from examples.policy import grpo, train

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("standard_dtypes")]


@pytest.fixture(autouse=True)
def as_users():
    with jax.numpy_rank_promotion("allow"):
        yield


TINY = DecoderConfig(
    vocab=16, width=16, hidden=24, layers=2, heads=2, kv_heads=1, head=8, tied=True
)


@functools.cache
def started():
    params = init(jax.random.key(0), TINY)
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)
    fn = functools.partial(forward, config=TINY)
    config = jlora.LoraConfig(rank=4, alpha=8)
    plan = jlora.plan(fn, params, np.zeros((1, 4), np.int32), config=config)
    return jlora.split(jax.random.key(1), params, plan)


def test_advantages_compare_the_samples_of_a_prompt():
    found = grpo.advantages(np.array([[0.0, 1.0], [3.0, 3.0]]))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-3)


def test_a_step_follows_the_policy_gradient_and_starts_at_the_reference():
    frozen, trainable = started()
    batch = grpo.batched(
        [[1, 2], [1, 2, 3]], [[4, 5], [6]], np.array([[1.0, -1.0]]), length=6
    )
    np.testing.assert_array_equal(
        batch.written, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    )
    step = grpo.make_step(TINY, optax.sgd(1.0), beta=0.1)
    copy = jax.tree.map(jnp.copy, trainable)
    stepped, _, kl = step(copy, optax.sgd(1.0).init(copy), frozen, batch)
    assert float(kl) == 0  # a fresh adapter is the base

    def gain(trainable):
        fn = jlora.apply_lora(functools.partial(forward, config=TINY))
        logits = fn(frozen, trainable, batch.tokens, None, batch.there)
        logp = grpo.chosen(logits, batch.tokens)
        return (logp[0, 1] + logp[0, 2] - logp[1, 2]) / 3

    wanted = jax.grad(gain)(trainable)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old + g, atol=1e-6),
        stepped,
        trainable,
        wanted,
    )


def test_rewards_rise():
    """The policy learns to write even tokens."""
    frozen, trainable = started()
    trainable = jax.tree.map(jnp.copy, trainable)
    tx = optax.adam(5e-2)
    step, state = grpo.make_step(TINY, tx, beta=0.01), tx.init(trainable)
    sampler = grpo.Sampler.of(TINY, most=4)
    rewards, kl = [], 0.0
    for i in range(16):
        batch, mean = grpo.rollout(
            sampler,
            (frozen, trainable),
            [[1, 2, 3], [5, 4]],
            lambda _, written: float(np.mean(np.array(written) % 2 == 0)),
            group=8,
            length=8,
            key=jax.random.fold_in(jax.random.key(2), i),
        )
        trainable, state, kl = step(trainable, state, frozen, batch)
        rewards.append(mean)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert float(kl) > 0


def test_rewards_are_checked_by_a_program():
    cases = {"12": 1.0, " 12.\n": 1.0, "13": train.FORMAT, "": 0.0, "It is": 0.0}
    cases |= {"It is 12": 0.25, "5 + 7 = 12": 0.4, "12 + 1": train.FORMAT / 2}
    assert {text: train.reward((5, 7), text) for text in cases} == cases
