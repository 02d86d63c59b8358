"""Dropout inside `shard_map`: shards draw their own masks, replicas the same one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding

import jlora
from jlora.transform import compat
from jlora.transform.shards import varied_axes
from tests.helpers import close, normal

pytestmark = pytest.mark.once

N, RATE = 8, 0.5
MESH = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
ONES = jnp.ones((8, N))
ALL = P(("data", "model"))  # what each device has, one below the other


def sees(fn, x=ONES, shape=(N, N)):
    """`(run, frozen, trainable)`; where `fn` is a product, `run` shows the mask."""
    params = {"w": jnp.zeros(shape)}
    axes = jlora.Axes((), (0,), (1,))
    config = jlora.LoraConfig(
        rank=N, alpha=N, dropout=RATE, targets="w", rules=jlora.Rule("w", axes=axes)
    )
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda a: jnp.eye(*a.shape), trainable)
    return jlora.apply_lora(fn, on_merge="error"), frozen, trainable


CHECK = [True]  # whether types say along which mesh axes values differ


def local(body, in_specs, out_specs=ALL):
    return jax.shard_map(
        body, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=CHECK[0]
    )


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def check(request, monkeypatch):
    monkeypatch.setattr(f"{__name__}.CHECK", [request.param])
    return request.param


def by_device(seen):
    """`[data, model, ...]` from results of all devices, one below the other."""
    return np.asarray(seen).reshape(4, 2, -1)


def differing(seen):
    """The mesh axes along which devices differ."""
    seen = by_device(seen)
    found = set()
    if len({a.tobytes() for a in seen[:, 0]}) > 1:
        assert len({a.tobytes() for a in seen[:, 0]}) == 4
        found.add("data")
    if any(a[0].tobytes() != a[1].tobytes() for a in seen):
        assert all(a[0].tobytes() != a[1].tobytes() for a in seen)
        found.add("model")
    return found


def replicated(p, x):
    return local(lambda w, x: x @ w, (P(), P()))(p["w"], x)


def batch(p, x):
    return local(lambda w, x: x @ w, (P(), P("data")))(p["w"], x)


def batch_over_all(p, x):
    return local(lambda w, x: x @ w, (P(), ALL))(p["w"], x)


def columns_of_the_weight(p, x):
    """The activation is whole on both devices of a row, the outputs are halves."""
    return local(lambda w, x: x @ w, (P(None, "model"), P("data")))(p["w"], x)


def rows_of_the_weight(p, x):
    """Each device has half of the features, and draws their mask."""
    both = (P("model"), P("data", "model"))
    return local(lambda w, x: x @ w, both)(p["w"], x)


def gathered(p, x):
    def body(w, x):
        return lax.all_gather(x, "model", axis=1, tiled=True) @ w

    return local(body, (P(), P("data", "model")))(p["w"], x)


def summed(p, x):
    return local(lambda w, x: lax.pmean(x, "data") @ w, (P(), P("data")))(p["w"], x)


def in_scan(p, x):
    """Devices differ from the second step on."""

    def body(w, x):
        start = jnp.ones_like(x)
        if CHECK[0]:
            start = lax.pcast(start, "data", to="varying")

        def step(h, _):
            return h + lax.axis_index("data").astype(h.dtype) * 0, h @ w

        return lax.scan(step, start, None, 2)[1][1]

    return local(body, (P(), P()))(p["w"], x)


def in_jit_and_remat(p, x):
    def body(w, x):
        return jax.jit(jax.checkpoint(lambda w, x: x @ w))(w, x)

    return local(body, (P(), P("data")))(p["w"], x)


def in_while(p, x):
    def body(w, x):
        return lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.abs(x @ w)), (0, x)
        )[1]

    return local(body, (P(), P("data")))(p["w"], x)


def in_cond(p, x):
    def body(w, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    return local(body, (P(), P("data")))(p["w"], x)


def nested(p, x):
    def outer(w, x):
        return jax.shard_map(
            lambda w, x: x @ w,
            in_specs=(P(), P("model")),
            out_specs=P("model"),
            axis_names={"model"},
        )(w, x)

    f = jax.shard_map(
        outer,
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
    )
    return f(p["w"], x)


CASES = {
    replicated: set(),
    batch: {"data"},
    batch_over_all: {"data", "model"},
    columns_of_the_weight: {"data"},
    rows_of_the_weight: {"data", "model"},
    gathered: {"data"},
    summed: set(),
    in_scan: {"data"},
    in_jit_and_remat: {"data"},
    in_while: {"data"},
    in_cond: {"data"},
    nested: {"data", "model"},
}


@pytest.mark.parametrize("fn", CASES, ids=lambda f: f.__name__)
def test_devices_draw_masks_of_their_own_where_the_activation_differs(fn, check):
    run, frozen, trainable = sees(fn)
    run = jax.jit(run)
    seen = run(frozen, trainable, ONES, lora_key=jax.random.key(3))
    whole = run(frozen, trainable, ONES)
    assert seen.shape == whole.shape
    if fn is columns_of_the_weight:  # each device shows other columns
        seen = np.asarray(seen).reshape(4, 2, 2, -1)
        assert len({a.tobytes() for a in seen[:, 0]}) == 4
        # The same run without the cut of the weight shows the whole mask.
        batched, frozen, trainable = sees(batch)
        mask = jax.jit(batched)(frozen, trainable, ONES, lora_key=jax.random.key(3))
        mask = np.asarray(mask).reshape(4, 2, 2, 2, -1)
        np.testing.assert_array_equal(seen[:, 0], mask[:, 0, :, 0])
        np.testing.assert_array_equal(seen[:, 1], mask[:, 1, :, 1])
        return
    assert set(np.unique(np.asarray(seen / jnp.where(whole == 0, 1, whole)))) <= {0, 2}
    assert differing(seen) == CASES[fn]
    other = run(frozen, trainable, ONES, lora_key=jax.random.key(4))
    assert (other != seen).any()


def test_checked_types_pass_and_gradients_use_the_same_mask(check):
    """The gradient of a linear function is the mask that its value shows."""

    def fn(p, x):
        def body(w, x):
            return lax.psum(x @ w, "model")

        specs = (P("model"), P("data", "model"))
        return local(body, specs, P("data"))(p["w"], x)

    run, frozen, trainable = sees(fn)

    def total(x):
        seen = run(frozen, trainable, x, lora_key=jax.random.key(3))
        return seen.sum(), seen

    grad, seen = jax.jit(jax.grad(total, has_aux=True))(ONES)
    np.testing.assert_array_equal(grad, seen)
    assert set(np.unique(seen)) == {0.0, 2.0}


def test_an_embedding_drops_positions_of_each_shard():
    ids = jnp.zeros((8, 20), int)

    def fn(p, ids):
        return local(lambda w, ids: w[ids], (P(), P("data")))(p["w"], ids)

    run, frozen, trainable = sees(fn, ids)
    seen = run(frozen, trainable, ids, lora_key=jax.random.key(3))
    assert set(np.unique(seen)) == {0.0, 2.0}
    assert differing(seen) == {"data"}


def product(p, x):
    return x @ p["w"]


@pytest.mark.parametrize(
    ("spec", "axes"),
    [(P(), set()), (P("data"), {"data"}), (ALL, {"data", "model"})],
)
@pytest.mark.parametrize("closed_over", [False, True])
def test_inside_the_users_shard_map_too(spec, axes, closed_over):
    run, frozen, trainable = sees(product)

    def body(trainable, x, key):
        if closed_over:
            fn = jlora.apply_lora(lambda p: x @ p["w"])
            seen = fn(frozen, trainable, lora_key=key)
        else:
            seen = run(frozen, trainable, x, lora_key=key)
        return lax.pcast(seen, tuple({"data", "model"} - axes), to="varying")

    step = local(body, (P(), spec, P()))
    assert differing(step(trainable, ONES, jax.random.key(3))) == axes


def test_a_data_parallel_step_trains_with_dropout():
    """Gradients of a step in `shard_map` are those of the same masks on one device."""
    fn = batch
    run, frozen, trainable = sees(fn)
    trainable = jax.tree.map(lambda a: normal(a.shape, a.size), trainable)
    x = normal(ONES.shape, 3)
    key = jax.random.key(5)

    def loss(trainable, run, x, **kwargs):
        return jnp.sum(jnp.sin(run(frozen, trainable, x, **kwargs)))

    value, grads = jax.value_and_grad(loss)(trainable, run, x, lora_key=key)
    see, _, eye = sees(fn)
    mask = see(frozen, eye, ONES, lora_key=key)  # for each device its rows
    rows = jnp.repeat(x.reshape(4, 1, 2, N), 2, axis=1).reshape(-1, N)
    plain = jlora.apply_lora(product)
    close((value, grads), jax.value_and_grad(loss)(trainable, plain, rows * mask), 1e-4)


def layers(p, x):
    step = jax.checkpoint(lambda x, _: (x, x @ p["w"]))
    return lax.scan(step, x, None, 3)[1]


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("data", "model")),
        (AxisType.Auto, P(None, "model")),
        (AxisType.Explicit, P("data", None)),
    ],
)
def test_masks_do_not_depend_on_how_the_arrays_lie(kind, spec):
    """One device and eight compute one function, to the bit."""
    run, frozen, trainable = sees(layers)
    key = jax.random.key(3)
    want = np.asarray(jax.jit(run)(frozen, trainable, ONES, lora_key=key))
    assert set(np.unique(want)) == {0.0, 2.0}
    assert any((want[0] != other).any() for other in want[1:])
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    columns = "model" if kind == AxisType.Explicit else None
    with jax.set_mesh(mesh):
        w = NamedSharding(mesh, P(spec[1], columns))
        frozen = {"w": jax.device_put(frozen["w"], w)}
        own = jlora.shardings(frozen, trainable)
        args = frozen, jax.device_put(trainable, own)
        x = jax.device_put(ONES, NamedSharding(mesh, spec))
        got = jax.jit(run)(*args, x, lora_key=key)
    np.testing.assert_array_equal(got, want)


def test_a_lookup_under_explicit_axes_drops():
    """JAX looks up under automatic axes, where the key has to come too."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def fn(p, ids):
        return p["w"].at[ids].get(out_sharding=P("data", None, None))

    ids = jnp.zeros((8, 20), int)
    with jax.set_mesh(mesh):
        ids = jax.device_put(ids, NamedSharding(mesh, P("data", None)))
        run, frozen, trainable = sees(fn, ids)
        seen = jax.jit(run)(frozen, trainable, ids, lora_key=jax.random.key(3))
    assert set(np.unique(seen)) == {0.0, 2.0}


def test_axes_of_values_by_their_collectives(monkeypatch):
    monkeypatch.setattr(f"{__name__}.CHECK", [False])  # checked code has no groups

    def body(x):
        (
            i,
            ring,
        ) = lax.axis_index("model"), lax.ppermute(x, "model", [(0, 1), (1, 0)])
        return (
            x,
            lax.psum(x, "data"),
            lax.pmax(x, ("data", "model")),
            lax.psum_scatter(x, "model", tiled=True),
            lax.all_gather(x, "data"),
            ring,
            i,
            jnp.ones(2),
            lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]),
        )

    x = jnp.ones((8, N))
    jaxpr = jax.make_jaxpr(local(body, P("data"), P()))(x)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    code = compat.inner_code(eqn)
    found = varied_axes(code, compat.in_axes(eqn))
    read = functools.partial(found.get)
    data, model = frozenset(["data"]), frozenset(["model"])
    both, none = data | model, frozenset()
    assert [read(v) for v in code.outvars if isinstance(v, compat.Var)] == [
        *(data, none, none, both, none, both, model, none, data)
    ]
