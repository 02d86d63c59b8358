"""`thin_dot` is `lax.dot_general` with other derivatives: the same numbers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from jlora.transform.thin import thin_dot
from tests.helpers import close, random_like


@st.composite
def products(draw):
    """Two arrays, dimension numbers for them, and which one's axes come first."""
    sizes = st.lists(st.integers(1, 3), max_size=2)
    summed, batch, free_t, free_b = (draw(sizes) for _ in range(4))

    def operand(free, seed):
        """Axes in any order; where the summed and the batch axes went."""
        names = [("s", i) for i in range(len(summed))]
        names += [("b", i) for i in range(len(batch))]
        names += [("f", i) for i in range(len(free))]
        names = draw(st.permutations(names))
        size = {"s": summed, "b": batch, "f": free}
        shape = [size[kind][i] for kind, i in names]
        x = np.random.default_rng(seed).normal(size=shape).astype("float32")
        return (
            jnp.asarray(x),
            [names.index(("s", i)) for i in range(len(summed))],
            [names.index(("b", i)) for i in range(len(batch))],
        )

    t, ct, bt = operand(free_t, 0)
    b, cb, bb = operand(free_b, 1)
    return t, b, ((ct, cb), (bt, bb)), draw(st.booleans())


def plain_dot(t, b, numbers, *, x_first=True, dtype="float32", precision=None):
    """What `thin_dot` stands for, written with only `dot_general`."""
    (ct, cb), (bt, bb) = numbers
    if not x_first:
        t, b, ct, cb, bt, bb = b, t, cb, ct, bb, bt
    return lax.dot_general(t, b, ((ct, cb), (bt, bb)), preferred_element_type=dtype)


def thin(t, b, numbers, *, x_first=True):
    return thin_dot(t, b, numbers, dtype="float32", precision=None, x_first=x_first)


@settings(max_examples=15)
@given(products())
def test_value_and_all_derivatives_are_those_of_dot_general(product):
    t, b, numbers, x_first = product
    tangents = (random_like(t, 2), random_like(b, 3))

    def everything(dot):
        def fn(t, b):
            return dot(t, b, numbers, x_first=x_first)

        @jax.jit
        def run(t, b):
            y, pull = jax.vjp(fn, t, b)
            dy = jnp.cos(y)
            first = pull(dy)
            # The derivative of the backward pass, which holds other products.
            second = jax.jvp(lambda *ops: jax.vjp(fn, *ops)[1](dy), (t, b), tangents)
            return y, first, jax.jvp(fn, (t, b), tangents), second

        return run(t, b)

    close(everything(thin), everything(plain_dot), 1e-4, 1e-5)


@settings(max_examples=10)
@given(products(), st.sampled_from(["t", "b", "both"]), st.integers(0, 4), st.data())
def test_vmap_is_that_of_dot_general(product, which, at, data):
    t, b, numbers, x_first = product
    in_axes = [None, None]
    operands = [t, b]
    for i, name in enumerate("tb"):
        if which in (name, "both"):
            axis = data.draw(st.integers(0, operands[i].ndim))
            x = operands[i]
            operands[i] = jnp.stack([x, 2 * x], axis=axis)
            in_axes[i] = axis
    n_out = t.ndim + b.ndim - 2 * len(numbers[0][0]) - len(numbers[1][0])
    out_axes = min(at, n_out)

    def everything(dot):
        def fn(t, b):
            def loss(t, b):
                y = dot(t, b, numbers, x_first=x_first)
                return jnp.sum(jnp.sin(y)), y

            grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(t, b)
            return y, grads

        mapped = jax.vmap(fn, in_axes=in_axes, out_axes=(out_axes, 0))
        return jax.jit(mapped)(*operands)

    close(everything(thin), everything(plain_dot), 1e-4, 1e-5)


def test_vmap_twice():
    t, b = random_like(jnp.ones((2, 3, 4, 5)), 0), random_like(jnp.ones((3, 5, 6)), 1)
    numbers = (((1,), (0,)), ((), ()))

    def everything(dot):
        def fn(t, b):
            return dot(t, b, numbers)

        inner = jax.vmap(fn, (0, None))
        return jax.jit(jax.vmap(inner, (1, 0)))(t, b)

    close(everything(thin), everything(plain_dot), 1e-4, 1e-5)


