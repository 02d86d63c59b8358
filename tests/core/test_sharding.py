"""Shardings of factors: which axis lies where, and that training does not change."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import close

SHAPES = {
    "embed": (16, 8),
    "layers": (2, 8, 8),
    "heads": (8, 4, 2),
    "out": (4, 2, 8),
}
PLACES = {
    "embed": P("model", None),
    "layers": P(None, "data", "model"),
    "heads": P(None, "model"),
    "out": P("model", None, "data"),
}


def model(p, ids):
    x = p["embed"][ids]
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])
    heads = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, p["heads"]))
    return jnp.einsum("bhk,hkd->bd", heads, p["out"]) @ p["embed"].T


IDS = jnp.arange(8) % 5


def setup(**settings):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    pairs = zip(SHAPES.items(), keys, strict=True)
    params = {k: jax.random.normal(key, shape) for (k, shape), key in pairs}
    config = jlora.LoraConfig(rank=2, **{"targets": "*", **settings})
    plan = jlora.plan(model, params, IDS, config=config)
    return params, plan


def specs(trainable):
    placed = jlora.shardings(PLACES, trainable)
    return {
        path: {k: getattr(f, k) for k in ("a", "b", "magnitude")}
        for path, f in placed.lora.items()
    }


def test_factors_lie_as_the_axes_of_their_weight():
    params, plan = setup()
    _, trainable = jlora.split(jax.random.key(1), params, plan)
    assert specs(trainable) == {
        "embed": {"a": P("model", None), "b": P(None, None), "magnitude": None},
        "layers": {
            "a": P(None, "data", None),
            "b": P(None, None, "model"),
            "magnitude": None,
        },
        "heads": {
            "a": P(None, None),
            "b": P(None, "model", None),
            "magnitude": None,
        },
        "out": {
            "a": P("model", None, None),
            "b": P(None, "data"),
            "magnitude": None,
        },
    }


def test_every_method_has_its_axes():
    params, plan = setup(method="dora", targets="layers")
    _, trainable = jlora.split(jax.random.key(1), params, plan)
    assert specs(trainable)["layers"]["magnitude"] == P(None, "model")
    params, plan = setup(method="vera", targets="layers")
    _, trainable = jlora.split(jax.random.key(1), params, plan)
    own = specs(trainable)["layers"]
    assert (own["a"], own["b"]) == (P(None, None), P(None, "model"))
    params, plan = setup(
        targets="out", train=(jlora.TokenRows("embed", (1, 2)), "heads")
    )
    _, trainable = jlora.split(jax.random.key(1), params, plan)
    assert specs(trainable)["embed"] == {
        "a": None,
        "b": P(None, None),
        "magnitude": None,
    }
    assert jlora.shardings(PLACES, trainable).full["heads"] == P(None, "model")


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_sharded_gradient_is_the_gradient(method):
    params, plan = setup(method=method)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    base = {k: NamedSharding(mesh, spec) for k, spec in PLACES.items()}
    frozen, trainable = jlora.split(jax.random.key(1), params, plan)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    lora_fn = jlora.apply_lora(model, on_merge="error")

    def loss(frozen, trainable):
        return jnp.sum(jnp.cos(lora_fn(frozen, trainable, IDS)))

    gradient = jax.jit(jax.grad(loss, argnums=1))
    expected = gradient(frozen, trainable)
    placed = jlora.shardings(base, trainable)
    sharded = jax.device_put(frozen, base), jax.device_put(trainable, placed)
    again = jlora.shardings(sharded[0], trainable)  # of the arrays themselves
    assert jax.tree.leaves(again) == jax.tree.leaves(placed)
    actual = jax.jit(jax.grad(loss, argnums=1), out_shardings=placed)(*sharded)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        actual,
        expected,
    )
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, actual)) == (
        jax.tree.leaves(placed)
    )


NAMES, RULES = ("embed", "mlp"), (("embed", "data"), ("mlp", "model"))
LECUN = jax.nn.initializers.lecun_normal()


def linen_places(mesh):
    """What a Linen module's logical names mean, and its own function."""
    init = nn.with_logical_partitioning(LECUN, NAMES)
    module = nn.Dense(16, use_bias=False, kernel_init=init)
    boxed = module.init(jax.random.key(0), jnp.ones((8, 8)))
    places = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    return module.apply, nn.unbox(boxed), places, "params/kernel"


def nnx_places(mesh):
    init = nnx.with_partitioning(LECUN, ("data", "model"))
    with jax.set_mesh(mesh):
        module = nnx.Linear(8, 16, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))
        graph, state = nnx.split(module)
        places = nnx.get_named_sharding(state, mesh)
    return lambda p, x: nnx.merge(graph, p)(x), state, places, "kernel"


@pytest.mark.parametrize("flax", [linen_places, nnx_places])
def test_logical_names_of_flax_lay_factors_out(flax):
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    fn, params, places, path = flax(mesh)
    plan = jlora.plan(fn, params, jnp.ones((8, 8)), config=jlora.LoraConfig(rank=2))
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    own = jlora.shardings(places, trainable).lora[path]
    assert own.a == NamedSharding(mesh, P("data", None))
    assert own.b == NamedSharding(mesh, P(None, "model"))


def test_what_has_no_sharding_is_named():
    params, plan = setup(targets="heads", train="out")
    _, trainable = jlora.split(jax.random.key(1), params, plan)
    with pytest.raises(jlora.TreeError, match=r"no sharding for 'heads' .*'head'"):
        jlora.shardings({"head": P(), "out": P()}, trainable)
    with pytest.raises(jlora.TreeError, match="got dict"):
        jlora.shardings(trainable, PLACES)
    with pytest.raises(jlora.TreeError, match="'heads' has 3 axes"):
        jlora.shardings({"heads": P(None, None, None, "data"), "out": P()}, trainable)


def test_factors_spread_over_the_axes_that_they_leave_unused():
    """Each mesh axis goes to the longest axis that it divides, stacks last."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, plan = setup()
    placed = {
        k: jax.device_put(x, NamedSharding(mesh, PLACES[k])) for k, x in params.items()
    }
    frozen, trainable = jlora.split(jax.random.key(1), placed, plan)
    own = jlora.shardings(placed, trainable, spread=True)
    found = {k: (f.a.spec, f.b.spec) for k, f in own.lora.items()}
    assert found == {
        "embed": (P(("model", "data"), None), P(None, ("data", "model"))),
        "layers": (P(None, ("data", "model"), None), P(None, None, ("model", "data"))),
        "heads": (P(("data", "model"), None), P(None, "model", "data")),
        "out": (P("model", "data", None), P(None, ("data", "model"))),
    }
    lora = jax.jit(jlora.apply_lora(model, on_merge="error"))
    spread = jax.device_put(trainable, own)
    close(lora(frozen, spread, IDS), model(params, IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(jlora.TreeError, match="spread=True needs a NamedSharding"):
        jlora.shardings(PLACES, trainable, spread=True)
