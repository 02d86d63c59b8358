"""`apply_lora` under every JAX transformation, and with what functions may be."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import bits, close, normal, random_like

small = functools.partial(normal, scale=0.3)
small_like = functools.partial(random_like, scale=0.3)

# Sizes that no other axis has, so that a weight-shaped array is known by its shape.
IN, MID, OUT, ROWS, LAYERS = 5, 11, 13, 7, 3


def deep(p, x):
    """A model with a product in a scan of remats, in a `jit`, and at the top."""

    def block(h, layer):
        up = jax.nn.gelu(h @ layer["up"])
        return h + up @ layer["down"], None

    h = jnp.tanh(x @ p["first"])
    h, _ = lax.scan(jax.checkpoint(block), h, p["layers"])
    h = jax.jit(lambda w, h: jnp.sin(h @ w))(p["mid"], h)
    return h @ p["head"] + p["bias"][None]


def deep_params():
    shapes = {
        "first": (IN, MID),
        "layers": {"up": (LAYERS, MID, OUT), "down": (LAYERS, OUT, MID)},
        "mid": (MID, OUT),
        "head": (OUT, 2),
        "bias": (2,),
    }
    return small(shapes)


def adapt(fn, params, *args, config=None, **kwargs):
    """`(frozen, trainable)` with all factors random."""
    config = jlora.LoraConfig(**{"rank": 2, "alpha": 3, **(config or {})})
    plan = jlora.plan(fn, params, *args, config=config, **kwargs)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    return frozen, dataclasses.replace(trainable, lora=small_like(trainable.lora))


@pytest.fixture(scope="module")
def setting():
    """`(x, frozen, trainable, factored, merged)` of the deep model; a full head."""
    params = deep_params()
    x = small((ROWS, IN), seed=4)
    config = {"targets": "{first,mid,layers/*}", "train": "{head,bias}"}
    frozen, trainable = adapt(deep, params, x, config=config)
    factored = jlora.apply_lora(deep, on_merge="error")

    def merged(frozen, trainable, x):
        return deep(jlora.merge(frozen, trainable), x)

    return x, frozen, trainable, factored, merged


# Transformations: the same on the factored function and on that of merged weights.


def loss_of(fn, frozen, x):
    return lambda trainable: jnp.sum(jnp.square(fn(frozen, trainable, x)))


def as_is(fn, x, frozen, trainable):
    return jax.jit(fn)(frozen, trainable, x)


def value_and_grad(fn, x, frozen, trainable):
    return jax.jit(jax.value_and_grad(loss_of(fn, frozen, x)))(trainable)


def grad_of_inputs(fn, x, frozen, trainable):
    return jax.jit(jax.grad(lambda x: jnp.sum(fn(frozen, trainable, x) ** 2)))(x)


def grad_of_frozen(fn, x, frozen, trainable):
    loss = jax.grad(lambda frozen: jnp.sum(fn(frozen, trainable, x) ** 2))
    return jax.jit(loss)(frozen)


def jvp(fn, x, frozen, trainable):
    tangents = (small_like(trainable, 7), small_like(x, 8))

    def run(trainable, x):
        return fn(frozen, trainable, x)

    return jax.jit(lambda p, t: jax.jvp(run, p, t))((trainable, x), tangents)


def hessian_vector(fn, x, frozen, trainable):
    tangent = small_like(trainable, 7)
    grad = jax.grad(loss_of(fn, frozen, x))
    return jax.jit(lambda t: jax.jvp(grad, (t,), (tangent,)))(trainable)


def vmap_over_inputs(fn, x, frozen, trainable):
    xs = jnp.stack([x, -x, 2 * x], axis=1)
    run = functools.partial(fn, frozen, trainable)
    return jax.jit(jax.vmap(run, in_axes=1, out_axes=1))(xs)


def vmap_over_adapters(fn, x, frozen, trainable):
    stacked = jax.tree.map(lambda a: jnp.stack([a, -a / 2, a * a]), trainable)
    return jax.jit(jax.vmap(fn, (None, 0, None)))(frozen, stacked, x)


def grad_of_vmap_over_both(fn, x, frozen, trainable):
    stacked = jax.tree.map(lambda a: jnp.stack([a, -a / 2]), trainable)
    xs = jnp.stack([x, 2 * x])

    def loss(stacked):
        return jnp.sum(jax.vmap(fn, (None, 0, 0))(frozen, stacked, xs) ** 2)

    return jax.jit(jax.grad(loss))(stacked)


def scan_over_training_steps(fn, x, frozen, trainable):
    def step(trainable, x):
        loss, grads = jax.value_and_grad(loss_of(fn, frozen, x))(trainable)
        return jax.tree.map(lambda p, g: p - 0.001 * g, trainable, grads), loss

    xs = jnp.stack([x, x + 1, -x])
    return jax.jit(lambda t: lax.scan(step, t, xs))(trainable)


def checkpoint(fn, x, frozen, trainable):
    return value_and_grad(jax.checkpoint(fn), x, frozen, trainable)


def checkpoint_that_saves_dots(fn, x, frozen, trainable):
    policy = jax.checkpoint_policies.dots_saveable
    return value_and_grad(jax.checkpoint(fn, policy=policy), x, frozen, trainable)


def linearize(fn, x, frozen, trainable):
    y, push = jax.linearize(lambda t: fn(frozen, t, x), trainable)
    return y, push(small_like(trainable, 7))


def without_jit(fn, x, frozen, trainable):
    return fn(frozen, trainable, x)


def loop_of_a_traced_length(fn, x, frozen, trainable):
    def body(_, h):
        return jnp.tile(fn(frozen, trainable, h), (1, 3))[:, :IN]

    return jax.jit(lambda n: lax.fori_loop(0, n, body, x))(3)


TRANSFORMATIONS = [
    as_is,
    without_jit,
    value_and_grad,
    grad_of_inputs,
    jvp,
    hessian_vector,
    vmap_over_inputs,
    vmap_over_adapters,
    grad_of_vmap_over_both,
    scan_over_training_steps,
    checkpoint,
    checkpoint_that_saves_dots,
    linearize,
    loop_of_a_traced_length,
]


@pytest.mark.parametrize("transform", TRANSFORMATIONS, ids=lambda f: f.__name__)
def test_transformed_is_as_merged(transform, setting):
    x, frozen, trainable, factored, merged = setting
    close(
        transform(factored, x, frozen, trainable),
        transform(merged, x, frozen, trainable),
        1e-4,
    )


def test_gradient_of_the_frozen_side_is_as_merged(setting):
    """Not needed for training, but nobody should get zeros in silence."""
    x, frozen, trainable, factored, merged = setting
    close(
        grad_of_frozen(factored, x, frozen, trainable),
        grad_of_frozen(merged, x, frozen, trainable),
        1e-4,
    )


def test_eval_shape_and_make_jaxpr(setting):
    x, frozen, trainable, factored, _ = setting
    out = jax.eval_shape(factored, frozen, trainable, x)
    assert (out.shape, out.dtype) == ((ROWS, 2), jnp.float32)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (frozen, trainable, x)
    )
    assert jax.eval_shape(factored, *shapes).shape == (ROWS, 2)
    jaxpr = jax.make_jaxpr(factored)(*shapes)
    again = jax.make_jaxpr(factored)(frozen, trainable, x)
    assert str(jaxpr) == str(again)


def test_nothing_leaks(setting):
    x, frozen, trainable, factored, _ = setting
    with jax.checking_leaks():
        jax.jit(jax.grad(loss_of(factored, frozen, x)))(trainable)


@pytest.mark.parametrize("size", ["fixed", "symbolic"])
def test_export_and_back(size, setting):
    x, frozen, trainable, factored, _ = setting
    rows = ROWS if size == "fixed" else jax.export.symbolic_shape("rows")[0]
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (frozen, trainable)
    )
    leaves, treedef = jax.tree.flatten(shapes)

    def flat(leaves, x):
        return factored(*treedef.unflatten(leaves), x)

    exported = jax.export.export(jax.jit(flat))(
        leaves, jax.ShapeDtypeStruct((rows, IN), x.dtype)
    )
    if importlib.util.find_spec("flatbuffers"):  # JAX writes with it, if it is there
        exported = jax.export.deserialize(bytearray(exported.serialize()))
    out = exported.call(jax.tree.leaves((frozen, trainable)), x)
    close(out, jax.jit(factored)(frozen, trainable, x))


def test_lowers_for_every_platform(setting):
    x, frozen, trainable, factored, _ = setting
    grad = jax.jit(jax.grad(loss_of(factored, frozen, x)))
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        lowered = grad.trace(trainable).lower(lowering_platforms=(platform,))
        assert "dot_general" in lowered.as_text()


def test_donation_of_the_adapter(setting):
    x, frozen, trainable, factored, merged = setting

    @functools.partial(jax.jit, donate_argnums=0)
    def step(trainable, frozen, x):
        grads = jax.grad(loss_of(factored, frozen, x))(trainable)
        return jax.tree.map(lambda p, g: p - 0.01 * g, trainable, grads)

    own = jax.tree.map(jnp.copy, trainable)
    new = step(own, frozen, x)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    grads = jax.grad(loss_of(merged, frozen, x))(trainable)
    close(new, jax.tree.map(lambda p, g: p - 0.01 * g, trainable, grads), 1e-4)


def test_sharded_inputs_give_the_same_result(setting):
    x, frozen, trainable, factored, merged = setting
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    xs = jnp.concatenate([x, x[:1]])
    on_data = jax.device_put(xs, NamedSharding(mesh, P("data")))
    by_all = NamedSharding(mesh, P())
    frozen, trainable = jax.device_put((frozen, trainable), by_all)
    out = jax.jit(factored)(frozen, trainable, on_data)
    close(out, merged(frozen, trainable, xs), 1e-4)
    assert out.sharding.is_equivalent_to(on_data.sharding, 2)


# One trace, no state.


def test_jit_traces_once_whatever_the_values(setting):
    x, frozen, trainable, _, _ = setting
    traces = []

    def counted(p, x):
        traces.append(1)
        return deep(p, x)

    step = jax.jit(jax.value_and_grad(loss_of(jlora.apply_lora(counted), frozen, x)))
    first, grads = step(trainable)
    second, _ = step(jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads))
    step(small_like(trainable, 9))
    assert len(traces) == 1
    assert first != second


def test_an_empty_trainable_leaves_the_jaxpr_as_it_was(setting):
    x = setting[0]
    params = deep_params()
    empty = jlora.Trainable()
    expected = str(jax.make_jaxpr(deep)(params, x))
    assert str(jax.make_jaxpr(jlora.apply_lora(deep))(params, empty, x)) == expected
    jitted = str(jax.make_jaxpr(jlora.apply_lora(jax.jit(deep)))(params, empty, x))
    assert jitted == str(jax.make_jaxpr(jax.jit(deep))(params, x))


def test_with_full_leaves_alone_no_equation_is_added(setting):
    x = setting[0]
    params = deep_params()
    frozen = {**params, "head": jlora.MISSING}
    full = jlora.Trainable(full={"head": params["head"]})
    jaxpr = jax.make_jaxpr(jlora.apply_lora(deep))(frozen, full, x)
    expected = jax.make_jaxpr(deep)(params, x)
    assert [e.primitive.name for e in jaxpr.eqns] == [
        e.primitive.name for e in expected.eqns
    ]


def test_equations_that_no_weight_reaches_stay_as_they_are():
    def fn(p, x):
        y = x @ p["w"]
        z = lax.scan(lambda c, v: (c + jnp.sin(v), c), x[0], x, unroll=2)
        return y, z, jnp.linalg.qr(x)[0], jax.nn.relu(x)

    x = small((3, 4))  # few rows: the low-rank term is added to the activations
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x)
    before = [str(e) for e in jax.make_jaxpr(fn)(frozen, x).eqns]
    jaxpr = jax.make_jaxpr(jlora.apply_lora(fn))(frozen, trainable, x)
    after = [e.primitive.name for e in jaxpr.eqns]
    for eqn in jax.make_jaxpr(fn)(frozen, x).eqns:
        assert eqn.primitive.name in after, before
    scans = [
        [e.params[k] for k in ("unroll", "reverse", "length")]
        for j in (jaxpr, jax.make_jaxpr(fn)(frozen, x))
        for e in j.eqns
        if e.primitive.name == "scan"
    ]
    assert scans[0] == scans[1]


def test_inputs_are_never_written_to(setting):
    x, frozen, trainable, _, _ = setting

    def fn(p, x):
        p["cache"] = x @ p["first"]  # the function's own tree
        p["layers"].clear()
        return p["cache"]

    before = bits((frozen, trainable, x))
    keys = set(frozen)
    lora_fn = jlora.apply_lora(fn)
    lora_fn(frozen, trainable, x)
    jax.jit(lora_fn)(frozen, trainable, x)
    lora_fn(deep_params(), jlora.Trainable(), x)
    assert set(frozen) == keys
    assert set(frozen["layers"]) == {"up", "down"}
    assert bits((frozen, trainable, x)) == before


def test_the_wrapper_has_the_functions_name_and_its_own_signature():
    lora_fn = jlora.apply_lora(deep)
    assert lora_fn.__name__ == "deep"
    assert lora_fn.__doc__ == deep.__doc__
    names = list(inspect.signature(lora_fn).parameters)
    assert names == ["frozen", "trainable", "args", "lora_key", "lora_gate", "kwargs"]
    for fn in (jax.jit(deep), functools.partial(deep), nn.Dense(2).apply):
        jlora.apply_lora(fn)


# What a function may take and return.


class Out(NamedTuple):
    y: Any
    aux: Any


def test_any_pytree_in_and_out():
    def fn(p, batch, scale, mode, *, train, other):
        y = batch["x"] @ p.y["w"]
        y = y * scale if train else y
        more = {"mode": mode, "none": None, "n": 3, "i": batch["ids"] + 1, "o": other}
        return Out(y, [more, (jnp.sum(y), "text")])

    params = Out({"w": small((4, 6))}, None)
    args = ({"x": small((3, 4)), "ids": jnp.arange(3)}, 0.5, "gelu")
    kwargs = {"train": True, "other": np.arange(2)}
    frozen, trainable = adapt(fn, params, *args, **kwargs)
    assert list(trainable.lora) == ["y/w"]
    out = jlora.apply_lora(fn)(frozen, trainable, *args, **kwargs)
    expected = fn(jlora.merge(frozen, trainable), *args, **kwargs)
    assert isinstance(out, Out)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    texts = [x for x in jax.tree.leaves(out) if isinstance(x, str)]
    assert texts == ["gelu", "text"]
    assert out.aux[0]["n"] == 3
    assert type(out.aux[0]["n"]) is int
    close(out.y, expected.y)
    np.testing.assert_array_equal(out.aux[0]["i"], [1, 2, 3])


def test_random_keys_and_integers_pass():
    def fn(p, x, key, n):
        noise = jax.random.normal(key, x.shape)
        return (x + noise) @ p["w"], jax.random.split(key)[0], n + 1

    x, key = small((3, 4)), jax.random.key(3)
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x, key, 1)
    out = jax.jit(jlora.apply_lora(fn))(frozen, trainable, x, key, 1)
    expected = fn(jlora.merge(frozen, trainable), x, key, 1)
    close(out[0], expected[0])
    assert out[1] == expected[1]
    assert out[2] == 2


def test_leaves_that_are_no_arrays_reach_the_function():
    params = {"w": small((4, 6)), "act": jnp.tanh, "eps": 0.5, "name": "mlp"}

    def fn(p, x):
        assert p["name"] == "mlp"
        return p["act"](x @ p["w"]) + p["eps"]

    x = small((3, 4))
    frozen, trainable = adapt(fn, params, x)
    out = jlora.apply_lora(fn)(frozen, trainable, x)
    close(out, fn(jlora.merge(frozen, trainable), x))


def test_keyword_arguments_of_any_name():
    def fn(p, x, *, frozen=False, trainable=True, params=1.0, fn=2.0):
        y = x @ p["w"]
        return (y if trainable and not frozen else -y) * params * fn

    x = small((3, 4))
    kwargs = {"frozen": True, "trainable": False, "params": 2.0, "fn": 3.0}
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x)
    out = jlora.apply_lora(fn)(frozen, trainable, x, **kwargs)
    close(out, fn(jlora.merge(frozen, trainable), x, **kwargs))


@pytest.mark.parametrize(
    ("weight", "activation", "factors"),
    [
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", None),
        ("float16", "float16", "bfloat16"),
        ("float32", "float32", "bfloat16"),
    ],
)
def test_low_precision(weight, activation, factors):
    """The result has the function's dtype and is right to that dtype's precision."""

    def fn(p, x):
        y = x @ p["w"].astype(x.dtype)
        return jnp.einsum("td,dhk->thk", y, p["v"].astype(x.dtype))

    x = small((3, 8), dtype=activation)
    params = small({"w": (8, 8), "v": (8, 2, 4)}, dtype=weight)
    frozen, trainable = adapt(fn, params, x, config={"targets": "*", "dtype": factors})
    run = jax.jit(jlora.apply_lora(fn, on_merge="error"))
    out = run(frozen, trainable, x)
    assert out.dtype == fn(params, x).dtype
    wide = jax.tree.map(lambda a: a.astype("float32"), (frozen, trainable, x))
    exact = fn(jlora.merge(*wide[:2]), wide[2])
    eps = float(jnp.finfo(activation).eps)
    if factors:
        eps = max(eps, float(jnp.finfo(factors).eps))
    scale = float(jnp.abs(exact).max())
    np.testing.assert_allclose(
        np.asarray(out, "float32"), exact, atol=4 * eps * scale, rtol=4 * eps
    )
    grads = jax.grad(lambda t: run(frozen, t, x).astype("float32").sum())(trainable)
    for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(trainable), strict=True):
        assert (g.shape, g.dtype) == (t.shape, t.dtype)
        assert bool(jnp.isfinite(g).all())
        assert bool((g != 0).any())


def test_low_precision_products_sum_in_float32():
    """4096 terms near one: a bfloat16 sum stops at 256."""
    x = jnp.ones((1, 4096), "bfloat16")
    params = {"w": jnp.zeros((4096, 4), "bfloat16")}
    config = {"rank": 1, "targets": "w"}
    frozen, trainable = adapt(use, params, x, config=config)
    trainable = jax.tree.map(jnp.ones_like, trainable)
    lora_fn = jlora.apply_lora(use)
    first = [
        eqn.outvars[0].aval.dtype
        for eqn in jax.make_jaxpr(lora_fn)(frozen, trainable, x).eqns
        if eqn.primitive.name == "thin_dot" and eqn.outvars[0].aval.shape == (1, 1)
    ]
    assert first == ["float32"]
    out = lora_fn(frozen, trainable, x)
    np.testing.assert_array_equal(np.asarray(out, "float32"), 3 * 4096)


class Linen(nn.Module):
    """A Linen module with state, randomness and a second method."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="down")(nn.gelu(x))

    def features(self, x):
        return self(x, train=False) * 2


