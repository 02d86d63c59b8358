"""What a cache hands out: its arrays, and who may still read them."""

import contextlib
import dataclasses
import threading
import weakref
from types import TracebackType
from typing import Any

import jax
import numpy as np

from ..errors import PoolError
from ..factors import Trainable


@dataclasses.dataclass(eq=False)
class Loan:
    """One use of the pool's arrays: the thread that may still read them.

    A loan ends when its `Trainable` is gone, or when its thread asks the cache for
    something else. While it is pinned it does not end, and then it does.
    """

    thread: threading.Thread | None
    pins: int = 0

    def blocks(self, thread: threading.Thread) -> bool:
        """Returns whether a write by `thread` must leave the arrays alone."""
        return self.pins > 0 or self.thread not in (None, thread)


class Loans:
    """The loans of the arrays that are the pool now."""

    def __init__(self) -> None:
        self._given: list[tuple[weakref.ref[Trainable], Loan]] = []

    def give(self, adapters: Trainable) -> tuple[Trainable, Loan]:
        """Returns the same arrays in an object of their own, and its loan."""
        own = dataclasses.replace(adapters)
        loan = Loan(threading.current_thread())
        self._given = [(ref, old) for ref, old in self._given if ref() is not None]
        self._given.append((weakref.ref(own), loan))
        return own, loan

    def block(self) -> bool:
        """Returns whether this thread must not write into the arrays."""
        thread = threading.current_thread()
        return any(
            ref() is not None and loan.blocks(thread) for ref, loan in self._given
        )

    def forget(self) -> None:
        """Ends all loans: the pool has other arrays now."""
        self._given = []


def is_deleted(tree: Any) -> bool:
    """Returns whether an array of `tree` was written over by a later call."""
    return any(x.is_deleted() for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The adapters of a batch of requests, and the slot of each batch row.

    In a `with` statement a batch stays valid until the end of the statement, whatever
    other threads do. Without one it belongs to the thread that acquired it, or that
    read `adapters` last, and stays valid until this thread next acquires or puts an
    adapter.

    Attributes:
      adapters: the pool's stack. After the end of the batch, reading it can be a
        `PoolError`.
      ids: `[batch]` int32; -1 for the base model. A batch row with an error has the id
        `capacity`, which makes the row NaN.
      errors: why a batch row cannot be served, by its number.
    """

    ids: np.ndarray
    errors: dict[int, Exception]
    _adapters: Trainable = dataclasses.field(repr=False)
    _loan: Loan = dataclasses.field(repr=False)
    _lock: contextlib.AbstractContextManager[Any] = dataclasses.field(repr=False)

    @property
    def adapters(self) -> Trainable:
        """The pool's stack, for this thread.

        Raises:
          PoolError: if the batch has ended and another adapter was put into the pool.
        """
        with self._lock:
            self._check()
            self._loan.thread = threading.current_thread()
            return self._adapters

    def __enter__(self) -> "Batch":
        with self._lock:
            self._check()
            self._loan.pins += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._loan.pins -= 1
            self._loan.thread = None

    def _check(self) -> None:
        if is_deleted(self._adapters):
            raise PoolError(
                "This batch has ended: the thread that it belonged to has put another "
                "adapter into the pool since. Keep a batch in a `with` statement as "
                "long as it is used: `with cache.acquire(names) as batch:`."
            )
