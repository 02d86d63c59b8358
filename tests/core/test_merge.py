"""Factors added to weights, taken off again, and found from a fine-tune."""

import contextlib
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from tests.helpers import bits, random_like, update

X = jnp.ones((2, 4))


class Pair(NamedTuple):
    w: Any
    v: Any


def weights(dtype="float32"):
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(4, 6)), rng.normal(size=(6, 3))
    return {"w": jnp.asarray(w, dtype), "v": jnp.asarray(v, dtype)}


def product(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def plan_of(params, fn=product, **config):
    leaves = [w for w in jax.tree.leaves(params) if hasattr(w, "dtype")]
    x = X.astype(next(w.dtype for w in leaves if w.ndim > 1))
    return jlora.plan(fn, params, x, config=jlora.LoraConfig(**{"rank": 2, **config}))


# Merge.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("train", [(), "v"])
def test_split_then_merge_is_identity_bit_for_bit(dtype, train, key):
    params = weights(dtype)
    params["w"] = params["w"].at[0, 0].set(-0.0).at[0, 1].set(0.0)
    frozen, trainable = jlora.split(key, params, plan_of(params, train=train))
    merged = jlora.merge(frozen, trainable)
    # Adding the zero update makes +0 of -0; all other bits are kept.
    expected = {**params, "w": params["w"].at[0, 0].set(0.0)}
    assert bits(merged) in (bits(params), bits(expected))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_a_sum_too_large_for_its_dtype_is_told_on_request(dtype, key):
    params = weights("float32")
    frozen, trainable = jlora.split(key, params, plan_of(params, train="v"))
    frozen = {**frozen, "w": frozen["w"].astype(dtype)}
    assert jlora.merge(frozen, trainable, check=True)["w"].dtype == dtype
    f = trainable.lora["w"]
    far = dataclasses.replace(f, a=jnp.ones_like(f.a), b=jnp.full_like(f.b, 1e5))
    far = dataclasses.replace(trainable, lora={"w": far})
    with pytest.raises(jlora.MergeError) as caught:
        jlora.merge(frozen, far, check=True)
    text = (
        rf"'w' would hold 20000\d, but {dtype} holds at most \d+: convert the base to"
    )
    assert re.search(text, str(caught.value))
    told = contextlib.nullcontext()
    if "float8" in dtype:
        told = pytest.warns(UserWarning, match=rf"'w' \({dtype}, all of it\)")
    with told:
        merged = jlora.merge(frozen, far)
    assert not np.isfinite(np.asarray(merged["w"], "float32")).all()


def test_a_checked_merge_tells_nan_of_the_adapter_from_that_of_the_base(key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params, train="v"))
    f = trainable.lora["w"]
    bad = dataclasses.replace(f, b=f.b.at[0, 0].set(jnp.nan))
    bad = jlora.Trainable({"w": bad}, {"v": jnp.full((6, 3), jnp.inf)})
    with pytest.raises(jlora.MergeError) as caught:
        jlora.merge(frozen, bad, check=True)
    assert "the factors of 'w' give NaN or infinity" in str(caught.value)
    assert "'v' has NaN or infinity" in str(caught.value)
    spoilt = {**frozen, "w": frozen["w"].at[0, 0].set(jnp.nan)}
    merged = jlora.merge(spoilt, trainable, check=True)
    assert np.isnan(merged["w"]).sum() == 1
    with pytest.raises(jlora.MergeError, match="outside jit"):
        jax.jit(lambda f, t: jlora.merge(f, t, check=True))(frozen, trainable)


