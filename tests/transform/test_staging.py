"""Products and equations that are alike are traced and derived once for all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.transform import adapted, products

pytestmark = pytest.mark.once


def model(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def stage_gradient(layers, width):
    params = [jnp.full((width, width), 0.1)] * layers
    x = jnp.ones((64, width))
    config = jlora.LoraConfig(rank=2, targets="*")
    plan = jlora.plan(model, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    lora = jlora.apply_lora(model)
    grad = jax.grad(lambda trainable: lora(frozen, trainable, x).sum())
    return jax.jit(grad).lower(trainable)


@pytest.mark.parametrize(
    ("where", "name", "widths"),
    [(products, "_in_a_form", (37, 41)), (adapted, "_lowered", (43, 47))],
)
def test_a_product_of_every_layer_is_traced_and_lowered_once(
    where, name, widths, monkeypatch
):
    """No other test has these widths: what JAX has kept would not be traced again."""
    calls = []
    run = getattr(where, name)
    monkeypatch.setattr(
        where, name, lambda *args, **options: calls.append(1) or run(*args, **options)
    )

    def count(layers, width):
        calls.clear()
        stage_gradient(layers, width)
        return len(calls)

    assert 0 < count(3, widths[0]) == count(9, widths[1])


def test_equations_that_differ_in_the_sign_of_zero_stay_two():
    def fn(params, x):
        y = x @ params["w"]
        return jnp.stack([y * 0.0, y * -0.0])

    params, x = {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))
    config = jlora.LoraConfig(rank=1, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)

    def loss(trainable):
        y = jlora.apply_lora(fn)(frozen, trainable, x)
        return y.sum(), y

    (_, y), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    assert not np.signbit(y[0]).any()
    assert np.signbit(y[1]).all()
