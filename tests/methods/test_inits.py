"""How factors start: formulas of the papers, changed bases, statistics of data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora
from jlora.methods import INITS, find_init
from jlora.methods.moments import InputMoments, Statistics
from tests.helpers import normal

pytestmark = pytest.mark.once

N_IN, N_OUT, RANK = 12, 10, 4
TAKES_A_PART = ("pissa", "pissa_niter_6", "olora", "corda", "corda_kpm", "lora_ga")
# Leaves by shape: what is on which axis, and how the function uses it.
LEAVES = {
    "matrix": ((N_IN, N_OUT), lambda w, x: x @ w),
    "heads": ((N_IN, 2, 5), lambda w, x: jnp.einsum("ti,iho->tho", x, w)),
    "joint": ((3, 4, N_OUT), lambda w, x: jnp.einsum("tjk,jko->to", heads(x), w)),
    "turned": ((N_OUT, N_IN), lambda w, x: x @ w.T),
    "experts": ((2, N_IN, N_OUT), lambda w, x: jnp.einsum("ti,eio->teo", x, w)),
}


def heads(x):
    return x.reshape(-1, 3, 4)


def inputs(n=40):
    """Inputs that are long in some directions, with a mean."""
    return normal((n, N_IN), 7) * jnp.linspace(3, 0.5, N_IN)[None] + 1


def plan_of(name, dtype=jnp.float32, **config):
    shape, use = LEAVES[name]
    params = {"w": normal(shape, 1).astype(dtype)}
    if name == "experts":
        axes = jlora.Axes(batch=(0,), fan_in=(1,), fan_out=(2,))
        config["rules"] = jlora.Rule("w", axes=axes)

    def fn(p, x):
        return use(p["w"], x)

    config = jlora.LoraConfig(**{"rank": RANK, "alpha": 8, "targets": "w", **config})
    x = inputs().astype(dtype)
    return fn, params, jlora.plan(fn, params, x, config=config), x


def statistics_of(fn, params, plan, x):
    needs = {find_init(row.spec.init).needs for row in plan.rows() if row.spec}

    def loss(p, x):
        return jnp.sum(jnp.tanh(fn(p, x)).astype(jnp.float32) ** 2)

    found = Statistics()
    if "inputs" in needs:
        found |= jlora.activation_statistics(fn, params, plan, [x[:25], x[25:]])
    if "gradients" in needs:
        found |= jlora.gradient_statistics(loss, params, plan, [x])
    return found


def split(key, fn, params, plan, x, **options):
    statistics = statistics_of(fn, params, plan, x)
    return jlora.split(key, params, plan, statistics=statistics, **options)


def flat(w, axes):
    """Matrices [n, fan_in, fan_out] of a weight."""
    return np.transpose(np.asarray(w, np.float32), axes.order).reshape(
        axes.sizes(w.shape)
    )


def product(factors):
    """Matrices `scale * a @ b`."""
    n_batch = len(factors.spec.axes.batch)
    a = np.asarray(factors.a, np.float32)
    n = int(np.prod(a.shape[:n_batch]))
    a = a.reshape(n, -1, factors.rank)
    b = np.asarray(factors.b, np.float32).reshape(n, factors.rank, -1)
    return factors.scale * a @ b


def best(matrices, rank):
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


# The base and its change -----------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("init", TAKES_A_PART)
def test_frozen_and_update_are_the_original(init, name, key):
    fn, params, plan, x = plan_of(name, init=init)
    frozen, trainable = split(key, fn, params, plan, x)
    assert not np.allclose(frozen["w"], params["w"], atol=1e-3)
    np.testing.assert_allclose(
        jlora.merge(frozen, trainable)["w"], params["w"], atol=2e-6 * N_IN
    )


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "zero_a", "eva"])
def test_base_stays_where_init_starts_at_zero(init, key):
    fn, params, plan, x = plan_of("matrix", init=init)
    frozen, trainable = split(key, fn, params, plan, x)
    assert frozen["w"] is params["w"]
    np.testing.assert_allclose(product(trainable.lora["w"]), 0, atol=1e-6)


def test_low_precision_base_is_rounded_once(key):
    fn, params, plan, x = plan_of("matrix", jnp.bfloat16, init="pissa")
    frozen, trainable = split(key, fn, params, plan, x)
    assert frozen["w"].dtype == jnp.bfloat16
    assert trainable.lora["w"].a.dtype == jnp.float32
    update = product(trainable.lora["w"])[0]
    want = (np.asarray(params["w"], np.float32) - update).astype(jnp.bfloat16)
    np.testing.assert_array_equal(frozen["w"], want)
    # so what is lost is half a unit in the last place of the base
    back = np.asarray(frozen["w"], np.float32) + update
    lost = np.abs(back - np.asarray(params["w"], np.float32))
    assert lost.max() <= np.abs(want.astype(np.float32)).max() * 2**-8


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "corda", "eva"])
def test_split_under_jit_and_eval_shape(init, key):
    fn, params, plan, x = plan_of("experts", init=init)
    statistics = statistics_of(fn, params, plan, x)

    def make(key, params, statistics):
        return jlora.split(key, params, plan, statistics=statistics)

    eager = make(key, params, statistics)
    compiled = jax.jit(make)(key, params, statistics)
    for got, want in zip(
        jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-3)
    shapes = jax.eval_shape(make, key, params, statistics)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(lambda x: x.shape, shapes)


def test_changed_base_keeps_its_sharding(key):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.sharding.NamedSharding(mesh, jax.P("m", None))
    _, params, plan, _ = plan_of("matrix", init="pissa")
    params = {"w": jax.device_put(params["w"], placed)}
    frozen, _ = jlora.split(key, params, plan)
    assert frozen["w"].sharding == placed


# Formulas --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_the_best_part_of_the_weight(name, rslora, key):
    _, params, plan, _ = plan_of(name, init="pissa", rslora=rslora)
    _, trainable = jlora.split(key, params, plan)
    factors = trainable.lora["w"]
    want = best(flat(params["w"], factors.spec.axes), RANK)
    np.testing.assert_allclose(product(factors), want, atol=1e-5)


def test_pissa_shares_the_singular_values(key):
    _, params, plan, _ = plan_of("matrix", init="pissa")
    _, trainable = jlora.split(key, params, plan)
    a, b = trainable.lora["w"].a, trainable.lora["w"].b
    s = np.linalg.svd(params["w"], compute_uv=False)[:RANK] / plan.rows()[0].spec.scale
    np.testing.assert_allclose(a.T @ a, np.diag(s), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.diag(s), atol=1e-5)


def test_randomised_pissa_nears_the_exact_one(key):
    want, errors = None, []
    for init in ("pissa", "pissa_niter_1", "pissa_niter_16"):
        _, params, plan, _ = plan_of("experts", init=init)
        _, trainable = jlora.split(key, params, plan)
        got = product(trainable.lora["w"])
        want = got if want is None else want
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert errors[2] < 0.05 < errors[1] < 1


@pytest.mark.parametrize("name", ["matrix", "turned", "experts"])
def test_olora_is_the_start_of_a_qr(name, key):
    _, params, plan, _ = plan_of(name, init="olora")
    _, trainable = jlora.split(key, params, plan)
    factors = trainable.lora["w"]
    q, r = np.linalg.qr(np.swapaxes(flat(params["w"], factors.spec.axes), 1, 2))
    b = np.asarray(factors.b).reshape(-1, RANK, N_OUT)
    a = np.asarray(factors.a).reshape(-1, N_IN, RANK)
    np.testing.assert_allclose(np.swapaxes(b, 1, 2), q[..., :RANK], atol=1e-5)
    np.testing.assert_allclose(np.swapaxes(a, 1, 2), r[:, :RANK], atol=1e-5)


def test_orthogonal_is_pefts_formula(key):
    _, params, plan, _ = plan_of("experts", init="orthogonal")
    _, trainable = jlora.split(key, params, plan)
    factors = trainable.lora["w"]
    np.testing.assert_allclose(product(factors), 0, atol=1e-6)
    # A's rows are in one half of the rank's space, B's columns in the other, and each
    # entry is a sum of `rank / 2` normal ones times a unit vector's, over 10
    for x in (np.asarray(factors.a), np.swapaxes(np.asarray(factors.b), 1, 2)):
        assert [np.linalg.matrix_rank(m, tol=1e-4) for m in x] == [RANK // 2] * 2
        assert 0.5 < np.std(x) / (0.1 / np.sqrt(2)) < 1.5


def test_eva_is_the_singular_vectors_of_the_inputs(key):
    for name in ("matrix", "joint", "experts"):
        fn, params, plan, x = plan_of(name, init="eva")
        _, trainable = split(key, fn, params, plan, x)
        centred = np.asarray(x - x.mean(0, keepdims=True))
        _, _, vt = np.linalg.svd(centred, full_matrices=False)
        vt = vt[:RANK]
        vt *= np.sign(vt[np.arange(RANK), np.abs(vt).argmax(1)])[:, None]
        a = np.asarray(trainable.lora["w"].a).reshape(-1, N_IN, RANK)
        np.testing.assert_allclose(a, np.broadcast_to(vt.T, a.shape), atol=1e-4)
        assert not trainable.lora["w"].b.any()


@pytest.mark.parametrize("name", ["matrix", "joint", "experts"])
def test_lora_ga_is_pefts_formula(name, key):
    fn, params, plan, x = plan_of(name, init="lora_ga")
    statistics = statistics_of(fn, params, plan, x)
    _, trainable = jlora.split(key, params, plan, statistics=statistics)
    factors = trainable.lora["w"]
    gradient = flat(statistics.gradients["w"], factors.spec.axes)
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    a = np.asarray(factors.a).reshape(-1, N_IN, RANK)
    b = np.asarray(factors.b).reshape(-1, RANK, N_OUT)
    second = slice(RANK, 2 * RANK)
    want = s[:, second, None] * vt[:, second] * N_OUT**0.25 / 4
    np.testing.assert_allclose(np.abs(a), np.abs(u[..., :RANK]), atol=1e-4)
    np.testing.assert_allclose(np.abs(b), np.abs(want), rtol=1e-3, atol=1e-3)


def test_gradient_statistics_are_means(key):
    fn, params, plan, x = plan_of("matrix", init="lora_ga")

    def loss(p, x):
        return jnp.sum(fn(p, x) ** 2)

    found = jlora.gradient_statistics(loss, params, plan, iter([x, -2 * x, (x,)]))
    one = jax.grad(loss)(params, x)["w"]
    np.testing.assert_allclose(found.gradients["w"], 2 * one, rtol=1e-4)


@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
def test_corda_is_pefts_formula(init, key):
    fn, params, plan, x = plan_of("matrix", init=init)
    _, trainable = split(key, fn, params, plan, x)
    factors = trainable.lora["w"]
    c = np.asarray(x.T @ x, np.float64)
    c = c / np.diag(c).mean() + 0.01 * np.eye(N_IN)
    u, s, vt = np.linalg.svd(c @ np.asarray(params["w"], np.float64))
    part = slice(0, RANK) if init == "corda" else slice(N_OUT - RANK, N_OUT)
    want = np.linalg.inv(c) @ (u[:, :N_OUT][:, part] * s[part]) @ vt[part]
    np.testing.assert_allclose(product(factors)[0], want, atol=1e-3)
    np.testing.assert_allclose(
        np.linalg.norm(factors.b, axis=1) ** 2, s[part] / factors.scale, rtol=1e-3
    )


def test_corda_of_white_inputs_is_pissa(key):
    _, params, plan, _ = plan_of("matrix", init="corda")
    white = InputMoments(jnp.eye(N_IN), jnp.zeros(N_IN), jnp.ones(()))
    _, corda = jlora.split(key, params, plan, statistics=Statistics({"w": white}))
    want = best(np.asarray(params["w"]), RANK)
    np.testing.assert_allclose(product(corda.lora["w"])[0], want, atol=1e-5)


def test_corda_damps_what_has_no_inverse(key):
    _, params, plan, _ = plan_of("matrix", init="corda")
    one = jnp.zeros((N_IN, N_IN)).at[0, 0].set(1e6)
    poor = InputMoments(one, jnp.zeros(N_IN), jnp.ones(()))
    frozen, trainable = jlora.split(
        key, params, plan, statistics=Statistics({"w": poor})
    )
    back = jlora.merge(frozen, trainable)["w"]
    np.testing.assert_allclose(back, params["w"], atol=1e-4)


# Quantised bases -------------------------------------------------------------------


def coarse(w):
    """The values of w as -1, 0 or 1 times the largest of its row."""
    step = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    return jnp.round(w / step) * step


def test_loftq_repairs_what_quantising_loses(key):
    errors = []
    for init in ("loftq", "loftq_niter_2"):
        _, params, plan, _ = plan_of("experts", init=init)
        frozen, trainable = jlora.split(key, params, plan, quantize=coarse)
        assert all(len(np.unique(abs(row))) <= 2 for row in frozen["w"].reshape(-1, 10))
        back = jlora.merge(frozen, trainable)["w"]
        errors.append(float(jnp.linalg.norm(back - params["w"])))
    alone = float(jnp.linalg.norm(coarse(params["w"]) - params["w"]))
    assert 0.6 * alone > errors[0] > errors[1]


def test_loftq_divides_the_scale_out(key):
    _, params, plan, _ = plan_of("matrix", init="loftq", alpha=64)
    frozen, trainable = jlora.split(key, params, plan, quantize=coarse)
    np.testing.assert_array_equal(frozen["w"], coarse(params["w"]))
    want = best(np.asarray(params["w"] - frozen["w"]), RANK)
    np.testing.assert_allclose(product(trainable.lora["w"])[0], want, atol=1e-5)


NF4_NEGATIVE = -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105
NF4_POSITIVE = (
    0.0795803,
    0.1609302,
    0.2461123,
    0.3379152,
    0.4407098,
    0.562617,
    0.7229568,
)
NF4 = np.array([*NF4_NEGATIVE, 0, *NF4_POSITIVE, 1], np.float32)


def nf4(w):
    """Values of w in NF4 with blocks of 64."""
    blocks = np.asarray(w).reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[np.searchsorted(middles, blocks / largest)] * largest).reshape(w.shape)


@pytest.mark.parametrize(
    ("rank", "less"),
    [(4, 0.16), pytest.param(16, 0.28, marks=pytest.mark.slow), (64, 0.44)],
)
def test_pissa_leaves_less_to_quantise(rank, less, key):
    """The papers' trend: the nuclear norm of the error at a power-law spectrum."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(512, 512)))[0] for _ in range(2))
    w = jnp.asarray((u * np.arange(1, 513) ** -0.5) @ v.T, jnp.float32)
    config = jlora.LoraConfig(rank=rank, init="pissa_niter_4")
    x = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    plan = jlora.plan(lambda p, x: x @ p["w"], {"w": w}, x, config=config)
    frozen, _ = jlora.split(key, {"w": w}, plan)

    def error(w):
        return np.linalg.svd(w - nf4(w), compute_uv=False).sum()

    assert 1 - error(frozen["w"]) / error(w) == pytest.approx(less, abs=0.02)