@pytest.mark.parametrize("config", [{}, {"alpha": 7}, {"alpha": 3, "rslora": True}])
def test_merge_adds_scale_times_a_times_b(config, key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params, **config))
    trainable = random_like(trainable)
    merged = jlora.merge(frozen, trainable)
    expected = np.asarray(params["w"], np.float64) + update(trainable.lora["w"])
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-6, atol=1e-6)
    assert merged["v"] is params["v"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_merge_rounds_once(dtype, factors, key):
    """Small integers, so that float64 and float32 sums are the exact ones."""
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.integers(-255, 256, (32, 32)) / 8, dtype)
    params = {"w": w, "v": jnp.ones((32, 2), dtype)}
    plan = jlora.plan(
        product,
        params,
        jnp.ones((1, 32), dtype),
        config=jlora.LoraConfig(rank=4, alpha=1, dtype=factors),
    )
    frozen, trainable = jlora.split(key, params, plan)
    trainable = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(-99, 100, x.shape) / 32, x.dtype), trainable
    )
    merged = jlora.merge(frozen, trainable)["w"]
    delta = update(trainable.lora["w"])
    exact = np.asarray(w, np.float64) + delta
    assert (exact.astype(np.float32) == exact).all()
    once = exact.astype(merged.dtype)
    np.testing.assert_array_equal(np.asarray(merged), once)
    # The example tells one rounding from two.
    twice = w + jnp.asarray(delta, dtype)
    assert (np.asarray(twice) != once).any()


def test_merge_of_float64_weights_is_in_float64(key):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((2, 2), "float64"), "v": jnp.ones((2, 1), "float64")}
        plan = jlora.plan(
            product,
            params,
            jnp.ones((1, 2), "float64"),
            config=jlora.LoraConfig(rank=2),
        )
        frozen, trainable = jlora.split(key, params, plan)
        factors = dataclasses.replace(
            trainable.lora["w"],
            a=jnp.full((2, 2), 1 + 2.0**-12, "float32"),
            b=jnp.full((2, 2), 1 + 2.0**-12, "float32"),
        )
        trainable = dataclasses.replace(trainable, lora={"w": factors})
        merged = jlora.merge(frozen, trainable)["w"]
        assert merged.dtype == "float64"
        np.testing.assert_array_equal(merged, 1 + 2 * (1 + 2.0**-12) ** 2)


TREES = {
    "FrozenDict": (lambda: FrozenDict(weights()), product),
    "NamedTuple": (
        lambda: Pair(**weights()),
        lambda p, x: jnp.tanh(x @ p.w) @ p.v,
    ),
    "nnx.State": (
        lambda: nnx.State({k: nnx.Param(w) for k, w in weights("bfloat16").items()}),
        lambda p, x: jnp.tanh(x @ p["w"][...]) @ p["v"][...],
    ),
    "numpy": (lambda: jax.tree.map(np.asarray, weights()), product),
}


@pytest.mark.parametrize("name", TREES)
def test_tree_and_dtypes_are_those_of_the_parameters(name, key):
    make, fn = TREES[name]
    params = make()
    plan = plan_of(params, fn, targets="w", train="v")
    frozen, trainable = jlora.split(key, params, plan)
    trainable = random_like(trainable)
    merged = jlora.merge(frozen, trainable)
    undone = jlora.unmerge(merged, trainable)
    for out, like in ((merged, params), (undone, frozen)):
        assert type(out) is type(params)
        assert jax.tree.structure(out) == jax.tree.structure(like)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(like), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_merge_under_transformations(key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params))
    trainable = random_like(trainable)
    eager = jlora.merge(frozen, trainable)
    np.testing.assert_allclose(
        jax.jit(jlora.merge)(frozen, trainable)["w"], eager["w"], rtol=1e-6
    )
    shapes = jax.eval_shape(jlora.merge, frozen, trainable)
    assert shapes["w"].shape == (4, 6)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), trainable)
    both = jax.vmap(jlora.merge, (None, 0))(frozen, several)
    np.testing.assert_allclose(both["w"][0], eager["w"], rtol=1e-6)
    np.testing.assert_allclose(
        both["w"][1] - params["w"], 4 * (eager["w"] - params["w"]), rtol=1e-4, atol=1e-5
    )


def test_merge_writes_to_neither_argument(key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params))
    trainable = random_like(trainable)
    before = bits((frozen, trainable))
    jlora.merge(frozen, trainable)
    jlora.unmerge(params, trainable)
    assert bits((frozen, trainable)) == before


