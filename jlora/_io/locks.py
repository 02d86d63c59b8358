"""Locks among writers, which the system lets go when a process ends in any way."""

import contextlib
import os
import pathlib
import platform
import time
import weakref
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


class Lock:
    """A lock that is held until `release`, or until nothing refers to it."""

    def __init__(self, handle: int):
        self._handle = handle
        self._close = weakref.finalize(self, os.close, handle)
        _held.add(self)

    def is_on(self, path: str | os.PathLike[str]) -> bool:
        """Returns whether `path` is the name of what is locked."""
        return os.path.samestat(os.stat(path), os.fstat(self._handle))

    def release(self) -> None:
        """Lets go; a second time does nothing."""
        self._close()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _let_go() -> None:
    for lock in [*_held]:
        lock.release()


# A forked child would hold the locks of a parent that was killed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def take(path: str | os.PathLike[str], *, wait: float = 0.0) -> Lock | None:
    """Returns a lock on a file or a directory; None where the disk has no locks.

    Args:
      path: what to lock. The lock is on the file, not on its name.
      wait: for how many seconds to try.

    Raises:
      BlockingIOError: if somebody else holds it all the time.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, _FLAGS)
    except OSError:
        return None
    lock, end = Lock(handle), time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                lock.release()
                raise
            time.sleep(0.002)
        except OSError:
            lock.release()
            return None
        else:
            return lock


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: float = 2.0) -> Iterator[None]:
    """Holds a lock in the block, if it can be had in time.

    It is for steps of some milliseconds. No writer of jlora holds it longer.
    """
    lock = None
    with contextlib.suppress(BlockingIOError):
        lock = take(path, wait=wait)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def alone(file: pathlib.Path) -> Iterator[None]:
    """Holds `file` in the block, as the only one; it says who holds it.

    Raises:
      BlockingIOError: if somebody else holds it; its text says who.
      OSError: if it cannot be written.
    """
    lock, process = _alone(file), os.getpid()
    try:
        if lock is not None:
            file.write_text(f"process {process} on {platform.node()}")
        yield
    finally:
        if os.getpid() == process:  # a forked child has this block as well
            with contextlib.suppress(OSError):
                file.unlink()
        if lock is not None:
            lock.release()


def _alone(file: pathlib.Path) -> Lock | None:
    while True:
        file.touch()
        try:
            lock = take(file)
        except BlockingIOError as error:
            raise BlockingIOError(file.read_text()) from error
        with contextlib.suppress(FileNotFoundError):
            # Its last owner may have deleted the file that was locked here.
            if lock is None or lock.is_on(file):
                return lock
            lock.release()