# Statistics in any function --------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(16, name="up")(x)
        return x + nn.Dense(N_IN, name="down")(nn.gelu(y)), None


class Stack(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        if not self.scan:
            for i in range(3):
                x, _ = Block(name=f"block_{i}")(x)
            return x
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
            length=3,
        )  # fmt: skip
        return block(name="blocks")(x)[0]


def stacked(params):
    """Parameters of the model of blocks as those of the scanned one."""
    blocks = [params["params"][f"block_{i}"] for i in range(3)]
    return {"params": {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


def test_eva_of_a_model_and_of_its_scanned_form(standard_dtypes, key):
    x = inputs(30)
    config = jlora.LoraConfig(rank=3, init="eva", targets="**/kernel")
    loop, scanned = Stack(scan=False), Stack(scan=True)
    params = loop.init(key, x)
    plan = jlora.plan(loop.apply, params, x, config=config)
    found = jlora.activation_statistics(loop.apply, params, plan, [x])
    _, state = loop.apply(params, x, capture_intermediates=True)
    seen = state["intermediates"]["block_0"]["__call__"][0][0]
    assert_moments(found.inputs["params/block_0/up/kernel"], x)
    assert_moments(found.inputs["params/block_1/up/kernel"], seen)

    many = stacked(params)
    plan = jlora.plan(scanned.apply, many, x, config=config)
    layers = jlora.activation_statistics(scanned.apply, many, plan, [x])
    for name in ("up", "down"):
        for i in range(3):
            one = found.inputs[f"params/block_{i}/{name}/kernel"]
            all_ = layers.inputs[f"params/blocks/{name}/kernel"]
            for k in ("second", "first", "count"):
                np.testing.assert_allclose(
                    getattr(all_, k)[i], getattr(one, k), rtol=1e-3, atol=1e-2
                )
    _, trainable = jlora.split(key, many, plan, statistics=layers)
    a = trainable.lora["params/blocks/up/kernel"].a
    eye = np.broadcast_to(np.eye(3), (3, 3, 3))
    np.testing.assert_allclose(np.swapaxes(a, 1, 2) @ a, eye, atol=1e-5)


def looked_at(fn, params, *args, init="eva", **config):
    config = jlora.LoraConfig(**{"rank": 2, "init": init, **config})
    plan = jlora.plan(fn, params, *args, config=config)
    return jlora.activation_statistics(fn, params, plan, [args]).inputs


def assert_moments(found, x):
    x = np.asarray(x)
    np.testing.assert_allclose(found.second, x.T @ x, rtol=1e-4, atol=1e-4 * len(x))
    np.testing.assert_allclose(found.first, x.sum(0), rtol=1e-4, atol=1e-4 * len(x))
    np.testing.assert_allclose(found.count, len(x))


X = normal((6, 4), 3)
USES = {
    "sliced": (lambda w, x: x[:, 1:3] @ w[1:3], X * np.array([[0, 1, 1, 0]])),
    "scaled": (lambda w, x: x @ (-2.0 * w), -2 * X),
    "rows scaled": (
        lambda w, x: x @ (w * jnp.arange(4.0)[:, None]),
        X * np.arange(4.0)[None],
    ),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w, w], 1), [X, X]),
    "stacked": (
        lambda w, x: jnp.einsum("ti,kio->tko", x, jnp.stack([w, 2 * w])),
        [X, 2 * X],
    ),
    "stopped weight": (lambda w, x: x @ jax.lax.stop_gradient(w), X),
    "used twice": (lambda w, x: jnp.tanh(x @ w) @ w, [X, jnp.tanh(X @ jnp.eye(4))]),
    "cond": (lambda w, x: jax.lax.cond(x[0, 0] > -99, lambda: x @ w, lambda: x), X),
    "jit": (lambda w, x: jax.jit(lambda x: x @ w)(x), X),
    "reshaped": (
        lambda w, x: jnp.einsum("tab,abo->to", x.reshape(6, 2, 2), w.reshape(2, 2, 4)),
        X,
    ),
    "left": (lambda w, x: w.T @ x.T, X),
    "vmapped": (lambda w, x: jax.vmap(lambda x: x @ w)(x), X),
    "recurrent": (
        lambda w, x: jax.lax.scan(lambda c, x: (c, x @ w), 0.0, x)[1],
        X,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_moments_are_in_the_leafs_own_axes(name):
    use, seen = USES[name]
    seen = np.concatenate(seen) if isinstance(seen, list) else np.asarray(seen)
    found = looked_at(lambda p, x: use(p["w"], x), {"w": jnp.eye(4)}, X)
    assert_moments(found["w"], seen)


def test_moments_of_low_precision_inputs_are_float32():
    params = {"w": jnp.eye(4, dtype=jnp.bfloat16)}
    x = X.astype(jnp.bfloat16)
    found = looked_at(lambda p, x: x @ p["w"], params, x)["w"]
    assert found.second.dtype == jnp.float32
    assert_moments(found, x.astype(jnp.float32))


def test_a_complex_input_counts_as_its_real_and_its_imaginary_part():
    x = jax.lax.complex(X, jnp.cos(X))

    def fn(p, x):
        numbers = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, p["w"], numbers)

    found = looked_at(fn, {"w": jnp.eye(4)}, x)["w"]
    assert_moments(found, np.concatenate([X, np.cos(X)]))