def test_shardings_are_kept(key):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=auto)
    place = {
        "w": NamedSharding(mesh, P("x", "y")),
        "v": NamedSharding(mesh, P(None, "x")),
        "z": NamedSharding(mesh, P(("x", "y"))),
    }
    params = {"w": jnp.ones((8, 4)), "v": jnp.ones((4, 8)), "z": jnp.ones((8, 8))}
    params = jax.device_put(params, place)
    plan = jlora.plan(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["z"],
        params,
        jnp.ones((2, 8)),
        config=jlora.LoraConfig(rank=2, targets="{w,z}", train="v"),
    )
    frozen, trainable = jlora.split(key, params, plan)
    trainable = random_like(trainable)
    trainable = dataclasses.replace(
        trainable, full=jax.device_put(trainable.full, {"v": place["v"]})
    )
    merged = jlora.merge(frozen, trainable)
    undone = jlora.unmerge(merged, trainable)
    for name, sharding in place.items():
        assert merged[name].sharding == sharding
        assert merged[name].addressable_shards[1].data.shape == (
            sharding.shard_shape(merged[name].shape)
        )
    for name in "wz":
        assert undone[name].sharding == place[name]
    np.testing.assert_allclose(
        merged["w"], 1 + update(trainable.lora["w"]), rtol=1e-5, atol=1e-5
    )


# Every role of every axis.


@st.composite
def roles(draw):
    """`(axes, shape)`: up to five axes in any order, at least one in and one out."""
    ndim = draw(st.integers(2, 5))
    order = draw(st.permutations(range(ndim)))
    first = draw(st.integers(0, ndim - 2))
    second = draw(st.integers(first + 1, ndim - 1))
    # JAX's einsum and the trace give the roles in the order of the weight's axes.
    cut = (order[:first], order[first:second], order[second:])
    shape = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    return jlora.Axes(*(tuple(sorted(c)) for c in cut)), tuple(shape)