def test_linen_with_rngs_mutable_and_method():
    x = small((8, 4))
    module = Linen()
    variables = module.init(jax.random.key(0), x, train=False)
    kwargs = {"rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    frozen, trainable = adapt(
        module.apply,
        variables,
        x,
        config={"targets": "**/kernel"},
        train=True,
        **kwargs,
    )
    lora_fn = jlora.apply_lora(module.apply, on_merge="error")
    params = jlora.merge(frozen, trainable)
    y, updates = lora_fn(frozen, trainable, x, train=True, **kwargs)
    close((y, updates), module.apply(params, x, train=True, **kwargs))
    assert set(updates) == {"batch_stats"}
    before = variables["batch_stats"]["norm"]["mean"]
    assert (updates["batch_stats"]["norm"]["mean"] != before).any()
    out = lora_fn(frozen, trainable, x, method="features")
    close(out, module.apply(params, x, method="features"))


def test_nnx_there_and_back():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.down = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            h = jax.nn.gelu(self.norm(self.up(x)))
            return self.down(h + self.drop(self.attention(h)))

    x = small((2, 5, 4))
    model = Model(nnx.Rngs(0))
    model.eval()

    graphdef, state = nnx.split(model)
    fn = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731

    config = {"targets": "all-linear", "train": "down/*"}
    frozen, trainable = adapt(fn, state, x, config=config)
    kernels = [f"attention/{n}/kernel" for n in ("key", "out", "query", "value")]
    assert sorted(trainable.lora) == [*kernels, "up/kernel"]
    assert sorted(trainable.full) == ["down/bias", "down/kernel"]
    axes = trainable.lora["attention/query/kernel"].spec.axes
    assert (axes.fan_in, axes.fan_out) == ((0,), (1, 2))

    lora_fn = jax.jit(jlora.apply_lora(fn, on_merge="error"))
    merged = nnx.merge(graphdef, jlora.merge(frozen, trainable))
    y = lora_fn(frozen, trainable, x)
    assert not np.allclose(y, model(x), atol=1e-3)
    np.testing.assert_allclose(y, merged(x), rtol=1e-4, atol=1e-5)
    again = jlora.combine(frozen, trainable)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    loss = lambda t: jnp.sum(lora_fn(frozen, t, x) ** 2)  # noqa: E731
    for leaf in jax.tree.leaves(jax.grad(loss)(trainable)):
        assert bool(jnp.isfinite(leaf).all())