def test_moments_of_parts_stacked_by_the_function():
    params = {"u": jnp.eye(4), "v": jnp.eye(4)}

    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, jnp.stack([p["u"], p["v"]]))[0]

    found = looked_at(fn, params, X)
    assert_moments(found["u"], X)
    assert_moments(found["v"], jnp.tanh(X))


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda w, x: jax.lax.stop_gradient(x @ w), "reaches no result"),
        (lambda w, x: jnp.argmax(x @ w, -1), "reaches no result"),
        (lambda w, x: (x @ w, (x + 1) @ jnp.tanh(w)), "is not a matrix product"),
        (lambda w, x: (x @ w) @ w.T, "sums over other axes"),
        (
            lambda w, x: jax.lax.while_loop(
                lambda x: jnp.sum(x) < 9.0, lambda x: jnp.abs(x @ w) + 1, x
            ),
            "has none.*differentiated",
        ),
    ],
    ids=["stopped", "integer", "elementwise", "both ways", "while"],
)
def test_inputs_that_cannot_be_seen_are_an_error(use, why):
    def fn(p, x):
        return use(p["w"], x)

    params = {"w": jnp.eye(4)}
    rule = jlora.Axes((), (0,), (1,))
    config = jlora.LoraConfig(
        rank=2, targets="w", init="gaussian", rules=jlora.Rule("w", axes=rule)
    )
    plan = jlora.plan(fn, params, X, config=config)
    config = dataclasses.replace(config, init="eva")
    (row,) = plan.rows()
    spec = dataclasses.replace(row.spec, init="eva")
    row = dataclasses.replace(row, spec=spec, init=INITS["eva"])
    plan = jlora.Plan(config, (row,))
    with pytest.raises(jlora.ConfigError, match=why):
        jlora.activation_statistics(fn, params, plan, [X])


