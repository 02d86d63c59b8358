"""Codes and scales over devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import close, normal, random_like

pytestmark = pytest.mark.once

SHAPES = {"layers": (2, 128, 64), "out": (64, 128)}
PLACES = {"layers": P(None, "data", "model"), "out": P("model", "data")}
X = jnp.ones((8, 128)) / 8


def model(p, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w) @ jnp.ones((64, 128)), None

    x, _ = jax.lax.scan(layer, x, p["layers"])
    return x[:, :64] @ p["out"]


@pytest.fixture(scope="module")
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)


def setup(mesh):
    params = normal(SHAPES, scale=0.1)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACES)
    config = jlora.LoraConfig(rank=2, targets="*")
    plan = jlora.plan(model, params, X, config=config)
    return params, places, plan


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_sharded_model_computes_what_the_unsharded_one_does(kind, mesh):
    params, places, plan = setup(mesh)
    placed = jlora.quantize(
        jax.device_put(params, places), plan, kind=kind, block=16, targets="*"
    )
    for path, spec in PLACES.items():
        assert placed[path].codes.sharding.spec == spec
        assert placed[path].scales.sharding.spec == spec
    own = jlora.shardings(places, placed)
    host = jax.device_get(placed)
    again = jax.device_put(host, own)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(placed), strict=True):
        assert x.sharding == y.sharding
    frozen, fresh = jlora.split(jax.random.key(0), host, plan)
    trainable = random_like(fresh, scale=0.1)
    of_factors = jlora.shardings(placed, trainable)
    assert of_factors.lora["layers"].a.spec == P(None, "data", None)
    assert of_factors.lora["out"].b.spec == P(None, "data")

    @jax.jit
    def both(frozen, trainable):
        lora_fn = jlora.apply_lora(model)
        return jax.value_and_grad(lambda t: lora_fn(frozen, t, X).sum())(trainable)

    sharded = both(placed, jax.device_put(trainable, of_factors))
    close(jax.device_get(sharded), jax.device_get(both(frozen, trainable)), 1e-4)
    merged = jlora.merge(placed, jax.device_put(trainable, of_factors))
    assert {k: x.sharding.spec for k, x in merged.items()} == PLACES
    close(jax.device_get(merged), jax.device_get(jlora.merge(frozen, trainable)), 1e-5)
    start, _ = jlora.split(jax.random.key(0), jax.device_put(params, places), plan)
    codes, _ = jlora.split(
        jax.random.key(0),
        start,
        plan,
        quantize={"kind": kind, "block": 16, "targets": "*"},
    )
    assert codes["layers"].codes.sharding.spec == PLACES["layers"]


def test_blocks_and_bytes_are_not_cut(mesh):
    params, places, _ = setup(mesh)
    whole = jlora.quantize(params, kind="int8", block=48)
    with pytest.raises(
        jlora.TreeError,
        match=r"'layers': axis 1 of 128 entries is cut into 2 shards of 64, which are "
        r"not whole blocks of 48.*'out'.*Lay out the dense arrays first",
    ):
        jlora.shardings(places, whole)
    packed = jlora.quantize(params, kind="nf4", block=16)
    with pytest.raises(jlora.TreeError, match="whole pieces of 128 entries that share"):
        jlora.shardings(places, packed)
    native = jlora.quantize(params, kind="nf4", block=16, storage="native")
    assert jlora.shardings(places, native)["out"].codes == places["out"]
    with pytest.raises(jlora.TreeError, match=r"Give a block= that"):
        jlora.quantize(jax.device_put(params, places), kind="int8", block=48)


def test_specs_are_checked_inside_a_mesh(mesh):
    params, _, _ = setup(mesh)
    whole = jlora.quantize(params, kind="int8", block=48)
    specs = jlora.shardings(PLACES, whole)
    assert specs["layers"].codes == PLACES["layers"]
    assert jax.tree.structure(specs) == jax.tree.structure(whole)
    with (
        jax.set_mesh(mesh),
        pytest.raises(jlora.TreeError, match="not whole blocks of 48"),
    ):
        jlora.shardings(PLACES, whole)


def test_what_has_no_place_is_named(mesh):
    params, places, _ = setup(mesh)
    coded = jlora.quantize(params, kind="int8", block=16)
    with pytest.raises(jlora.TreeError, match="no sharding for 'out'"):
        jlora.shardings({"layers": places["layers"]}, coded)
    with pytest.raises(jlora.TreeError, match="'out': it has 2 axes, its sharding"):
        jlora.shardings({**PLACES, "out": P(None, None, "model")}, coded)
    with pytest.raises(jlora.TreeError, match=r"must be a jlora\.Trainable"):
        jlora.shardings(places, params)