# What the user wrote stays.


@jax.custom_vjp
def tenfold(x):
    return jnp.sin(x)


tenfold.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (10 * g * jnp.cos(x),))


@jax.custom_jvp
def jvp_tenfold(x):
    return jnp.sin(x)


jvp_tenfold.defjvp(lambda p, t: (jnp.sin(p[0]), 10 * t[0] * jnp.cos(p[0])))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda res, g: (10 * g @ res[1].T, 10 * res[0].T @ g),
)


@pytest.mark.parametrize("inside", ["plain", "jit", "scan", "remat"])
@pytest.mark.parametrize("rule", [tenfold, jvp_tenfold], ids=["vjp", "jvp"])
def test_a_users_gradient_of_activations_survives(rule, inside):
    def layer(w, x):
        return rule(x @ w)

    wrap = {
        "plain": layer,
        "jit": jax.jit(layer),
        "scan": lambda w, x: lax.scan(lambda h, _: (layer(w, h), None), x, None, 1)[0],
        "remat": jax.checkpoint(layer),
    }[inside]

    def fn(p, x):
        return wrap(p["w"], x)

    x = small((3, 4))
    frozen, trainable = adapt(fn, {"w": small((4, 4))}, x)

    def plain(w, x):
        return jnp.sin(x @ w)

    def grads(fn):
        return jax.grad(lambda t, x: fn(t, x).sum(), argnums=(0, 1))(trainable, x)

    expected = grads(lambda t, x: plain(jlora.merge(frozen, t)["w"], x))
    lora_fn = jlora.apply_lora(fn, on_merge="error")
    actual = grads(lambda t, x: lora_fn(frozen, t, x))
    close(actual, jax.tree.map(lambda g: 10 * g, expected), 1e-4)


