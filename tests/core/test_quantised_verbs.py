"""The verbs of the flow over a quantised base: each equals the widened model's."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.quantised import is_quantized
from tests.helpers import close, normal, random_like, same

pytestmark = pytest.mark.once

SHAPES = {"embed": (16, 32), "layers": (2, 32, 32), "up": (32, 48), "head": (48, 8)}
IDS = jnp.array([[1, 5, 3], [0, 2, 15]])


def model(p, ids):
    x = p["embed"][ids]
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])
    x = jnp.tanh(x @ p["up"]) @ p["head"]
    return x + jnp.broadcast_to(p["bias"], x.shape)


def setup(**settings):
    params = {**normal(SHAPES, scale=0.2), "bias": jnp.zeros(8)}
    settings = {"rank": 2, "alpha": 4, "targets": ("layers", "up"), **settings}
    config = jlora.LoraConfig(**settings)
    return params, jlora.plan(model, params, IDS, config=config)


def dense(tree):
    return jlora.merge(tree, jlora.Trainable())


def error(tree, params):
    """Returns the distance of each leaf from that of `params`."""
    return {k: float(jnp.linalg.norm((tree[k] - params[k]).ravel())) for k in params}


def trained(trainable):
    return random_like(trainable, scale=0.1)


@pytest.fixture
def key():
    return jax.random.key(0)


def test_split_quantises_as_quantize_does(key):
    params, plan = setup()
    frozen, trainable = jlora.split(key, params, plan, quantize="int8")
    same(frozen, jlora.quantize(params, plan, kind="int8"))
    same(trainable, jlora.split(key, params, plan)[1])
    again, other = jlora.split(key, frozen, plan)
    same((again, other), (frozen, trainable))
    options = {"kind": "nf4", "double": True, "targets": "up"}
    frozen, _ = jlora.split(key, params, plan, quantize=options)
    assert [k for k, x in frozen.items() if is_quantized(x)] == ["up"]
    assert is_quantized(frozen["up"].scales)


@pytest.mark.parametrize("init", ["loftq", "loftq_niter_2", "pissa"])
def test_an_init_starts_from_the_dense_weight(init, key):
    params, plan = setup(init=init)
    frozen, trainable = jlora.split(key, params, plan, quantize="nf4")
    plain = jlora.quantize(params, plan, kind="nf4")
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)
    ours, theirs = (error(dense(t), params) for t in (frozen, plain))
    merged = error(jlora.merge(frozen, trainable), params)
    for path in plan.adapted:
        assert ours[path] >= theirs[path] > 1.01 * merged[path]
    if init == "pissa":
        _, factors = jlora.split(key, params, plan)
        same(trainable, factors)
    compiled = jax.jit(lambda p: jlora.split(key, p, plan, quantize="nf4"))
    shapes = jax.eval_shape(compiled, params)
    assert jax.tree.structure(shapes) == jax.tree.structure((frozen, trainable))
    close(compiled(params)[0]["up"].dense(), frozen["up"].dense(), 1e-4)


def test_an_init_changes_codes_that_are_there_already(key):
    params, plan = setup(init="pissa")
    coded = jlora.quantize(params, plan, kind="int8", block=16, scale_dtype="bfloat16")
    with pytest.warns(UserWarning, match="'layers', 'up' are quantised for a second"):
        frozen, trainable = jlora.split(key, coded, plan)
    assert jax.tree.structure(frozen) == jax.tree.structure(coded)
    assert frozen["up"].scales.dtype == jnp.bfloat16
    off = error(jlora.merge(frozen, trainable), dense(coded))
    assert 0 < off["up"] < 0.01 * float(jnp.linalg.norm(params["up"]))
    assert bool((frozen["up"].codes != coded["up"].codes).any())


def test_loftq_of_codes_has_nothing_to_make_up_for(key):
    params, plan = setup(init="loftq")
    coded = jlora.quantize(params, plan)
    with pytest.warns(UserWarning, match=r"start as init='kaiming'.*quantize=, the"):
        frozen, trainable = jlora.split(key, coded, plan)
    same(frozen, coded)
    assert not trainable.lora["up"].b.any()
    assert trainable.lora["up"].a.all()
    with pytest.raises(jlora.ConfigError, match="leave quantize= out"):
        jlora.split(key, coded, plan, quantize=lambda w: w)


def test_a_function_of_loftq_may_return_codes(key):
    params, plan = setup(init="loftq")
    values = jlora.split(
        key, params, plan, quantize=lambda w: jlora.quantize([w])[0].dense()
    )
    codes = jlora.split(key, params, plan, quantize=lambda w: jlora.quantize([w])[0])
    close(jlora.merge(*codes), jlora.merge(*values), 1e-6)
    assert is_quantized(codes[0]["up"])


@pytest.mark.parametrize(
    ("quantize", "text"),
    [
        ("nf5", "kind must be one of nf4; int4; int8, got 'nf5'"),
        ({"kinds": "nf4"}, "mapping of the options of jlora.quantize, got .*kinds"),
        (4, "quantize must be"),
        (None, "init 'loftq', give the kind, quantize='nf4'"),
    ],
)
def test_what_split_quantises_with_is_checked(quantize, text, key):
    params, plan = setup(init="loftq")
    with pytest.raises(jlora.ConfigError, match=text):
        jlora.split(key, params, plan, quantize=quantize)


def test_what_is_trained_in_full_is_not_quantised(key):
    params, plan = setup(train="head")
    frozen, _ = jlora.split(key, params, plan, quantize="nf4")
    assert frozen["head"] == jlora.MISSING
    coded = jlora.quantize(params)
    with pytest.raises(jlora.TreeError, match=r"no gradient: 'head' is trained in fu"):
        jlora.split(key, coded, plan)
    with pytest.raises(jlora.TargetError, match=r"train: 'head' is quantised \(nf4\)"):
        jlora.plan(model, coded, IDS, config=plan.config)


def test_codes_that_are_not_finite_are_not_adapted(key):
    params, plan = setup()
    coded = jlora.quantize(params, plan)
    up = dataclasses.replace(coded["up"], scales=coded["up"].scales.at[0].set(jnp.nan))
    with pytest.raises(jlora.TreeError, match="'up' holds NaN or infinity"):
        jlora.split(key, {**coded, "up": up}, plan)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merge_is_dense_or_codes_again(kind, key):
    params, plan = setup(train="head")
    options = {"kind": kind, "double": kind == "nf4", "targets": ("embed", "up")}
    frozen, fresh = jlora.split(key, params, plan, quantize=options)
    wide = {k: x.dense() if is_quantized(x) else x for k, x in frozen.items()}
    trainable = trained(fresh)
    expected = jlora.merge(wide, trainable)
    close(jlora.merge(frozen, trainable, check=True), expected, 1e-6)
    with pytest.warns(
        UserWarning, match=rf"'up' \({kind}, off by 0\.\d+ of its norm, "
    ):
        coded = jlora.merge(frozen, trainable, requantize=True)
    assert coded["embed"] is frozen["embed"]
    assert jax.tree.structure(coded["up"]) == jax.tree.structure(frozen["up"])
    bar = 0.12 if kind == "nf4" else 0.012
    off = error(dense(coded), expected)["up"] / jnp.linalg.norm(expected["up"])
    assert 0 < off < bar
    with pytest.warns(UserWarning, match=rf"'up' \({kind}\)"):
        jax.eval_shape(
            lambda f, t: jlora.merge(f, t, requantize=True), frozen, trainable
        )


def test_codes_without_an_update_stay_and_nothing_is_told(key):
    params, plan = setup()
    frozen, fresh = jlora.split(key, params, plan, quantize="nf4")
    same(jlora.merge(frozen, fresh, requantize=True), frozen)


def test_a_merge_into_codes_is_checked(key):
    params, plan = setup()
    frozen, trainable = jlora.split(key, params, plan, quantize="int8")
    far = dataclasses.replace(
        trainable.lora["up"], b=jnp.full_like(trainable.lora["up"].b, jnp.inf)
    )
    far = jlora.Trainable({"up": far})
    for requantize in (False, True):
        with pytest.raises(jlora.MergeError, match="factors of 'up' give NaN"):
            jlora.merge(frozen, far, check=True, requantize=requantize)


def test_an_update_is_not_taken_off_codes(key):
    params, plan = setup()
    frozen, trainable = jlora.split(key, params, plan, quantize="int8")
    with pytest.raises(jlora.TreeError, match="'layers', 'up' are quantised, so the"):
        jlora.unmerge(frozen, trainable)
    close(jlora.unmerge(jlora.merge(frozen, trainable), trainable), dense(frozen), 1e-6)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_extract_finds_the_change_from_codes(method, key):
    params, plan = setup(method=method)
    frozen, trainable = jlora.split(key, params, plan, quantize="nf4")
    tuned = jlora.merge(frozen, trained(trainable))
    found = jlora.extract(tuned, frozen, plan)
    same(found, jlora.extract(tuned, dense(frozen), plan))
    if method == "lora":
        close(jlora.merge(frozen, found), tuned, 1e-4)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_statistics_of_codes_are_those_of_the_widened_model(init, key):
    params, plan = setup(init=init)
    coded = jlora.quantize(params, plan, kind="nf4")
    found, expected = (
        jlora.activation_statistics(model, p, plan, [IDS])
        if init == "corda"
        else jlora.gradient_statistics(
            lambda p, x: jnp.square(model(p, x)).sum(), p, plan, [IDS]
        )
        for p in (coded, dense(coded))
    )
    close(found, expected, 1e-4)
    frozen, _ = jlora.split(key, params, plan, statistics=found, quantize="nf4")
    assert jax.tree.structure(frozen) == jax.tree.structure(coded)


def test_a_report_widens_a_weight_and_counts_both_sizes(key):
    params, plan = setup()
    frozen, trainable = jlora.split(key, params, plan, quantize="nf4")
    trainable = trained(trainable)
    found, expected = (jlora.report(f, trainable) for f in (frozen, dense(frozen)))
    assert found.entries == expected.entries
    stored = sum(x.nbytes for x in jax.tree.leaves(frozen))
    assert (found.model_bytes, found.dense_bytes) == (stored, expected.model_bytes)
    assert "dense)" in str(found)
    assert "dense)" not in str(expected)


@pytest.mark.parametrize("storage", ["packed", "native"])
def test_an_optimizer_leaves_codes_as_they_are(storage, key):
    params, plan = setup()
    options = {"kind": "nf4", "storage": storage}
    frozen, trainable = jlora.split(key, params, plan, quantize=options)
    both = {"frozen": frozen, "trainable": trainable}
    tx = jlora.optim.masked(optax.adamw(0.1))
    state = tx.init(both)

    def loss(both):
        return jlora.apply_lora(model)(both["frozen"], both["trainable"], IDS).sum()

    @jax.jit
    def step(both, state):
        gradients = jax.grad(loss, allow_int=True)(both)
        updates, state = tx.update(gradients, state, both)
        return optax.apply_updates(both, updates), state

    with jax.numpy_dtype_promotion("standard"):  # inside Adam
        after, _ = step(both, state)
    same(after["frozen"], frozen)
    assert bool((after["trainable"].lora["up"].b != 0).all())


def test_rows_of_a_batch_use_their_own_adapter_over_codes(key):
    params, plan = setup(method="dora", train="head")
    frozen, trainable = jlora.split(key, params, plan, quantize="int8")
    whole = {**frozen, "head": params["head"]}
    pair = [trained(trainable), random_like(trainable, seed=2)]
    stacked = jlora.adapters.stack(pair, params=whole)
    row_fn = jlora.adapters.per_row(model)
    ids = jnp.array([1, -1])
    out = row_fn(whole, stacked, ids, IDS)
    close(out, row_fn(dense(whole), stacked, ids, IDS), 1e-4)
    apply = jlora.apply_lora(model)
    close(out[1], apply(whole, jlora.Trainable(), IDS)[1], 1e-4)


def test_adapters_measure_from_the_codes(key):
    params, plan = setup(method="dora")
    frozen, trainable = jlora.split(key, params, plan, quantize="nf4")
    pair = [trained(trainable), random_like(trainable, seed=2, scale=0.2)]
    for base in (frozen, dense(frozen)):
        mixed = jlora.adapters.linear(pair, [0.5, 0.5], params=base)
        size = jlora.adapters.norms(pair[0], params=base)
        if base is frozen:
            expected = mixed, size
    close((mixed, size), expected, 1e-4)


def test_combine_and_a_second_split_keep_codes(key):
    params, plan = setup(train="head")
    frozen, trainable = jlora.split(key, params, plan, quantize="nf4")
    whole = jlora.combine(frozen, trainable)
    assert whole["up"] is frozen["up"]
    again = jlora.plan(model, whole, IDS, config=plan.config)
    same(jlora.split(key, whole, again), (frozen, trainable))


def test_numbers_on_the_host_are_merged_there(key):
    params, plan = setup()
    frozen, trainable = jax.device_get(jlora.split(key, params, plan, quantize="nf4"))
    assert isinstance(frozen["up"].codes, np.ndarray)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(
            jlora.merge(frozen, trainable),
            dense(jlora.quantize(params, plan)),
            1e-6,
        )
