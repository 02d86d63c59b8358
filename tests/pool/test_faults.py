"""The cache after failures: no slot is lost, and no row is wrong."""

import functools
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jlora import PoolError, pool
from jlora.pool import _cache
from tests.pool.known import LIKE, adapter, load, served

INSERT = {n: getattr(_cache, n) for n in ("insert_in_place", "insert_into_copy")}


def check_rows(cache, names):
    """Asserts that every name is served, and served right, with all slots in use."""
    for name in names:
        with cache.acquire([name, None]) as batch:
            assert not batch.errors
            out = served(batch)
        np.testing.assert_allclose(out[0], 4 * int(name), rtol=1e-5)
        np.testing.assert_array_equal(out[1], 0)
    assert cache.resident == tuple(names[-cache.pool.capacity :])


@pytest.fixture
def fault(monkeypatch):
    """Makes the next insertions fail: `fault(error, consumed=..., times=...)`."""

    def install(error, *, consumed=False, times=3):
        left = [times]

        def insert(name, pool, slot, trainable):
            if left[0] == 0:
                return INSERT[name](pool, slot, trainable)
            left[0] -= 1
            if consumed:
                jax.tree.map(lambda x: x.delete(), pool)
            raise error

        for name in INSERT:
            monkeypatch.setattr(_cache, name, functools.partial(insert, name))

    return install


ERRORS = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    MemoryError(),
    ValueError("a bug"),
    KeyboardInterrupt(),
    SystemExit(1),
]


@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_insertion_that_fails_loses_no_slot(fault, error, consumed):
    with pool.Cache(load, LIKE, capacity=2) as cache:
        check_rows(cache, ["1", "2"])
        fault(error, consumed=consumed, times=3)
        for name in ("3", "4"):
            if isinstance(error, Exception):
                batch = cache.acquire([name, None, name])
                assert batch.errors == {0: error, 2: error}
                assert np.isnan(served(batch)[[0, 2]]).all()
                assert (served(batch)[1] == 0).all()
            else:
                with pytest.raises(type(error)):
                    cache.acquire([name])
        with pytest.raises(type(error)):
            cache.put("5", adapter(5))
        # The adapters that were there stay, or are gone with the memory they were in.
        assert cache.resident == (() if consumed else ("1", "2"))
        assert cache.pool.occupied.sum() == (0 if consumed else 2)
        check_rows(cache, ["2", "1"])
        check_rows(cache, ["3", "4", "5", "1"])


def test_adapters_of_a_batch_that_a_failure_took_along_are_loaded_again(fault):
    with pool.Cache(load, LIKE, capacity=3) as cache:
        check_rows(cache, ["1", "2"])
        fault(ERRORS[0], consumed=True, times=1)
        batch = cache.acquire(["1", "2", "3", None])
        assert batch.errors == {2: ERRORS[0]}
        np.testing.assert_allclose(served(batch)[:, 0], [4, 8, np.nan, 0], rtol=1e-5)
        check_rows(cache, ["1", "2", "3"])


def test_a_replacement_that_fails_leaves_the_adapter_of_that_name(fault):
    with pool.Cache(load, LIKE, capacity=2) as cache:
        check_rows(cache, ["1", "2"])
        fault(ERRORS[0], times=1)
        with pytest.raises(type(ERRORS[0])):
            cache.put("1", adapter(7))
        check_rows(cache, ["1", "2"])
        cache.put("1", adapter(7))
        np.testing.assert_allclose(served(cache.acquire(["1"]))[:, 0], [28], rtol=1e-5)


def test_numbers_that_come_back_as_errors_empty_the_pool(monkeypatch):
    """An accelerator tells later that an insertion failed."""

    class Failed:
        def is_deleted(self):
            return False

        def is_ready(self):
            return True

        def block_until_ready(self):
            raise ERRORS[0]

    def insert(made, slot, trainable):
        made = INSERT["insert_in_place"](made, slot, trainable)
        return pool.Pool(made.adapters, Failed())

    with pool.Cache(load, LIKE, capacity=2) as cache:
        check_rows(cache, ["1", "2"])
        monkeypatch.setattr(_cache, "insert_in_place", insert)
        batch = cache.acquire(["3", None])
        assert "'3' could not be written" in str(batch.errors[0])
        monkeypatch.undo()
        check_rows(cache, ["1", "2", "3"])