def test_calls_of_one_function_are_told_apart():
    @jax.jit
    def layer(w, x):
        return x @ w

    def fn(p, x):
        return layer(p["w"], x), jnp.argmax(layer(p["w"], 2 * x))

    with pytest.raises(jlora.ConfigError, match="reaches no result"):
        looked_at(fn, {"w": jnp.eye(4)}, X)


@pytest.mark.parametrize("gather", ["activation", "gradient"])
def test_statistics_nobody_needs_or_without_batches(gather):
    fn, params, plan, x = plan_of("matrix")
    take = getattr(jlora, f"{gather}_statistics")
    with pytest.raises(jlora.ConfigError, match="no adapted leaf has an init"):
        take(fn, params, plan, [x])
    init = {"activation": "eva", "gradient": "lora_ga"}[gather]
    fn, params, plan, x = plan_of("matrix", init=init)
    with pytest.raises(jlora.ConfigError, match="batches is empty"):
        take(fn, params, plan, [])


# Ranks -----------------------------------------------------------------------------


def moments(variances, n_batch=()):
    second = jnp.diag(jnp.asarray(variances, jnp.float32))
    n = len(variances)
    return InputMoments(
        jnp.broadcast_to(second, (*n_batch, n, n)),
        jnp.zeros((*n_batch, n)),
        jnp.ones(n_batch),
    )


