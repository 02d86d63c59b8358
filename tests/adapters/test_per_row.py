"""A batch whose rows use different adapters equals each row with its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import adapters
from jlora.factors import Axes, Factors, Spec, Trainable
from tests.helpers import normal

D = 6


PARAMS = {
    "embed": normal((9, D), 0),
    "attn": normal((2, D, D), 1),  # scanned layers
    "head": normal((D, 9), 2),
}
LAYERS = Axes(batch=(0,), fan_in=(1,), fan_out=(2,))


def adapter(seed, rank=2):
    def factors(op, axes, a_shape, b_shape):
        spec = Spec(op=op, axes=axes, rank=rank, alpha=3.0)
        return Factors(normal(a_shape, seed), normal(b_shape, seed + 50), spec)

    lora = {
        "embed": factors("embedding", Axes(), (9, rank), (rank, D)),
        "attn": factors("linear", LAYERS, (2, D, rank), (2, rank, D)),
    }
    return Trainable(lora if seed % 2 else {"attn": lora["attn"]})


def model(params, tokens, *, scale=1.0):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["attn"])
    return x @ params["head"] * scale


def step(params, token, cache, position):
    """One token of a model that attends to a cache `[layers, batch, length, d]`."""
    x = params["embed"][token]
    new = []
    for w, past in zip(params["attn"], cache, strict=True):
        past = jax.lax.dynamic_update_slice_in_dim(past, (x @ w)[:, None], position, 1)
        seen = jnp.arange(past.shape[1]) <= position
        scores = jnp.einsum("bd,bld->bl", x, past)
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -1e9))
        x = jnp.einsum("bl,bld->bd", weights, past)
        new.append(past)
    return x @ params["head"], jnp.stack(new)


SEVERAL = [adapter(seed, rank) for seed, rank in ((1, 1), (2, 3), (3, 2))]
STACKED = adapters.stack(SEVERAL)
IDS = jnp.array([2, -1, 0, 1, 2])
TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, 9, (5, 4)))


def own(i):
    return SEVERAL[i] if i >= 0 else Trainable()


def test_each_row_uses_its_adapter():
    rows = jax.jit(jlora.adapters.per_row(model))(PARAMS, STACKED, IDS, TOKENS)
    for i, tokens, out in zip(IDS, TOKENS, rows, strict=True):
        expected = jlora.apply_lora(model)(PARAMS, own(i), tokens[None])[0]
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    picked = adapters.select(STACKED, IDS)
    again = jax.jit(jlora.adapters.per_row(model))(PARAMS, picked, None, TOKENS)
    np.testing.assert_allclose(again, rows, rtol=1e-5, atol=1e-6)


def test_generation_with_a_cache_is_that_of_each_adapter():
    axes = {"in_axes": (0, 1, None), "out_axes": (0, 1)}
    row_step = jlora.adapters.per_row(step, **axes)
    rows = adapters.select(STACKED, IDS)

    @jax.jit
    def generate(rows):
        def body(carry, position):
            token, cache = carry
            logits, cache = row_step(PARAMS, rows, None, token, cache, position)
            return (jnp.argmax(logits, -1), cache), logits

        start = (TOKENS[:, 0], jnp.zeros((2, 5, 4, D)))
        return jax.lax.scan(body, start, jnp.arange(4))[1]

    logits = generate(rows)
    for i, row in enumerate(IDS):
        params = jlora.merge(PARAMS, own(row))
        token, cache = TOKENS[i : i + 1, 0], jnp.zeros((2, 1, 4, D))
        for t in range(4):
            expected, cache = step(params, token, cache, t)
            np.testing.assert_allclose(logits[t, i], expected[0], rtol=1e-3, atol=1e-4)
            token = jnp.argmax(expected, -1)


def test_multi_task_batch_trains_each_adapter_from_its_rows(standard_dtypes):
    @jax.jit
    @jax.value_and_grad
    def loss(stacked, ids):
        return jnp.sum(
            jnp.square(jlora.adapters.per_row(model)(PARAMS, stacked, ids, TOKENS))
        )

    before, grads = loss(STACKED, IDS)
    padded = adapters.unstack(STACKED, trim=False)

    @jax.jit
    @jax.grad
    def alone(trainable, tokens):
        out = jlora.apply_lora(model)(PARAMS, trainable, tokens)
        return jnp.sum(jnp.square(out))

    for i in range(2):  # one row each
        expected = alone(padded[i], TOKENS[np.asarray(IDS) == i])
        for g, e in zip(
            jax.tree.leaves(jax.tree.map(lambda x: x[i], grads)),  # noqa: B023
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-3)
    tx = optax.adam(1e-2)
    updates, _ = tx.update(grads, tx.init(STACKED), STACKED)
    better = optax.apply_updates(STACKED, updates)
    assert loss(better, IDS)[0] < before


def test_a_bad_id_or_adapter_harms_its_own_rows_only():
    bad = jax.tree.map(lambda x: x * jnp.nan, SEVERAL[1])
    row_fn = jax.jit(jlora.adapters.per_row(model))
    good = row_fn(PARAMS, STACKED, IDS, TOKENS)
    broken = adapters.stack([SEVERAL[0], bad, SEVERAL[2]])
    out = row_fn(PARAMS, broken, IDS, TOKENS)
    np.testing.assert_array_equal(np.isnan(out).all((1, 2)), np.asarray(IDS) == 1)
    np.testing.assert_array_equal(out[IDS != 1], good[IDS != 1])
    out = row_fn(PARAMS, STACKED, IDS.at[0].set(3).at[3].set(-2), TOKENS)
    np.testing.assert_array_equal(np.isnan(out).all((1, 2)), [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(out[jnp.array([1, 2, 4])], good[jnp.array([1, 2, 4])])


def test_other_ids_and_adapters_compile_nothing():
    traces = []

    def counted(params, tokens):
        traces.append(1)
        return model(params, tokens)

    row_fn = jax.jit(jlora.adapters.per_row(counted))
    row_fn(PARAMS, STACKED, IDS, TOKENS)
    first = len(traces)
    row_fn(PARAMS, jax.tree.map(lambda x: x * 2, STACKED), -jnp.ones_like(IDS), TOKENS)
    assert len(traces) == first


def test_dropout_draws_a_mask_for_each_row(key):
    spec = Spec(rank=1, alpha=1.0, dropout=0.5)
    one = Trainable({"head": Factors(jnp.ones((D, 1)), jnp.ones((1, 9)), spec)})
    x = jnp.ones((2, 3), "int32")
    row_fn = jlora.adapters.per_row(model)
    stacked = adapters.stack([one])
    out = row_fn(PARAMS, stacked, jnp.array([0, 0]), x, lora_key=key, scale=2.0)
    assert (np.abs(out[0] - out[1]) > 1e-3).any()
    plain = row_fn(PARAMS, stacked, jnp.array([0, 0]), x, scale=2.0)
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-5)


def test_what_does_not_fit_is_named():
    row_fn = jlora.adapters.per_row(model)
    with pytest.raises(jlora.TreeError, match=r"5 batch rows, .* the ids is \(2,\)"):
        row_fn(PARAMS, STACKED, jnp.array([0, 1]), TOKENS)
    with pytest.raises(jlora.TreeError, match=r"5 batch rows, .* stack is \(3,\)"):
        row_fn(PARAMS, STACKED, None, TOKENS)
    with pytest.raises(jlora.TreeError, match=r"batches of \[2, 5\].*in_axes="):
        jlora.adapters.per_row(step, in_axes=(0, 0, None))(
            PARAMS, STACKED, IDS, TOKENS[:, 0], jnp.zeros((2, 5, 4, D)), 0
        )
    with pytest.raises(jlora.TreeError, match="2 entries for 1 arguments"):
        jlora.adapters.per_row(model, in_axes=(0, 1))(PARAMS, STACKED, IDS, TOKENS)
    with pytest.raises(jlora.TreeError, match="ids must be integers"):
        row_fn(PARAMS, STACKED, jnp.ones(5), TOKENS)
