"""What PEFT 0.21.2 computed, kept in `golden/` by `make_peft_golden.py`, and jlora."""

import dataclasses
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.helpers import update

pytestmark = [pytest.mark.usefixtures("standard_dtypes"), pytest.mark.once]

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
ARRAYS = np.load(FOLDER / "peft.npz")
CASES = json.loads((FOLDER / "peft.json").read_text())["cases"]

METHODS = ("lora", "rslora", "dora", "vera", "adalora", "rows")
LAYERS = [
    name
    for name, about in CASES.items()
    if "kind" in about and about.get("method") in METHODS
]


def golden(case, name):
    return ARRAYS[f"{case}/{name}"]


def near(got, want, tolerance=1e-5):
    """Relative to the largest number of the array, as float32 sums round."""
    got, want = np.asarray(got, "float64"), np.asarray(want, "float64")
    assert got.shape == want.shape
    error = np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


def far(got, want, tolerance=1e-2):
    got, want = np.asarray(got, "float64"), np.asarray(want, "float64")
    assert np.max(np.abs(got - want)) > tolerance * np.max(np.abs(want))


def convolution(x, w, **options):
    spatial = "DHW"[-(x.ndim - 2) :]
    numbers = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": "VALID", **options}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def attention(p, x):
    q, k, v = jnp.einsum("bti,nhdi->nbthd", x, p["in"]) + p["in_bias"]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2  # sqrt of a head's size
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return jnp.einsum("bthd,ohd->bto", mixed, p["out"]) + p["out_bias"][None, None]


def bias_of(p, x):
    """The bias with axes of size 1, for `[N, C, *spatial]`."""
    return p["bias"].reshape(1, -1, *(1,) * (x.ndim - 2))


FUNCTIONS = {
    "linear": lambda p, x: x @ p["w"].T + p["bias"][None, None],
    "conv1d_hf": lambda p, x: x @ p["w"] + p["bias"][None, None],
    "embedding": lambda p, x: p["w"][x],
    "conv1d": lambda p, x: (
        convolution(x, p["w"], window_strides=(2,), padding=[(1, 1)]) + bias_of(p, x)
    ),
    "conv2d": lambda p, x: convolution(x, p["w"], padding="SAME") + bias_of(p, x),
    "conv3d": lambda p, x: convolution(x, p["w"]) + bias_of(p, x),
    "mha": attention,
    "experts_in_out": lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]),
    "experts_out_in": lambda p, x: jnp.einsum("eti,eoi->eto", x, p["w"]),
}


def layer(case):
    """`(fn, params, x)` of a case; the weights keep the axes they have in torch."""
    x = jnp.asarray(golden(case, "x").astype(np.int32 if "embed" in case else "f"))
    if CASES[case]["kind"] != "mha":
        params = {"w": jnp.asarray(golden(case, "weight"))}
        if f"{case}/bias" in ARRAYS:
            params["bias"] = jnp.asarray(golden(case, "bias"))
        return FUNCTIONS[CASES[case]["kind"]], params, x
    # PEFT adds the update of the output projection twice (see the test below), and
    # differentiates one of the two.
    a, b = pick(case, "out")
    once = golden(case, "out_proj.weight") + scale(case) * (b @ a)
    params = {
        "in": golden(case, "in_proj_weight").reshape(3, 2, 4, 8),
        "in_bias": golden(case, "in_proj_bias").reshape(3, 1, 1, 2, 4),
        "out": once.reshape(8, 2, 4),
        "out_bias": golden(case, "out_proj.bias"),
    }
    return attention, jax.tree.map(jnp.asarray, params), x


def scale(case):
    about = CASES[case]
    power = 0.5 if about.get("use_rslora") else 1
    return about["lora_alpha"] / about["r"] ** power


def config_of(case, **fields):
    about = CASES[case]
    method = about.get("method", "lora")
    if method == "rows":
        train = jlora.TokenRows("w", about["rows"])
        return jlora.LoraConfig(targets=(), train=train, **fields)
    return jlora.LoraConfig(
        rank=about["r"],
        alpha=about.get("lora_alpha"),
        targets=lambda row: row.path in ("w", "in", "out"),
        rslora=bool(about.get("use_rslora")),
        method="lora" if method == "rslora" else method,
        **fields,
    )


