"""On CPU a step keeps what the frozen model keeps, and little more."""

import functools
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.transform import trail
from jlora.transform.compat import code
from jlora.transform.interpret import Context, interpret

D, TOKENS, RANK = 64, 32, 4


def block(x, w):
    """A residual block: norm, product, bias, GELU, product, ReLU, product."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    h = x * scale * w["norm"][None]
    h = jax.nn.gelu(h @ w["up"] + w["bias"][None])
    h = jax.nn.relu(h @ w["mid"] - 0.01)
    return x + h @ w["down"]


def forward(params, x):
    for w in params["layers"]:
        x = block(x, w)
    return x


def weights(key, layers=2, dtype=jnp.float32):
    def one(key):
        keys = jax.random.split(key, 3)
        up, mid, down = (
            jax.random.normal(k, shape, dtype) / shape[0] ** 0.5
            for k, shape in zip(keys, [(D, 2 * D), (2 * D, D), (D, D)], strict=True)
        )
        return {
            "norm": jnp.full((D,), 1.5, dtype),
            "bias": jnp.full((2 * D,), 0.1, dtype),
            "up": up,
            "mid": mid,
            "down": down,
        }

    return {"layers": [one(k) for k in jax.random.split(key, layers)]}


def adapted(fn, params, x, **config):
    config = jlora.LoraConfig(rank=RANK, **config)
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(1), params, plan)
    return frozen, jax.tree.map(lambda v: v + 0.02, trainable)


def losses(fn):
    """Returns the loss of the factored and of the merged model."""
    apply = jlora.apply_lora(fn, on_merge="error")

    def factored(trainable, frozen, x):
        return jnp.mean(jnp.square(apply(frozen, trainable, x)))

    def merged(trainable, frozen, x):
        return jnp.mean(jnp.square(fn(jlora.merge(frozen, trainable), x)))

    return factored, merged


def close(one, other, rtol=2e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def over_layers(params, x):
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *params["layers"])
    return jax.lax.scan(lambda x, w: (block(x, w), None), x, stacked)[0]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "fn",
    [
        forward,
        jax.checkpoint(forward),
        jax.checkpoint(forward, policy=jax.checkpoint_policies.dots_saveable),
    ],
    ids=["plain", "remat", "dots saved"],
)
def test_gradients_are_those_of_the_merged_model(fn, method):
    params = weights(jax.random.key(0), 1)
    x = jax.random.normal(jax.random.key(2), (8, D))
    frozen, trainable = adapted(fn, params, x, method=method)
    factored, merged = losses(fn)
    if method == "dora":  # the norm is not differentiated in the factored form
        merged = factored
    got = jax.jit(jax.grad(factored))(trainable, frozen, x)
    want = jax.grad(merged)(trainable, frozen, x)
    close(got, want)


def test_higher_derivatives_are_those_of_the_merged_model():
    params, x = weights(jax.random.key(0)), jax.random.normal(jax.random.key(2), (8, D))
    frozen, trainable = adapted(forward, params, x)
    direction = jax.tree.map(jnp.ones_like, trainable)
    got, want = (
        jax.jit(functools.partial(products, loss))(trainable, direction, frozen, x)
        for loss in losses(forward)
    )
    close(got, want, 2e-4)


def products(loss, trainable, direction, frozen, x):
    """Returns the Hessian times a direction, by forward and by reverse mode."""
    gradient = functools.partial(jax.grad(loss), frozen=frozen, x=x)
    along = jax.jvp(gradient, [trainable], [direction])[1]

    def slope(trainable):
        return sum(
            map(jnp.vdot, *map(jax.tree.leaves, (gradient(trainable), direction)))
        )

    return along, jax.grad(slope)(trainable)


def test_each_adapter_of_a_stack_has_its_own_gradient():
    params, x = weights(jax.random.key(0)), jax.random.normal(jax.random.key(2), (8, D))
    frozen, trainable = adapted(forward, params, x)
    pair = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), trainable)
    gradient = jax.grad(losses(forward)[0])
    got = jax.jit(jax.vmap(gradient, (0, None, None)))(pair, frozen, x)
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], pair)
        close(jax.tree.map(lambda v, i=i: v[i], got), gradient(one, frozen, x))


def test_dropout_has_one_mask_in_value_and_gradient():
    params, x = weights(jax.random.key(0)), jax.random.normal(jax.random.key(2), (8, D))
    frozen, trainable = adapted(forward, params, x, dropout=0.4)
    apply = jlora.apply_lora(forward, on_merge="error")
    key = jax.random.key(5)

    def loss(trainable):
        return jnp.mean(jnp.square(apply(frozen, trainable, x, lora_key=key)))

    direction = jax.tree.map(jnp.ones_like, trainable)
    _, slope = jax.jit(lambda t: jax.jvp(loss, [t], [direction]))(trainable)
    gradient = jax.jit(jax.grad(loss))(trainable)
    total = sum(jax.tree.leaves(jax.tree.map(jnp.sum, gradient)))
    np.testing.assert_allclose(total, slope, rtol=1e-5)


def temp_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_a_step_takes_the_temporary_memory_of_the_frozen_model():
    params, x = weights(jax.random.key(0), 6), jnp.ones((1024, D))
    frozen, trainable = adapted(forward, params, x)
    factored, _ = losses(forward)

    def floor(x, params):  # to every activation, and to no weight
        return jnp.mean(jnp.square(forward(params, x)))

    ratio = temp_bytes(jax.value_and_grad(factored), trainable, frozen, x)
    ratio /= temp_bytes(jax.value_and_grad(floor), x, params)
    assert ratio < 1.12  # 1.6 with plain sums and with every activation kept


def pixels(params, x):
    """Residual convolutions of what follows cheaply from a kept array."""
    for w in params:
        h = jax.nn.relu(jnp.tanh(x) * 1.5 + 0.1)
        x = x + jax.lax.conv_general_dilated(
            h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return x


def kernels(layers, wide=8):
    keys = jax.random.split(jax.random.key(0), layers)
    return [jax.random.normal(k, (3, 3, wide, wide)) / 3 / wide**0.5 for k in keys]


def test_a_step_of_convolutions_takes_that_memory_too():
    params, x = kernels(6, 64), jnp.ones((8, 16, 16, 64))
    frozen, trainable = adapted(pixels, params, x)
    factored, _ = losses(pixels)

    def floor(x, params):
        return jnp.mean(jnp.square(pixels(params, x)))

    ratio = temp_bytes(jax.grad(factored), trainable, frozen, x)
    ratio /= temp_bytes(jax.grad(floor), x, params)
    assert ratio < 1.15  # 1.6 where the input of each convolution is kept


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_gradients_of_convolutions_are_those_of_the_merged_model(policy):
    params, x = kernels(2), jax.random.normal(jax.random.key(2), (2, 5, 5, 8))
    fn = jax.checkpoint(pixels, policy=policy) if policy else pixels
    frozen, trainable = adapted(fn, params, x)
    factored, merged = losses(fn)
    gradient = jax.grad(factored)
    close(
        jax.jit(gradient)(trainable, frozen, x), jax.grad(merged)(trainable, frozen, x)
    )
    pair = jax.tree.map(lambda v: jnp.stack([2 * v, v]), trainable)
    both = jax.vmap(gradient, (0, None, None))(pair, frozen, x)
    close(jax.tree.map(lambda v: v[1], both), gradient(trainable, frozen, x), 1e-4)


def test_a_policy_that_saves_products_saves_thin_convolutions():
    params, x = kernels(2), jnp.ones((2, 5, 5, 8))
    frozen, trainable = adapted(pixels, params, x)

    def convolutions(policy):
        loss, _ = losses(jax.checkpoint(pixels, policy=policy))
        text = str(jax.make_jaxpr(jax.grad(loss))(trainable, frozen, x))
        return len(re.findall("product_of_roots|conv_general_dilated", text))

    policies = jax.checkpoint_policies
    saved, again = map(
        convolutions, (policies.dots_saveable, policies.nothing_saveable)
    )
    assert saved == convolutions(policies.everything_saveable) < again


def test_a_closure_over_the_frozen_model_keeps_as_little():
    params, x = weights(jax.random.key(0)), jnp.ones((TOKENS, D))
    frozen, trainable = adapted(forward, params, x)
    factored, _ = losses(forward)
    jaxpr = jax.make_jaxpr(jax.grad(lambda t: factored(t, frozen, x)))(trainable)
    assert "product_of_roots" in str(jaxpr)


def gated(params, x):
    """A gated layer, whose hidden activation follows from three wide arrays."""
    h = jax.nn.gelu(x @ params["gate"]) * (x @ params["up"])
    return jnp.tanh(h @ params["down"]) @ params["head"]


def test_on_a_tpu_what_several_products_read_is_made_once():
    key, x = jax.random.key(0), jnp.ones((TOKENS, D))
    shapes = {"gate": (D, 3 * D), "up": (D, 3 * D), "down": (3 * D, D), "head": (D, D)}
    params = {k: jax.random.normal(key, shape) for k, shape in shapes.items()}
    plan = jlora.plan(gated, params, x, config=jlora.LoraConfig(rank=RANK))
    frozen, trainable = jlora.split(key, params, plan)
    apply = jlora.apply_lora(gated)

    def loss(trainable, frozen, x):
        return jnp.sum(jnp.square(apply(frozen, trainable, x)))

    def barriers(platform):
        """Returns how often each type of array goes through a barrier by itself."""
        lowered = jax.jit(jax.grad(loss)).trace(trainable, frozen, x)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        return Counter(re.findall(r"optimization_barrier %\S+ : tensor<(\S+)>", text))

    hidden, out = f"{TOKENS}x{3 * D}xf32", f"{TOKENS}x{D}xf32"
    tpu, cpu = barriers("tpu"), barriers("cpu")
    assert tpu[hidden] - cpu[hidden] == 2  # `h` in the products with A and for dA
    assert cpu[hidden] == 2  # the gradients of gate and up
    assert cpu[out] == tpu[out] == 1  # the gradient of the result


@functools.cache
def staged(fn, *shapes):
    return code(jax.make_jaxpr(fn)(*(jnp.ones(s) for s in shapes)))


def source_of(fn, *shapes):
    """Returns how many steps and roots the result of `fn` has while it is traced."""
    found = []

    def run(*args):
        ctx = Context(rules={}, materialise=lambda v, _: v, trail=trail.Trail())
        (out,) = interpret(ctx, staged(fn, *shapes), args)
        found.append((out, ctx.source(out)))
        return out

    jax.make_jaxpr(run)(*(jnp.ones(s) for s in shapes))
    return found[0][1]


def test_the_roots_of_an_activation():
    shape = (4, D)
    gelu = source_of(lambda w, x: jax.nn.gelu(x @ w), (D, D), shape)
    assert len(gelu.roots) == 2  # the product and its tanh
    norm = source_of(
        lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)), shape
    )
    assert [v.shape for v in norm.roots] == [shape, (4, 1)]
    assert source_of(lambda w, x: x @ w, (D, D), shape) is None
    assert source_of(lambda x, y: x + y, shape, shape) is None  # the residual stream
    assert source_of(lambda x: x.reshape(-1, 2), shape) is None  # as large as its root
    relu = source_of(lambda x, b: jax.nn.relu(x - b[None]), shape, (D,))
    assert [v.shape for v in relu.roots] == [shape, (D,)]
    assert source_of(lambda x: chain(x, 64), shape).roots[0].shape == shape
    assert source_of(lambda x: chain(x, 65), shape) is None
    assert source_of(lambda x: chain(x, 600), shape) is None  # no deep recursion


def chain(x, n):
    return functools.reduce(lambda x, _: jax.lax.neg(x), range(n), x)


def test_roots_give_the_activation():
    x = jax.random.normal(jax.random.key(0), (4, D))

    def fn(x):
        return nn.LayerNorm().apply({"params": scale}, jax.nn.silu(x) * (1 + x))

    scale = {"scale": jnp.full((D,), 2.0), "bias": jnp.ones((D,))}
    jaxpr = code(jax.make_jaxpr(fn)(x))

    @jax.jit
    def both(x):
        ctx = Context(rules={}, materialise=lambda v, _: v, trail=trail.Trail())
        (out,) = interpret(ctx, jaxpr, [x])
        source = ctx.source(out)
        return out, source.chain(*source.roots)

    out, again = both(x)
    np.testing.assert_allclose(out, again, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(out, fn(x), rtol=1e-6, atol=1e-6)


def test_a_program_that_is_divided_over_devices_keeps_as_little():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    params, x = weights(jax.random.key(0), 6), jnp.ones((4096, D))
    frozen, trainable = adapted(forward, params, x)
    gradient = jax.grad(losses(forward)[0])
    divided = jax.device_put(x, rows)

    def floor(x, params):
        return jnp.mean(jnp.square(forward(params, x)))

    ratio = temp_bytes(gradient, trainable, frozen, divided)
    ratio /= temp_bytes(jax.grad(floor), divided, params)
    assert ratio < 1.15
    close(
        jax.jit(gradient)(trainable, frozen, divided),
        jax.jit(gradient)(trainable, frozen, x),
    )


def test_a_program_for_any_number_of_rows_has_sums():
    params, x = weights(jax.random.key(0)), jnp.ones((8, D))
    frozen, trainable = adapted(forward, params, x)
    (rows,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((rows, D), x.dtype)
    gradient = jax.jit(jax.grad(losses(forward)[0]))
    exported = jax.export.export(gradient)(trainable, frozen, shapes)
    close(exported.call(trainable, frozen, x), gradient(trainable, frozen, x))


def test_a_literal_may_be_an_operand_of_a_cheap_call():
    shift = jax.jit(lambda x, i: x + (i + i))

    def fn(params, x):
        return shift(x, 0) @ params["w"]

    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    frozen, trainable = adapted(fn, params, x)
    factored, merged = losses(fn)
    value, expected = jax.jit(factored), jax.jit(merged)
    close(value(trainable, frozen, x), expected(trainable, frozen, x))


def test_experts_whose_rows_are_counted_have_the_gradients_of_merged_ones():
    """The sizes of the groups are arrays of the trace, as the roots are."""

    def fn(params, x):
        experts = jnp.argmax(x[:, :3], axis=1)
        sizes = jnp.bincount(experts, length=3).astype(jnp.int32)
        x = x[jnp.argsort(experts)]
        gate, up = (jax.lax.ragged_dot(x, params[k], sizes) for k in ("gate", "up"))
        h = jax.nn.silu(gate) * up
        return jax.lax.ragged_dot(h, params["down"], sizes)

    shapes = {"gate": (3, 4, 6), "up": (3, 4, 6), "down": (3, 6, 4), "x": (8, 4)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    x = params.pop("x")
    frozen, trainable = adapted(fn, params, x, targets=tuple(params))
    grads = (jax.jit(jax.grad(jax.checkpoint(loss))) for loss in losses(fn))
    close(*(grad(trainable, frozen, x) for grad in grads))