@given(drawn=roles(), seed=st.integers(0, 99))
def test_factored_equals_merged_equals_definition(drawn, seed):
    axes, shape = drawn
    letters = "abcde"[: len(shape)]
    batch, fan_in, fan_out = (
        "".join(letters[i] for i in role)
        for role in (axes.batch, axes.fan_in, axes.fan_out)
    )
    subscripts = f"t{batch}{fan_in},{letters}->{batch}t{fan_out}"

    def fn(p, x):
        return jnp.einsum(subscripts, x, p["w"])

    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=shape), "float32")}
    sizes = [2, *(shape[i] for i in (*axes.batch, *axes.fan_in))]
    x = jnp.asarray(rng.normal(size=sizes), "float32")
    # An axis of size one has no role of its own, so the roles are given.
    config = jlora.LoraConfig(
        rank=1, alpha=2, targets="w", rules=jlora.Rule("w", axes=axes)
    )
    plan = jlora.plan(fn, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = random_like(trainable, seed)

    @jax.jit
    def run(frozen, trainable, x):
        merged = jlora.merge(frozen, trainable)
        lora_fn = jlora.apply_lora(fn, on_merge="error")
        return merged["w"], fn(merged, x), lora_fn(frozen, trainable, x)

    merged, by_merge, factored = run(frozen, trainable, x)
    expected = np.asarray(params["w"], np.float64) + update(trainable.lora["w"])
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(factored, by_merge, rtol=1e-4, atol=1e-4)
    y = np.einsum(subscripts, np.asarray(x, np.float64), expected)
    np.testing.assert_allclose(factored, y, rtol=1e-4, atol=1e-4)


# Unmerge.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_then_unmerge_is_identity_up_to_one_rounding(dtype, key):
    params = weights(dtype)
    frozen, trainable = jlora.split(key, params, plan_of(params, train="v"))
    trainable = random_like(trainable)
    merged = jlora.merge(frozen, trainable)
    again = jlora.unmerge(merged, trainable)
    assert jax.tree.structure(again) == jax.tree.structure(frozen)
    largest = np.maximum(np.abs(np.asarray(merged["w"], "f4")), np.abs(frozen["w"]))
    ulp = float(jnp.finfo(dtype).eps) * np.asarray(largest, "f4")
    gap = np.abs(np.asarray(again["w"], "f4") - np.asarray(frozen["w"], "f4"))
    assert (gap <= 2 * ulp).all()
    assert (np.asarray(merged["w"], "f4") != np.asarray(frozen["w"], "f4")).any()


def test_unmerge_takes_back_what_merge_added_exactly_for_integers(key):
    params = {"w": jnp.arange(24.0).reshape(4, 6), "v": jnp.ones((6, 3))}
    frozen, trainable = jlora.split(key, params, plan_of(params))
    trainable = jax.tree.map(lambda x: jnp.round(3 * x), random_like(trainable))
    again = jlora.unmerge(jlora.merge(frozen, trainable), trainable)
    assert bits(again) == bits(frozen)


# Extract.


EXTRACT_CASES = {
    "matrix": ((8, 6), (3, 8), "td,df->tf", {}),
    "transposed": ((6, 8), (3, 8), "td,fd->tf", {"alpha": 5}),
    "heads": ((8, 2, 3), (3, 8), "td,dhk->thk", {"rslora": True}),
    "heads in": ((2, 3, 8), (3, 2, 3), "thk,hkd->td", {}),
    "experts last": ((5, 6, 2), (3, 2, 5), "ted,dfe->tef", {"alpha": 0.5}),
}


@pytest.fixture(params=EXTRACT_CASES, ids=str)
def planted(request, key):
    """`(fn, x, base, tuned, plan, planted adapter)`."""
    shape, x_shape, subscripts, config = EXTRACT_CASES[request.param]

    def fn(p, x):
        return jnp.einsum(subscripts, x, p["w"])

    rng = np.random.default_rng(5)
    base = {"w": jnp.asarray(rng.normal(size=shape), "float32")}
    x = jnp.asarray(rng.normal(size=x_shape), "float32")
    plan = jlora.plan(fn, base, x, config=jlora.LoraConfig(rank=2, **config))
    frozen, trainable = jlora.split(key, base, plan)
    trainable = random_like(trainable)
    return base, jlora.merge(frozen, trainable), plan, trainable


def test_extract_recovers_a_planted_low_rank_change(planted):
    base, tuned, plan, trainable = planted
    found = jlora.extract(tuned, base, plan)
    assert jax.tree.structure(found) == jax.tree.structure(trainable)
    np.testing.assert_allclose(
        update(found.lora["w"]), update(trainable.lora["w"]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        jlora.merge(base, found)["w"], tuned["w"], rtol=1e-5, atol=1e-5
    )


def test_extract_is_the_nearest_of_its_rank(key):
    rng = np.random.default_rng(2)
    base = weights()
    change = rng.normal(size=(4, 6)).astype(np.float32)
    tuned = {**base, "w": base["w"] + change}
    for rank in (1, 3, 4):
        found = jlora.extract(tuned, base, plan_of(base, rank=rank, alpha=3))
        change = np.asarray(tuned["w"] - base["w"], np.float64)
        u, s, vt = np.linalg.svd(change)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(update(found.lora["w"]), best, rtol=1e-4, atol=1e-5)
        gap = np.linalg.norm(change - update(found.lora["w"]))
        assert gap == pytest.approx(math.sqrt((s[rank:] ** 2).sum()), abs=1e-5)


def test_extract_shares_the_singular_values_evenly(planted):
    base, tuned, plan, _ = planted
    factors = jlora.extract(tuned, base, plan).lora["w"]
    n_batch = len(factors.spec.axes.batch)
    batch = factors.a.shape[:n_batch]
    a = np.asarray(factors.a).reshape(*batch, -1, 2)
    b = np.asarray(factors.b).reshape(*batch, 2, -1)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-4
    )


def test_extract_of_no_change_is_no_change(key):
    base = weights()
    found = jlora.extract(base, base, plan_of(base))
    assert not update(found.lora["w"]).any()
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


def test_extract_takes_full_leaves_whole_and_keeps_dtypes(key):
    base = weights("bfloat16")
    plan = plan_of(base, train="v", dtype="bfloat16")
    tuned = {"w": base["w"] * 2, "v": base["v"] + 1}
    found = jlora.extract(tuned, base, plan)
    assert bits(found.full["v"]) == bits(tuned["v"])
    assert found.lora["w"].a.dtype == found.lora["w"].b.dtype == jnp.bfloat16


def test_extract_warns_about_frozen_leaves_that_changed():
    base = {**weights(), "u": jnp.ones(3), "s": jnp.ones(2)}
    tuned = {**base, "v": base["v"] + 1, "u": base["u"] + 1}
    with pytest.warns(UserWarning, match=r"their change: u, v\. Add them to train="):
        jlora.extract(tuned, base, plan_of(base))


def test_extract_does_not_warn_about_leaves_that_are_as_they_were():
    base = {**weights(), "n": jnp.array([jnp.nan, 0.0])}
    base["k"] = jax.random.key(0)
    jlora.extract(dict(base), base, plan_of(base))  # warnings are errors


def test_extract_passes_over_leaves_that_are_no_arrays():
    base = {**weights(), "act": jnp.tanh, "name": "mlp", "eps": 1e-6}
    found = jlora.extract(dict(base), base, plan_of(base))
    assert list(found.lora) == ["w"]


# Trees that do not belong together.


def test_merge_of_trees_that_do_not_fit_is_refused(key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params))
    with pytest.raises(jlora.TreeError, match="'w', which frozen does not have"):
        jlora.merge({"v": params["v"]}, trainable)
    with pytest.raises(jlora.TreeError, match="got dict"):
        jlora.merge(trainable, frozen)