def test_a_users_gradient_of_the_weight_survives():
    def fn(p, x):
        return product(x, p["w"])

    x = small((3, 4))
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x, config={"targets": "w"})
    lora_fn = jlora.apply_lora(fn, on_merge="allow")
    actual = jax.grad(lambda t: lora_fn(frozen, t, x).sum())(trainable)
    plain = jax.grad(lambda t: (x @ jlora.merge(frozen, t)["w"]).sum())(trainable)
    close(actual, jax.tree.map(lambda g: 10 * g, plain), 1e-4)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_debug_prints_come_once_and_in_order(jit, capsys):
    def fn(p, x):
        jax.debug.print("start {}", x[0, 0], ordered=True)

        def body(h, i):
            jax.debug.print("step {}", i, ordered=True)
            return h @ p["w"], None

        x, _ = lax.scan(body, x, jnp.arange(3))
        jax.debug.print("end", ordered=True)
        return x

    x = jnp.ones((2, 4))
    frozen, trainable = adapt(fn, {"w": small((4, 4))}, x)
    jax.effects_barrier()
    capsys.readouterr()
    lora_fn = jlora.apply_lora(fn)
    lora_fn = jax.jit(lora_fn) if jit else lora_fn
    jax.block_until_ready(lora_fn(frozen, trainable, x))
    jax.effects_barrier()
    lines = capsys.readouterr().out.split("\n")
    assert lines == ["start 1.0", "step 0", "step 1", "step 2", "end", ""]


