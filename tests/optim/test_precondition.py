"""LoRA-FA and Riemannian preconditioning: PEFT's numbers, laws, and every axis role."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import optim
from jlora._core.algebra import delta
from jlora.factors import Axes, Factors, Spec

pytestmark = [pytest.mark.usefixtures("standard_dtypes"), pytest.mark.once]

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "peft.npz")


def golden(case, name):
    return GOLDEN[f"optimizer-{case}/{name}"]


def factors_of(case):
    a, b = golden(case, "lora_A").T, golden(case, "lora_B").T
    return jlora.Trainable(
        {"w": Factors(jnp.asarray(a), jnp.asarray(b), Spec(rank=3, alpha=7))}
    )


def steps(case, tx):
    """A and B after each of three steps, and the first gradient, as PEFT's script."""
    w, bias, x, target = (
        jnp.asarray(golden(case, name)) for name in ("weight", "bias", "x", "target")
    )

    def fn(p, x):
        return x @ p["w"] + bias[None]

    lora_fn = jlora.apply_lora(fn)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return 0.5 * jnp.sum((lora_fn({"w": w.T}, trainable, x) - target) ** 2)

        gradient = jax.grad(loss)(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable = factors_of(case)
    state = tx.init(trainable)
    out = []
    for _ in range(3):
        trainable, state = step(trainable, state)
        out.append((trainable.lora["w"].a, trainable.lora["w"].b))
    return out


def near(got, want, tolerance=1e-5):
    want = np.asarray(want)
    error = np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))
    assert error <= tolerance, error


ADAMW = optax.adamw(1e-2, weight_decay=1e-2)  # torch's default decay
SAME = {
    "riemannian_sgd": optim.riemannian(optax.sgd(1e-2)),
    "riemannian": optim.riemannian(ADAMW),
    "lora_plus": optim.lora_plus(optax.adamw(1e-2, weight_decay=0.0)),
    # PEFT's Adam adds eps before the bias correction, so no eps is the same in both.
    "lora_fa": optim.lora_fa(optax.adam(1e-2, eps=0)),
}


@pytest.mark.parametrize("case", SAME)
def test_three_steps_are_those_of_peft(case):
    for i, (a, b) in enumerate(steps(case, SAME[case]), start=1):
        near(a, golden(case, f"step{i}.lora_A").T)
        near(b, golden(case, f"step{i}.lora_B").T)


CORRECTED = [("lora_fa", 1e-5), ("lora_fa_bfloat16", 1e-2)]


@pytest.mark.parametrize(("case", "error"), CORRECTED)
def test_lora_fa_gives_the_optimizer_the_gradient_that_peft_gives_it(case, error):
    trainable = factors_of(case)
    gradient = jnp.asarray(golden(case, "grad.lora_B").T)
    own = dataclasses.replace(trainable.lora["w"], b=gradient)
    tx = optim.lora_fa(optax.identity())
    updates, _ = tx.update(jlora.Trainable({"w": own}), tx.init(trainable), trainable)
    got, want = updates.lora["w"].b, golden(case, "corrected.lora_B").T
    near(got, want, error)
    if case == "lora_fa_bfloat16":  # what PEFT does unless told otherwise
        assert np.max(np.abs(got - want)) > 1e-3 * np.max(np.abs(want))
    assert not updates.lora["w"].a.any()


AXES = {
    "matrix": ((6, 5), Axes()),
    "heads": ((6, 2, 3), Axes((), (0,), (1, 2))),
    "output of heads": ((2, 3, 6), Axes((), (0, 1), (2,))),
    "experts": ((3, 6, 5), Axes((0,), (1,), (2,))),
    "stacked heads, output first": ((2, 3, 4, 6), Axes((0,), (3,), (1, 2))),
    "convolution": ((3, 4, 5), Axes((), (0, 1), (2,))),
}


