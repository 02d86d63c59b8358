"""What the gradient of a magnitude keeps is the copy that attention keeps anyway."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.transform.compat import code
from jlora.transform.views import View, readers, view_of
from tests.helpers import normal

BATCH, TOKENS, HEADS, HEAD = 2, 6, 3, 4
D = HEADS * HEAD


def heads(x):
    return x.reshape(BATCH, TOKENS, HEADS, HEAD)


def scores(q, k):
    return jnp.einsum("bthd,bshd->bhts", q, k)


READERS = {
    "queries": (
        lambda y: scores(heads(y), jnp.ones((BATCH, TOKENS, HEADS, HEAD))),
        View((2, 6, 3, 4), (0, 2, 1, 3), (2, 3, 6, 4)),
    ),
    "values": (
        lambda y: jnp.einsum("bhts,bshd->bthd", jnp.ones((2, 3, 6, 6)), heads(y)),
        View((2, 6, 3, 4), (0, 2, 3, 1), (2, 3, 4, 6)),
    ),
    "grouped queries": (
        lambda y: jnp.einsum(
            "btkgd,bskd->bkgts", y.reshape(2, 6, 1, 3, 4), jnp.ones((2, 6, 1, 4))
        ),
        View((2, 6, 1, 3, 4), (0, 2, 1, 3, 4), (2, 1, 18, 4)),
    ),
    "transposed before": (
        lambda y: heads(y).transpose(0, 2, 1, 3) @ jnp.ones((2, 3, 4, 6)),
        View((2, 6, 3, 4), (0, 2, 1, 3), (2, 3, 6, 4)),
    ),
    "in a call": (
        jax.jit(lambda y: scores(heads(y), jnp.ones((BATCH, TOKENS, HEADS, HEAD)))),
        View((2, 6, 3, 4), (0, 2, 1, 3), (2, 3, 6, 4)),
    ),
    "in order": (lambda y: y @ jnp.ones((2, D, 5)), None),
    "read twice": (lambda y: scores(heads(y), heads(y)), None),
    "returned": (lambda y: y, None),
    "returned from a call": (jax.jit(heads), None),
    "not used": (lambda y: 1.0, None),
    "joined": (lambda y: y.reshape(BATCH * TOKENS, D) @ jnp.ones((D, 5)), None),
    "changed": (lambda y: jnp.tanh(y) @ jnp.ones((2, D, 5)), None),
}


@pytest.mark.parametrize("name", READERS)
def test_the_view_is_that_of_the_only_reader(name):
    fn, want = READERS[name]
    jaxpr, _ = code(jax.make_jaxpr(fn)(jnp.ones((BATCH, TOKENS, D))))
    got = view_of(jaxpr.invars[0], readers(jaxpr))
    if name != "grouped queries":  # a head axis of size one changes no entry's place
        assert got == want
    if got is not None:
        x = normal((BATCH, TOKENS, D))
        assert got.of(x).shape == got.shape
        np.testing.assert_array_equal(got.back(got.of(x), x.shape), x)
        pair = jnp.stack([x, 2 * x])
        np.testing.assert_array_equal(got.rows(2).of(pair)[1], got.of(2 * x))


def attention(params, x, read_twice=False):
    q, k, v = (x @ params[name] for name in "qkv")
    if read_twice:
        q, k, v = (y + 0 * jnp.sum(y) for y in (q, k, v))
    weights = jax.nn.softmax(scores(heads(q), heads(k)))
    out = jnp.einsum("bhts,bshd->bthd", weights, heads(v))
    return out.reshape(BATCH, TOKENS, D)


def adapted():
    params = {name: normal((D, D), i) / 3 for i, name in enumerate("qkv")}
    x = normal((BATCH, TOKENS, D), 5)
    config = jlora.LoraConfig(rank=2, method="dora")
    plan = jlora.plan(attention, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    return frozen, jax.tree.map(lambda v: 1.1 * v + 0.05, trainable), x


@pytest.mark.parametrize("form", ["factored", "merged"])
def test_gradients_through_a_view_are_those_without(form):
    frozen, trainable, x = adapted()

    def gradient(t, **settings):
        def fn(params, x):
            return attention(params, x, **settings)

        run = jlora.apply_lora(fn, form=form, on_merge="error")
        return jax.grad(lambda t: jnp.sum(jnp.square(run(frozen, t, x))))(t)

    got, want = (gradient(trainable, read_twice=twice) for twice in (False, True))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    pair = jax.tree.map(lambda v: jnp.stack([v, 1.2 * v]), trainable)
    both = jax.vmap(gradient)(pair)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5)


def test_the_copy_of_attention_is_all_that_is_kept():
    """The gradient of the magnitudes reads the copies, so `q` is not kept, nor `k`."""
    n, tokens, wide = 4, 64, 128

    def fn(params, x):
        for p in params:
            q, k, v = ((x @ p[s]).reshape(2, tokens, 2, -1) for s in "qkv")
            a = jax.nn.softmax(scores(q, k))
            x = jnp.tanh(jnp.einsum("bhts,bshd->bthd", a, v).reshape(x.shape))
        return x

    shape = jax.ShapeDtypeStruct((wide, wide), "float32")
    params = [dict.fromkeys("qkv", shape) for _ in range(n)]
    x = jax.ShapeDtypeStruct((2, tokens, wide), "float32")

    def temp(method):
        config = jlora.LoraConfig(rank=2, method=method)
        plan = jlora.plan(fn, params, x, config=config)
        _, t = jax.eval_shape(lambda p: jlora.split(jax.random.key(0), p, plan), params)
        run = jlora.apply_lora(fn)
        step = jax.jit(jax.grad(lambda t, p, x: run(p, t, x).sum()))
        return step.lower(t, params, x).compile().memory_analysis().temp_size_in_bytes

    assert temp("dora") < temp("lora") + n * 2 * tokens * wide * 4


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_magnitude_has_its_gradient_on_a_mesh(kind):
    frozen, trainable, x = adapted()

    def product(params, x):
        return jnp.tanh(x @ params["q"])

    run = jlora.apply_lora(product, on_merge="error")

    def gradient(t, frozen, x):
        return jax.grad(lambda t: jnp.sum(jnp.square(run(frozen, t, x))))(t)

    want = gradient(trainable, frozen, x)
    axes = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((2,), ("d",), axis_types=axes)
    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("d"), jax.P()))
    with jax.set_mesh(mesh):
        t, w = jax.device_put((trainable, frozen), whole)
        got = jax.jit(gradient)(t, w, jax.device_put(x, rows))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
