"""`merge(..., donate=True)`: which arrays it deletes, and what memory it holds."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jlora
from jlora._core import donation, merge as module
from tests.helpers import bits, random_like

D, LAYERS = 64, 6
X = jnp.ones((2, D))


def model(p, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ p[str(i)])
    return x @ p["head"]


def start(**config):
    keys = jax.random.split(jax.random.key(1), LAYERS + 1)
    params = {str(i): jax.random.normal(keys[i], (D, D)) for i in range(LAYERS)}
    params["head"] = jax.random.normal(keys[-1], (D, 3))
    config = {"rank": 2, "alpha": 3, "targets": "[0-9]", **config}
    plan = jlora.plan(model, params, X, config=jlora.LoraConfig(**config))
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    return frozen, random_like(trainable)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sums_are_the_same_and_the_adapted_arrays_are_deleted(method, dtype):
    frozen, trainable = start(method=method, train="head")
    frozen = jax.tree.map(lambda w: w.astype(dtype), frozen)
    own = {**frozen, "head": jnp.ones((D, 3))}  # whole parameters fit too
    expected = bits(jlora.merge(own, trainable))
    merged = jlora.merge(own, trainable, donate=True)
    assert bits(merged) == expected
    assert all(own[path].is_deleted() for path in (*trainable.lora, "head"))
    assert merged["head"] is trainable.full["head"]
    with pytest.raises(RuntimeError, match="Array has been deleted"):
        own["0"] + 1


def test_memory_holds_one_model_and_one_leaf(monkeypatch):
    frozen, trainable = start()
    leaf = frozen["0"].nbytes

    def held():
        return sum(x.nbytes for x in jax.live_arrays())

    before, seen = held(), []
    release = donation.Donation.release
    monkeypatch.setattr(
        donation.Donation,
        "release",
        lambda *args: seen.append(held()) or release(*args),
    )
    jlora.merge(frozen, trainable, donate=True)
    assert len(seen) == LAYERS
    assert max(seen) <= before + 0.1 * leaf
    # And the program of one leaf, beside its own weight:
    w, factors = jnp.ones((D, D)), trainable.lora["0"]
    program = module._sum_in_place(w.sharding).lower(w, factors, sign=1).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == leaf
    assert memory.temp_size_in_bytes <= 1.1 * leaf


def test_under_jit_donated_arguments_hold_one_model_and_one_leaf():
    frozen, trainable = start()
    merge = jax.jit(jlora.merge, donate_argnums=0)
    memory = merge.lower(frozen, trainable).compile().memory_analysis()
    leaf = frozen["0"].nbytes
    assert memory.alias_size_in_bytes >= LAYERS * leaf
    assert memory.temp_size_in_bytes <= 1.2 * leaf
    expected = bits(jlora.merge(frozen, trainable))
    assert bits(merge(frozen, trainable)) == expected
    with pytest.raises(jlora.MergeError, match="donate_argnums=0"):
        jax.jit(lambda f, t: jlora.merge(f, t, donate=True))(*start())


def test_arrays_that_something_else_holds_are_kept():
    """Tied leaves, a leaf twice in memory, views on the host, and NumPy leaves."""
    frozen, trainable = start()
    frozen["1"] = frozen["0"]  # both adapted
    frozen["head"] = frozen["2"]  # adapted once
    frozen["3"] = jax.device_put(frozen["4"], frozen["4"].sharding)  # one memory
    view = np.asarray(frozen["5"])
    expected = bits(jlora.merge(frozen, trainable))
    seen = view.copy()
    merged = jlora.merge(frozen, trainable, donate=True)
    assert bits(merged) == expected
    assert frozen["0"].is_deleted()
    assert frozen["4"].is_deleted()
    assert merged["head"] is frozen["2"]
    assert not frozen["2"].is_deleted()
    np.testing.assert_array_equal(view, seen)

    frozen, trainable = start()
    frozen = jax.tree.map(np.asarray, frozen)
    before = bits(frozen)
    jlora.merge(frozen, trainable, donate=True)
    assert bits(frozen) == before


def test_nothing_is_deleted_if_merge_raises():
    frozen, trainable = start()
    factors = trainable.lora["5"]
    bad = {**trainable.lora, "5": dataclasses.replace(factors, b=factors.b * jnp.nan)}
    with pytest.raises(jlora.MergeError, match="give NaN"):
        jlora.merge(frozen, jlora.Trainable(bad), check=True, donate=True)
    assert not any(w.is_deleted() for w in frozen.values())


@pytest.mark.parametrize("requantize", [False, True])
def test_codes_are_deleted_where_they_are_replaced(requantize):
    frozen, trainable = start(targets="[0-2]")
    coded = jlora.quantize(frozen, kind="int8", targets="[0-9]")
    with (
        pytest.warns(UserWarning, match="quantised")
        if requantize
        else contextlib.nullcontext()
    ):
        expected = jlora.merge(coded, trainable, requantize=requantize)
        merged = jlora.merge(coded, trainable, requantize=requantize, donate=True)
    assert bits(merged) == bits(expected)
    assert coded["0"].codes.is_deleted()
    assert coded["5"].codes.is_deleted() is not requantize


def test_a_sharded_weight_is_summed_where_it_lies():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    frozen, trainable = start()
    lay = NamedSharding(mesh, P("x", "y"))
    whole = NamedSharding(mesh, P())
    expected = jlora.merge(frozen, trainable)
    frozen = jax.device_put(frozen, {p: whole if p == "head" else lay for p in frozen})
    trainable = jax.device_put(trainable, whole)
    merged = jlora.merge(frozen, trainable, donate=True)
    assert all(merged[p].sharding == frozen[p].sharding for p in frozen)
    assert all(frozen[p].is_deleted() for p in trainable.lora)
    for path, w in expected.items():
        np.testing.assert_allclose(merged[path], w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "axes",
    [
        jlora.Axes(batch=(0,), fan_in=(1,), fan_out=(2,)),
        jlora.Axes(batch=(1,), fan_in=(0,), fan_out=(2,)),
        jlora.Axes(batch=(2,), fan_in=(1,), fan_out=(0,)),
    ],
)
def test_a_large_sum_is_made_in_pieces_along_any_axis(axes, dtype):
    sizes = (16, 80, 64)
    batch, n, m = (sizes[i] for i in axes.order)
    spec = jlora.Spec(rank=2, alpha=3, axes=axes)
    shapes = jlora.Factors(jnp.ones((batch, n, 2)), jnp.ones((batch, 2, m)), spec)
    factors = random_like(shapes)
    w = random_like(jnp.zeros(sizes, dtype))
    assert module._pieces(w, factors) == 16
    expected = np.asarray(w).astype("float64")
    (merged,) = jlora.merge([w], jlora.Trainable({"0": factors}), donate=True)
    change = 1.5 * np.einsum("bir,bro->bio", *map(np.float64, (factors.a, factors.b)))
    assert w.is_deleted()
    expected += change.transpose([axes.order.index(i) for i in range(3)])
    tolerance = 1e-6 if dtype == "float32" else 8e-3
    np.testing.assert_allclose(
        np.asarray(merged).astype("float64"), expected, rtol=tolerance, atol=tolerance
    )