def random_factors(shape, axes, seed=0, **fields):
    rng = np.random.default_rng(seed)
    spec = Spec(axes=axes, rank=2, alpha=3, **fields)
    a, b = axes.a_shape(shape, 2), axes.b_shape(shape, 2)
    return Factors(
        jnp.asarray(rng.normal(size=a), "float32"),
        jnp.asarray(rng.normal(size=b), "float32"),
        spec,
    )


def matrices(own, shape):
    """A `[batch, in, rank]` and B `[batch, rank, out]` of any factors."""
    batch, fan_in, fan_out = own.spec.axes.sizes(shape)
    a = np.asarray(own.a, "float64").reshape(batch, fan_in, own.rank)
    return a, np.asarray(own.b, "float64").reshape(batch, own.rank, fan_out)


def on_one(tx, gradient, own):
    grads, params = jlora.Trainable({"w": gradient}), jlora.Trainable({"w": own})
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates.lora["w"]


@pytest.mark.parametrize("name", AXES)
def test_every_axis_role_is_a_matrix_a_batch_entry(name):
    shape, axes = AXES[name]
    own, gradient = random_factors(shape, axes), random_factors(shape, axes, 1)
    a, b = matrices(own, shape)
    g_a, g_b = matrices(gradient, shape)
    got = matrices(on_one(optim.lora_fa(optax.identity()), gradient, own), shape)
    want = np.linalg.inv(a.mT @ a) @ g_b / 1.5**2
    np.testing.assert_allclose(got[1], want, rtol=1e-4, atol=1e-5)
    assert not got[0].any()
    table = dataclasses.replace(own, spec=dataclasses.replace(own.spec, op="embedding"))
    got = matrices(on_one(optim.lora_fa(optax.identity()), gradient, table), shape)
    want = g_a @ np.linalg.inv(b @ b.mT) / 1.5**2
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)
    assert not got[1].any()
    tx = optim.riemannian(optax.identity(), damping=0.5)
    got = matrices(on_one(tx, gradient, own), shape)
    eye = 0.5 * np.eye(2)
    np.testing.assert_allclose(
        got[0], g_a @ np.linalg.inv(b @ b.mT + eye), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        got[1], np.linalg.inv(a.mT @ a + eye) @ g_b, rtol=1e-4, atol=1e-5
    )


def test_parts_of_a_fused_weight_are_corrected_each_by_itself():
    shape, axes = (6, 9), Axes()
    parts = jlora.FusedParts(axis=1, sizes=(2, 4, 3), ranks=(1, 0, 2))
    spec = Spec(axes=axes, rank=3, alpha=4, parts=parts)
    rng = np.random.default_rng(0)
    own, gradient = (
        Factors(
            jnp.asarray(rng.normal(size=(6, 3)), "float32"),
            jnp.asarray(rng.normal(size=(3, 3)), "float32"),
            spec,
        )
        for _ in range(2)
    )
    corrected = on_one(optim.lora_fa(optax.identity()), gradient, own)
    tx = optim.riemannian(optax.identity(), damping=0.5)
    preconditioned = on_one(tx, gradient, own)
    assert delta(own).shape == shape
    for ranks, size in ((slice(0, 1), 2), (slice(1, 3), 3)):
        rank = ranks.stop - ranks.start
        part = Spec(axes=axes, rank=rank, alpha=4)
        alone, its_gradient = (
            Factors(f.a[:, ranks], f.b[ranks, :size], part) for f in (own, gradient)
        )
        want = on_one(optim.lora_fa(optax.identity()), its_gradient, alone)
        np.testing.assert_allclose(corrected.b[ranks, :size], want.b, rtol=1e-4)
        want = on_one(tx, its_gradient, alone)
        np.testing.assert_allclose(preconditioned.a[:, ranks], want.a, rtol=1e-4)
        np.testing.assert_allclose(preconditioned.b[ranks, :size], want.b, rtol=1e-4)


