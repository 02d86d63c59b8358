"""Arithmetic of adapters against dense algebra in float64, and stacks of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from jlora import adapters
from jlora.factors import Axes, Factors, Spec, Trainable
from tests.helpers import compilations, same, update

pytestmark = pytest.mark.once

SHAPES = {
    "linear": ((6, 5), Axes()),
    "heads": ((6, 2, 3), Axes(fan_in=(0,), fan_out=(1, 2))),
    "stacked": ((5, 6, 2), Axes(batch=(2,), fan_in=(1,), fan_out=(0,))),
    "conv": ((3, 3, 4, 5), Axes(fan_in=(0, 1, 2), fan_out=(3,))),
}


def factors(name, rank, seed, *, alpha=3.0, rslora=False, dtype="float32"):
    shape, axes = SHAPES[name]
    rng = np.random.default_rng(seed)
    spec = Spec(
        op="conv" if name == "conv" else "linear",
        axes=axes,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
    )
    a, b = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in (axes.a_shape(shape, rank), axes.b_shape(shape, rank))
    )
    return Factors(a, b, spec)


def adapter(seed, *, names=tuple(SHAPES), rank=2, **spec):
    return Trainable({name: factors(name, rank, seed, **spec) for name in names})


X = adapter(0, rank=2, alpha=3.0)
Y = adapter(1, rank=3, alpha=5.0, rslora=True)
Z = adapter(2, names=("linear", "conv"), rank=1)


def updates(trainable):
    return {path: update(f) for path, f in trainable.lora.items()}


def matrices(name, dense):
    """`[*batch, in, out]`, from a weight in its own order."""
    shape, axes = SHAPES[name]
    _, n_in, n_out = axes.sizes(shape)
    batch = [shape[i] for i in axes.batch]
    return dense.transpose(axes.order).reshape(*batch, n_in, n_out)


def assert_updates(trainable, expected, tol=1e-5):
    assert set(trainable.lora) == set(expected)
    for path, dense in expected.items():
        got = update(trainable.lora[path])
        np.testing.assert_allclose(got, dense, rtol=tol, atol=tol * np.abs(dense).max())
        spec = trainable.lora[path].spec
        assert trainable.lora[path].a.shape[-1] == spec.rank


def total(weighted):
    out = {}
    for weight, trainable in weighted:
        for path, dense in updates(trainable).items():
            out[path] = out.get(path, 0) + weight * dense
    return out


# Sums.


def test_one_adapter_with_weight_one_is_that_adapter():
    assert adapters.add([X]).lora == dict(X.lora)
    for again in (
        adapters.scale(X, 1),
        adapters.linear([X], [1.0]),
        adapters.concat([X]),
        adapters.average([X]),
        adapters.interpolate(X, Y, 0),
        adapters.truncate(X, 2),
        adapters.truncate(X, energy=1.0),
        adapters.ties([X], density=1.0),
        adapters.dare([X], key=jax.random.key(0), density=1.0),
        adapters.magnitude_prune([X], density=1.0),
        adapters.to_lora(X),
    ):
        for path, f in X.lora.items():
            assert again.lora[path].a is f.a
            assert again.lora[path].b is f.b
            assert again.lora[path].spec == f.spec


@pytest.mark.parametrize("weight", [0.5, -2, 0])
def test_scale_multiplies_the_update_and_keeps_the_structure(weight):
    scaled = adapters.scale(Y, weight)
    assert_updates(scaled, total([(weight, Y)]))
    assert jax.tree.structure(scaled) == jax.tree.structure(Y)


def test_scale_by_a_traced_weight_compiles_once():
    scale = jax.jit(adapters.scale)
    assert_updates(scale(Y, 0.5), total([(0.5, Y)]))
    with compilations() as compiled:
        more = scale(Y, 3.0)
    assert not compiled
    assert_updates(more, total([(3, Y)]))


def test_sums_equal_dense_algebra():
    """Different ranks, alphas, rsLoRA, target sets; every kind of weight."""
    weights = (0.5, -2.0, 3.0)
    expected = total(zip(weights, (X, Y, Z), strict=True))
    assert_updates(adapters.linear([X, Y, Z], weights), expected)
    assert_updates(adapters.concat([X, Y, Z], weights), expected)
    assert_updates(jax.jit(adapters.linear)([X, Y, Z], weights), expected)
    ones = total([(1, X), (1, Y), (1, Z)])
    assert_updates(adapters.add([X, Y, Z]), ones)
    assert_updates(adapters.add([X, Y, Z]), ones)
    assert_updates(
        adapters.average([X, Y, Z]), total([(1 / 3, X), (1 / 3, Y), (1 / 3, Z)])
    )
    assert_updates(adapters.interpolate(X, Y, 0.25), total([(0.75, X), (0.25, Y)]))


def test_ranks_add_up_to_no_more_than_the_weight_has():
    joint = adapters.add([X, Y])
    assert joint.lora["linear"].rank == 5
    assert adapters.add([joint, X]).lora["linear"].rank == 5
    assert adapters.concat([joint, X]).lora["linear"].rank == 7
    assert adapters.add([joint, X]).lora["conv"].rank == 5  # of out 5 and in 36


def test_adapter_and_its_negative_add_up_to_zero():
    both = adapters.add([Y, adapters.negate(Y)])
    for path, f in Y.lora.items():
        largest = np.abs(update(f)).max()
        np.testing.assert_allclose(update(both.lora[path]), 0, atol=1e-6 * largest)
    for path, norm in adapters.norms(both).items():  # no root of a rounding error
        assert norm < 1e-6 * np.linalg.norm(update(Y.lora[path]))


def test_leaf_of_one_adapter_alone_comes_back_as_it_is():
    both = adapters.add([X, adapter(5, names=("linear",))])
    assert both.lora["conv"] is X.lora["conv"]


def test_dtypes_of_factors_are_kept():
    dtype = "bfloat16"
    x, y = (adapter(0, names=("linear",), dtype=d) for d in (dtype, "float32"))
    for out in (
        adapters.scale(x, 0.5),
        adapters.add([x, x]),
        adapters.truncate(x, 1),
        adapters.stack([x, x]),
        adapters.ties([x, x], density=0.5),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(dtype)}
    for mixed in (adapters.add([x, y]), adapters.ties([x, y], density=0.5)):
        assert {leaf.dtype for leaf in jax.tree.leaves(mixed)} == {jnp.dtype("float32")}


def test_dropout_stays_where_all_agree():
    def with_rate(rate):
        spec = dataclasses.replace(X.lora["linear"].spec, dropout=rate)
        return Trainable({"linear": dataclasses.replace(X.lora["linear"], spec=spec)})

    half, fifth = with_rate(0.5), with_rate(0.2)
    for combine in (
        lambda a, b: adapters.add([a, b]),
        lambda a, b: adapters.stack([a, b]),
    ):
        assert combine(half, half).lora["linear"].spec.dropout == 0.5
        assert combine(half, fifth).lora["linear"].spec.dropout == 0


# Truncation.


@pytest.mark.parametrize("rank", [1, 3])
def test_truncate_is_the_best_approximation(rank):
    both = adapters.add([X, Y])
    short = adapters.truncate(both, rank)
    for name, dense in updates(both).items():
        u, s, vt = np.linalg.svd(matrices(name, dense), full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        got = matrices(name, update(short.lora[name]))
        np.testing.assert_allclose(got, best, atol=2e-5 * s.max())
        assert short.lora[name].rank == rank


def test_truncate_to_energy_keeps_the_least_rank_that_has_it():
    both = adapters.add([X, Y])
    short = adapters.truncate(both, energy=0.9)
    for name, dense in updates(both).items():
        s = np.linalg.svd(matrices(name, dense), compute_uv=False)
        part = np.cumsum(s**2, -1) / np.sum(s**2, -1, keepdims=True)
        assert short.lora[name].rank == int((part < 0.9).sum(-1).max()) + 1


def test_truncate_needs_one_of_rank_and_energy():
    for wrong in ({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(jlora.ConfigError, match=r"rank|energy"):
            adapters.truncate(X, **wrong)
    with pytest.raises(jlora.ConfigError, match="not known under jit"):
        jax.jit(lambda x: adapters.truncate(x, energy=0.5))(X)


# Pruning.


def keep_largest(dense, density):
    flat = dense.reshape(len(dense), -1)
    count = int(density * flat.shape[1])
    order = np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :count]
    mask = np.zeros_like(flat)
    np.put_along_axis(mask, order, 1, axis=1)
    return (flat * mask).reshape(dense.shape)


def ties_in_numpy(changes, weights, density):
    kept = np.stack([keep_largest(c, density) for c in changes])
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agrees = np.sign(kept) == sign
    weighted = kept * np.asarray(weights)[:, None, None, None]
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def as_stack(name, dense):
    mats = matrices(name, dense)
    return mats.reshape(-1, *mats.shape[-2:])


def test_ties_equals_dense_algebra():
    merged = adapters.ties([X, Y], [1.0, 0.5], density=0.4, rank=6)
    for name in SHAPES:
        changes = [as_stack(name, update(t.lora[name])) for t in (X, Y)]
        expected = ties_in_numpy(changes, [1.0, 0.5], 0.4)
        got = as_stack(name, update(merged.lora[name]))
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_magnitude_prune_equals_dense_algebra_cut_to_the_sum_of_ranks():
    merged = adapters.magnitude_prune([X, Z], [1.0, -2.0], density=0.5)
    for name in ("linear", "conv"):
        parts = [
            w * keep_largest(as_stack(name, update(t.lora[name])), 0.5)
            for w, t in ((1, X), (-2, Z))
        ]
        u, s, vt = np.linalg.svd(sum(parts), full_matrices=False)
        expected = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
        got = as_stack(name, update(merged.lora[name]))
        np.testing.assert_allclose(got, expected, atol=2e-5 * s.max())
        assert merged.lora[name].rank == 3


def test_dare_drops_and_rescales(key):
    merged = adapters.dare([X], key=key, density=0.5, rank=6)
    for name in SHAPES:
        got, whole = update(merged.lora[name]), update(X.lora[name])
        ratio = got / whole
        near_zero, near_two = np.abs(ratio) < 1e-3, np.abs(ratio - 2) < 1e-3
        assert (near_zero | near_two).mean() > 0.99
        assert 0.2 < near_two.mean() < 0.8


def test_dare_of_a_leaf_depends_on_its_path_alone(key):
    whole = adapters.dare([X, Y], key=key, density=0.5)
    one = adapters.dare(
        [Trainable({"conv": t.lora["conv"]}) for t in (X, Y)], key=key, density=0.5
    )
    assert_updates(one, {"conv": update(whole.lora["conv"])})


@pytest.mark.parametrize("density", [0, 1.5])
def test_density_must_be_a_part(density, key):
    with pytest.raises(jlora.ConfigError, match=r"density must be in \(0, 1\]"):
        adapters.ties([X], density=density)
    with pytest.raises(jlora.ConfigError, match=r"density must be in \(0, 1\]"):
        adapters.dare([X], key=key, density=density)


# Measures.


def test_the_norm_of_complex_numbers_is_real():
    moved = jlora.Trainable(full={"w": jnp.array([[3j, 4.0]])})
    base = {"w": jnp.zeros((1, 2), jnp.complex64)}
    norms = adapters.norms(moved, params=base)
    assert norms["w"].dtype == jnp.float32
    assert norms["w"] == 5


def test_norms_and_cosine_equal_dense_algebra():
    for path, norm in adapters.norms(Y).items():
        np.testing.assert_allclose(
            norm, np.linalg.norm(update(Y.lora[path])), rtol=1e-5
        )
    x, y, z = (
        {path: dense.ravel() for path, dense in updates(t).items()} for t in (X, Y, Z)
    )

    def cosine(x, y):
        dot = sum(x[p] @ y[p] for p in x if p in y)
        norms = (math.sqrt(sum(v @ v for v in t.values())) for t in (x, y))
        return dot / math.prod(norms)

    np.testing.assert_allclose(adapters.cosine(X, Y), cosine(x, y), atol=1e-5)
    np.testing.assert_allclose(adapters.cosine(X, Z), cosine(x, z), atol=1e-5)
    np.testing.assert_allclose(adapters.cosine(X, adapters.scale(X, -3)), -1, rtol=1e-5)


def test_orthogonality_is_of_the_input_spaces():
    spec = Spec(rank=2, alpha=2)
    eye = jnp.eye(6)

    def reads(*inputs):
        own = Factors(eye[:, list(inputs)], jnp.ones((2, 5)) + jnp.eye(2, 5), spec)
        return Trainable({"w": own})

    for y, expected in ((reads(2, 3), 1), (reads(1, 2), 0.5), (reads(1, 0), 0)):
        found = adapters.orthogonality(reads(0, 1), y)
        np.testing.assert_allclose(found["w"], expected, atol=1e-6)
    padded = adapters.unstack(adapters.stack([Z, X]), trim=False)[0]
    found = adapters.orthogonality(padded, Z)
    np.testing.assert_allclose(found["conv"], 0, atol=1e-5)


# Leaves trained in full.


def with_head(trainable, value):
    return dataclasses.replace(trainable, full={"head": jnp.full((2, 3), value)})


BASE = {
    **{name: jnp.ones(shape) for name, (shape, _) in SHAPES.items()},
    "head": jnp.full((2, 3), 10.0),
}


def test_full_leaves_are_summed_as_distances_from_the_base():
    x, y = with_head(X, 11.0), with_head(Y, 14.0)
    both = adapters.linear([x, y, Z], [2, 0.5, 1], params=BASE)
    np.testing.assert_allclose(both.full["head"], 10 + 2 * 1 + 0.5 * 4)
    np.testing.assert_allclose(
        adapters.negate(x, params=BASE).full["head"], 10 - 1, rtol=1e-6
    )
    ties = adapters.ties([x, y], density=1.0, params=BASE)
    np.testing.assert_allclose(ties.full["head"], 10 + (1 + 4) / 2)


def test_full_leaves_need_the_base_unless_it_cancels():
    x, y = with_head(X, 11.0), with_head(Y, 14.0)
    np.testing.assert_allclose(adapters.average([x, y]).full["head"], 12.5)
    np.testing.assert_allclose(adapters.interpolate(x, y, 0.25).full["head"], 11.75)
    np.testing.assert_allclose(adapters.add([x, Y]).full["head"], 11)
    for wrong in (
        lambda: adapters.add([x, y]),
        lambda: adapters.scale(x, 2),
        lambda: adapters.average([x, Y]),
        lambda: adapters.ties([x, y], density=1.0),
        lambda: adapters.norms(x),
        lambda: adapters.cosine(x, y),
        lambda: adapters.stack([x, Y]),
    ):
        with pytest.raises(jlora.TreeError, match=r"'head': .* Pass params="):
            wrong()
    with pytest.raises(jlora.TreeError, match=r"params= has no weight 'head'"):
        adapters.add([x, y], params={"linear": 0})
    frozen = {**BASE, "head": jlora.MISSING}
    with pytest.raises(
        jlora.TreeError, match=r"The frozen side of a split lacks the leaves"
    ):
        adapters.add([x, y], params=frozen)


def test_weight_in_full_here_and_by_factors_there():
    x = Trainable(full={"linear": jnp.full((6, 5), 3.0)})
    both = adapters.add([x, Z], params=BASE)
    np.testing.assert_allclose(
        both.full["linear"], 3 + updates(Z)["linear"], rtol=1e-5, atol=1e-5
    )
    assert set(both.lora) == {"conv"}
    with pytest.raises(jlora.TreeError, match="'linear'"):
        adapters.add([x, Z])
    with pytest.raises(jlora.TreeError, match="in full and others by factors"):
        adapters.stack([x, Z])


# Stacks.


def test_unstack_is_the_inverse_of_stack():
    several = [X, Y, Z]
    stacked = adapters.stack(several)
    assert {x.shape[0] for x in jax.tree.leaves(stacked)} == {3}
    assert {f.scale for f in stacked.lora.values()} == {1.0}
    for out, own in zip(adapters.unstack(stacked), several, strict=True):
        assert_updates(out, updates(own))
        assert {p: f.rank for p, f in out.lora.items()} == {
            p: f.rank for p, f in own.lora.items()
        }


def test_fresh_adapters_keep_their_rank():
    fresh = dataclasses.replace(X.lora["linear"], b=jnp.zeros((2, 5)))
    stacked = adapters.stack([Trainable({"linear": fresh}), Y])
    assert adapters.unstack(stacked)[0].lora["linear"].rank == 2


def test_select_under_vmap_is_each_adapter():
    fn = lambda p, x: jnp.tanh(x @ p["linear"])  # noqa: E731
    several = [Trainable({"linear": t.lora["linear"]}) for t in (X, Y, Z)]
    stacked = adapters.stack(several)
    ids = jnp.array([2, -1, 0, 1, 1])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6)), "float32")
    apply = jlora.apply_lora(fn)
    each = jax.vmap(apply, (None, 0, 0))(BASE, adapters.select(stacked, ids), x)
    for i, out in zip(ids, each, strict=True):
        expected = apply(BASE, several[i] if i >= 0 else Trainable(), x[0])
        x = x[1:]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    one = adapters.select(stacked, 1)
    assert_updates(one, updates(several[1]))
    assert_updates(adapters.select(stacked, -1), total([(0, several[0])]))


def test_select_of_an_id_beyond_the_stack():
    stacked = adapters.stack([X, Y])
    with pytest.raises(jlora.TreeError, match=r"has 2 adapters, .* but got -2, 2, 7"):
        adapters.select(stacked, jnp.array([0, 2, 7, -2]))
    with pytest.raises(jlora.TreeError, match="ids must be integers"):
        adapters.select(stacked, jnp.array([0.0]))
    picked = jax.jit(adapters.select)(stacked, jnp.array([1, 2, -1, -2]))
    b = picked.lora["linear"].b
    np.testing.assert_allclose(b[0], stacked.lora["linear"].b[1])
    assert np.isnan(b[1]).all()
    assert (b[2] == 0).all()
    assert np.isnan(b[3]).all()


def test_select_of_full_leaves_is_the_base_for_minus_one():
    stacked = adapters.stack([with_head(X, 11.0), Y], params=BASE)
    heads = adapters.select(stacked, jnp.array([0, 1, -1]), params=BASE).full["head"]
    np.testing.assert_allclose(heads[:, 0, 0], [11, 10, 10])
    with pytest.raises(jlora.TreeError, match=r"'head': .* Pass params="):
        adapters.select(stacked, jnp.array([-1]))
    blind = jax.jit(adapters.select)(stacked, jnp.array([0, -1])).full["head"]
    assert blind[0, 0, 0] == 11
    assert np.isnan(blind[1]).all()


def test_what_is_no_stack_is_named():
    for wrong in (X, Trainable(), adapters.stack([X, Y]).lora["linear"]):
        with pytest.raises(
            jlora.TreeError, match=r"not a stack|Trainable|axis of adapters"
        ):
            adapters.select(wrong, 0)
    with pytest.raises(jlora.TreeError, match=r"trim=False"):
        jax.jit(adapters.unstack)(adapters.stack([X, Y]))
    traced = jax.jit(lambda s: adapters.unstack(s, trim=False))(adapters.stack([X, Y]))
    assert_updates(traced[1], updates(Y))


def test_gradient_of_a_selected_adapter_reaches_its_row_alone():
    stacked = adapters.stack([X, Y, Z])

    def loss(stacked):
        picked = adapters.select(stacked, jnp.array([1, -1, 1]))
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(picked))

    grads = jax.jit(jax.grad(loss))(stacked)
    for g, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(stacked), strict=True):
        assert (g[0] == 0).all()
        assert (g[2] == 0).all()
        np.testing.assert_allclose(g[1], 4 * leaf[1], rtol=1e-5)


# All of it.


def test_functions_work_under_vmap_on_stacks():
    x, y = (Trainable({"stacked": t.lora["stacked"]}) for t in (X, Y))
    stacked = adapters.stack([x, y])
    scaled = jax.vmap(adapters.scale)(stacked, jnp.array([2.0, 3.0]))
    short = jax.vmap(lambda t: adapters.truncate(t, 1))(stacked)
    norms = jax.vmap(adapters.norms)(stacked)
    for i, own in enumerate((x, y)):
        one = adapters.unstack(scaled)[i]
        assert_updates(one, total([(2.0 + i, own)]))
        for path in own.lora:
            np.testing.assert_allclose(
                norms[path][i], np.linalg.norm(update(own.lora[path])), rtol=1e-5
            )
    expected = updates(adapters.truncate(y, 1))
    assert_updates(adapters.unstack(short)[1], expected, tol=1e-4)


def test_shardings_survive(key):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = Spec(rank=2, alpha=4)
    a = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("x")))
    b = jax.device_put(jnp.ones((2, 12)), NamedSharding(mesh, P(None, "x")))
    x = Trainable({"w": Factors(a, b, spec)})
    both = adapters.add([x, adapters.scale(x, 0.5)]).lora["w"]
    assert both.a.addressable_shards[0].data.shape == (2, 4)
    assert both.b.addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_allclose(update(both), 1.5 * update(x.lora["w"]), rtol=1e-6)
    short = adapters.truncate(adapters.add([x, x]), 1).lora["w"]
    np.testing.assert_allclose(update(short), 2 * update(x.lora["w"]), rtol=1e-5)


def test_adapters_of_other_models_are_named():
    other = Trainable({"linear": factors("heads", 2, 0), "conv": factors("conv", 2, 0)})
    match = r"'linear' of adapter 1 is for a linear with Axes.* one model"
    for combine in (adapters.linear, adapters.stack, adapters.concat):
        with pytest.raises(jlora.TreeError, match=match):
            combine([X, other])
    wide = dataclasses.replace(X.lora["linear"], a=jnp.ones((9, 2)))
    with pytest.raises(jlora.TreeError, match=r"sizes \(9, 5\), that of .* \(6, 5\)"):
        adapters.add([X, Trainable({"linear": wide})])
    with pytest.raises(jlora.TreeError, match="1 is a dict"):
        adapters.stack([X, {}])
    with pytest.raises(jlora.TreeError, match=r"write linear\(\[x, y\]\)"):
        adapters.linear(X)
    with pytest.raises(jlora.TreeError, match="at least one adapter"):
        adapters.average([])
    with pytest.raises(jlora.TreeError, match="2 adapters and 1 weights"):
        adapters.linear([X, Y], [1])


def test_merged_adapters_are_switched_in_place_from_the_kept_base():
    """What docs/many_adapters.md advises: the base comes back bit for bit."""
    rng = np.random.default_rng(0)
    shape, _ = SHAPES["linear"]
    frozen = {"linear": jnp.asarray(rng.normal(size=shape), jnp.bfloat16)}
    x, y = (Trainable({"linear": t.lora["linear"]}) for t in (X, Y))
    kept = jax.tree.map(np.array, frozen)  # copies: a view would keep its memory
    switch = jax.jit(jlora.merge, donate_argnums=0)
    own = frozen["linear"]
    switch(frozen, x)
    assert own.is_deleted()
    again = switch(jax.device_put(kept), y)
    expected = jlora.merge(jax.device_put(kept), y)
    np.testing.assert_array_equal(again["linear"], expected["linear"])


WEIGHTS = ["2", float("nan"), float("inf"), True, None, [1.0], 1j]


@pytest.mark.parametrize("weight", [*WEIGHTS, jnp.ones(2), np.ones(1)], ids=repr)
def test_a_weight_that_is_not_a_number_is_refused(weight):
    own = Factors(jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1.0))
    x = Trainable({"w": own})
    with pytest.raises(jlora.ConfigError, match="linear takes a finite number for"):
        adapters.linear([x, x], [1, weight])
    with pytest.raises(jlora.ConfigError, match="scale takes a finite number for"):
        adapters.scale(x, weight)
    with pytest.raises(jlora.ConfigError, match="interpolate takes a finite number"):
        adapters.interpolate(x, x, weight)


def test_numbers_of_numpy_are_weights_and_ranks(tmp_path):
    own = Factors(jnp.ones((3, 2)), jnp.ones((2, 2)), Spec(rank=2, alpha=2.0))
    x = Trainable({"w": own})
    for half in (np.float16(0.5), np.array(0.5), jnp.float32(0.5)):
        same(adapters.scale(x, half).lora["w"].b, own.b / 2)
    cut = adapters.truncate(x, np.int64(1))
    assert cut.lora["w"].rank == 1
    jlora.save(tmp_path / "cut.safetensors", cut)


def test_a_share_that_is_not_a_number_is_refused():
    own = Factors(jnp.ones((3, 1)), jnp.ones((1, 2)), Spec(rank=1, alpha=1.0))
    with pytest.raises(
        jlora.ConfigError, match=r"density must be in \(0, 1\], got '1'"
    ):
        adapters.magnitude_prune([Trainable({"w": own})], density="1")