def steps(cache):
    """Calls that load, replace, put and drop."""
    cache.acquire(["3", "1"])
    cache.put("4", load("4"))
    cache.drop("1")
    cache.acquire(["5"])


def interrupted_at(line, call):
    """Calls with Ctrl-C at the `line`-th line of the cache; whether it came so far."""
    files = _cache.__file__, pool._batch.__file__
    left = [line]

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return left[0] <= 0


@pytest.mark.parametrize("copied", [False, True])
def test_ctrl_c_at_any_line_leaves_every_row_right(copied):
    for line in range(1 + copied, 1000, 7):
        with pool.Cache(load, LIKE, capacity=2, workers=1) as cache:
            check_rows(cache, ["1", "2"])
            held = cache.acquire(["1"])
            with held if copied else threading.Lock():
                cut = interrupted_at(line, lambda cache=cache: steps(cache))
                # Whatever it still has must be right, as must all that follows.
                for name in cache.resident:
                    out = served(cache.acquire([name]))
                    np.testing.assert_allclose(out[0], 4 * int(name), rtol=1e-5)
                if copied:
                    np.testing.assert_allclose(served(held)[0], 4, rtol=1e-5)
            check_rows(cache, ["4", "1", "5", "2", "3"])
        if not cut:
            break
    assert 100 < line < 999


def test_a_loader_that_exits_is_an_error_of_its_row():
    for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit()):

        def fatal(name, error=error):
            if name == "exit":
                raise error
            return load(name)

        with pool.Cache(fatal, LIKE, capacity=2, workers=1) as cache:
            batch = cache.acquire(["1", "exit", "2"])
            assert set(batch.errors) == {1}
            with pytest.raises(PoolError, match="The loader of 'exit' raised") as info:
                raise batch.errors[1]
            assert info.value.__cause__ is error
            check_rows(cache, ["3", "4"])


def test_prefetched_adapters_that_nobody_asks_for_are_bounded():
    seen = threading.Semaphore(0)

    def count(name):
        seen.release()
        return load(name)

    with pool.Cache(count, LIKE, capacity=2, waiting=4, workers=1) as cache:
        for start in range(0, 5000, 50):
            cache.prefetch(map(str, range(start, start + 50)))
        assert list(cache._loading) == ["4996", "4997", "4998", "4999"]
        assert not cache.ready("1")
        check_rows(cache, ["4999", "1"])
        while not cache.ready("4998"):
            time.sleep(0.001)
        assert len(cache._loading) == 3  # 4999 is in the pool
        # A batch may ask for more than are kept, and get an answer for each row.
        batch = cache.acquire(list(map(str, range(20))))
        assert len(batch.errors) == 18
        assert len(cache._loading) <= 4
    for wrong in (0, -1, 2.0, "3"):
        with pytest.raises(PoolError, match="waiting must be a whole number from 1"):
            pool.Cache(load, LIKE, 2, waiting=wrong)


def test_an_error_that_is_kept_holds_no_adapters_in_memory(monkeypatch):
    """Its traceback holds the frame of the call that waited for them."""

    def fails(*_, **__):
        raise PoolError("no room")

    with pool.Cache(load, LIKE, capacity=2, waiting=1) as cache:
        monkeypatch.setattr(cache, "_write", fails)
        kept = cache.acquire(["1", "2"]).errors
        assert len(kept) == 2
        assert not list(cache._claims)


def test_failures_that_nobody_asks_for_are_bounded():
    with pool.Cache(load, LIKE, capacity=2) as cache:
        cache.prefetch(["missing", "exit", "large", "nan", *map(str, range(100))])
        assert len(cache._loading) == 2


