"""Under a mesh with explicit axes every verb works, and gives the unsharded numbers.

`jax.make_mesh` makes such axes by default. Operations of JAX then refuse arrays that
are cut where they mix entries, or ask how their result shall lie.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import close, normal, random_like

PLACES = {"w": P(None, "m"), "v": P("m", None)}
PARAMS = normal({"w": (4, 8), "v": (8, 4)})
X = normal((8, 4), 1)
KEY = jax.random.key(0)


def model(p, x):
    h = jnp.tanh(x @ p["w"])
    return lax.dot_general(h, p["v"], (((1,), (0,)), ((), ())), out_sharding=P("d"))


def plain(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def loss(fn):
    return lambda *args, **kwargs: jnp.sum(jnp.sin(fn(*args, **kwargs)))


def adapter_of(**settings):
    config = jlora.LoraConfig(rank=2, targets="*", **settings)
    plan = jlora.plan(plain, PARAMS, X, config=config)
    _, trainable = jlora.split(KEY, PARAMS, plan)
    return plan, random_like(trainable, scale=0.3)


@pytest.fixture
def mesh():
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=axes, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


def whole(tree):
    """Returns `tree` with each array whole on each device of the mesh."""
    return jax.device_put(tree, P())


def placed(mesh, trainable):
    """Returns the base, an adapter cut over all axes, and a batch."""
    places = {k: NamedSharding(mesh, spec) for k, spec in PLACES.items()}
    cut = jax.device_put(trainable, jlora.shardings(places, trainable, spread=True))
    return jax.device_put(PARAMS, places), cut, jax.device_put(X, P("d"))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "lora_xs"])
def test_gradients_are_those_of_one_device(mesh, method):
    _, trainable = adapter_of(method=method, dropout=0.5)
    wanted = jax.jit(jax.grad(loss(jlora.apply_lora(plain)), 1))(PARAMS, trainable, X)
    base, cut, x = placed(mesh, trainable)
    run = loss(jlora.apply_lora(model))
    close(jax.grad(run, 1)(base, cut, x), wanted)  # not in a jit
    # `x` is a constant of the program
    dropped = jax.jit(jax.grad(lambda t: run(base, t, x, lora_key=KEY)))(cut)
    assert jlora.report(base, dropped).entries[0].finite


@pytest.mark.once
@pytest.mark.parametrize("method", ["dora", "adalora"])
def test_what_is_computed_from_factors(mesh, method):
    _, trainable = adapter_of(method=method)
    base, cut, _ = placed(mesh, trainable)

    def computed(t, params):
        arithmetic = jlora.adapters
        yield arithmetic.norms(t, params=params)
        yield arithmetic.cosine(
            t, arithmetic.scale(t, 2.0, params=params), params=params
        )
        for one in (
            arithmetic.truncate(t, 1, params=params),
            arithmetic.ties([t, t], density=0.5, params=params),
        ):
            yield jlora.merge(params, one)

    for found, wanted in zip(
        computed(cut, base), computed(*whole((trainable, PARAMS))), strict=True
    ):
        close(jax.device_get(found), jax.device_get(wanted), 1e-4)
    found, wanted = jlora.report(base, cut), jlora.report(*whole((PARAMS, trainable)))
    assert str(found) == str(wanted)


@pytest.mark.once
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("lora", jlora.optim.lora_fa),
        ("lora", jlora.optim.riemannian),
        ("adalora", lambda tx: jlora.optim.adalora(tx, target_rank=1, steps=2)),
    ],
)
def test_optimizers_of_two_factors(mesh, method, optimizer):
    _, trainable = adapter_of(method=method)
    _, cut, _ = placed(mesh, trainable)
    tx = optimizer(optax.sgd(0.1))

    @jax.jit
    def step(t):
        return tx.update(t, tx.init(t), t)[0]

    close(jax.device_get(step(cut)), jax.device_get(step(whole(trainable))), 1e-4)
    penalty = jlora.optim.orthogonality_penalty
    close(jax.device_get(penalty(cut)), jax.device_get(penalty(whole(trainable))), 1e-4)


@pytest.mark.parametrize(
    "settings", [{"init": "pissa"}, {"init": "olora"}, {"method": "mica"}], ids=str
)
def test_what_starts_from_the_weight(mesh, settings):
    plan, trainable = adapter_of(**settings)
    base, _, _ = placed(mesh, trainable)
    frozen, fresh = jlora.split(KEY, base, plan)
    assert {k: w.sharding.spec for k, w in frozen.items()} == PLACES
    close(jax.device_get(jlora.merge(frozen, fresh)), jax.device_get(PARAMS))
    traced, _ = jax.jit(lambda params: jlora.split(KEY, params, plan))(base)
    assert {k: w.sharding.spec for k, w in traced.items()} == PLACES


@pytest.mark.once
def test_moments_and_extraction(mesh):
    config = jlora.LoraConfig(rank=2, targets="*", init="eva")
    plan = jlora.plan(plain, PARAMS, X, config=config)
    plain_plan, trainable = adapter_of()
    base, cut, x = placed(mesh, trainable)
    found = jlora.activation_statistics(model, base, plan, [x])
    wanted = jlora.activation_statistics(plain, whole(PARAMS), plan, [whole(X)])
    close(jax.device_get(found), jax.device_get(wanted), 1e-4)
    jlora.split(KEY, base, plan, statistics=found)
    again = jlora.extract(jlora.merge(base, cut), base, plain_plan)
    merged = jlora.merge(base, again)
    close(
        jax.device_get(merged),
        jax.device_get(jlora.merge(*whole((PARAMS, trainable)))),
        1e-4,
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_shard_map_over_some_of_the_axes(quantized):
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=axes, devices=jax.devices()[:4])

    def fn(p, x):
        return jax.shard_map(
            plain,
            mesh=mesh,
            in_specs=(P(), P("d")),
            out_specs=P("d"),
            axis_names={"d"},
        )(p, x)

    plan, trainable = adapter_of(dropout=0.5)
    base = jlora.quantize(PARAMS, plan, kind="int8") if quantized else PARAMS
    run = jax.jit(jlora.apply_lora(fn))
    close(run(base, trainable, X), plain(jlora.merge(base, trainable), X), 1e-4)
    dropped = jax.grad(loss(run), 1)(base, trainable, X, lora_key=KEY)
    assert jnp.isfinite(dropped.lora["w"].a).all()
