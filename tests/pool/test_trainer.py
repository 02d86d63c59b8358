"""Slots that train: each as a run of its own, and nothing compiles again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.pool import Trainer
from tests.helpers import compilations, normal

# optax needs these dtypes
pytestmark = [pytest.mark.once, pytest.mark.usefixtures("standard_dtypes")]

PARAMS = {"up": normal((6, 8), 0), "down": normal((8, 3), 1)}
RATES = {0: 1e-2, 2: 3e-2, 3: 1e-3}


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def loss(p, x, y):
    return jnp.mean((fn(p, x) - y) ** 2, axis=(1, 2))


@optax.inject_hyperparams
def adam(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


TX = adam(learning_rate=0.0)
TRAINER = Trainer(loss, TX)
ADD = jax.jit(TRAINER.add, donate_argnums=0)
REMOVE = jax.jit(TRAINER.remove, donate_argnums=0)
FORWARD = jax.jit(TRAINER.forward_backward, donate_argnums=0)
STEP = jax.jit(TRAINER.optim_step, donate_argnums=0)
EVALUATE = jax.jit(TRAINER.evaluate)


@functools.cache
def fresh(seed, **config):
    config = jlora.LoraConfig(rank=2, alpha=4, targets="*", **config)
    plan = jlora.plan(fn, PARAMS, jnp.ones((1, 5, 6)), config=config)
    return jlora.split(jax.random.key(seed), PARAMS, plan)[1]


def filled():
    slots = TRAINER.create(fresh(0), capacity=4)
    for slot, rate in RATES.items():
        slots = ADD(slots, slot, fresh(slot), learning_rate=rate)
    return slots


def batch(step):
    """Rows of slots 0 (two), 2, 3 and of the base."""
    ids = jnp.array([0, 3, 0, 2, -1])
    return ids, normal((5, 5, 6), 10 + step), normal((5, 5, 3), 20 + step)


def test_every_slot_trains_as_a_run_of_its_own():
    slots = filled()
    runs = {}
    for slot, rate in RATES.items():
        tx = adam(learning_rate=rate)
        runs[slot] = fresh(slot), tx, tx.init(fresh(slot))

    @jax.jit
    def gradient(trainable, x, y):
        apply = jlora.apply_lora(loss)
        return jax.value_and_grad(lambda t: apply(PARAMS, t, x, y).mean())(trainable)

    for step in range(3):
        ids, x, y = batch(step)
        losses, slots = FORWARD(slots, PARAMS, ids, x, y)
        slots, stepped = STEP(slots)
        np.testing.assert_array_equal(stepped, [True, False, True, True])
        np.testing.assert_allclose(losses[4], loss(PARAMS, x, y)[4], rtol=1e-5)
        for slot, (own, tx, state) in runs.items():
            rows = np.flatnonzero(ids == slot)
            value, g = gradient(own, x[rows], y[rows])
            np.testing.assert_allclose(losses[rows].mean(), value, rtol=1e-5)
            updates, state = tx.update(g, state, own)
            runs[slot] = optax.apply_updates(own, updates), tx, state
    for slot, (own, _, _) in runs.items():
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            TRAINER.adapter(slots, slot),
            own,
        )
    np.testing.assert_array_equal(slots.step, [3, 0, 3, 3])


@pytest.mark.once
def test_gradients_accumulate_and_slots_wait_for_their_turn():
    ids, x, y = batch(0)
    _, whole = FORWARD(filled(), PARAMS, ids, x, y)
    slots = filled()
    for part in (slice(0, 2), slice(2, 5)):
        pad = jnp.full(5 - len(range(*part.indices(5))), -1)
        order = np.r_[
            np.arange(5)[part], np.setdiff1d(np.arange(5), np.arange(5)[part])
        ]
        own = jnp.concatenate([ids[part], pad])
        _, slots = FORWARD(slots, PARAMS, own, x[order], y[order])
    np.testing.assert_array_equal(slots.rows, whole.rows)
    first, stepped = STEP(slots, jnp.array([True, True, False, False]))
    np.testing.assert_array_equal(stepped, [True, False, False, False])
    np.testing.assert_array_equal(first.rows, [0, 0, 1, 1])
    rest, stepped = STEP(first)
    np.testing.assert_array_equal(stepped, [False, False, True, True])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        rest.adapters,
        STEP(whole)[0].adapters,
    )


def test_bad_data_touches_no_other_slot():
    """Bit for bit; the bad slot itself stays where it was, and can go on."""
    ids, x, y = batch(0)
    for bad in (jnp.nan, jnp.inf, 1e38):
        slots = {}
        for name, data in (("good", x), ("bad", x.at[1].set(bad))):
            losses, slots[name] = FORWARD(filled(), PARAMS, ids, data, y)
            slots[name], stepped = STEP(slots[name])
        assert np.isfinite(np.delete(losses, 1)).all()
        for slot in (0, 2):
            jax.tree.map(
                np.testing.assert_array_equal,
                *(jax.tree.map(lambda x: x[slot], s) for s in slots.values()),  # noqa: B023
            )
        if bad != 1e38:  # tanh holds it
            np.testing.assert_array_equal(stepped, [True, False, True, False])
            jax.tree.map(
                np.testing.assert_array_equal,
                TRAINER.adapter(slots["bad"], 3),
                fresh(3),
            )
    _, after = FORWARD(slots["bad"], PARAMS, ids, x, y)
    assert STEP(after)[1][3]


def test_nothing_compiles_while_adapters_come_and_go():
    ids, x, y = batch(0)
    adapters = [fresh(seed) for seed in range(3)]

    def cycle(slots, i):
        slots = ADD(slots, i % 4, adapters[i % 3], learning_rate=1e-3 * (i + 1))
        _, slots = FORWARD(slots, PARAMS, ids, x, y)
        slots, _ = STEP(slots)
        EVALUATE(slots, PARAMS, ids, x, y)
        return REMOVE(slots, i % 4)

    slots = cycle(TRAINER.create(fresh(0), 4), 0)
    with compilations() as compiled:
        for i in range(1, 101):
            slots = cycle(slots, i)
        jax.block_until_ready(slots)
        assert not compiled
        jax.jit(lambda x: x + 1.5)(x)  # compilations are heard
        assert compiled
    assert not slots.occupied.any()


def test_a_step_out_of_all_numbers_is_not_taken():
    ids, x, y = batch(0)
    slots = ADD(filled(), 3, fresh(3), learning_rate=jnp.inf)  # its update is NaN
    slots = FORWARD(slots, PARAMS, ids, x, y)[1]
    slots, stepped = STEP(slots)
    np.testing.assert_array_equal(stepped, [True, False, True, False])
    jax.tree.map(np.testing.assert_array_equal, TRAINER.adapter(slots, 3), fresh(3))


@pytest.mark.parametrize("method", ["adalora", "lora_xs", "rows"])
def test_slots_of_other_methods_have_the_gradient_of_each(method):
    def loss(p, tokens):
        return jnp.mean(p["up"][tokens] @ p["down"], axis=(1, 2)) ** 2

    tokens = jnp.array([[1, 2], [4, 1], [0, 4]])
    config = {"method": method} if method != "rows" else {}
    rows = jlora.TokenRows("up", (1, 4)) if method == "rows" else ()
    config = jlora.LoraConfig(rank=2, targets="down", train=rows, **config)
    plan = jlora.plan(loss, PARAMS, tokens, config=config)
    frozen, own = jlora.split(jax.random.key(0), PARAMS, plan)
    own = jax.tree.map(lambda x: x + 0.5, own)
    trainer, ids = Trainer(loss, optax.sgd(0.1)), jnp.array([1, -1, 1])
    slots = trainer.add(trainer.create(own, 2), 1, own)
    losses, slots = jax.jit(trainer.forward_backward)(slots, frozen, ids, tokens)
    apply = jlora.apply_lora(loss)
    want = jax.grad(lambda t: apply(frozen, t, tokens)[ids == 1].sum())(own)
    for got, one in zip(*map(jax.tree.leaves, (slots.gradients, want)), strict=True):
        np.testing.assert_allclose(got[1], one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses[1], loss(PARAMS, tokens)[1], rtol=1e-6)


@pytest.mark.once
def test_a_free_slot_is_nan_and_changes_nothing():
    _, x, y = batch(0)
    before = filled()
    losses, slots = FORWARD(filled(), PARAMS, jnp.array([1, 7, 0, -2, -1]), x, y)
    np.testing.assert_array_equal(np.isnan(losses), [True, True, False, True, False])
    np.testing.assert_array_equal(slots.rows, [1, 0, 0, 0])
    slots, _ = STEP(REMOVE(slots, 0))
    jax.tree.map(np.testing.assert_array_equal, slots.adapters, before.adapters)
    assert np.isnan(TRAINER.adapter(slots, 0).lora["up"].a).all()


@pytest.mark.once
def test_what_slots_cannot_take_is_an_error():
    slots = filled()
    with pytest.raises(jlora.PoolError, match="are not those of the slots"):
        TRAINER.add(slots, 0, fresh(0, dtype="bfloat16"))
    with pytest.raises(jlora.PoolError, match="but no slot 4"):
        TRAINER.add(slots, 4, fresh(0))
    with pytest.raises(jlora.PoolError, match=r"injects no 'rate'.*inject_hyperp"):
        TRAINER.add(slots, 0, fresh(0), rate=0.1)
    with pytest.raises(jlora.PoolError, match="capacity must be a whole number"):
        TRAINER.create(fresh(0), 0)
    for which in (jnp.array([1, 0, 2, 0]), jnp.ones(1, bool)):
        with pytest.raises(jlora.PoolError, match=r"must be booleans \(4,\), one"):
            TRAINER.optim_step(slots, which)
    with pytest.raises(jlora.PoolError, match="ids must be integers, got float32"):
        TRAINER.evaluate(slots, PARAMS, jnp.ones(5), *batch(0)[1:])
    whole = Trainer(lambda p, x: fn(p, x).sum(axis=(1, 2))[:, None], TX)
    with pytest.raises(jlora.PoolError, match=r"one number for each batch row, \(5,\)"):
        whole.evaluate(slots, PARAMS, *batch(0)[:2])
    with pytest.raises(jlora.ConfigError, match=r"pool\.Trainer"):
        Trainer(None, TX)
    for tx in (None, optax.adam):
        with pytest.raises(
            jlora.ConfigError, match=r"pool\.Trainer takes an optimizer"
        ):
            Trainer(fn, tx)
    for like in (None, PARAMS):
        with pytest.raises(jlora.TreeError, match=r"like must be a jlora\.Trainable"):
            TRAINER.create(like, 2)
