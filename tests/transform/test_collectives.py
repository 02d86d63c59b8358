"""Weights that a function gathers, lays out anew or sends on itself stay factored."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

import jlora
from tests.helpers import close, normal, random_like

AUTO = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
KINDS = [None, "int8", "nf4"]
CYCLE = [(i, (i + 1) % 8) for i in range(8)]


def over(mesh, x, *entries):
    return jax.device_put(x, NamedSharding(mesh, P(*entries)))


def gathered(w, axis=0, tiled=True):
    return lax.all_gather(w, "d", axis=axis, tiled=tiled)


def by_rows(w, x):
    return x @ gathered(w)


def by_new_axis(w, x):
    return x @ gathered(w, tiled=False).reshape(-1, w.shape[-1])


def layers(ws, x):
    def step(x, w):
        return jnp.tanh(x @ gathered(w, axis=1)), None

    return lax.scan(jax.checkpoint(step), x, ws)[0]


def in_turn(w, x):
    """Each device computes with every shard, which goes round."""
    y = 0.0
    for _ in range(8):
        y = y + x[:, :64] @ w
        w = lax.ppermute(w, "d", CYCLE)
    return y


def law(fn, params, x, kind, collective):
    """The adapted function is that of the merged weights, and factors stay factors."""
    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(fn, params, x, config=config)
    assert plan.rows()[0].route == "factored"
    if kind:
        params = jlora.quantize(params, plan, kind=kind)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = random_like(trainable, scale=0.1)
    trainable = jax.device_put(trainable, jlora.shardings(frozen, trainable))
    lora = jlora.apply_lora(fn, on_merge="error")

    def loss(trainable):
        return jnp.sin(lora(frozen, trainable, x)).sum()

    def dense(trainable):
        return jnp.sin(fn(jlora.merge(frozen, trainable), x)).sum()

    got, want = (jax.jit(jax.value_and_grad(f))(trainable) for f in (loss, dense))
    close(got, want, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(lora)(frozen, trainable, x))
    assert f" {collective}[" in text or f" = {collective} " in text
    return text


@pytest.mark.parametrize(
    ("kind", "check"), [(None, True), (None, False), ("int8", False), ("nf4", True)]
)
@pytest.mark.parametrize(
    ("body", "shape", "entries", "collective"),
    [
        (by_rows, (512, 16), ("d", None), "all_gather"),
        (by_new_axis, (512, 16), ("d", None), "all_gather"),
        (layers, (2, 64, 64), (None, None, "d"), "all_gather"),
        (in_turn, (512, 16), ("d", None), "ppermute"),
    ],
)
def test_fsdp_by_hand(body, shape, entries, collective, kind, check):
    def fn(params, x):
        own = jax.shard_map(
            body,
            mesh=AUTO,
            in_specs=(P(*entries), P("d")),
            out_specs=P("d"),
            check_vma=check,
        )
        return own(params["w"], x)

    params = {"w": over(AUTO, normal(shape, scale=0.1), *entries)}
    x = over(AUTO, normal((8, shape[-2]), seed=1), "d")
    text = law(fn, params, x, kind, collective)
    # Of the factors only A is cut here, so only A and the base are gathered.
    if body is by_rows and kind is None:
        assert text.count("all_gather[") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_explicit_axes(kind):
    def fn(params, x):
        w = jax.sharding.reshard(params["w"], P(None, "tp"))
        return jnp.dot(x, w, out_sharding=P("fsdp", "tp"))

    with jax.set_mesh(EXPLICIT):
        params = {"w": over(EXPLICIT, normal((512, 16), scale=0.1), "fsdp", "tp")}
        x = over(EXPLICIT, normal((8, 512), seed=1), "fsdp", None)
        law(fn, params, x, kind, "reshard")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_explicit_axes(kind):
    def fn(params, x):
        def step(x, w):
            w = jax.sharding.reshard(w, P(None, None))
            return jnp.tanh(jnp.dot(x, w, out_sharding=P("fsdp", None))), None

        return lax.scan(step, x, params["w"])[0]

    with jax.set_mesh(EXPLICIT):
        w = over(EXPLICIT, normal((2, 512, 512), scale=0.03), None, "fsdp", "tp")
        x = over(EXPLICIT, normal((8, 512), seed=1), "fsdp", None)
        law(fn, {"w": w}, x, kind, "reshard")


def test_over_several_devices_no_sum_is_gathered():
    """On one device 512 tokens are enough for a sum with the weight."""
    params = {"w": jax.ShapeDtypeStruct((64, 64), "float32")}
    x = jax.ShapeDtypeStruct((64, 64, 64), "float32")
    fn = lambda params, x: jnp.tanh(x @ params["w"]).sum()  # noqa: E731
    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=2, targets="w"))
    make = lambda key, params: jlora.split(key, params, plan)  # noqa: E731
    trees = *jax.eval_shape(make, jax.random.key(0), params), x

    def sums(mesh):
        """How often `w` is gathered, and whether `x a` is computed."""
        specs = jax.P("d", None), jax.P(), jax.P("d")
        own = [
            jax.tree.map(lambda x, s=s: x.update(sharding=NamedSharding(mesh, s)), tree)
            for tree, s in zip(trees, specs, strict=True)
        ]
        lora = jax.jit(jlora.apply_lora(fn, on_merge="error"))
        text = lora.lower(*own).compile().as_text()
        thin = re.search(r"= f32\[[\d,]+,2\]\S* dot\(", text)
        return text.count("f32[64,64]{1,0} all-gather"), bool(thin)

    one = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    assert sums(AUTO) == (1, True)
    assert sums(one) == (0, False)