def two_leaves(**config):
    params = {"u": jnp.ones((6, 6)), "v": jnp.ones((6, 6)), "x": jnp.ones((2, 6, 6))}

    def fn(p, x):
        return jnp.einsum("ti,lio->tlo", x @ p["u"] + x @ p["v"], p["x"])

    axes = jlora.Axes(batch=(0,), fan_in=(1,), fan_out=(2,))
    config = {"targets": ("u", "v"), "rules": (), **config}
    if "x" in config["targets"]:
        config["rules"] = jlora.Rule("x", axes=axes)
    config = jlora.LoraConfig(rank=2, alpha=4, init="eva", **config)
    return jlora.plan(fn, params, jnp.ones((3, 6)), config=config)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_follow_the_explained_variance(rslora):
    plan = two_leaves(rslora=rslora)
    u = moments([10, 9, 8, 0.1, 0, 0])  # shares .37 .33 .30
    v = moments([10, 1, 1, 1, 1, 1])  # shares .67 .07 ...
    statistics = Statistics({"u": u, "v": v})
    moved = jlora.redistribute_ranks(plan, statistics)
    assert [row.spec and row.spec.rank for row in moved.rows()][:2] == [3, 1]
    scales = {row.spec.scale for row in (*plan.rows(), *moved.rows()) if row.spec}
    np.testing.assert_allclose(list(scales), plan.rows()[0].spec.scale)
    same = jlora.redistribute_ranks(plan, statistics, rho=1)
    assert same == plan


