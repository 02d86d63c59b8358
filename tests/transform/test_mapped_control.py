"""Loops and branches under `vmap`, where each example has its own predicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.helpers import close, normal

N, EOS = 6, 0


def adapt(fn, params, *args, **config):
    """`(frozen, trainable, lora_fn, merged)` with random factors."""
    config = jlora.LoraConfig(**{"rank": 2, "alpha": 3, **config})
    plan = jlora.plan(fn, params, *args, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 3, trainable)
    lora_fn = jlora.apply_lora(fn, on_merge="error")

    def merged(trainable, *args):
        return fn(jlora.merge(frozen, trainable), *args)

    return frozen, trainable, lora_fn, merged


def settles(p, x):
    """Steps until they are small, with a number of steps that each example has."""

    def step(state):
        old, _, n = state
        new = jnp.tanh(old @ p["w"] / 4) + 0.3
        return new, jnp.abs(new - old).max(), n + 1

    return lax.while_loop(lambda s: s[1] > 1e-2, step, (x, jnp.float32(1), 0))


PARAMS = normal({"w": (N, N)}, 3)
XS = 3 * normal((5, N), 4)


def for_each(p, xs):
    return jax.vmap(lambda x: settles(p, x))(xs)


def for_each_of_each(p, xs):
    return jax.vmap(jax.vmap(lambda x: settles(p, x)))(jnp.stack([xs, xs / 9]))


def in_jit(p, xs):
    return jax.jit(jax.vmap(jax.jit(lambda x: settles(p, x))))(xs)


def in_scan(p, xs):
    return lax.scan(lambda c, _: (for_each(p, c)[0] * 2, for_each(p, c)), xs, None, 2)


def in_remat(p, xs):
    return jax.vmap(jax.checkpoint(lambda x: settles(p, x)))(xs)


def inner_loop(p, xs):
    """The outer predicate is one for all, the inner one each example's own."""
    return lax.while_loop(
        lambda s: s[1] < 3, lambda s: (for_each(p, s[0])[0] * 2, s[1] + 1), (xs, 0)
    )


def weight_in_the_predicate(p, xs):
    def steps(x):
        return lax.while_loop(lambda h: (h @ p["w"]).sum() < 4, lambda h: h + w, x)

    w = p["w"].sum(1)
    w = jnp.sign(w) * 0.5
    return jax.vmap(steps)(xs)


@pytest.mark.parametrize(
    "fn",
    [for_each, for_each_of_each, in_jit, in_scan, in_remat, inner_loop],
    ids=lambda f: f.__name__,
)
def test_each_example_leaves_the_loop_on_its_own(fn):
    frozen, trainable, lora_fn, merged = adapt(fn, PARAMS, XS)
    out = jax.jit(lora_fn)(frozen, trainable, XS)
    close(out, merged(trainable, XS), 1e-4)
    if fn is for_each:
        assert len(np.unique(out[2])) > 1  # numbers of steps


def test_a_weight_may_be_in_the_predicate():
    fn = weight_in_the_predicate
    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(fn, PARAMS, XS, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), PARAMS, plan)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size) / 3, trainable)
    out = jlora.apply_lora(fn, on_merge="allow")(frozen, trainable, XS)
    close(out, fn(jlora.merge(frozen, trainable), XS), 1e-4)


def test_forward_derivatives_of_a_loop_for_each():
    frozen, trainable, lora_fn, merged = adapt(for_each, PARAMS, XS)

    def push(fn):
        return jax.jvp(lambda t, x: fn(t, x)[:2], *[(trainable, XS)] * 2)

    close(push(lambda t, x: lora_fn(frozen, t, x)), push(merged), 1e-4, 1e-4)


def test_vmap_of_the_adapted_function():
    frozen, trainable, lora_fn, merged = adapt(settles, PARAMS, XS[0])
    one = jax.vmap(lora_fn, (None, None, 0))(frozen, trainable, XS)
    close(one, jax.vmap(merged, (None, 0))(trainable, XS), 1e-4)
    many = jax.tree.map(lambda a: jnp.stack([a, -a]), trainable)
    each = jax.vmap(jax.vmap(lora_fn, (None, None, 0)), (None, 0, None))
    expected = jax.vmap(jax.vmap(merged, (None, 0)), (0, None))(many, XS)
    close(each(frozen, many, XS), expected, 1e-4)


def test_random_numbers_drawn_in_a_loop():
    """`poisson` draws until it accepts, also where no weight is near."""

    def fn(p, xs):
        keys = jax.random.split(jax.random.key(0), len(xs))
        counts = jax.vmap(lambda k: jax.random.poisson(k, 3.0))(keys)
        rates = jax.vmap(lambda k, x: jax.random.poisson(k, jnp.exp(x[0])))(
            keys, xs @ p["w"] / 9
        )
        return counts, rates, xs @ p["w"]

    frozen, trainable, lora_fn, merged = adapt(fn, PARAMS, XS)
    close(lora_fn(frozen, trainable, XS), merged(trainable, XS), 1e-4)
    text = jax.make_jaxpr(lora_fn)(frozen, trainable, XS).pretty_print()
    assert " while[" in text