@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize(
    ("t", "b", "out"),
    [
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
    ],
)
def test_dtypes_of_results_and_gradients(t, b, out, x_first):
    x, y = jnp.ones((3, 2), t), jnp.ones((2, 5), b)

    def loss(x, y):
        z = thin_dot(
            x,
            y,
            (((1,), (0,)), ((), ())),
            dtype=out,
            precision=None,
            x_first=x_first,
        )
        assert z.dtype == out
        assert z.shape == ((3, 5) if x_first else (5, 3))
        return jnp.sum(z.astype("float32"))

    dx, dy = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, y)
    assert (dx.dtype, dx.shape) == (t, (3, 2))
    assert (dy.dtype, dy.shape) == (b, (2, 5))
    assert float(dx[0, 0]) == 5
    assert float(dy[0, 0]) == 3


def test_low_precision_sums_in_float32():
    """4096 ones and an epsilon: a bfloat16 sum would stop at 256."""
    t, b = jnp.ones((1, 4096), "bfloat16"), jnp.ones((4096, 1), "bfloat16")
    numbers = (((1,), (0,)), ((), ()))
    out = thin_dot(t, b, numbers, dtype="float32", precision=None)
    assert float(out[0, 0]) == 4096


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("side", ["x", "y"])
def test_bfloat16_sums_over_one_axis_of_tokens(side, batch):
    """XLA's CPU compiler did not have this product where the wide side has heads."""
    n = len(batch)
    many, few = (4, 16), (2,)
    ins, outs = (many, few) if side == "x" else (few, many)
    x, ct = (
        jnp.asarray(
            np.random.default_rng(i).normal(size=(*batch, 8, *axes)), "bfloat16"
        )
        for i, axes in enumerate((ins, outs))
    )
    b = jnp.ones((*batch, *ins, *outs))
    axes = tuple(range(n))
    summed = range(n + 1, n + 1 + len(ins)), range(n, n + len(ins))
    numbers = (tuple(map(tuple, summed)), (axes, axes))

    def loss(b, x, ct):
        y = thin_dot(x, b, numbers, dtype="bfloat16", precision=None)
        return jnp.vdot(y.astype("float32"), ct.astype("float32"))

    flat = (*batch, 8, -1)
    wide = (v.astype("float32").reshape(flat) for v in (x, ct))
    expected = jnp.einsum("...ti,...to->...io", *wide).reshape(b.shape)
    close(jax.jit(jax.grad(loss))(b, x, ct), expected, 1e-5)


def test_the_wide_array_is_never_transposed():
    """In the backward pass only arrays with the rank axis are transposed."""
    rank, rows, wide = 2, 7, 5
    t, b = jnp.ones((3, rows, rank)), jnp.ones((rank, wide))
    numbers = (((2,), (0,)), ((), ()))

    def backward(t, b, dy):
        return jax.vjp(lambda t, b: thin(t, b, numbers), t, b)[1](dy)

    jaxpr = jax.make_jaxpr(backward)(t, b, jnp.ones((3, rows, wide)))
    text = str(jaxpr)
    transposed = [e for e in jaxpr.eqns if e.primitive.name == "transpose"]
    assert "dot_general" in text
    for eqn in transposed:
        shape = eqn.invars[0].aval.shape
        assert rank in shape or math.prod(shape) == 1, text


@pytest.mark.parametrize("vmapped", [False, True])
def test_the_compiler_does_not_turn_the_wide_array_either(vmapped):
    """XLA does not fold the transpose of the gradient back into its product."""

    def gradient(x, b):
        numbers = (((1,), (0,)), ((), ()))
        return jax.grad(lambda b: jnp.sum(jnp.square(thin(x, b, numbers))))(b)

    x, b = jnp.ones((64, 48)), jnp.ones((48, 2))
    if vmapped:
        gradient = jax.vmap(gradient)
        x, b = jnp.stack([x] * 3), jnp.stack([b] * 3)
    text = jax.jit(gradient).lower(x, b).compile().as_text()
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert len(products) == 2
    assert not any(shape.endswith("48,2") for shape in products), products


def test_lowers_to_only_dot_general():
    numbers = (((1,), (0,)), ((), ()))
    lowered = jax.jit(lambda t, b: thin(t, b, numbers)).lower(
        jnp.ones((3, 2)), jnp.ones((2, 5))
    )
    assert "stablehlo.dot_general" in lowered.as_text()
    assert "custom_call" not in lowered.as_text()
