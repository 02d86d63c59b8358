"""The pool's only state: which named adapter is in which slot."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import ArrayLike

from ..errors import PoolError
from ..factors import Trainable
from ._pool import Pool, check_number, create, evict, fit, insert

if TYPE_CHECKING:
    from concurrent.futures import Future


@functools.partial(jax.jit, donate_argnums=0)
def insert_in_place(pool: Pool, slot: ArrayLike, trainable: Trainable) -> Pool:
    return insert(pool, slot, trainable)


@functools.partial(jax.jit, donate_argnums=0)
def evict_in_place(pool: Pool, slot: ArrayLike) -> Pool:
    return evict(pool, slot)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The adapters of a batch of requests, and the slot of each batch row.

    Attributes:
      adapters: the pool's stack. It is valid until the cache next puts an adapter in.
      ids: `[batch]` int32; -1 for the base model. A batch row with an error has the id
        `capacity`, which makes the row NaN.
      errors: why a batch row cannot be served, by its number.
    """

    adapters: Trainable
    ids: np.ndarray
    errors: dict[int, Exception]


class Cache:
    """Adapters by name in a `Pool`: loads, places and replaces them.

    This is the only part of jlora that keeps state. Several threads may use it.
    `acquire` writes into the pool in place, so run one batch after another.

    Args:
      load: `load(name) -> Trainable`, for example from a PEFT directory. It runs in
        threads of its own. An exception that it raises is reported for the batch rows
        that asked for this adapter.
      like: the largest adapter, see `create`.
      capacity: the number of slots.
      workers: how many adapters load at the same time.

    Raises:
      PoolError: if `capacity` or `workers` is not a whole number from 1, or a pool
        cannot hold `like`.

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
      ...     batch = cache.acquire(["two", None, "three"])
      ...     y = row_fn({"w": jnp.ones((3, 2))}, batch.adapters, jnp.array([0, -1]),
      ...                jnp.ones((2, 3)))
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
    ):
        from concurrent.futures import ThreadPoolExecutor

        check_number("workers", workers)
        self._load = load
        self._pool = create(like, capacity)
        # Only shapes: the arrays are donated at each insertion.
        self._shapes = jax.eval_shape(lambda p: p, self._pool)
        self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._free = list(range(capacity))[::-1]
        self._loading: dict[str, Future[Trainable]] = {}
        self._lock = threading.RLock()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="jlora-pool")

    @property
    def pool(self) -> Pool:
        """The pool as it is now."""
        return self._pool

    @property
    def resident(self) -> tuple[str, ...]:
        """The names in the pool, the least recently used one first."""
        with self._lock:
            return tuple(self._slots)

    def prefetch(self, names: Iterable[str | None]) -> None:
        """Starts to load the adapters that are not in the pool, and returns at once.

        Args:
          names: names of adapters. None, the base model, needs no loading.
        """
        with self._lock:
            for name in names:
                if name is None or name in self._slots or name in self._loading:
                    continue
                self._loading[name] = self._workers.submit(self._fetch, name)

    def ready(self, name: str | None) -> bool:
        """Returns whether `acquire` would not wait for `name`."""
        with self._lock:
            if name is None or name in self._slots:
                return True
            future = self._loading.get(name)
            return future is not None and future.done()

    def acquire(self, names: Sequence[str | None]) -> Batch:
        """Returns slots for a batch of requests, loading what is missing.

        Adapters of this batch do not replace each other. Other adapters are replaced,
        the least recently used first. If an adapter cannot be loaded, does not fit, or
        finds all slots taken by this batch, only its own batch rows have an error.

        Args:
          names: for each batch row an adapter's name, or None for the base model.
        """
        from concurrent.futures import wait

        names = list(names)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        while True:
            self.prefetch(wanted)
            with self._lock:
                loading = [self._loading[n] for n in wanted if n in self._loading]
            wait(loading)  # not under the lock: other threads may go on
            with self._lock:
                if all(map(self.ready, wanted)):
                    return self._placed(names, wanted)
            # Another thread has placed and replaced an adapter that was waited for.

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
            self._loading.pop(name, None)
            self._write(name, fitted, keep=())

    def drop(self, name: str) -> None:
        """Frees the slot of `name`, so that the next request loads it again."""
        with self._lock:
            self._loading.pop(name, None)
            slot = self._slots.pop(name, None)
            if slot is not None:
                self._pool = evict_in_place(self._pool, np.int32(slot))
                self._free.append(slot)

    def close(self) -> None:
        """Stops the threads that load adapters."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fetch(self, name: str) -> Trainable:
        return fit(self._shapes, self._load(name))

    def _placed(self, names: Sequence[str | None], wanted: Sequence[str]) -> Batch:
        """Returns the batch; all its adapters must be in the pool or loaded."""
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        failed: dict[str, Exception] = {}
        for name in wanted:
            try:
                if name not in self._slots:
                    self._write(name, self._loading.pop(name).result(), wanted)
            except Exception as error:  # of `load`: reported for its batch rows
                failed[name] = error
        none = self._pool.capacity
        ids = [-1 if n is None else self._slots.get(n, none) for n in names]
        errors = {i: failed[n] for i, n in enumerate(names) if n in failed}
        return Batch(self._pool.adapters, np.asarray(ids, np.int32), errors)

    def _write(self, name: str, fitted: Trainable, keep: Sequence[str]) -> None:
        slot = self._slots.pop(name, None)
        if slot is None and self._free:
            slot = self._free.pop()
        if slot is None:
            victim = next((n for n in self._slots if n not in keep), None)
            if victim is None:
                raise PoolError(
                    f"No slot for {name!r}: this batch uses more adapters than the "
                    f"pool's {self._pool.capacity}. Make the batch smaller or the pool "
                    "larger."
                )
            slot = self._slots.pop(victim)
        self._pool = insert_in_place(self._pool, np.int32(slot), fitted)
        self._slots[name] = slot