def split(case, fn, params, x, **fields):
    plan = jlora.plan(fn, params, x, config=config_of(case, **fields))
    return jlora.split(jax.random.key(0), params, plan)


def pick(case, path, prefix=""):
    """PEFT's A and B of a weight in PEFT's layout; `prefix` says which numbers."""
    outer = "out_proj." if path == "out" else ""
    word = "lora_embedding_" if "embedding" in case else "lora_"
    return tuple(golden(case, f"{prefix}{outer}{word}{name}") for name in "AB")


def ours(case, path, own, prefix=""):
    """`own` with PEFT's numbers in jlora's layout."""
    method = CASES[case].get("method")
    if method == "vera":
        numbers = {
            "a": golden(case, f"{prefix}vera_lambda_d"),
            "b": golden(case, f"{prefix}vera_lambda_b"),
        }
    elif method == "rows":
        numbers = {"b": rows_of(case, prefix)}
    else:
        numbers = dict(
            zip("ab", in_our_layout(own, *pick(case, path, prefix)), strict=True)
        )
    extra = {"dora": "lora_magnitude_vector", "adalora": "lora_E"}
    if method in extra:
        numbers["magnitude"] = golden(case, prefix + extra[method])
    leaves = {
        name: jnp.asarray(x.reshape(getattr(own, name).shape))
        for name, x in numbers.items()
    }
    return dataclasses.replace(own, **leaves)


def in_our_layout(own, a, b):
    axes, rank = own.spec.axes, own.rank
    if axes.batch:  # the expert is A's first axis and B's last
        n = len(a) // rank
        a = a.reshape(n, rank, -1).transpose(0, 2, 1)
        return a, b.reshape(len(b), rank, n).transpose(2, 1, 0)
    if own.spec.op == "conv":
        window = (own.a.shape[axes.fan_in.index(i)] for i in sorted(axes.fan_in))
        a = a.reshape(rank, *window).transpose(*axes.fan_in, 0)
        return a, b.reshape(b.shape[:2]).T
    return a.T, b.T


def rows_of(case, prefix):
    """Trained rows: PEFT keeps the rows, jlora their difference to the base's.

    So AdamW's decay pulls PEFT's rows to zero and jlora's to where they started.
    """
    base = golden(case, "weight")[CASES[case]["rows"]]
    numbers = golden(case, f"{prefix}trainable_tokens_delta")
    undecayed = {"": 1, "grad.": 0, "step.": 1 - 1e-2 * 1e-2}[prefix]
    return numbers - undecayed * base


def with_golden(case, trainable, prefix=""):
    lora = {p: ours(case, p, own, prefix) for p, own in trainable.lora.items()}
    return dataclasses.replace(trainable, lora=lora)


@pytest.fixture
def random_matrices_of_peft(request, monkeypatch):
    """VeRA's frozen matrices come from a seed, so a test has to put PEFT's there."""
    case = request.getfixturevalue("case")
    if CASES[case]["method"] != "vera":
        return
    pair = tuple(jnp.asarray(golden(case, f"vera_{name}").T) for name in "AB")
    module = importlib.import_module("jlora.methods.vera")
    monkeypatch.setattr(module, "shared", lambda spec, dtype: pair)


def everything(fn, frozen, trainable, x, dy):
    """Output, gradients, one step of AdamW and the merged weights, in one program."""
    lora_fn = jlora.apply_lora(fn, on_merge="error")

    @jax.jit
    def run(frozen, trainable, x, dy):
        y, pull = jax.vjp(lambda t: lora_fn(frozen, t, x), trainable)
        (gradient,) = pull(dy)
        tx = optax.adamw(1e-2, weight_decay=1e-2)
        updates, _ = tx.update(gradient, tx.init(trainable), trainable)
        stepped = optax.apply_updates(trainable, updates)
        return y, gradient, stepped, jlora.merge(frozen, trainable)

    return run(frozen, trainable, x, dy)


