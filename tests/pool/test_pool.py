"""Slots for adapters: known outputs, no compilation, errors for their own rows."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import adapters, pool
from jlora.factors import Axes, Factors, Spec, Trainable
from jlora.pool._cache import insert_in_place
from tests.helpers import same
from tests.pool.known import LIKE, PARAMS, ROW_FN, adapter, load, model, served


def test_pure_functions_on_slots():
    empty = pool.create(jax.eval_shape(lambda: LIKE), 3)
    assert empty.capacity == 3
    two = pool.insert(empty, 1, pool.fit(empty, adapter(5, rank=2, alpha=7)))
    assert not empty.occupied.any()
    np.testing.assert_array_equal(two.occupied, [False, True, False])
    rows = jax.jit(pool.lookup)(two, jnp.array([1, -1, 0, 3, -2]))
    x = jnp.ones((5, 4))
    out = np.asarray(jlora.adapters.per_row(model)(PARAMS, rows, None, x))[:, 0]
    np.testing.assert_allclose(out[:2], [20, 0], rtol=1e-6)
    assert np.isnan(out[2:]).all()
    gone = pool.lookup(pool.evict(two, 1), 1)
    assert np.isnan(gone.lora["w"].a).all()


def test_random_swaps_and_mixed_batches_never_give_a_wrong_adapter():
    """Sixteen adapters in five slots; some requests are bad."""
    rng = np.random.default_rng(0)
    names = [*map(str, range(1, 17)), None, "missing", "large", "nan"]
    compiled = None
    with pool.Cache(load, LIKE, capacity=5) as cache:
        for i in range(1000):
            asked = [names[k] for k in rng.integers(0, len(names), 6)]
            batch = cache.acquire(asked)
            out = served(batch)
            good = {n for n in asked if n is not None and n.isdigit()}
            for row, name in enumerate(asked):
                if name is None:
                    assert (out[row] == 0).all()
                elif name.isdigit() and row not in batch.errors:
                    np.testing.assert_allclose(out[row], 4 * int(name), rtol=1e-5)
                else:
                    assert row in batch.errors
                    assert np.isnan(out[row]).all()
                    assert not name.isdigit() or len(good) > 5
            if i == 0:
                compiled = ROW_FN._cache_size(), insert_in_place._cache_size()
        # JAX forgets the oldest of some thousand programs, so they may be fewer.
        assert ROW_FN._cache_size() <= compiled[0]
        assert insert_in_place._cache_size() <= compiled[1]
        assert len(cache.resident) == 5


def test_errors_say_what_is_wrong_with_which_row():
    with pool.Cache(load, LIKE, capacity=2) as cache:
        batch = cache.acquire(["1", "missing", None, "large", "nan", "1", "2", "3"])
        assert set(batch.errors) == {1, 3, 4, 7}
        assert isinstance(batch.errors[1], FileNotFoundError)
        assert "'w' has rank 4, above the pool's 3" in str(batch.errors[3])
        assert "'w' holds NaN or infinity" in str(batch.errors[4])
        assert "more adapters than the pool's 2" in str(batch.errors[7])
        np.testing.assert_array_equal(batch.ids[[1, 3, 4, 7]], 2)
        # None of it stays: the next request is served.
        assert not cache.acquire(["3"]).errors


def test_least_recently_used_adapter_goes_first():
    with pool.Cache(load, LIKE, capacity=2) as cache:
        cache.acquire(["1"])
        cache.acquire(["2"])
        cache.acquire(["1"])
        cache.acquire(["3"])
        assert cache.resident == ("1", "3")
        cache.drop("1")
        cache.put("9", adapter(9))
        assert cache.resident == ("3", "9")
        np.testing.assert_allclose(served(cache.acquire(["9", "3"]))[:, 0], [36, 12])
        cache.put("9", adapter(8))
        np.testing.assert_allclose(served(cache.acquire(["9"]))[:, 0], [32])
        with pytest.raises(jlora.PoolError, match="rank 4"):
            cache.put("10", adapter(1, rank=4))


def test_adapters_load_in_the_background():
    begin, loaded = threading.Event(), []

    def slow(name):
        begin.wait(10)
        loaded.append(name)
        return load(name)

    with pool.Cache(slow, LIKE, capacity=2) as cache:
        cache.prefetch(["1", "1", None])
        assert not cache.ready("1")
        assert cache.ready(None)
        begin.set()
        np.testing.assert_allclose(served(cache.acquire(["1"]))[:, 0], [4])
        assert cache.ready("1")
        cache.acquire(["1"])
        assert loaded == ["1"]


def test_adapter_replaced_by_another_thread_is_loaded_anew(monkeypatch):
    wait, others = concurrent.futures.wait, ["1", "2"]

    def slow_wait(loading):  # meanwhile other threads ask for the same, and for more
        wait(loading)
        asked, others[:] = others[:], []
        for name in asked:
            cache.acquire([name])

    monkeypatch.setattr(concurrent.futures, "wait", slow_wait)
    with pool.Cache(load, LIKE, capacity=1) as cache:
        batch = cache.acquire(["1"])
        assert not batch.errors
        np.testing.assert_allclose(served(batch)[:, 0], [4])


def test_capacity_by_bytes():
    assert pool.bytes_of(LIKE) == 4 * (4 * 3 + 3 * 3 + 2 * (9 + 9))
    assert pool.capacity_for(LIKE, 10 * pool.bytes_of(LIKE) + 10) == 10
    made = pool.create(LIKE, 10)
    held = sum(x.nbytes for x in jax.tree.leaves(made))
    assert held <= 10 * pool.bytes_of(LIKE) + 10


def test_what_does_not_fit_is_listed():
    made = pool.create(LIKE, 1)
    other = Trainable({"v": adapter(1).lora["w"]}, {"head": jnp.ones(2)})
    with pytest.raises(jlora.PoolError, match="'head' is trained in full; 'v' is no"):
        pool.fit(made, other)
    turned = Factors(
        np.ones((3, 1)),
        np.ones((1, 4)),
        Spec(axes=Axes((), (1,), (0,)), rank=1, alpha=1),
    )
    with pytest.raises(jlora.PoolError, match="'w' is for a linear with Axes"):
        pool.fit(made, Trainable({"w": turned}))
    wide = Factors(np.ones((5, 1)), np.ones((1, 3)), Spec(rank=1, alpha=1))
    with pytest.raises(
        jlora.PoolError, match=r"sizes \(5, 3\), that of the pool of \(4, 3\)"
    ):
        pool.fit(made, Trainable({"w": wide}))
    with pytest.raises(jlora.PoolError, match="a dict"):
        pool.fit(made, {})
    with pytest.raises(jlora.PoolError, match=r"jlora.pool.fit\(pool, adapter\)"):
        pool.insert(made, 0, adapter(1))
    with pytest.raises(jlora.PoolError, match="'head' is trained in full"):
        pool.create(Trainable(full={"head": jnp.ones(2)}), 2)


def test_pool_in_low_precision_rounds_once():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LIKE)
    made = pool.create(low, 2)
    x = adapter(3, rank=2, alpha=7)
    made = pool.insert(made, 0, pool.fit(made, x))
    own = adapters.unstack(made.adapters)[0].lora["w"]
    assert own.a.dtype == jnp.bfloat16
    expected = jnp.asarray(x.lora["w"].b * 3.5, jnp.bfloat16)
    np.testing.assert_array_equal(own.b[:2], expected)
    half = pool.create(jax.tree.map(lambda x: x.astype(jnp.float16), LIKE), 1)
    with pytest.raises(jlora.PoolError, match=r"'w' .*too large for the pool's dtypes"):
        pool.fit(half, adapter(1e6))


def test_directories_of_peft_are_served(tmp_path):
    params = {"up": {"kernel": jnp.zeros((4, 3))}}

    def trained(number):
        return Trainable({"up/kernel": adapter(number, rank=2).lora["w"]})

    for number in (1, 2):
        jlora.peft.save(tmp_path / str(number), trained(number))

    def load(name):
        return jlora.peft.load(tmp_path / name, params)

    row_fn = jlora.adapters.per_row(lambda p, x: x @ p["up"]["kernel"])
    with pool.Cache(load, trained(0), capacity=2) as cache:
        batch = cache.acquire(["2", "none", None, "1"])
    out = row_fn(params, batch.adapters, batch.ids, jnp.ones((4, 4)))
    np.testing.assert_allclose(out[:, 0], [8, np.nan, 0, 4], rtol=1e-5)
    assert set(batch.errors) == {1}


@pytest.mark.parametrize("capacity", [0, -1, 2.0, 1.5, True, "3", None])
def test_a_pool_has_a_whole_number_of_slots(capacity):
    text = "capacity must be a whole number from 1, got"
    with pytest.raises(jlora.PoolError, match=text):
        pool.create(LIKE, capacity)
    with pytest.raises(jlora.PoolError, match=text):
        pool.Cache(load, LIKE, capacity)
    with pytest.raises(jlora.PoolError, match="workers must be a whole number"):
        pool.Cache(load, LIKE, 2, workers=capacity)
    for budget in (capacity, pool.bytes_of(LIKE), float("inf")):
        with pytest.raises(jlora.PoolError, match="budget must be a whole number from"):
            pool.capacity_for(LIKE, budget)
    assert pool.create(LIKE, np.int64(2)).capacity == 2
    with pytest.raises(
        jlora.TreeError, match=r"like must be a jlora\.Trainable, got N"
    ):
        pool.create(None, 2)


@pytest.mark.parametrize("slot", [3, -1, -3, 2**40, np.int32(3), jnp.int32(-1)])
def test_a_slot_that_does_not_exist_is_no_other_slot(slot):
    made = pool.create(LIKE, 3)
    for i in range(3):
        made = pool.insert(made, i, pool.fit(made, adapter(i + 1)))
    own = pool.fit(made, adapter(9))
    for change in (
        lambda: pool.insert(made, slot, own),
        lambda: pool.evict(made, slot),
    ):
        with pytest.raises(jlora.PoolError, match="has slots 0 to 2, but no slot"):
            change()
    if isinstance(slot, int) and slot >= 2**31:
        return
    same(jax.jit(pool.insert)(made, slot, own), made)
    same(jax.jit(pool.evict)(made, slot), made)


@pytest.mark.parametrize("slot", [1.0, True, None, "0", np.arange(2), [0]])
def test_a_slot_is_one_integer(slot):
    made = pool.create(LIKE, 3)
    own = pool.fit(made, adapter(9))
    for change in (
        lambda: pool.insert(made, slot, own),
        lambda: pool.evict(made, slot),
    ):
        with pytest.raises(jlora.PoolError, match="A slot is one integer, got"):
            change()
    if isinstance(slot, float | np.ndarray):
        with pytest.raises(jlora.PoolError, match="A slot is one integer, got"):
            jax.jit(pool.insert)(made, slot, own)


def test_an_adapter_of_other_dtypes_is_not_cast_in_silence():
    made = pool.create(jax.tree.map(lambda x: x.astype(jnp.float16), LIKE), 1)
    wide = pool.fit(pool.create(LIKE, 1), adapter(1e6))
    with pytest.raises(jlora.PoolError, match=r"dtypes of the adapter are not those"):
        pool.insert(made, 0, wide)
