"""Codes over eight devices: `shard_map`, and meshes with explicit or automatic axes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import close, normal, random_like
from tests.transform.quantised_helpers import (
    KINDS,
    equations,
    gradients,
    products,
    same_over_codes,
)

N, ROWS = 16, 8
# Axes of a mesh over which the weight lies, the inputs and the result.
SPECS = {
    "fan-in": (P("model", None), P("data", "model"), P("data", None)),
    "fan-out": (P(None, "model"), P("data", None), P("data", "model")),
    "batch": (P("data", None, None), P("data", None, None), P("data", None, None)),
    "nothing": (P(), P("data", None), P("data", None)),
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def check(fn, codes, x, on_merge="error"):
    """Asserts that values and gradients are those of the widened model."""
    config = jlora.LoraConfig(rank=2, alpha=3, targets="*")
    plan = jlora.plan(fn, codes, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), codes, plan)
    run = gradients(jlora.apply_lora(fn, on_merge=on_merge))
    return same_over_codes(run, frozen, random_like(trainable), x)


def sharded(specs, axis):
    w_spec, x_spec, out_spec = specs

    def body(w, x):
        if w.ndim == 3:
            return jnp.einsum("eti,eio->eto", x, w)
        out = jnp.tanh(x @ w) if axis is None else x @ w
        return out if axis is None else lax.psum(out, axis)

    def fn(p, x):
        return jax.shard_map(
            body,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(w_spec, x_spec),
            out_specs=out_spec,
        )(p["w"], x)

    return fn


@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "kind"),
    [("fan-in", "int8"), ("fan-out", "nf4"), ("batch", "int4"), ("nothing", "nf4")],
)
def test_shards_of_codes(what, kind):
    batch = (4,) if what == "batch" else ()
    w = normal((*batch, N, N))
    codes = jlora.quantize({"w": w}, kind=kind, block=4, double=what == "batch")
    fn = sharded(SPECS[what], "model" if what == "fan-in" else None)
    jaxpr = check(fn, codes, normal((*batch, ROWS, N), 1))
    assert equations(jaxpr, "remat2")  # a product whose derivative widens again


def test_codes_packed_for_their_shards_stay_codes():
    auto = NamedSharding(mesh_of(AxisType.Auto), P("model", None))
    codes = jlora.quantize({"w": jax.device_put(normal((N, N)), auto)}, block=4)
    check(sharded(SPECS["fan-in"], "model"), codes, normal((ROWS, N), 1))


@pytest.mark.parametrize("block", [4, N])
def test_a_placement_inside_the_function_moves_codes_or_leaves_them(block):
    def fn(p, x):
        return x @ jax.device_put(p["w"], NamedSharding(mesh, P("model", None)))

    mesh = mesh_of(AxisType.Auto)
    codes = jlora.quantize({"w": normal((N, N))}, kind="int8", block=block)
    x = jax.device_put(normal((ROWS, N), 1), NamedSharding(mesh, P()))
    run = jlora.apply_lora(fn, on_merge="error")  # not in a jit, which pads shards
    close(run(codes, jlora.Trainable(), x), x @ codes["w"].dense())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_shard_that_cuts_blocks_or_bytes_is_told(kind):
    specs = (P("data", None), P(None, "data"), P())
    fn = sharded(specs, "data")
    codes = jlora.quantize({"w": normal((N, N))}, kind=kind, block=8)
    x = normal((ROWS, N), 1)
    with pytest.raises(jlora.MergeError, match="w: `shard_map` at"):
        check(fn, codes, x)
    if kind == "int8":
        check(fn, codes, x, on_merge="allow")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_explicit_axes(kind):
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        params = {
            "u": jax.device_put(normal((N, N)), P(None, "model")),
            "v": jax.device_put(normal((N, N), 2), P("model", None)),
        }
        x = jax.device_put(normal((ROWS, N), 1), P("data", None))

        def fn(p, x):
            h = jnp.dot(x, p["u"], out_sharding=P("data", "model"))
            return jnp.dot(jnp.tanh(h), p["v"], out_sharding=P("data", None))

        codes = jlora.quantize(params, kind=kind, block=4)
        assert jax.typeof(codes["v"].scales).sharding.spec == P("model", None)
        assert jax.typeof(codes["v"].dense()).sharding.spec == P("model", None)
        check(fn, codes, x)

        def lookup(p, ids):
            return p["u"].at[ids].get(out_sharding=P("data", "model"))

        rows = jlora.apply_lora(lookup, on_merge="allow")
        fun = lambda frozen, ids: rows(frozen, jlora.Trainable(), ids)  # noqa: E731
        same_over_codes(fun, codes, jax.device_put(jnp.arange(ROWS), P("data")))


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_with_automatic_axes(kind):
    mesh = mesh_of(AxisType.Auto)
    w = jax.device_put(normal((3, N, N)), NamedSharding(mesh, P(None, "model", None)))
    x = jax.device_put(normal((ROWS, N), 1), NamedSharding(mesh, P("data", None)))

    def layer(h, w):
        w = lax.with_sharding_constraint(w, NamedSharding(mesh, P("model", None)))
        placed = NamedSharding(mesh, P("data", "model"))
        return lax.with_sharding_constraint(jnp.tanh(h @ w), placed), None

    def fn(p, x):
        return lax.scan(layer, x, p["w"])[0]

    codes = jlora.quantize({"w": w}, kind=kind, block=4)
    assert codes["w"].codes.sharding.spec == P(None, "model", None)
    assert products(check(fn, codes, x)) == 2