def test_leaf_without_rank_is_not_adapted(key):
    plan = two_leaves()
    u, v = moments([4, 3, 2, 1, 0, 0]), moments([1] * 6)
    statistics = Statistics({"u": u, "v": v})
    moved = jlora.redistribute_ranks(plan, statistics, rho=2)
    ranks = {row.path: row.spec.rank for row in moved.rows() if row.spec}
    assert ranks == {"u": 3, "v": 1}  # u's fourth share is below v's first
    v = moments([1] * 60 + [0])  # smaller shares
    moved = jlora.redistribute_ranks(plan, Statistics({"u": u, "v": v}))
    assert moved.adapted == ("u",)
    assert "rank 0" in moved.rows()[1].note
    params = {"u": jnp.ones((6, 6)), "v": jnp.ones((6, 6)), "x": jnp.ones((2, 6, 6))}
    _, trainable = jlora.split(key, params, moved, statistics=statistics)
    assert trainable.lora["u"].a.shape == (6, 4)


def test_stack_counts_once_a_layer():
    plan = two_leaves(targets=("u", "x"))  # budget 2 + 2 * 2
    u, x = moments([1, 0, 0, 0, 0, 0]), moments([3, 3, 1, 1, 0, 0], (2,))
    moved = jlora.redistribute_ranks(plan, Statistics({"u": u, "x": x}))
    ranks = {row.path: row.spec.rank for row in moved.rows() if row.spec}
    assert ranks == {"u": 2, "x": 2}


@pytest.mark.parametrize(
    ("rho", "init", "message"),
    [
        (0.5, "eva", "rho must be"),
        (2, "kaiming", "no adapted leaf has init='eva'"),
        (2, "eva", "No input moments of 'w'"),
    ],
)
def test_redistribute_says_what_lacks(rho, init, message):
    _, _, plan, _ = plan_of("matrix", init=init)
    with pytest.raises(jlora.ConfigError, match=message):
        jlora.redistribute_ranks(plan, Statistics(), rho=rho)