def test_planning_prints_nothing(capsys):
    def fn(p, x):
        jax.debug.print("x {}", x[0, 0])
        return x @ p["w"]

    adapt(fn, {"w": small((4, 4))}, jnp.ones((2, 4)))
    jax.effects_barrier()
    assert capsys.readouterr().out == ""


def test_callbacks_see_the_adapted_values():
    seen = []

    def fn(p, x):
        y = x @ p["w"]
        return jax.pure_callback(
            lambda y: seen.append(np.asarray(y)) or np.asarray(y), y, y
        )

    x = small((3, 4))
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x)
    out = jax.jit(jlora.apply_lora(fn))(frozen, trainable, x)
    expected = x @ jlora.merge(frozen, trainable)["w"]
    close(out, expected)
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_profiler_scopes_and_source_lines_survive():
    def fn(p, x):
        with jax.named_scope("attention"), jax.named_scope("query"):
            x = x @ p["w"]

        def body(h, _):
            with jax.named_scope("in_loop"):
                return h @ p["v"], None

        with jax.named_scope("loop"):
            return lax.scan(body, x, None, 2)[0]

    x = small((3, 4))
    params = small({"w": (4, 4), "v": (4, 4)})
    frozen, trainable = adapt(fn, params, x, config={"targets": "*"})
    lora_fn = jlora.apply_lora(fn, on_merge="error")
    text = jax.jit(lora_fn).lower(frozen, trainable, x).as_text(debug_info=True)
    assert "attention/query/dot_general" in text
    assert "in_loop/dot_general" in text
    assert "test_apply.py" in text
    grad = jax.jit(jax.grad(lambda t: lora_fn(frozen, t, x).sum()))
    text = grad.lower(trainable).as_text(debug_info=True)
    assert "transpose(jvp(attention))/query/" in text or (
        "transpose(jvp(attention/query))" in text
    )


