"""What follows an embedding lookup is planned and adapted as after any activation."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from safetensors.numpy import load_file

import jlora
from tests.helpers import close, normal

IDS = jnp.array([[0, 3, 1], [2, 2, 4]])


def conv(h, w, **settings):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        h, w, (1,), "SAME", dimension_numbers=numbers, **settings
    )


def scanned(w, h):
    return lax.scan(lambda t, row: (t + row @ w, None), jnp.zeros((2, 6)), h)[0]


# `(shape of w, fn(w, h))` for activations `h` of `[2, 3, 4]`.
STEPS = {
    "product": ((4, 6), lambda w, h: h @ w),
    "weight first": ((6, 4), lambda w, h: jnp.einsum("oi,bti->bto", w, h)),
    "experts": ((3, 4, 6), lambda w, h: jnp.einsum("bti,tio->bto", h, w)),
    "ragged product": (
        (2, 4, 6),
        lambda w, h: lax.ragged_dot(h.reshape(6, 4), w, jnp.array([2, 4])),
    ),
    "convolution": ((3, 4, 6), lambda w, h: conv(h, w)),
    "grouped convolution": (
        (3, 2, 6),
        lambda w, h: conv(h, w, feature_group_count=2),
    ),
    "convolution in jit": ((3, 4, 6), lambda w, h: jax.jit(conv)(h, w)),
    "standardised kernel": (
        (3, 4, 6),
        lambda w, h: conv(h, jax.nn.standardize(w, axis=(0, 1))),
    ),
    "standardised weight": (
        (4, 6),
        lambda w, h: h @ jax.nn.standardize(w, axis=0),
    ),
    "scan over positions": ((4, 6), lambda w, h: scanned(w, h.swapaxes(0, 1))),
    "scaled weight": ((4, 6), lambda w, h: h @ (w * h[0, 0, 0])),
    "in cond": (
        (3, 4, 6),
        lambda w, h: lax.cond(h[0, 0, 0] > 0, conv, lambda h, w: 2 * conv(h, w), h, w),
    ),
    "in remat": ((3, 4, 6), lambda w, h: jax.checkpoint(conv)(h, w)),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_leaf_after_a_lookup_is_planned_as_after_any_activation(step):
    shape, fn = STEPS[step]

    def looked_up(p, scale):
        return jnp.tanh(fn(p["w"], p["table"][IDS])) * scale

    def met(p, h):
        return jnp.tanh(fn(p["w"], h))

    params = {"w": normal(shape, 0), "table": normal((5, 4), 1)}
    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(looked_up, params, 2.0, config=config)
    table, row = plan.rows()
    (_, same) = jlora.plan(met, params, normal((2, 3, 4), 2), config=config).rows()
    assert (row.op, row.route, row.spec) == (same.op, same.route, same.spec)
    assert (table.op, table.route) == ("embedding", "factored")


@pytest.mark.parametrize("targets", ["w", "table", "*"])
@pytest.mark.parametrize("step", STEPS)
def test_adapted_equals_merged_after_a_lookup(step, targets):
    shape, fn = STEPS[step]

    def looked_up(p):
        return fn(p["w"], p["table"][IDS])

    params = {"w": normal(shape, 0), "table": normal((5, 4), 1)}
    plan = jlora.plan(
        looked_up, params, config=jlora.LoraConfig(rank=2, targets=targets)
    )
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda t: normal(t.shape, 3) / 2, trainable)
    merges = any(row.spec and row.route != "factored" for row in plan.rows())
    lora_fn = jlora.apply_lora(looked_up, on_merge="allow" if merges else "error")

    def with_gradient(function):
        return jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.cos(function(t)))))

    close(
        with_gradient(lambda t: lora_fn(frozen, t))(trainable),
        with_gradient(lambda t: looked_up(jlora.merge(frozen, t)))(trainable),
        1e-4,
        largest=1e-4,
    )


def test_a_convolution_that_is_merged_is_saved_as_one(tmp_path):
    """Also with the output channels first, which its dimension numbers say."""

    def fn(p, x):
        kernel = jax.nn.standardize(p["w"], axis=(1, 2))
        return lax.conv_general_dilated(x, kernel, (1,), "SAME")

    params, x = {"w": normal((6, 4, 3), 0)}, normal((2, 4, 9), 1)
    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=2, targets="w"))
    (row,) = plan.rows()
    assert (row.op, row.spec.op) == ("merged", "conv")
    assert row.spec.axes == jlora.Axes((), (1, 2), (0,))
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    jlora.peft.save(tmp_path, trainable)
    close(jlora.peft.load(tmp_path, plan), trainable, 0)
    written = load_file(tmp_path / "adapter_model.safetensors")
    (a,) = (x for name, x in written.items() if "lora_A" in name)
    assert a.shape == (2, 4, 3)  # as torch's `[r, in, window]`
