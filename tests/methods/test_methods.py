"""Methods beside LoRA: their formulas, their leaves, and what they share with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.methods import leaf_shapes, low_rank_pair
from jlora.methods.vera import shared

pytestmark = pytest.mark.once

METHODS = ["lora", "dora", "vera", "adalora", "lora_xs", "mica"]


def model(p, ids):
    """A lookup, a stack of layers under scan, heads, a convolution, a tied head."""
    x = p["embed"][ids]
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])
    heads = jnp.einsum("bld,dhk->blhk", x, p["heads"])
    x = x + jnp.einsum("blhk,hkd->bld", jnp.tanh(heads), p["out"])
    x = jax.lax.conv_general_dilated(
        x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return x @ p["embed"].T


SHAPES = {
    "embed": (11, 6),
    "layers": (2, 6, 6),
    "heads": (6, 2, 3),
    "out": (2, 3, 6),
    "conv": (3, 6, 6),
}
IDS = jnp.array([[0, 3, 3, 10], [7, 1, 0, 2]])


def weights(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(7), len(SHAPES))
    pairs = zip(SHAPES.items(), keys, strict=True)
    return {k: jax.random.normal(key, s, dtype) / 2 for (k, s), key in pairs}


def adapt(dtype=jnp.float32, targets="*", **settings):
    """Returns `(params, plan, frozen, trainable)` with random factors."""
    params = weights(dtype)
    config = jlora.LoraConfig(rank=2, alpha=3, targets=targets, **settings)
    plan = jlora.plan(model, params, IDS, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    return params, plan, frozen, randomised(trainable)


def randomised(trainable):
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return treedef.unflatten(
        x + jax.random.normal(k, x.shape, x.dtype) / 3 for x, k in pairs
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base(method):
    params, plan, _, _ = adapt(method=method)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    out = jax.jit(jlora.apply_lora(model, on_merge="error"))(frozen, trainable, IDS)
    np.testing.assert_allclose(out, jax.jit(model)(params, IDS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_factored_is_merged_in_value_and_gradient(method):
    _, _, frozen, trainable = adapt(method=method)
    if method == "dora":  # a column without length learns to have one
        heads = trainable.lora["heads"]
        short = heads.magnitude.at[0, 0].set(0.0).at[0, 1].multiply(-1.0)
        heads = dataclasses.replace(heads, magnitude=short)
        trainable = dataclasses.replace(
            trainable, lora={**trainable.lora, "heads": heads}
        )
    lora_fn = jlora.apply_lora(model, on_merge="error")

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.cos(run(t)))))

    value, gradient = loss(lambda t: lora_fn(frozen, t, IDS))(trainable)
    same, expected = loss(lambda t: model(jlora.merge(frozen, t), IDS))(trainable)
    np.testing.assert_allclose(value, same, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4),
        gradient,
        expected,
    )
    fixed = [
        g
        for g, name in zip(
            jax.tree.leaves(gradient),
            jax.tree.leaves(jlora.optim.labels(trainable)),
            strict=True,
        )
        if name == "frozen"
    ]
    assert len(fixed) == {"lora_xs": 10, "mica": 5}.get(method, 0)
    assert not any(x.any() for x in fixed)


@pytest.mark.parametrize("method", METHODS)
def test_leaves_and_counts_are_as_planned(method):
    _, plan, _, trainable = adapt(method=method)
    for row in plan.rows():
        factors = trainable.lora[row.path]
        found = {k: getattr(factors, k) for k in ("a", "b", "magnitude")}
        shapes = {k: x.shape for k, x in found.items() if x is not None}
        assert row.spec is not None
        assert shapes == leaf_shapes(row.spec, row.shape)
        trained = jax.tree.map(
            lambda x, is_trained: x.size * is_trained,
            factors,
            jlora.optim.mask(jlora.Trainable({"": factors})).lora[""],
        )
        assert row.trained == sum(jax.tree.leaves(trained))


@pytest.mark.parametrize("method", METHODS)
def test_files_and_reports_know_every_method(method, tmp_path):
    _, plan, frozen, trainable = adapt(method=method)
    jlora.checkpoint.save(tmp_path, trainable)
    restored = jlora.checkpoint.restore(tmp_path).trainable
    assert jax.tree.structure(restored) == jax.tree.structure(trainable)
    jax.tree.map(np.testing.assert_array_equal, restored, trainable)
    entry = next(
        e for e in jlora.report(frozen, trainable).entries if e.path == "heads"
    )
    merged = jlora.merge(frozen, trainable)["heads"]
    np.testing.assert_allclose(
        entry.update, np.linalg.norm(merged - frozen["heads"]), rtol=1e-4
    )
    assert entry.trained == next(r for r in plan.rows() if r.path == "heads").trained


def test_lora_xs_is_the_formula_of_the_paper():
    params, plan, frozen, trainable = adapt(method="lora_xs", targets="{layers,heads}")
    for path in ("layers", "heads"):
        w = np.asarray(params[path], np.float64).reshape(-1, 6, 6)
        _, fresh = jlora.split(jax.random.key(0), params, plan)
        r = np.asarray(trainable.lora[path].magnitude, np.float64).reshape(-1, 2, 2)
        u, s, vt = np.linalg.svd(w)
        # The signs of singular vectors are those that split found.
        own = np.asarray(fresh.lora[path].b).reshape(-1, 2, 6)
        signs = np.sign(np.einsum("nro,nro->nr", own, vt[:, :2]))
        a = u[..., :2] * (s[:, :2] * signs)[:, None]
        change = 1.5 * a @ r @ (vt[:, :2] * signs[..., None])
        start = dataclasses.replace(
            fresh.lora[path], magnitude=r.reshape(trainable.lora[path].magnitude.shape)
        )
        merged = jlora.merge(frozen, jlora.Trainable({path: start}))[path]
        np.testing.assert_allclose(
            merged, (w + change).reshape(merged.shape), rtol=1e-4, atol=1e-5
        )


def test_dora_is_the_formula_of_the_paper():
    _, _, frozen, trainable = adapt(method="dora")
    factors = trainable.lora["heads"]
    w, a, b = (
        np.asarray(x, np.float64) for x in (frozen["heads"], *low_rank_pair(factors))
    )
    total = w + 1.5 * np.einsum("dr,rhk->dhk", a, b)
    length = np.sqrt((total**2).sum(0))
    np.testing.assert_allclose(
        jlora.merge(frozen, trainable)["heads"],
        np.asarray(factors.magnitude) * total / length,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("alpha", [1e-30, 1e20, 1e35])
def test_dora_at_a_scale_whose_square_is_out_of_reach(alpha):
    """B that makes up for the scale gives what it gives at a scale of 1."""
    _, _, frozen, trainable = adapt(method="dora")

    def at(scale):
        return jlora.Trainable({
            path: dataclasses.replace(
                f,
                spec=dataclasses.replace(f.spec, alpha=float(f.rank * scale)),
                b=f.b / scale,
            )
            for path, f in trainable.lora.items()
        })  # fmt: skip

    plain, far = at(1.0), at(2.0 ** round(np.log2(alpha)))
    apply = jlora.apply_lora(model, on_merge="allow")
    expected, actual = (apply(frozen, t, IDS) for t in (plain, far))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [1e22, 1e38])
def test_dora_of_a_length_out_of_reach_is_nan_and_not_zero(alpha):
    _, _, frozen, trainable = adapt(method="dora", targets="heads")
    f = trainable.lora["heads"]
    spec = dataclasses.replace(f.spec, alpha=alpha)
    far = jlora.Trainable({"heads": dataclasses.replace(f, spec=spec)})
    assert np.isnan(jlora.merge(frozen, far)["heads"]).all()
    assert np.isnan(jlora.apply_lora(model)(frozen, far, IDS)).all()


def test_dora_starts_with_the_lengths_of_the_columns():
    params, plan, _, _ = adapt(method="dora")
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    for path, axis in (("embed", 0), ("layers", 1), ("heads", 0), ("conv", (0, 1))):
        np.testing.assert_allclose(
            trainable.lora[path].magnitude,
            np.sqrt((np.asarray(params[path]) ** 2).sum(axis)),
            rtol=1e-6,
        )


def test_dora_never_forms_the_sum():
    w = jnp.ones((32, 48))

    def fn(p, x):
        return x @ p["w"]

    config = jlora.LoraConfig(rank=2, targets="w", method="dora")
    x = jnp.ones((3, 32))
    plan = jlora.plan(fn, {"w": w}, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), {"w": w}, plan)
    lora_fn = jlora.apply_lora(fn, form="factored")

    def loss(t):
        return lora_fn(frozen, t, x).sum()

    for run in (loss, jax.grad(loss)):
        eqns = jax.make_jaxpr(run)(trainable).jaxpr.eqns
        products = [e for e in eqns if "dot" in e.primitive.name]
        assert products
        assert all(e.outvars[0].aval.shape != w.shape for e in products)

    longer = jax.tree.map(lambda leaf: 2 * leaf, trainable)
    out, pull = jax.vjp(lambda t: lora_fn(frozen, t, x), longer)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == out.shape]
    assert all((leaf == out).all() for leaf in kept)  # not the product before its gain


def test_dora_cannot_be_unmerged():
    _, _, frozen, trainable = adapt(method="dora")
    with pytest.raises(jlora.TreeError, match="Keep frozen"):
        jlora.unmerge(jlora.merge(frozen, trainable), trainable)


def test_dora_extracts_the_lengths():
    params, plan, frozen, trainable = adapt(method="dora", targets="heads")
    tuned = jlora.merge(frozen, trainable)
    found = jlora.extract(tuned, params, plan)
    np.testing.assert_allclose(
        found.lora["heads"].magnitude, trainable.lora["heads"].magnitude, rtol=1e-5
    )


def test_vera_shares_its_matrices_and_trains_vectors():
    _, _, _, trainable = adapt(method="vera", targets="{layers,heads}")
    one, other = trainable.lora["layers"], trainable.lora["heads"]
    assert one.a.shape == (2, 2)
    assert one.b.shape == (2, 6)
    a, b = shared(one.spec, jnp.float32)
    x, y = low_rank_pair(one)
    np.testing.assert_allclose(x, a[None] * one.a[:, None, :], rtol=1e-6)
    np.testing.assert_allclose(y, b[None] * one.b[:, None, :], rtol=1e-6)
    again, _ = shared(other.spec, jnp.float32)
    np.testing.assert_array_equal(a, again)  # both have a fan-in of 6


def test_vera_takes_a_rank_above_the_weights():
    def fn(p, x):
        return x @ p["w"]

    params = {"w": jnp.ones((4, 4))}
    config = jlora.LoraConfig(rank=64, method="vera")
    plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
    assert plan.trained_count == 64 + 4


def test_adalora_is_a_scaled_product():
    _, _, _, trainable = adapt(method="adalora", targets="heads")
    factors = trainable.lora["heads"]
    a, b = low_rank_pair(factors)
    expected = np.asarray(factors.a) * np.asarray(factors.magnitude)
    np.testing.assert_allclose(a, expected, rtol=1e-6)
    np.testing.assert_array_equal(b, factors.b)


def rows_of(ids, **settings):
    config = jlora.LoraConfig(
        rank=2, targets="heads", train=(jlora.TokenRows("embed", ids),), **settings
    )
    params = weights()
    plan = jlora.plan(model, params, IDS, config=config)
    return params, plan, *jlora.split(jax.random.key(0), params, plan)


def test_only_the_chosen_rows_exist_and_move():
    params, plan, frozen, trainable = rows_of((10, 3))
    factors = trainable.lora["embed"]
    assert factors.a is None
    assert factors.b.shape == (2, 6)
    assert plan.trained_count == 2 * 6 + 2 * (6 + 6)
    moved = dataclasses.replace(factors, b=jnp.stack([jnp.ones(6), 2 * jnp.ones(6)]))
    trainable = dataclasses.replace(trainable, lora={**trainable.lora, "embed": moved})
    expected = params["embed"].at[10].add(1.0).at[3].add(2.0)
    merged = jlora.merge(frozen, trainable)
    np.testing.assert_allclose(merged["embed"], expected, rtol=1e-6)
    out = jlora.apply_lora(model, on_merge="error")(frozen, trainable, IDS)
    np.testing.assert_allclose(out, model(merged, IDS), rtol=1e-4, atol=1e-4)
    back = jlora.LoraConfig.from_json(plan.config.to_json())
    assert back == plan.config


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (jlora.TokenRows("embed", (11,)), "has 11 rows, but no row 11"),
        (jlora.TokenRows("heads", (0,)), "is not an embedding table"),
        (jlora.TokenRows("emb", (0,)), "nearest: 'embed'"),
    ],
)
def test_rows_that_cannot_be(rows, words):
    config = jlora.LoraConfig(rank=2, targets="out", train=(rows,))
    with pytest.raises(jlora.TargetError, match=words):
        jlora.plan(model, weights(), IDS, config=config)


@pytest.mark.parametrize("ids", [(), (1, 1), (-1,), (0.5,), "12"])
def test_rows_are_numbers_each_once(ids):
    with pytest.raises(jlora.ConfigError, match="row numbers"):
        jlora.TokenRows("embed", ids)


def fused(p, x):
    """One kernel for q, k and v of unequal sizes, used whole."""
    q, k, v = jnp.split(x @ p["qkv"], [8, 12], axis=-1)
    return jnp.tanh(q).sum() + jnp.tanh(k).sum() + v.sum()


def test_parts_of_a_fused_weight_have_ranks_of_their_own():
    params = {"qkv": jax.random.normal(jax.random.key(0), (6, 16))}
    x = jax.random.normal(jax.random.key(1), (3, 6))
    parts = jlora.FusedParts(axis=-1, sizes=(8, 4, 4), ranks=(2, 0, 1))
    config = jlora.LoraConfig(alpha=4, rules=(jlora.Rule("qkv", parts=parts),))
    plan = jlora.plan(fused, params, x, config=config)
    assert plan.trained_count == 3 * (6 + 8)
    frozen, trainable = jlora.split(jax.random.key(2), params, plan)
    trainable = randomised(trainable)
    factors = trainable.lora["qkv"]
    a, b = np.asarray(factors.a), np.asarray(factors.b)
    expected = np.asarray(params["qkv"]).copy()
    expected[:, :8] += 4 / 2 * a[:, :2] @ b[:2]
    expected[:, 12:] += 4 / 1 * a[:, 2:] @ b[2:, :4]
    merged = jlora.merge(frozen, trainable)["qkv"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)
    loss = jlora.apply_lora(fused, on_merge="error")
    value, gradient = jax.value_and_grad(lambda t: loss(frozen, t, x))(trainable)
    np.testing.assert_allclose(value, fused({"qkv": merged}, x), rtol=1e-4)
    expected = jax.grad(lambda t: fused(jlora.merge(frozen, t), x))(trainable)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        gradient,
        expected,
    )
    assert jlora.LoraConfig.from_json(config.to_json()) == config
    spec = trainable.lora["qkv"].spec
    assert type(spec).from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (jlora.FusedParts(0, (6,), (1,)), "not one of its fan-out axes"),
        (jlora.FusedParts(1, (8, 4), (1, 1)), "add up to 16"),
        (jlora.FusedParts(1, (8, 8), (1,)), "a rank for each"),
        (jlora.FusedParts(1, (8, 8), (0, 0)), "must be in 0 to"),
        (jlora.FusedParts(1, (), ()), "add up to 16"),
        (jlora.FusedParts(1, (12, 4), (1, 5)), "must be in 0 to"),
    ],
)
def test_parts_that_cannot_be(parts, words):
    config = jlora.LoraConfig(rules=(jlora.Rule("qkv", parts=parts),))
    params, x = {"qkv": jnp.ones((6, 16))}, jnp.ones((3, 6))
    with pytest.raises(jlora.TargetError, match=words):
        jlora.plan(fused, params, x, config=config)


def test_methods_are_chosen_leaf_by_leaf():
    rules = (jlora.Rule("out", method="dora"), jlora.Rule("conv", method="vera"))
    _, _, frozen, trainable = adapt(rules=rules)
    methods = {path: f.spec.method for path, f in trainable.lora.items()}
    assert methods["out"] == "dora"
    assert methods["conv"] == "vera"
    assert methods["heads"] == "lora"
    out = jlora.apply_lora(model, on_merge="error")(frozen, trainable, IDS)
    merged = jlora.merge(frozen, trainable)
    np.testing.assert_allclose(out, model(merged, IDS), rtol=1e-3, atol=1e-3)


def test_a_misshapen_magnitude_is_named():
    _, _, frozen, trainable = adapt(method="dora", targets="heads")
    factors = trainable.lora["heads"]
    bad = dataclasses.replace(factors, magnitude=jnp.ones(3))
    with pytest.raises(jlora.TreeError, match="magnitude of 'heads' has shape"):
        jlora.merge(frozen, jlora.Trainable({"heads": bad}))


def test_dora_in_low_precision_stays_near_the_merged_weights():
    _, _, frozen, trainable = adapt(jnp.bfloat16, method="dora")
    lora_fn = jlora.apply_lora(model, on_merge="error")
    out = lora_fn(frozen, trainable, IDS).astype(jnp.float32)
    expected = model(jlora.merge(frozen, trainable), IDS).astype(jnp.float32)
    np.testing.assert_allclose(out, expected, rtol=0.1, atol=0.15)


def test_adalora_prunes_to_its_budget_and_trains(standard_dtypes):
    params, plan, frozen, _ = adapt(method="adalora", targets="{layers,heads}")
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    goal = model(params, IDS) + 1.0
    steps = 12
    tx = jlora.optim.adalora(
        optax.adam(3e-2), target_rank=1, steps=steps, warmup=2, final=4
    )
    lora_fn = jlora.apply_lora(model, on_merge="error")

    def loss(trainable):
        error = jnp.mean((lora_fn(frozen, trainable, IDS) - goal) ** 2)
        return error + 0.1 * jlora.optim.orthogonality_penalty(trainable)

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, kept, values = tx.init(trainable), [], []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
        every = [f.magnitude for f in trainable.lora.values()]
        kept.append(sum(int((m != 0).sum()) for m in every))
    assert kept[:2] == [6, 6]
    assert kept[-1] == 3  # two layers and the heads, one singular value each
    assert kept == sorted(kept, reverse=True)
    assert kept[-4:] == [3] * 4
    assert values[-1] < values[0]


def test_adalora_wants_its_method():
    _, _, _, trainable = adapt()
    tx = jlora.optim.adalora(optax.sgd(1.0), target_rank=1, steps=2)
    with pytest.raises(jlora.TreeError, match="method='adalora'"):
        tx.init(trainable)
    _, _, _, trainable = adapt(method="adalora", targets="heads")
    rest = dict.fromkeys(("b", "magnitude"), optax.sgd(1.0))
    apart = optax.multi_transform({"a": tx, **rest}, jlora.optim.labels)
    with pytest.raises(jlora.TreeError, match="singular values together"):
        apart.init(trainable)
    with pytest.raises(jlora.ConfigError, match="must fit in 2 steps"):
        jlora.optim.adalora(optax.sgd(1.0), target_rank=1, steps=2, warmup=3)


def test_the_orthogonality_penalty_is_the_mean_of_norms():
    _, _, _, trainable = adapt(method="adalora", targets="{layers,out}")
    expected = []
    for f in trainable.lora.values():
        layers = zip(f.a, f.b, strict=True) if f.spec.axes.batch else [(f.a, f.b)]
        for a, b in layers:
            a, b = np.asarray(a).reshape(-1, 2), np.asarray(b).reshape(2, -1)
            expected += [np.linalg.norm(a.T @ a - np.eye(2))]
            expected += [np.linalg.norm(b @ b.T - np.eye(2))]
    actual = jlora.optim.orthogonality_penalty(trainable)
    np.testing.assert_allclose(actual, np.mean(expected), rtol=1e-5)