@pytest.mark.usefixtures("random_matrices_of_peft")
@pytest.mark.parametrize("case", LAYERS)
def test_output_gradients_step_and_merged_weight_are_those_of_peft(case):
    fn, params, x = layer(case)
    frozen, trainable = split(case, fn, params, x)
    trainable = with_golden(case, trainable)
    dy = jnp.asarray(golden(case, "dy"))
    y, gradient, stepped, merged = everything(fn, frozen, trainable, x, dy)
    near(y, golden(case, "y"))
    for prefix, got in (("grad.", gradient), ("step.", stepped)):
        want = with_golden(case, trainable, prefix)
        jax.tree.map(near, got, want)
    for path, name in {"w": "merged", "in": "merged", "out": "out_proj.merged"}.items():
        if path in trainable.lora:
            near(merged[path], golden(case, name).reshape(merged[path].shape))


def test_every_kind_of_layer_is_compared():
    kinds = {about.get("kind") for about in CASES.values()} - {None}
    assert kinds == set(FUNCTIONS)
    assert len(LAYERS) == len(set(LAYERS)) >= 30


# Where jlora differs on purpose: each test shows both numbers, and
# docs/peft_differences.md explains.


def test_peft_adds_the_output_projection_of_packed_attention_twice():
    case = "lora-mha"
    a, b = pick(case, "out")
    weight, update = golden(case, "out_proj.weight"), scale(case) * (b @ a)
    near(golden(case, "out_proj.merged"), weight + 2 * update)
    fn, params, x = layer(case)
    params = {**params, "out": jnp.asarray(weight.reshape(8, 2, 4))}
    frozen, trainable = split(case, fn, params, x)
    trainable = with_golden(case, trainable)
    merged = jlora.merge(frozen, trainable)["out"]
    near(merged, (weight + update).reshape(8, 2, 4))
    y = jlora.apply_lora(fn)(frozen, trainable, x)
    far(y, golden(case, "y"))


def test_peft_adds_a_tied_embedding_twice():
    case = "differs-tied"
    a, b = (golden(case, f"lora_embedding_{name}") for name in "AB")
    weight, update = golden(case, "weight"), scale(case) * (b @ a).T
    near(golden(case, "merged"), weight + 2 * update)

    def fn(p, ids):
        return jnp.tanh(p["w"][ids]) @ p["w"].T

    ids, params = jnp.arange(5), {"w": jnp.asarray(weight)}
    frozen, trainable = split(case, fn, params, ids)
    own = dataclasses.replace(
        trainable.lora["w"], a=jnp.asarray(a.T), b=jnp.asarray(b.T)
    )
    trainable = jlora.Trainable({"w": own})
    merged = jlora.merge(frozen, trainable)
    near(merged["w"], weight + update)
    near(jlora.apply_lora(fn)(frozen, trainable, ids), fn(merged, ids))


def one_convolution(case, fn):
    weight, x = jnp.asarray(golden(case, "weight")), jnp.asarray(golden(case, "x"))
    params = {"w": weight, "bias": jnp.asarray(golden(case, "bias"))}
    frozen, trainable = split(case, fn, params, x)
    return frozen, trainable, x


def test_peft_drops_the_dilation_of_a_convolution():
    case = "differs-dilation"

    def fn(p, x):
        y = convolution(x, p["w"], window_strides=(4,), rhs_dilation=(2,))
        return y + bias_of(p, x)

    frozen, trainable, x = one_convolution(case, fn)
    trainable = with_golden(case, trainable)
    y = jlora.apply_lora(fn, on_merge="error")(frozen, trainable, x)
    near(y, golden(case, "merged_y"))
    far(golden(case, "y"), golden(case, "merged_y"))


def test_peft_drops_the_padding_mode_of_a_convolution():
    case = "differs-padding_mode"

    def fn(p, x):
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1)), mode="wrap")
        return convolution(x, p["w"]) + bias_of(p, x)

    frozen, trainable, x = one_convolution(case, fn)
    trainable = with_golden(case, trainable)
    y = jlora.apply_lora(fn, on_merge="error")(frozen, trainable, x)
    near(y, golden(case, "merged_y"))
    far(golden(case, "y"), golden(case, "merged_y"))