# Back to plain LoRA ----------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "kaiming"])
def test_to_plain_is_for_the_original_base(init, rslora, key):
    name = "experts" if init == "pissa" else "matrix"
    fn, params, plan, x = plan_of(name, init=init, rslora=rslora)
    frozen, initial = split(key, fn, params, plan, x)
    noise = normal(initial.lora["w"].b.shape, 9)
    trained = jax.tree.map(lambda x: 1.1 * x, initial)
    factors = dataclasses.replace(trained.lora["w"], b=trained.lora["w"].b + noise)
    trained = dataclasses.replace(trained, lora={"w": factors})
    plain = jlora.rebase(trained, initial)
    got = plain.lora["w"]
    assert got.rank == (RANK if init == "kaiming" else 2 * RANK)
    assert got.scale == pytest.approx(factors.scale)
    want = jlora.merge(frozen, trained)["w"]
    np.testing.assert_allclose(jlora.merge(params, plain)["w"], want, atol=1e-4)
    again = jlora.rebase(plain, plain)
    assert again.lora["w"].rank == got.rank


def test_to_plain_says_what_does_not_fit(key):
    _, params, plan, _ = plan_of("matrix", init="loftq")
    _, trainable = jlora.split(key, params, plan, quantize=coarse)
    with pytest.raises(jlora.TreeError, match=r"'w' has init 'loftq'"):
        jlora.rebase(trainable, trainable)
    with pytest.raises(jlora.TreeError, match=r"'w' is in only one of the two"):
        jlora.rebase(trainable, jlora.Trainable())
    _, _, plan, _ = plan_of("matrix", init="pissa")
    _, other = jlora.split(key, params, plan)
    with pytest.raises(jlora.TreeError, match="other settings"):
        jlora.rebase(other, trainable)


# Settings --------------------------------------------------------------------------


def ones(key, w, spec, dtype):
    """An init of a user: reads the weight, and is not zero."""
    a = jnp.full(spec.axes.a_shape(w.shape, spec.rank), 1.0, dtype)
    return a, jnp.full(spec.axes.b_shape(w.shape, spec.rank), jnp.max(w).astype(dtype))


def test_init_may_be_a_function(key):
    _, params, plan, _ = plan_of("matrix", init=ones)
    frozen, trainable = jlora.split(key, params, plan)
    assert trainable.lora["w"].spec.init == "ones"
    assert float(trainable.lora["w"].b[0, 0]) == float(params["w"].max())
    assert frozen["w"] is params["w"]
    rule = jlora.Rule("w", init=ones)
    _, _, plan, _ = plan_of("matrix", rules=rule)
    _, by_rule = jlora.split(key, params, plan)
    np.testing.assert_array_equal(by_rule.lora["w"].b, trainable.lora["w"].b)
    for config in (jlora.LoraConfig(init=ones), jlora.LoraConfig(rules=rule)):
        assert hash(config) == hash(dataclasses.replace(config))
        with pytest.raises(jlora.ConfigError, match=r"\(ones\) has no JSON form"):
            config.to_json()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda key, w, spec, dtype: None, r"must return \(a, b\)"),
        (lambda key, w, spec, dtype: (w, w), r"returned shapes \(12, 10\)"),
    ],
)
def test_function_with_wrong_result(init, message, key):
    _, params, plan, _ = plan_of("matrix", init=init)
    with pytest.raises(jlora.ConfigError, match=message):
        jlora.split(key, params, plan)


def test_init_that_is_a_method_says_so():
    with pytest.raises(jlora.ConfigError, match="got 'mica': write method='mica'"):
        jlora.LoraConfig(init="mica")


def test_zero_a_moves_only_a_at_first(key):
    fn, params, plan, x = plan_of("heads", init="zero_a")
    frozen, trainable = jlora.split(key, params, plan)
    own = trainable.lora["w"]
    assert not own.a.any()
    assert abs(float(jnp.std(own.b)) - RANK**-0.5 / 3**0.5) < 0.1
    loss = lambda t: jnp.sum(jlora.apply_lora(fn)(frozen, t, x) ** 2)  # noqa: E731
    gradient = jax.grad(loss)(trainable).lora["w"]
    assert gradient.a.any()
    assert not gradient.b.any()


def test_function_named_as_a_known_init_is_refused():
    def pissa(key, w, spec, dtype):
        return w, w

    with pytest.raises(jlora.ConfigError, match="called 'pissa'"):
        jlora.LoraConfig(init=pissa)


@pytest.mark.parametrize("init", [*INITS, "pissa_niter_4", "loftq_niter_2"])
def test_names_round_trip_as_json(init):
    config = jlora.LoraConfig(init=init, rules=jlora.Rule("w", init=init))
    assert jlora.LoraConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("init", ["pisa", "pissa_niter_0", "olora_niter_3", "", 3])