def test_riemannian_step_does_not_depend_on_how_the_product_is_shared():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)), "float32")
    own = random_factors((6, 5), Axes())
    mix = jnp.array([[2.0, 1.0], [0.0, 0.5]])
    other = dataclasses.replace(own, a=own.a @ mix, b=jnp.linalg.inv(mix) @ own.b)

    def change(own):
        gradient = dataclasses.replace(own, a=w @ own.b.T, b=own.a.T @ w)
        step = on_one(optim.riemannian(optax.sgd(1.0), damping=1e-9), gradient, own)
        return step.a @ own.b + own.a @ step.b

    np.testing.assert_allclose(change(own), change(other), rtol=1e-4, atol=1e-4)


def test_lora_fa_is_the_best_step_of_b():
    """The corrected gradient is the least-squares solution of `s a x s = dense`."""
    dense = np.random.default_rng(2).normal(size=(6, 5))
    own = random_factors((6, 5), Axes())
    scale = own.scale
    gradient = dataclasses.replace(own, b=jnp.asarray(scale * own.a.T @ dense))
    gradient = jax.tree.map(lambda x: x.astype("float32"), gradient)
    got = on_one(optim.lora_fa(optax.identity()), gradient, own).b
    want = np.linalg.lstsq(scale * np.asarray(own.a), dense, rcond=None)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_dependent_columns_of_a_give_finite_steps():
    own = random_factors((6, 5), Axes())
    own = dataclasses.replace(own, a=jnp.tile(own.a[:, :1], (1, 2)))
    for tx in (
        optim.lora_fa(optax.sgd(1.0)),
        optim.riemannian(optax.sgd(1.0)),
    ):
        step = on_one(tx, own, own)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(step))


def mixed():
    dora = dataclasses.replace(
        random_factors((6, 5), Axes(), 0, method="dora"), magnitude=jnp.ones(5)
    )
    ada = dataclasses.replace(
        random_factors((6, 5), Axes(), method="adalora"), magnitude=jnp.ones(2)
    )
    vera = Factors(
        jnp.ones(2),
        jnp.ones(5),
        Spec(axes=Axes(), rank=2, alpha=2, method="vera", shape=(6, 5)),
    )
    low = jax.tree.map(
        lambda x: x.astype("bfloat16"), random_factors((4, 3), Axes(), op="embedding")
    )
    rows = Factors(
        None,
        jnp.ones((2, 3)),
        Spec(op="embedding", rank=2, alpha=2, shape=(7, 3), rows=(5, 1)),
    )
    lora = {"dora": dora, "ada": ada, "vera": vera, "table": low, "rows": rows}
    full = {
        "head/kernel": jnp.ones((5, 2)),
        "head/bias": jnp.ones(2),
        "layers/LayerNorm_0/weight": jnp.ones((3, 5)),
        "q/bias": jnp.ones((2, 3)),
        "layer_norm/scale": jnp.ones((3, 5)),
        "linear/b": jnp.ones((3, 5)),
    }
    return jlora.Trainable(lora, full)


def test_lora_fa_keeps_state_for_what_is_trained_and_no_other_leaf_changes():
    trainable = mixed()
    tx = optim.lora_fa(optax.adam(0.1))
    state = tx.init(trainable)
    trained = sum(x.size for x in jax.tree.leaves(trainable)) - 6 * 2 - 2 * 3
    assert sum(x.size for x in jax.tree.leaves(state)) == 1 + 2 * trained
    updates, state = tx.update(trainable, state, trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)
    assert not updates.lora["dora"].a.any()
    assert not updates.lora["table"].b.any()
    moved = (
        updates.lora["dora"].b,
        updates.lora["dora"].magnitude,
        *jax.tree.leaves([updates.lora[part] for part in ("ada", "vera", "rows")]),
        updates.lora["table"].a,
        *updates.full.values(),
    )
    assert all(bool(x.any()) for x in moved)
    dtypes = jax.tree.map(lambda x: x.dtype, trainable)
    assert jax.tree.map(lambda x: x.dtype, updates) == dtypes
    plain = optax.adam(0.1)
    want, _ = plain.update(trainable, plain.init(trainable), trainable)
    for part in ("ada", "vera", "rows"):
        jax.tree.map(np.testing.assert_array_equal, updates.lora[part], want.lora[part])