def test_peft_leaves_the_groups_of_a_convolution():
    """Its update joins channels of different groups, so no grouped kernel holds it."""
    case = "differs-groups"

    def fn(p, x):
        return convolution(x, p["w"], feature_group_count=2) + bias_of(p, x)

    frozen, trainable, x = one_convolution(case, fn)
    a, b = golden(case, "lora_A"), golden(case, "lora_B")[..., 0]
    groups = [
        b[4 * g : 4 * g + 4] @ a.reshape(4, -1)[2 * g : 2 * g + 2] for g in (0, 1)
    ]
    dense = scale(case) * np.concatenate(groups).reshape(8, 6, 3)
    assert np.abs(dense[:4, 3:]).min() > 0  # outputs of group 0, inputs of group 1
    base = fn(frozen, x)
    near(base + convolution(x, jnp.asarray(dense)), golden(case, "y"))
    own = trainable.lora["w"]
    own = dataclasses.replace(own, b=jnp.ones_like(own.b))
    trainable = jlora.Trainable({"w": own})
    y = jlora.apply_lora(fn, on_merge="error")(frozen, trainable, x)
    near(y, fn(jlora.merge(frozen, trainable), x))


def test_peft_ignores_the_dropout_of_an_embedding():
    case = "differs-embedding_dropout"
    for name in ("y_train", "y_again"):
        np.testing.assert_array_equal(golden(case, name), golden(case, "y_eval"))
    params = {"w": jnp.asarray(golden(case, "weight"))}
    ids = jnp.asarray(golden(case, "x").astype(np.int32))
    fn = FUNCTIONS["embedding"]
    frozen, trainable = split(case, fn, params, ids, dropout=0.9)
    trainable = with_golden(case, trainable)
    lora_fn = jlora.apply_lora(fn)
    whole = lora_fn(frozen, trainable, ids)
    near(whole, golden(case, "y_eval"))
    some = lora_fn(frozen, trainable, ids, lora_key=jax.random.key(0))
    base = np.asarray(frozen["w"])[np.asarray(ids)]
    update, left = (np.asarray(y) - base for y in (whole, some))
    is_kept = np.any(left, axis=-1, keepdims=True)  # by position, not by id
    np.testing.assert_allclose(left, is_kept * update / 0.1, rtol=1e-4, atol=1e-5)
    assert 0 < is_kept.mean() < 0.5


def test_peft_forgets_packed_biases():
    trained = CASES["differs-bias_all"]["trained"]
    assert [n for n in trained if n.endswith("out_proj.base_layer.bias")]
    assert not [n for n in trained if "in_proj_bias" in n]
    fn, params, x = layer("lora-mha")
    config = jlora.LoraConfig(rank=3, train="*bias")
    plan = jlora.plan(fn, params, x, config=config)
    assert set(plan.full) == {"in_bias", "out_bias"}


def adapter(a, b, **fields):
    """A `Trainable` of PEFT's A and B for one matrix."""
    spec = jlora.factors.Spec(rank=len(a), **fields)
    return jlora.Trainable(
        {"w": jlora.Factors(jnp.asarray(a.T), jnp.asarray(b.T), spec)}
    )


def test_linear_combinations_of_peft_have_cross_terms():
    case = "differs-linear_combination"
    names = [[f"{name}.lora_{x}" for x in "AB"] for name in ("default", "other")]
    two = [adapter(*(golden(case, n) for n in pair), alpha=7) for pair in names]
    change = update(jlora.adapters.linear(two, CASES[case]["weights"]).lora["w"]).T
    near(change, golden(case, "cat.delta"))
    near(change, golden(case, "svd.delta"))
    far(change, golden(case, "linear.delta"), 0.5)


def test_one_rslora_adapter_with_weight_one_is_another_in_peft():
    case = "differs-one_rslora_adapter"
    own = adapter(*pick(case, "w"), alpha=8, rslora=True)
    same = jlora.adapters.linear([own], [1.0])
    near(update(same.lora["w"]).T, golden(case, "delta"))
    near(2 * update(same.lora["w"]).T, golden(case, "same"))  # sqrt(rank) too large