def test_unknown_init_names_the_known(init):
    with pytest.raises(jlora.ConfigError, match=r"init must be one of .*pissa"):
        jlora.LoraConfig(init=init)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init": "orthogonal", "rank": 3}, r"'w' has 3: give it Rule\('w', rank=4\)"),
        ({"init": "lora_ga", "rank": 6}, r"12, to fit into min\(12, 10\) of 'w'"),
        ({"method": "mica", "rank": 11}, "rank 11 is above min"),
    ],
)
def test_plan_refuses_ranks_that_an_init_cannot_have(config, message):
    with pytest.raises(jlora.TargetError, match=message):
        plan_of("matrix", **config)


def test_plan_refuses_inputs_of_an_embedding():
    params = {"w": jnp.ones((9, 4))}
    for init in ("eva", "corda"):
        config = jlora.LoraConfig(rank=2, targets="w", init=init)
        with pytest.raises(jlora.TargetError, match=r"'w' is of op 'embedding'.*Rule"):
            jlora.plan(
                lambda p, i: p["w"][i], params, jnp.zeros(3, jnp.int32), config=config
            )


@pytest.mark.parametrize("method", ["vera", "adalora", "lora_xs", "mica"])
def test_methods_with_a_start_of_their_own_take_no_init(method, key):
    message = (
        rf"{method!r} has an initialisation of its own.*Rule\('w', init='kaiming'\)"
    )
    for init in ("pissa", ones):
        with pytest.raises(jlora.TargetError, match=message):
            plan_of("matrix", method=method, init=init)
    rule = jlora.Rule("w", init="kaiming")
    _, params, plan, _ = plan_of("matrix", method=method, init="eva", rules=rule)
    jlora.split(key, params, plan)  # no statistics are asked for


@pytest.mark.parametrize("init", ["pissa", "eva", "loftq"])
def test_dora_starts_as_the_base_does(init, key):
    fn, params, plan, x = plan_of("matrix", method="dora", init=init)
    frozen, trainable = split(key, fn, params, plan, x, quantize=coarse)
    length = jnp.linalg.norm(frozen["w"] + product(trainable.lora["w"])[0], axis=0)
    np.testing.assert_allclose(trainable.lora["w"].magnitude, length, rtol=1e-4)
    if init != "pissa":
        return
    merged = jlora.merge(frozen, trainable)["w"]
    np.testing.assert_allclose(merged, params["w"], atol=1e-4)
    trained = jax.tree.map(lambda x: 1.2 * x, trainable)
    plain = jlora.rebase(trained, trainable)
    want = jlora.merge(frozen, trained)["w"]
    np.testing.assert_allclose(jlora.merge(params, plain)["w"], want, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "remedy"),
    [
        ("eva", "jlora.activation_statistics"),
        ("corda", "jlora.activation_statistics"),
        ("lora_ga", "jlora.gradient_statistics"),
        ("loftq", "quantize="),
    ],
)
def test_split_without_what_an_init_needs(init, remedy, key):
    _, params, plan, _ = plan_of("matrix", init=init)
    with pytest.raises(jlora.ConfigError, match=f"'w': init '{init}', give .*{remedy}"):
        jlora.split(key, params, plan)


def test_quantize_that_cannot_work(key):
    _, params, plan, _ = plan_of("matrix", init="loftq")
    with pytest.raises(jlora.ConfigError, match=r"must be a kind, .* got int"):
        jlora.split(key, params, plan, quantize=4)
    with pytest.raises(jlora.ConfigError, match=r"returned shape .* for 'w'"):
        jlora.split(key, params, plan, quantize=lambda w: w[:2])


def test_statistics_of_another_shape(key):
    _, params, plan, _ = plan_of("matrix", init="eva")
    statistics = Statistics({"w": moments([1, 2, 3])})
    with pytest.raises(jlora.ConfigError, match=r"shape \(3, 3\), it needs \(12, 12\)"):
        jlora.split(key, params, plan, statistics=statistics)


@pytest.mark.parametrize("op", ["embedding", "conv"])
def test_pissa_of_lookups_and_convolutions(op, key):
    shape = {"embedding": (16, 8), "conv": (3, 4, 8)}[op]
    params = {"w": normal(shape, 2)}
    ids, x = jnp.arange(5), normal((2, 9, 4), 4)

    def fn(p, x):
        if op == "embedding":
            return p["w"][x]
        return jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    x = ids if op == "embedding" else x
    config = jlora.LoraConfig(rank=3, targets="w", init="pissa")
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(key, params, plan)
    factors = trainable.lora["w"]
    assert factors.spec.op == op
    want = best(flat(params["w"], factors.spec.axes), 3)
    np.testing.assert_allclose(product(factors), want, atol=1e-5)
    got = jlora.apply_lora(fn)(frozen, trainable, x)
    np.testing.assert_allclose(got, fn(params, x), atol=1e-4)