def test_errors_of_the_function_are_raised_as_they_are():
    def fn(p, x):
        return x @ p["w"] @ p["w"]

    frozen = {"w": jnp.ones((4, 6))}
    _, trainable = adapt(lambda p, x: x @ p["w"], frozen, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        jlora.apply_lora(fn)(frozen, trainable, jnp.ones((2, 4)))


# Merging on the fly.


def odd(p, x):
    return x @ jnp.exp(p["w"]) @ jnp.exp(p["w"]).T @ p["v"]


@pytest.fixture
def odd_setting():
    x = small((3, 4))
    params = small({"w": (4, 6), "v": (4, 5)})
    frozen, trainable = adapt(odd, params, x, config={"targets": "*"})
    return x, frozen, trainable


def test_merging_warns_once_for_each_trace_and_points_to_the_caller(odd_setting):
    x, frozen, trainable = odd_setting
    with pytest.warns(jlora.MergeWarning) as caught:
        jlora.apply_lora(odd)(frozen, trainable, x)
    (warning,) = caught
    text = str(warning.message)
    assert "merged on the fly, which is correct but slower" in text
    assert "  w: `exp` at test_apply.py:" in text
    assert "\n  v:" not in text
    assert 'on_merge="allow"' in text
    assert warning.filename == __file__
    jitted = jax.jit(jlora.apply_lora(odd))
    with pytest.warns(jlora.MergeWarning):
        jitted(frozen, trainable, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jitted(frozen, trainable, x)


def test_merging_can_be_an_error_or_allowed(odd_setting):
    x, frozen, trainable = odd_setting
    with pytest.raises(
        jlora.MergeError, match=r"(?s)No factored route for.*w: `exp` at.*exclude="
    ):
        jlora.apply_lora(odd, on_merge="error")(frozen, trainable, x)
    out = jlora.apply_lora(odd, on_merge="allow")(frozen, trainable, x)
    close(out, odd(jlora.merge(frozen, trainable), x), 1e-4)


def test_on_merge_must_be_one_of_three():
    with pytest.raises(
        jlora.ConfigError, match="must be 'allow', 'warn' or 'error', got 'warning'"
    ):
        jlora.apply_lora(deep, on_merge="warning")
    with pytest.raises(jlora.ConfigError, match="takes the function first"):
        jlora.apply_lora({"w": jnp.ones((2, 2))})
    with pytest.raises(jlora.ConfigError, match=r"lora_key must be one PRNG key.*int"):
        jlora.apply_lora(deep)({}, jlora.Trainable(), lora_key=0)


def test_a_returned_weight_is_merged_and_said_to_be():
    def fn(p, x):
        return x @ p["w"], p["w"]

    x = small((3, 4))
    frozen, trainable = adapt(fn, {"w": small((4, 6))}, x, config={"targets": "w"})
    with pytest.warns(jlora.MergeWarning, match="w: it is returned by the function"):
        out = jlora.apply_lora(fn)(frozen, trainable, x)
    close(out[1], jlora.merge(frozen, trainable)["w"])


# Dropout. With w zero and A = B = 1 the result is the input as A saw it.

N = 32


def see_through(fn, rate, **params):
    """`(lora_fn, frozen, trainable)` where a product with "w" is the dropped input."""
    params = {"w": jnp.zeros((N, N)), **params}
    config = jlora.LoraConfig(rank=N, targets="w", dropout=rate)
    plan = jlora.plan(fn, params, jnp.ones((4, N)), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    factors = dataclasses.replace(trainable.lora["w"], a=jnp.eye(N), b=jnp.eye(N))
    trainable = dataclasses.replace(trainable, lora={"w": factors})
    return jax.jit(jlora.apply_lora(fn, on_merge="error")), frozen, trainable


def use(p, x):
    return x @ p["w"]


ONES = jnp.ones((4, N))


def test_dropout_is_off_without_a_key():
    run, frozen, trainable = see_through(use, 0.5)
    np.testing.assert_array_equal(run(frozen, trainable, ONES), ONES)


def test_dropout_drops_at_its_rate_and_scales_the_rest_up():
    run, frozen, trainable = see_through(use, 0.25)
    keys = jax.random.split(jax.random.key(5), 100)
    seen = jax.vmap(lambda k: run(frozen, trainable, ONES, lora_key=k))(keys)
    seen = np.asarray(seen)
    assert set(np.unique(seen)) == {0.0, np.float32(1 / 0.75)}
    kept = (seen != 0).mean()
    assert abs(kept - 0.75) < 0.01  # 12800 draws: standard deviation 0.004
    np.testing.assert_allclose(seen.mean(), 1, atol=0.02)
    np.testing.assert_allclose(seen.mean(axis=0), 1, atol=0.3)  # each entry alike
    assert len({row.tobytes() for row in seen.reshape(-1, N)}) > 390  # none shared


def test_dropout_repeats_with_its_key_and_not_with_another():
    run, frozen, trainable = see_through(use, 0.5)
    a = run(frozen, trainable, ONES, lora_key=jax.random.key(1))
    b = run(frozen, trainable, ONES, lora_key=jax.random.key(1))
    c = run(frozen, trainable, ONES, lora_key=jax.random.key(2))
    old = run(frozen, trainable, ONES, lora_key=jax.random.PRNGKey(1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert set(np.unique(old)) == {0.0, 2.0}


def twice(p, x):
    return jnp.stack([x @ p["w"], x @ p["w"]])


def in_jit(p, x):
    f = jax.jit(lambda w, x: x @ w)
    return jnp.stack([f(p["w"], x), f(p["w"], x)])


def in_scan(p, x):
    return lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 2)[1]


def in_fori_loop(p, x):
    def body(i, out):
        return lax.dynamic_update_index_in_dim(out, x @ p["w"], i, 0)

    return lax.fori_loop(0, 2, body, jnp.zeros((2, *x.shape)))


def in_while_loop(p, x):
    def body(state):
        i, out = state
        return i + 1, lax.dynamic_update_index_in_dim(out, x @ p["w"], i, 0)

    out = jnp.zeros((2, *x.shape))
    return lax.while_loop(lambda s: s[0] < x[0, 0] + 1, body, (0, out))[1]


def in_remat(p, x):
    f = jax.checkpoint(lambda w, x: x @ w)
    return jnp.stack([f(p["w"], x), f(p["w"], x)])


def in_cond(p, x):
    def f():
        return lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)

    return jnp.stack([f(), f()])


def in_nested_loops(p, x):
    def outer(c, _):
        return c, lax.scan(lambda c, _: (c, jax.checkpoint(use)(p, x)), 0, None, 2)[1]

    return lax.scan(outer, 0, None, 2)[1].reshape(4, *x.shape)


@pytest.mark.parametrize(
    "fn",
    [
        twice,
        in_jit,
        in_scan,
        in_fori_loop,
        in_while_loop,
        in_remat,
        in_cond,
        in_nested_loops,
    ],
    ids=lambda f: f.__name__,
)
def test_each_use_and_each_step_draws_its_own_mask(fn):
    run, frozen, trainable = see_through(fn, 0.5)
    seen = np.asarray(run(frozen, trainable, ONES, lora_key=jax.random.key(3)))
    assert set(np.unique(seen)) == {0.0, 2.0}
    assert len({mask.tobytes() for mask in seen}) == len(seen) >= 2
    np.testing.assert_array_equal(run(frozen, trainable, ONES), jnp.ones(seen.shape))


@pytest.mark.parametrize(
    "fn", [use, in_remat, in_scan, in_jit], ids=lambda f: f.__name__
)
def test_the_backward_pass_uses_the_mask_of_the_forward_pass(fn):
    run, frozen, trainable = see_through(fn, 0.5)

    def total(x):
        seen = run(frozen, trainable, x, lora_key=jax.random.key(3))
        return seen.sum(), seen

    grad, seen = jax.grad(total, has_aux=True)(ONES)
    np.testing.assert_array_equal(grad, seen.reshape(-1, 4, N).sum(0))


def test_dropout_of_an_embedding_drops_whole_positions():
    params = {"table": jax.random.normal(jax.random.key(0), (7, 5))}
    ids = jnp.arange(400).reshape(20, 20) % 7

    def fn(p, ids):
        return p["table"][ids]

    config = jlora.LoraConfig(rank=2, targets="table", dropout=0.25)
    plan = jlora.plan(fn, params, ids, config=config)
    frozen, trainable = jlora.split(jax.random.key(1), params, plan)
    trainable = jax.tree.map(jnp.ones_like, trainable)
    lora_fn = jlora.apply_lora(fn)
    whole = lora_fn(frozen, trainable, ids) - fn(params, ids)
    np.testing.assert_allclose(whole, 2 * jnp.ones((20, 20, 5)), rtol=1e-5)
    key = jax.random.key(2)
    ratio = (lora_fn(frozen, trainable, ids, lora_key=key) - fn(params, ids)) / whole
    dropped = np.isclose(ratio, 0, atol=1e-5).all(-1)
    scaled = np.isclose(ratio, 1 / 0.75, rtol=1e-4).all(-1)
    assert (dropped | scaled).all()
    assert 60 < dropped.sum() < 140


def test_dropout_touches_the_low_rank_term_alone():
    run, frozen, trainable = see_through(use, 0.5)
    w = jnp.eye(N) * 7
    seen = run({**frozen, "w": w}, trainable, ONES, lora_key=jax.random.key(3))
    assert set(np.unique(seen)) == {7.0, 9.0}


def test_a_key_without_a_rate_draws_nothing():
    run, frozen, trainable = see_through(use, 0.0)
    key = jax.random.key(3)
    with_key = jax.make_jaxpr(run)(frozen, trainable, ONES, lora_key=key)
    assert "random_bits" not in str(with_key)
    assert "threefry" not in str(with_key)


# Trees that do not belong together.


def call_error(frozen, trainable, message):
    with pytest.raises(jlora.TreeError, match=message):
        jlora.apply_lora(use)(frozen, trainable, jnp.ones((2, 4)))


def test_trees_that_do_not_fit_are_refused_when_called():
    frozen, trainable = adapt(use, {"w": small((4, 6))}, jnp.ones((2, 4)))
    call_error(trainable, frozen, r"must be a jlora\.Trainable, got dict.*the order")
    call_error(frozen, None, r"must be a jlora\.Trainable, got NoneType")
    call_error({"ww": frozen["w"]}, trainable, r"'w', which .*\(nearest: 'ww'\)")
    call_error({"w": jnp.ones((4, 7))}, trainable, r"b of 'w' has shape \(2, 6\), a w")
    call_error({"w": jlora.MISSING}, trainable, "no leaf for the missing 'w'")
    call_error(
        {"w": jnp.ones((4, 6), jnp.int32)}, trainable, "is not a floating-point array"
    )
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), trainable)
    call_error(frozen, stacked, r"a of 'w' has shape \(2, 4, 2\)")


# What the gradient computes.


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)


