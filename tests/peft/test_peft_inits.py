"""Inits beside PEFT's own results, which `golden/make_peft_inits.py` wrote."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.once

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DATA = np.load(GOLDEN / "peft_inits.npz")
LAYERS = ("first", "second")
SCALE = 6 / 4
X = jnp.asarray(DATA["x"])


def fn(p, x):
    return jnp.tanh(x @ p["first"]) @ p["second"]


def started(init, rank=4, **more):
    params = {name: jnp.asarray(DATA[f"w/{name}"].T) for name in LAYERS}
    config = jlora.LoraConfig(rank=rank, alpha=6, init=init, targets=LAYERS)
    plan = jlora.plan(fn, params, X, config=config)
    batches = more.pop("batches", [X])
    found = jlora.Statistics()
    if init == "lora_ga":

        def loss(p, x):
            return jnp.sum(jnp.tanh(fn(p, x)) ** 2)

        found = jlora.gradient_statistics(loss, params, plan, batches)
    elif init in ("eva", "corda", "corda_kpm"):
        found = jlora.activation_statistics(fn, params, plan, batches)
    if more.get("move"):
        plan = jlora.redistribute_ranks(plan, found)
    return jlora.split(jax.random.key(0), params, plan, statistics=found)


def same_up_to_signs(got, want, **tolerance):
    """Columns are equal, each but for its sign."""
    signs = np.sign(np.sum(got * want, axis=0, keepdims=True))
    np.testing.assert_allclose(got * signs, want, **tolerance)


@pytest.mark.parametrize(
    ("init", "name"), [("corda", "corda_ipm"), ("corda_kpm", "corda_kpm")]
)
def test_corda(init, name):
    frozen, trainable = started(init)
    for layer in LAYERS:
        factors = trainable.lora[layer]
        a, b = DATA[f"{name}/{layer}/lora_A"].T, DATA[f"{name}/{layer}/lora_B"].T
        product = factors.scale * np.asarray(factors.a) @ factors.b
        np.testing.assert_allclose(product, SCALE * a @ b, atol=2e-4)
        base = DATA[f"{name}/{layer}/base_layer"].T
        np.testing.assert_allclose(frozen[layer], base, atol=2e-4)
        # PEFT divides the moments by the largest input, jlora by their mean diagonal:
        # one number apart
        ratios = np.linalg.norm(factors.a, axis=0) / np.linalg.norm(a, axis=0)
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_lora_ga():
    frozen, trainable = started("lora_ga")
    for layer in LAYERS:
        a, b = (DATA[f"lora_ga/{layer}/lora_{k}"].T for k in "AB")
        factors = trainable.lora[layer]
        same_up_to_signs(np.asarray(factors.a), a, atol=1e-3)
        same_up_to_signs(np.asarray(factors.b).T, b.T, rtol=1e-2, atol=1e-3)
        back = frozen[layer] + factors.scale * factors.a @ factors.b
        np.testing.assert_allclose(back, DATA[f"w/{layer}"].T, atol=1e-5)


def test_eva():
    frozen, trainable = started("eva", batches=[X, X])
    for layer in LAYERS:
        a = DATA[f"eva/{layer}/lora_A"].T
        np.testing.assert_allclose(trainable.lora[layer].a, a, atol=2e-2)
        assert not trainable.lora[layer].b.any()
        np.testing.assert_array_equal(frozen[layer], DATA[f"w/{layer}"].T)


def test_eva_moves_ranks_as_peft_does():
    _, trainable = started("eva", batches=[X, X], move=True)
    for layer in LAYERS:
        a = DATA[f"eva_rho/{layer}/lora_A"].T
        assert trainable.lora[layer].rank == a.shape[1]
        assert trainable.lora[layer].scale == pytest.approx(SCALE)
        np.testing.assert_allclose(trainable.lora[layer].a, a, atol=5e-2)


@pytest.mark.parametrize(
    "case", ["init-pissa-linear", "init-pissa-conv1d_hf", "init-olora-linear"]
)
def test_inits_from_the_weight_alone(case):
    data = np.load(GOLDEN / "peft.npz")
    _, init, kind = case.split("-")
    turn = kind == "linear"
    w, residual = (data[f"{case}/{name}"] for name in ("weight", "residual"))
    params = {"w": jnp.asarray(w.T if turn else w)}
    config = jlora.LoraConfig(rank=4, alpha=6, init=init)
    x = jax.ShapeDtypeStruct((1, params["w"].shape[0]), jnp.float32)
    plan = jlora.plan(lambda p, x: x @ p["w"], params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    want = residual.T if turn else residual
    np.testing.assert_allclose(frozen["w"], want, atol=1e-5)
    a, b = data[f"{case}/lora_A"].T, data[f"{case}/lora_B"].T
    same_up_to_signs(np.asarray(trainable.lora["w"].a), a, atol=1e-5)
    same_up_to_signs(np.asarray(trainable.lora["w"].b).T, b.T, atol=1e-5)


def test_mica_is_pefts_and_its_b_stays(tmp_path):
    params = {name: jnp.asarray(DATA[f"w/{name}"].T) for name in LAYERS}
    config = jlora.LoraConfig(rank=4, alpha=6, method="mica", targets=LAYERS)
    plan = jlora.plan(fn, params, X, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    for layer, own in trainable.lora.items():
        assert not own.a.any()
        theirs = DATA[f"mica/{layer}/lora_B"]
        same_up_to_signs(np.asarray(own.b).T, theirs, atol=1e-5)

    def loss(trainable):
        y = jlora.apply_lora(fn)(frozen, trainable, X)
        return jnp.sum(jnp.tanh(y) ** 2)

    tx = jlora.optim.masked(optax.sgd(0.1))
    updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
    stepped = optax.apply_updates(trainable, updates)
    for layer, own in stepped.lora.items():
        np.testing.assert_array_equal(own.b, trainable.lora[layer].b)
        update = np.asarray(own.a) @ own.b  # without the sign of singular vectors
        a, b = (DATA[f"mica_step/{layer}/lora_{k}"] for k in "AB")
        np.testing.assert_allclose(update, (b @ a).T, atol=1e-4)
    jlora.peft.save(tmp_path, stepped)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == "mica"
    read = jlora.peft.load(tmp_path, plan)
    assert read.lora["first"].spec == stepped.lora["first"].spec
    jax.tree.map(np.testing.assert_array_equal, read, stepped)
