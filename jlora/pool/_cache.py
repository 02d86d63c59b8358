"""The pool's only state: which named adapter is in which slot."""

import collections
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..errors import PoolError
from ..factors import Trainable
from ._batch import Batch, Loans, is_deleted
from ._pool import Pool, check_number, create, fit, insert

if TYPE_CHECKING:
    from concurrent.futures import Future


@functools.partial(jax.jit, donate_argnums=0)
def insert_in_place(pool: Pool, slot: ArrayLike, trainable: Trainable) -> Pool:
    return insert(pool, slot, trainable)


insert_into_copy = jax.jit(insert)


class Write(NamedTuple):
    """A write into the pool that has begun, so that one cut off can be settled."""

    before: Pool
    name: str
    slot: int
    replaced: str | None  # the name that had the slot


@dataclasses.dataclass(eq=False)
class Claim:
    """The names that a batch waits for, as long as its call keeps this object."""

    names: Sequence[str]


class Cache:
    """Adapters by name in a `Pool`: loads, places and replaces them.

    This is the only part of jlora that keeps state. Several threads may use it, and
    several may serve at once. While nobody else reads the pool, `acquire` and `put`
    write into it in place. While another thread holds a batch, they write into a copy,
    so that this batch stays as it was. `with cache.acquire(names) as batch:` says when
    a batch is no longer used.

    A call that fails, or that Ctrl-C cuts off, loses no slot. An adapter that was to be
    replaced stays, unless the failed call has already used up the pool's memory. Then
    the cache starts again with an empty pool and loads what requests ask for.

    Args:
      load: `load(name) -> Trainable`, for example from a PEFT directory. It runs in
        threads of its own. An exception that it raises is reported for the batch rows
        that asked for this adapter; SystemExit is too, as the cause of a `PoolError`.
      like: the largest adapter, see `create`.
      capacity: the number of slots.
      workers: how many adapters load at the same time.
      waiting: how many prefetched adapters are kept in host memory, or are still to
        be loaded, before a batch asks for them; `capacity` by default. The oldest are
        forgotten first.

    Raises:
      PoolError: if `capacity`, `workers` or `waiting` is not a whole number from 1, or
        a pool cannot hold `like`.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> def load(name):
      ...     value = {"one": 1.0, "two": 2.0}[name]
      ...     own = Factors(jnp.full((3, 1), value), jnp.ones((1, 2)),
      ...                   Spec(rank=1, alpha=1.0))
      ...     return Trainable({"w": own})
      >>> row_fn = jlora.adapters.per_row(lambda p, x: x @ p["w"])
      >>> with jlora.pool.Cache(load, load("one"), capacity=2) as cache:
      ...     with cache.acquire(["two", None, "three"]) as batch:
      ...         y = row_fn({"w": jnp.ones((3, 2))}, batch.adapters,
      ...                    jnp.array([0, -1]), jnp.ones((2, 3)))
      >>> y[:, 0], batch.ids, batch.errors
      (Array([9., 3.], dtype=float32), array([ 0, -1,  2], dtype=int32),
       {2: KeyError('three')})

      Load the next batch's adapters while this batch runs, and replace an adapter by a
      newly trained one of the same name:

      >>> with jlora.pool.Cache(load, load("one"), capacity=2) as cache:
      ...     cache.prefetch(["two"])
      ...     cache.put("one", load("two"))
      ...     before = cache.resident, cache.ready("one"), cache.ready("three")
      ...     cache.drop("one")
      ...     before, cache.resident
      ((('one',), True, False), ())
    """

    def __init__(
        self,
        load: Callable[[str], Trainable],
        like: Trainable,
        capacity: int,
        *,
        workers: int = 2,
        waiting: int | None = None,
    ):
        from concurrent.futures import ThreadPoolExecutor

        check_number("workers", workers)
        check_number("waiting", 1 if waiting is None else waiting)
        self._load = load
        self._pool = create(like, capacity)
        # Only shapes: the arrays are donated at most insertions.
        self._shapes = jax.eval_shape(lambda p: p, self._pool)
        # A name is in `_slots` only while the pool has its numbers in that slot. A slot
        # in neither `_slots` nor `_free` is found again; none is ever in both.
        self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._free = list(range(capacity))[::-1]
        self._begun: Write | None = None
        self._loans = Loans()
        self._copies = 0
        self._loading: dict[str, Future[Trainable]] = {}
        self._claims: weakref.WeakSet[Claim] = weakref.WeakSet()
        self._waiting = capacity if waiting is None else waiting
        self._lock = threading.RLock()
        self._closed = False
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="jlora-pool")

    @property
    def pool(self) -> Pool:
        """The pool as it is now; its arrays are valid as long as those of a `Batch`."""
        with self._lock:
            self._settle()
            adapters, _ = self._loans.give(self._pool.adapters)
            return Pool(adapters, jnp.copy(self._pool.occupied))

    @property
    def resident(self) -> tuple[str, ...]:
        """The names in the pool, the least recently used one first."""
        with self._lock:
            self._settle()
            return tuple(self._slots)

    @property
    def copies(self) -> int:
        """How many insertions wrote into a copy, because another thread had a batch."""
        return self._copies

    def prefetch(self, names: Iterable[str | None]) -> None:
        """Starts to load the adapters that are not in the pool, and returns at once.

        Of adapters that no batch has asked for, the cache keeps the last `waiting`.

        Args:
          names: names of adapters. None, the base model, needs no loading.
        """
        with self._lock:
            self._settle()
            for name in names:
                if name is None or name in self._slots or name in self._loading:
                    continue
                self._loading[name] = self._start(name)
            self._forget_oldest()

    def ready(self, name: str | None) -> bool:
        """Returns whether `acquire` would not wait for `name`."""
        with self._lock:
            self._settle()
            return self._is_ready(name)

    def acquire(self, names: Sequence[str | None]) -> Batch:
        """Returns slots for a batch of requests, loading what is missing.

        Adapters of this batch do not replace each other. Other adapters are replaced,
        the least recently used first. If an adapter cannot be loaded, does not fit,
        cannot be put into the pool, or finds all slots taken by this batch, only its
        own batch rows have an error.

        Args:
          names: for each batch row an adapter's name, or None for the base model.
        """
        names = list(names)
        wanted: list[str] = list(
            dict.fromkeys(name for name in names if name is not None)
        )
        claim = Claim(wanted)
        with self._lock:
            self._claims.add(claim)
        try:
            return self._acquired(names, wanted)
        finally:
            with self._lock:
                self._claims.discard(claim)
                self._forget_oldest()

    def _acquired(self, names: list[str | None], wanted: list[str]) -> Batch:
        from concurrent.futures import wait

        failed: dict[str, Exception] = {}
        while True:
            missing = [name for name in wanted if name not in failed]
            self.prefetch(missing)
            with self._lock:
                loading = [self._loading[n] for n in missing if n in self._loading]
            wait(loading)  # not under the lock: other threads may go on
            with self._lock:
                self._settle()
                if all(map(self._is_ready, missing)):
                    self._place(missing, failed)
                if all(name in self._slots or name in failed for name in wanted):
                    return self._batch(names, failed)
            # Another thread has placed and replaced an adapter that was waited for, or
            # an insertion that failed has used up the pool.

    def put(self, name: str, trainable: Trainable) -> None:
        """Puts an adapter into the pool, in place of one with the same name.

        Args:
          name: the name that requests use.
          trainable: the adapter.

        Raises:
          PoolError: if it does not fit.
        """
        fitted = fit(self._shapes, trainable)
        with self._lock:
            self._settle()
            self._loading.pop(name, None)
            self._write(name, fitted, keep=())

    def drop(self, name: str) -> None:
        """Frees the slot of `name`, so that the next request loads it again."""
        with self._lock:
            self._settle()
            self._loading.pop(name, None)
            slot = self._slots.pop(name, None)
            if slot is not None:
                occupied = vacate(self._pool.occupied, np.int32(slot))
                self._pool = Pool(self._pool.adapters, occupied)
                self._free.append(slot)

    def close(self) -> None:
        """Stops the threads that load adapters; adapters in the pool are still served.

        It waits for a loader that runs. Adapters that wait to be loaded, and those that
        a batch asks for later, are an error of their batch rows.
        """
        self._closed = True
        self._workers.shutdown(wait=True)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _is_ready(self, name: str | None) -> bool:
        if name is None or name in self._slots:
            return True
        future = self._loading.get(name)
        return future is not None and future.done()

    def _start(self, name: str) -> "Future[Trainable]":
        from concurrent.futures import Future

        try:
            return self._workers.submit(self._fetch, name)
        except RuntimeError as error:  # closed, or no thread can be started
            refused: Future[Trainable] = Future()
            refused.set_exception(closed(name) if self._closed else error)
            return refused

    def _fetch(self, name: str) -> Trainable:
        if self._closed:
            raise closed(name)
        try:
            loaded = self._load(name)
        except Exception:
            raise
        except BaseException as error:  # must not end the thread that asks for it
            raise PoolError(f"The loader of {name!r} raised {error!r}.") from error
        return fit(self._shapes, loaded)

    def _forget_oldest(self) -> None:
        """Forgets prefetched adapters above the limit that no batch waits for."""
        if len(self._loading) > self._waiting:
            awaited = {name for claim in self._claims for name in claim.names}
            idle = [name for name in self._loading if name not in awaited]
            for name in idle[: max(0, len(idle) - self._waiting)]:
                self._loading.pop(name).cancel()

    def _place(self, wanted: Sequence[str], failed: dict[str, Exception]) -> None:
        """Puts what is loaded into the pool; adds to `failed` what cannot be.

        If a failure uses up the pool, its adapters are gone and must be loaded again.
        """
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        for name in wanted:
            if name in self._slots or name not in self._loading:
                continue
            try:
                self._write(name, self._loading.pop(name).result(), wanted)
            except Exception as error:  # of `load` or of JAX, for its batch rows
                failed[name] = error

    def _batch(
        self, names: Sequence[str | None], failed: dict[str, Exception]
    ) -> Batch:
        none = self._pool.capacity
        ids = [
            -1 if n is None else none if n in failed else self._slots[n] for n in names
        ]
        errors = {i: failed[n] for i, n in enumerate(names) if n in failed}
        adapters, loan = self._loans.give(self._pool.adapters)
        return Batch(np.asarray(ids, np.int32), errors, adapters, loan, self._lock)

    def _write(self, name: str, fitted: Trainable, keep: Sequence[str]) -> None:
        slot, replaced = self._slot_for(name, keep)
        self._begun = Write(self._pool, name, slot, replaced)
        try:
            self._pool = self._with(slot, fitted)
        finally:
            self._settle()
        if name not in self._slots:  # the arrays that came back are errors
            raise PoolError(f"{name!r} could not be written into the pool.")

    def _with(self, slot: int, fitted: Trainable) -> Pool:
        """Returns the pool with an adapter, in place if no other thread reads it."""
        if self._loans.block():
            self._copies += 1
            return insert_into_copy(self._pool, np.int32(slot), fitted)
        return insert_in_place(self._pool, np.int32(slot), fitted)

    def _slot_for(self, name: str, keep: Sequence[str]) -> tuple[int, str | None]:
        """Returns a slot for `name`, and the name that it is taken from."""
        if name in self._slots:
            return self._slots[name], name
        capacity = self._pool.capacity
        if not self._free and len(self._slots) < capacity:  # after a call was cut off
            self._free = sorted({*range(capacity)} - {*self._slots.values()})[::-1]
        if self._free:
            return self._free[-1], None
        victim = next((n for n in self._slots if n not in keep), None)
        if victim is None:
            raise PoolError(
                f"No slot for {name!r}: this batch uses more adapters than the "
                f"pool's {capacity}. Make the batch smaller or the pool larger."
            )
        return self._slots[victim], victim

    def _settle(self) -> None:
        """Brings names and pool to agreement, after a write that ended or was cut off.

        Each step may be cut off too: the next call then does it again.
        """
        begun = self._begun
        if begun is not None and self._pool is not begun.before:
            if self._free and self._free[-1] == begun.slot:
                self._free.pop()
            if begun.replaced is not None:
                self._slots.pop(begun.replaced, None)
            self._slots[begun.name] = begun.slot
            self._loans.forget()
        self._begun = None
        if is_lost(self._pool):
            self._slots.clear()
            self._free = []
            self._loans.forget()
            self._pool = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), self._shapes
            )


@jax.jit
def vacate(occupied: jax.Array, slot: ArrayLike) -> jax.Array:
    return occupied.at[slot].set(False)


def is_lost(pool: Pool) -> bool:
    """Returns whether a failed insertion has used up the arrays, or made them errors.

    An insertion that has not ended counts as good, so that nobody waits for it here.
    """
    if is_deleted(pool):
        return True
    if not pool.occupied.is_ready():
        return False
    try:
        pool.occupied.block_until_ready()
    except Exception:  # of the insertion that made it
        return True
    return False


def closed(name: str) -> PoolError:
    return PoolError(f"{name!r} was not loaded: this cache is closed.")