def weight_shaped(jaxpr, primitives):
    """Results of `primitives` that have both sizes of a weight of the deep model."""
    found = []
    for eqn in equations(jaxpr):
        for out in eqn.outvars:
            shape = getattr(out.aval, "shape", ())
            if eqn.primitive.name in primitives and OUT in shape and MID in shape:
                found.append((eqn.primitive.name, shape))
    return found


PRODUCTS = ("dot_general", "thin_dot", "add", "add_any", "sub", "mul", "scan")


def test_the_gradient_never_forms_a_dense_update(setting):
    x, frozen, trainable, factored, merged = setting

    def jaxpr(fn):
        return jax.make_jaxpr(jax.value_and_grad(loss_of(fn, frozen, x)))(trainable)

    assert weight_shaped(jaxpr(factored), PRODUCTS) == []
    # The same look at the merged function does find them.
    names = {name for name, _ in weight_shaped(jaxpr(merged), PRODUCTS)}
    assert {"dot_general", "add", "scan"} <= names


def test_the_compiled_gradient_has_no_dense_update_either(setting):
    x, frozen, trainable, factored, merged = setting

    def dense(fn):
        grad = jax.jit(jax.grad(lambda t, f: loss_of(fn, f, x)(t)))
        text = grad.lower(trainable, frozen).compile().as_text()
        shapes = [f"f32[{a},{b}]" for a, b in ((MID, OUT), (OUT, MID))]
        return [
            line.strip()
            for line in text.splitlines()
            for shape in shapes
            if f" = {shape}" in line and (" dot(" in line or "add(" in line)
        ]

    assert dense(factored) == []
    assert dense(merged) != []