def test_a_bfloat16_merge_rounds_once():
    case = "differs-bfloat16_merge"
    weight = jnp.asarray(golden(case, "weight"), "bfloat16")
    a, b = pick(case, "w")
    merged = jlora.merge({"w": weight.T}, adapter(a, b, alpha=8))["w"].T
    merged = np.asarray(merged, "float32")
    exact = golden(case, "weight").astype("float64") + 2 * (b.astype("float64") @ a)
    safe = golden(case, "safe_merged")
    assert np.mean(merged != golden(case, "merged")) < 0.005  # ties of the product
    assert np.mean(safe != merged) > 0.02
    assert np.mean(np.abs(merged - exact)) < np.mean(np.abs(safe - exact))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.startswith("init-") and "kind" in CASES[c]]
)
def test_inits_from_the_weight_are_those_of_peft(case):
    fn = FUNCTIONS[CASES[case]["kind"]]
    params = {n: jnp.asarray(golden(case, f"{n}")) for n in ("weight", "bias")}
    params["w"] = params.pop("weight")
    x = jnp.ones((1, 1, 12))
    frozen, trainable = split(case, fn, params, x, init=CASES[case]["init"])
    near(frozen["w"], golden(case, "residual"))
    own = trainable.lora["w"]
    for got, want in zip((own.a, own.b), pick(case, "w"), strict=True):
        near(jnp.abs(got), np.abs(want.T))  # a pair of vectors may change its sign
    near(jlora.merge(frozen, trainable)["w"], golden(case, "weight"))


def test_orthogonal_init_has_the_spread_of_peft():
    about = CASES["init-orthogonal"]
    params = {"w": jnp.zeros((about["fan_in"], about["fan_out"]))}
    config = jlora.LoraConfig(rank=about["r"], targets="w", init="orthogonal")
    x = jnp.ones((1, about["fan_in"]))
    plan = jlora.plan(lambda p, x: x @ p["w"], params, x, config=config)
    _, trainable = jlora.split(jax.random.key(0), params, plan)
    own = trainable.lora["w"]
    for name, factor in (("lora_A", own.a), ("lora_B", own.b)):
        rms = float(jnp.sqrt(jnp.mean(factor**2)))
        assert rms == pytest.approx(about["rms"][name], rel=0.1)
    assert float(jnp.abs(own.a @ own.b).max()) < 1e-6
    assert about["largest_product"] < 1e-6


def two_weights(prefix):
    """The factors of the two layers of `adalora-schedule`, in jlora's layout."""
    spec = jlora.factors.Spec(rank=4, alpha=4, method="adalora")

    def own(layer):
        a, b, e = (
            golden("adalora-schedule", f"{prefix}{layer}.lora_{name}") for name in "ABE"
        )
        return jlora.Factors(*map(jnp.asarray, (a.T, b.T)), spec, jnp.asarray(e[:, 0]))

    return jlora.Trainable({layer: own(layer) for layer in ("first", "second")})


def test_adalora_prunes_what_peft_prunes():
    about = CASES["adalora-schedule"]
    tx = jlora.optim.adalora(
        optax.sgd(0.05),
        target_rank=about["target_r"],
        steps=about["total_step"],
        warmup=about["tinit"],
        final=about["tfinal"],
        every=about["deltaT"],
        sensitivity_decay=about["beta1"],
        uncertainty_decay=about["beta2"],
    )
    trainable = two_weights("")
    state = tx.init(trainable)
    update = jax.jit(tx.update)
    pruned = []
    for step in range(1, about["total_step"]):
        updates, state = update(two_weights(f"grad{step}."), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        want = two_weights(f"after{step}.")
        jax.tree.map(near, trainable, want)
        pruned.append(sum(int((f.magnitude == 0).sum()) for f in want.lora.values()))
    assert pruned == [0, 0, 0, 3, 0, 4, 0, 4, 4, 4, 4]  # until the end they come back


def test_orthogonality_penalty_is_that_of_peft():
    penalty = jlora.optim.orthogonality_penalty(two_weights(""))
    near(penalty, golden("adalora-schedule", "orthogonality"))