@pytest.mark.parametrize("wrap", [optim.lora_fa, optim.riemannian])
def test_wrappers_compose_with_masked_schedules_and_lora_plus(wrap):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    plus = optax.inject_hyperparams(
        lambda ratio: optim.lora_plus(wrap(chain), ratio=ratio)
    )
    tx = optim.masked(plus(ratio=4.0))
    trainable = mixed()
    tree = {"frozen": {"w": jnp.ones(7)}, "trainable": trainable}
    state = tx.init(tree)
    updates, state = jax.jit(tx.update)(tree, state, tree)
    out = optax.apply_updates(tree, updates)
    np.testing.assert_array_equal(out["frozen"]["w"], tree["frozen"]["w"])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
    assert 7 not in [x.size for x in jax.tree.leaves(state)]


def test_preconditioners_need_params_and_a_positive_damping():
    trainable = mixed()
    for tx, name in (
        (optim.lora_fa, "lora_fa"),
        (optim.riemannian, "riemannian"),
    ):
        own = tx(optax.sgd(1.0))
        with pytest.raises(ValueError, match=f"{name} needs the factors themselves"):
            own.update(trainable, own.init(trainable))
        rest = dict.fromkeys(("a", "magnitude", "full"), optax.sgd(1.0))
        apart = optax.multi_transform({"b": own, **rest}, optim.labels)
        with pytest.raises(jlora.TreeError, match=f"{name} needs A and B together"):
            apart.update(trainable, apart.init(trainable), trainable)
    with pytest.raises(ValueError, match="damping must be a positive number, got 0"):
        optim.riemannian(optax.sgd(1.0), damping=0)


def test_decay_mask_leaves_out_magnitudes_vectors_biases_and_norms():
    tree = {"frozen": {"w": jnp.ones((2, 2))}, "trainable": mixed()}
    mask = optim.decay_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert mask["frozen"] == {"w": False}
    got = mask["trainable"]
    assert (got.lora["dora"].a, got.lora["dora"].b) == (True, True)
    assert (got.lora["ada"].a, got.lora["ada"].b) == (True, True)
    assert got.lora["dora"].magnitude is got.lora["ada"].magnitude is False
    assert (got.lora["vera"].a, got.lora["vera"].b) == (False, False)
    assert (got.lora["rows"].a, got.lora["rows"].b) == (None, True)
    assert [path for path, decays in got.full.items() if decays] == ["head/kernel"]


def test_decay_mask_in_adamw_decays_the_factors_alone():
    trainable = mixed()
    tx = optax.adamw(0.1, weight_decay=0.5, mask=optim.decay_mask)
    nothing = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(nothing, tx.init(trainable), trainable)
    moved = jax.tree.map(lambda x: bool(x.any()), updates)
    assert moved == optim.decay_mask(trainable)


def test_lora_fa_learns_in_a_tied_embedding_from_a_fresh_start():
    params = {"table": jnp.eye(6, 4), "w": jnp.eye(4)}

    def fn(p, ids):
        return jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T

    config = jlora.LoraConfig(rank=2, targets=("table", "w"))
    ids = jnp.arange(6)
    plan = jlora.plan(fn, params, ids, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    lora_fn = jlora.apply_lora(fn)

    @jax.jit
    def step(trainable):
        gradient = jax.grad(lambda t: jnp.mean(lora_fn(frozen, t, ids) ** 2))(trainable)
        tx = optim.lora_fa(optax.sgd(0.1))
        updates, _ = tx.update(gradient, tx.init(trainable), trainable)
        return updates

    updates = step(trainable)
    moved = {
        path: (bool(own.a.any()), bool(own.b.any()))
        for path, own in updates.lora.items()
    }
    assert moved == {"table": (True, False), "w": (False, True)}