def test_the_forward_pass_forms_no_dense_update(setting):
    x, frozen, trainable, factored, _ = setting
    jaxpr = jax.make_jaxpr(factored)(frozen, trainable, x)
    assert weight_shaped(jaxpr, PRODUCTS) == []


def test_vmap_over_adapters_keeps_the_base_product_one_product(setting):
    """Its weight has no batch axis, so base products stay as large as the model's."""
    x, frozen, trainable, factored, _ = setting
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), trainable)
    run = jax.vmap(factored, (None, 0, 0))
    jaxpr = jax.make_jaxpr(run)(frozen, stacked, jnp.stack([x, x]))
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            shapes = [v.aval.shape for v in eqn.invars]
            weights = [s for s in shapes if OUT in s and MID in s and ROWS not in s]
            assert all(len(s) == 2 for s in weights), shapes
            if weights:
                (_, _), (batch, _) = eqn.params["dimension_numbers"]
                assert batch == ()


def test_a_thread_may_trace_while_another_does(setting):
    from concurrent.futures import ThreadPoolExecutor

    x, frozen, trainable, factored, _ = setting
    expected = factored(frozen, trainable, x)
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack():
        runs = [
            pool.submit(jax.jit(jlora.apply_lora(deep)), frozen, trainable, x)
            for _ in range(4)
        ]
    for run in runs:
        close(run.result(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_iterating_over_a_stack_of_weights_is_factored(axis, key):
    """`unstack` since JAX 0.11, slices before."""
    params = {"w": jax.random.normal(key, (3, 4, 4) if axis == 0 else (4, 3, 4))}

    def fn(p, x):
        for w in jnp.moveaxis(p["w"], axis, 0):
            x = jnp.tanh(x @ w)
        return x

    x = jnp.ones((2, 4))
    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=2))
    frozen, trainable = jlora.split(key, params, plan)
    trainable = jax.tree.map(lambda v: v + 0.1, trainable)
    out = jax.jit(jlora.apply_lora(fn, on_merge="error"))(frozen, trainable, x)
    expected = fn(jlora.merge(frozen, trainable), x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_module_in_place_of_the_function_is_told_what_to_pass():
    class Whole(nnx.Module):
        def __call__(self, x):
            return x

    x = jnp.ones((1, 4))
    for call in (jlora.apply_lora, jlora.adapters.per_row):
        with pytest.raises(jlora.ConfigError, match=r"Dense.*as `model\.apply`"):
            call(nn.Dense(1))
        with pytest.raises(jlora.ConfigError, match=r"Whole.*nnx\.split\(model\)"):
            call(Whole())
    with pytest.raises(jlora.ConfigError, match=r"jlora\.plan .*as `model\.apply`"):
        jlora.plan(nn.Dense(1), {}, x, config=jlora.LoraConfig())
    jlora.apply_lora(nnx.jit(lambda p, x: x))  # callable, and not a module


def test_merged_weights_alike_share_a_line():
    params = {f"layer_{i}": jnp.ones((4, 4)) for i in range(12)}

    def fn(p, x):
        return sum(x @ jnp.exp(w) for w in p.values())

    x = jnp.ones((1, 4))
    frozen, trainable = adapt(fn, params, x, config={"targets": "**"})
    line = r"weights:\n  layer_\{0\.\.11\} \(×12\): `exp` at .*\nLeave them out"
    with pytest.raises(jlora.MergeError, match=line):
        jlora.apply_lora(fn, on_merge="error")(frozen, trainable, x)