def test_unmerge_of_trees_that_do_not_fit_is_refused(key):
    params = weights()
    _, trainable = jlora.split(key, params, plan_of(params, train="v"))
    with pytest.raises(jlora.TreeError, match="params has no leaf 'v'"):
        jlora.unmerge({"w": params["w"]}, trainable)
    with pytest.raises(jlora.TreeError, match=r"a of 'w' has shape \(4, 2\)"):
        jlora.unmerge({**params, "w": jnp.ones((5, 6))}, trainable)
    with pytest.raises(jlora.TreeError, match=r"got dict.*mind the order"):
        jlora.unmerge(trainable, params)


def test_extract_of_trees_that_differ_is_refused():
    base = weights()
    plan = plan_of(base)
    with pytest.raises(jlora.TreeError, match=r"different structure: only one has 'u'"):
        jlora.extract({**base, "u": base["v"]}, base, plan)
    with pytest.raises(jlora.TreeError, match="equal, containers differ"):
        jlora.extract(FrozenDict(base), base, plan)
    with pytest.raises(jlora.TreeError, match="'w'"):
        jlora.extract({**base, "w": jnp.ones((4, 7))}, base, plan)
    other = {**base, "u": base["v"]}
    with pytest.raises(jlora.TreeError, match="not in the plan"):
        jlora.extract(other, other, plan)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_a_merge_into_eight_bits_says_what_it_loses(dtype):
    w = jnp.full((4, 4), 2.0).astype(dtype)
    small = jlora.Factors(
        jnp.full((4, 1), 0.01), jnp.ones((1, 4)), jlora.Spec(rank=1, alpha=1)
    )
    adapter = jlora.Trainable({"w": small})
    with pytest.warns(UserWarning, match=rf"'w' \({dtype}, all of it\)"):
        jlora.merge({"w": w}, adapter)
    with pytest.warns(UserWarning, match=rf"'w' \({dtype}\)"):
        jax.jit(jlora.merge)({"w": w}, adapter)
    exact = dataclasses.replace(small, a=jnp.ones((4, 1)))
    jlora.merge({"w": w}, jlora.Trainable({"w": exact}))  # 3 is a number of each


def test_a_merge_of_files_into_eight_bits_says_what_it_loses(tmp_path):
    w = jnp.full((4, 4), 2.0).astype("float8_e4m3fn")
    jlora.export.safetensors(tmp_path / "base", {"w": w})
    small = jlora.Factors(
        jnp.full((4, 1), 0.01), jnp.ones((1, 4)), jlora.Spec(rank=1, alpha=1)
    )
    with pytest.warns(UserWarning, match=r"'w' \(float8_e4m3fn, all of it\)"):
        jlora.export.merge_files(
            tmp_path / "base", jlora.Trainable({"w": small}), tmp_path / "out"
        )