def test_keys_in_the_state_of_a_loop_for_each():
    def sample(p, key):
        def step(state):
            key, h, _ = state
            key, now = jax.random.split(key)
            h = jnp.tanh(h @ p["w"]) + jax.random.normal(now, h.shape)
            return key, h, h.sum()

        return lax.while_loop(lambda s: s[2] < 2, step, (key, jnp.ones(N), 0.0))

    def fn(p, keys):
        return jax.vmap(lambda key: sample(p, key))(keys)

    keys = jax.random.split(jax.random.key(7), 4)
    frozen, trainable, lora_fn, merged = adapt(fn, PARAMS, keys)
    close(lora_fn(frozen, trainable, keys), merged(trainable, keys), 1e-4)


def test_generation_until_each_sentence_ends():
    params = normal({"table": (9, N), "mix": (N, N), "head": (N, 9)}, 5)

    def generate(p, token):
        def step(state):
            tokens, n = state
            h = jnp.tanh(p["table"][tokens[n]] @ p["mix"])
            tokens = tokens.at[n + 1].set(jnp.argmax(h @ p["head"]))
            return tokens, n + 1

        def goes_on(state):
            tokens, n = state
            return (n < 7) & (tokens[n] != EOS)

        tokens = jnp.full((8,), EOS).at[0].set(token)
        return lax.while_loop(goes_on, step, (tokens, 0))

    def fn(p, prompts):
        return jax.vmap(lambda token: generate(p, token))(prompts)

    prompts = jnp.arange(9)
    frozen, trainable, lora_fn, merged = adapt(fn, params, prompts, targets="*")
    tokens, lengths = lora_fn(frozen, trainable, prompts)
    close((tokens, lengths), merged(trainable, prompts))
    assert len(np.unique(lengths)) > 1
    changed = tokens != fn(params, prompts)[0]
    assert changed.any()


def test_dropout_in_a_loop_for_each_draws_a_mask_for_each_step():
    def fn(p, xs):
        def steps(x):
            def step(state):
                n, seen = state
                return n + 1, seen.at[n].set(jnp.ones(N) @ p["w"])

            start = (0, jnp.zeros((4, N)))
            return lax.while_loop(lambda s: s[0] < x[0], step, start)[1]

        return jax.vmap(steps)(xs)

    xs = jnp.array([[2.0], [4.0]])
    params = {"w": jnp.zeros((N, N))}
    frozen, trainable, lora_fn, _ = adapt(fn, params, xs, dropout=0.5)
    factors = trainable.lora["w"]
    seen = lora_fn(frozen, trainable, xs, lora_key=jax.random.key(1))
    whole = lora_fn(frozen, trainable, xs)
    assert factors.spec.dropout == 0.5
    np.testing.assert_array_equal(seen[0, 2:], 0 * seen[0, 2:])
    steps = np.asarray(jnp.concatenate([seen[0, :2], seen[1]]))
    assert not np.isclose(steps, np.asarray(whole[1, 0])).all(1).any()
    assert len({step.tobytes() for step in steps[2:]}) == 4


@pytest.mark.parametrize("mapped", [False, True])
def test_dropout_acts_in_the_predicate_too(mapped):
    """The loop counts steps until a mask of two entries keeps both."""

    def count(p, x):
        def goes_on(n):
            return (x @ p["w"]).sum() < 3

        return lax.while_loop(goes_on, lambda n: n + 1, 0)

    def fn(p, x):
        return jax.vmap(lambda x: count(p, x))(x) if mapped else count(p, x[0])

    xs, params = jnp.ones((3, 2)), {"w": jnp.zeros((2, 2))}
    config = jlora.LoraConfig(rank=2, alpha=2, dropout=0.5)
    plan = jlora.plan(fn, params, xs, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: jnp.eye(2), trainable)
    run = jax.jit(jlora.apply_lora(fn))
    keys = jax.random.split(jax.random.key(1), 400)
    steps = jax.vmap(lambda key: run(frozen, trainable, xs, lora_key=key))(keys)
    # Both are kept once in four times, so three steps fail before that, on average.
    assert abs(float(steps.mean()) - 3) < 0.6


def test_moments_of_a_branch_for_each_are_refused():
    """The branch runs on every example, so its inputs are not those that took it."""
    xs = normal((8, N), 6)

    def fn(p, xs):
        def choose(x):
            return lax.cond(x[0] > 0, lambda x: x @ p["w"], lambda x: x, x)

        return jax.vmap(choose)(xs)

    config = jlora.LoraConfig(rank=2, init="eva")
    plan = jlora.plan(fn, PARAMS, xs, config=config)
    with pytest.raises(jlora.ConfigError, match=r"`select_n` at .* is not a matrix"):
        jlora.activation_statistics(fn, PARAMS, plan, [(xs,)])