def test_a_closed_cache_answers():
    begin, begun = threading.Event(), threading.Event()

    def slow(name):
        begun.set()
        begin.wait(10)
        return load(name)

    cache = pool.Cache(slow, LIKE, capacity=3, workers=1)
    got = []
    asks = threading.Thread(target=lambda: got.append(cache.acquire(["1", "2"])))
    asks.start()
    begun.wait(10)
    closes = threading.Thread(target=cache.close)
    closes.start()
    while not cache._closed:
        time.sleep(0.001)
    begin.set()
    asks.join(10)
    closes.join(10)
    assert set(got[0].errors) == {1}
    batch = cache.acquire(["3", "1", None])
    for error in (got[0].errors[1], batch.errors[0]):
        assert "was not loaded: this cache is closed" in str(error)
    assert set(batch.errors) == {0}
    np.testing.assert_allclose(served(batch)[1:, 0], [4, 0], rtol=1e-5)


def in_thread(call):
    """Returns what `call` returns in another thread."""
    out = []
    thread = threading.Thread(target=lambda: out.append(call()))
    thread.start()
    thread.join(10)
    return out[0]


def test_a_batch_ends_with_one_clear_error():
    with pool.Cache(load, LIKE, capacity=1) as cache:
        old = cache.acquire(["1"])
        cache.acquire(["2"])
        for use in (lambda: old.adapters, old.__enter__):
            with pytest.raises(PoolError, match="This batch has ended: the thread"):
                use()
        # Dropping an adapter writes no numbers.
        kept = cache.acquire(["2"])
        cache.drop("2")
        np.testing.assert_allclose(served(kept)[:, 0], [8], rtol=1e-5)
        assert cache.copies == 0


def test_a_batch_stays_while_another_thread_swaps():
    with pool.Cache(load, LIKE, capacity=1) as cache:
        batch, whole = cache.acquire(["1"]), cache.pool
        arrays = batch.adapters  # as an argument of a program that now compiles
        in_thread(lambda: cache.put("2", load("2")))
        assert cache.copies == 1
        np.testing.assert_allclose(served(batch)[:, 0], [4], rtol=1e-5)
        del batch
        assert not arrays.lora["w"].a.is_deleted()
        assert not pool.lookup(whole, 0).lora["w"].a.is_deleted()
        # Nobody reads what the pool is now.
        in_thread(lambda: cache.put("3", load("3")))
        assert cache.copies == 1


def test_a_batch_in_a_with_statement_stays_in_any_thread():
    with pool.Cache(load, LIKE, capacity=1) as cache:
        with cache.acquire(["1"]) as batch:
            with cache.acquire(["2"]) as inner:
                np.testing.assert_allclose(served(inner)[:, 0], [8], rtol=1e-5)
            np.testing.assert_allclose(
                in_thread(lambda: served(batch))[:, 0], [4], rtol=1e-5
            )
        assert cache.copies == 1
        with cache.acquire(["3"]) as last:
            pass
        # After its end it stops nobody, though the variable is still there.
        in_thread(lambda: cache.put("4", load("4")))
        assert cache.copies == 1
        with pytest.raises(PoolError, match="This batch has ended"):
            _ = last.adapters


def test_a_batch_handed_to_another_thread_is_that_threads():
    with pool.Cache(load, LIKE, capacity=1) as cache:
        batch = cache.acquire(["1"])
        arrays = in_thread(lambda: batch.adapters)
        cache.acquire(["2"])  # by the thread that had it
        assert cache.copies == 1
        assert not arrays.lora["w"].a.is_deleted()


def test_threads_without_a_lock_serve_right_rows():
    wrong, rows = [], []

    def serve(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                names = [str(n) for n in rng.integers(1, 9, 2)]
                batch = cache.acquire(names)
                out = served(batch)
                np.testing.assert_allclose(
                    out[:, 0], [4 * int(n) for n in names], rtol=1e-5
                )
                rows.append(len(names))
        except BaseException as error:
            wrong.append(error)

    with pool.Cache(load, LIKE, capacity=3) as cache:
        check_rows(cache, ["1"])
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert sum(rows) == 6 * 60 * 2
        assert cache.copies > 0
