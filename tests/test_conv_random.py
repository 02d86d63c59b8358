"""Random convolutions: the factored route equals the merged weight."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora

LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("NCW", "WIO", "NWC")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "CHWN")],
    3: [("NDHWC", "DHWIO", "NDHWC"), ("NCDHW", "OIDHW", "NCDHW")],
}


@st.composite
def convolutions(draw):
    """Returns the shapes of x and w, and the settings of one convolution."""
    n = draw(st.sampled_from([1, 1, 2, 2, 3]))
    layout = draw(st.sampled_from(LAYOUTS[n]))
    small = st.integers(1, 2)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = draw(small), draw(small) * groups
    window = [draw(st.integers(1, 3)) for _ in range(n)]
    spatial = [draw(st.integers(5, 6)) for _ in range(n)]
    dilation = [draw(small) for _ in range(n)]
    paddings = [[(draw(st.integers(0, 2)), 1)] * n]
    if dilation == [1] * n:  # JAX reads a string only then
        paddings += ["SAME", "VALID"]
    settings = {
        "window_strides": [draw(small) for _ in range(n)],
        "padding": draw(st.sampled_from(paddings)),
        "lhs_dilation": dilation,
        "rhs_dilation": [draw(small) for _ in range(n)],
        "dimension_numbers": layout,
        "feature_group_count": groups,
    }

    def shape(letters, sizes):
        rest = iter(spatial if letters == layout[0] else window)
        return tuple(sizes[c] if c in sizes else next(rest) for c in letters)

    x_shape = shape(layout[0], {"N": 2, "C": ins * groups})
    w_shape = shape(layout[1], {"I": ins, "O": outs})
    return x_shape, w_shape, settings


@pytest.mark.slow
@hypothesis.settings(max_examples=100)
@hypothesis.given(convolutions(), st.integers(0, 1000))
def test_convolution_adapted_equals_merged(drawn, seed):
    x_shape, w_shape, settings = drawn
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"w": jax.random.normal(keys[0], w_shape)}
    x = jax.random.normal(keys[1], x_shape)

    def fn(p, x):
        return jnp.tanh(lax.conv_general_dilated(x, p["w"], **settings))

    config = jlora.LoraConfig(rank=1, alpha=2, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(keys[2], params, plan)
    trainable = jax.tree.map(
        lambda t: t + jax.random.normal(keys[3], t.shape), trainable
    )
    lora_fn = jlora.apply_lora(fn, on_merge="error")

    @jax.jit
    def both(trainable, x):
        def factored(t, x):
            return jnp.sum(jnp.sin(lora_fn(frozen, t, x)))

        def merged(t, x):
            return jnp.sum(jnp.sin(fn(jlora.merge(frozen, t), x)))

        return [jax.value_and_grad(f, (0, 1))(trainable, x) for f in (factored, merged)]

    factored, merged = map(jax.tree.leaves, both(trainable, x))
    for a, b in zip(factored, merged, strict=True):
        scale = 1 + np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)
    out_dim = settings["dimension_numbers"][1].index("O")
    assert plan.rows()[0].spec.axes.fan_out == (out_dim,)
