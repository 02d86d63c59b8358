"""Files that are opened once and read from later, and names that must not change."""

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import BinaryIO, TypeVar

from ..errors import CheckpointError, JloraError
from .disk import Fault, Path, reading, told

T = TypeVar("T")
Files = OrderedDict[Path, int]  # descriptors by path, the one used last at the end

_OPEN = 64  # files at a time: a process may often have 256 in all
_TRIES = 200


class Handles:
    """Open files, which are read from whatever happens to their names.

    They are closed when nothing refers to this object. Of many files only some are open
    at a time; one that is opened again must still be the same.

    Args:
      fault: the error to raise where one cannot be read.
    """

    def __init__(self, fault: Fault):
        self._fault = fault
        self._files: Files = OrderedDict()
        self._marks: dict[Path, Hashable] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._files, 0)

    def keep(self, path: Path, file: BinaryIO) -> None:
        """Keeps an open file, to be read from later."""
        with self._lock:
            self._keep(path, file)

    def _keep(self, path: Path, file: BinaryIO) -> None:
        mark = _mark(os.fstat(file.fileno()))
        if self._marks.setdefault(path, mark) != mark:
            raise CheckpointError("it was replaced while it was read.")
        _close(self._files, _OPEN - 1)
        self._files[path] = os.dup(file.fileno())

    def read(self, path: Path, start: int, size: int) -> memoryview:
        """Returns `size` bytes of a file that is kept, from `start` on.

        Raises:
          fault: if the file was changed since `keep`, or cannot be read.
        """
        name = repr(os.fspath(path))
        with self._lock, told(f"{name} cannot be read", self._fault):
            if path not in self._files:
                with reading(path, self._fault) as again:
                    self._keep(path, again)
            self._files.move_to_end(path)
            file = self._files[path]
            os.lseek(file, start, os.SEEK_SET)
            data, done = memoryview(bytearray(size)), 0
            with open(file, "rb", buffering=0, closefd=False) as raw:
                while done < size and (n := raw.readinto(data[done:])):
                    done += n
            if done < size or _mark(os.fstat(file)) != self._marks[path]:
                raise self._fault(f"{name} was written to while it was read.")
            return data.toreadonly()


def _close(files: Files, keep: int) -> None:
    """Closes the files that were not used for longest, but for some."""
    while len(files) > keep:
        os.close(files.popitem(last=False)[1])


def _mark(status: os.stat_result) -> Hashable:
    """Returns what tells a file from a later one of its name, or its later content."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def mark_of(path: Path) -> Hashable:
    """Returns what tells what has this name now from what has it later; None is none.

    Links are followed.
    """
    try:
        return _mark(os.stat(path))
    except (OSError, ValueError):
        return None


def settled(
    read: Callable[[], T], paths: Callable[[], Iterable[Path]], what: str, fault: Fault
) -> T:
    """Returns what `read` does, of a moment at which all files are of one save.

    While it opens several files, a writer may replace some of them. Then it begins
    again.

    Args:
      read: opens the files; nothing that it reads later may go by a name.
      paths: returns the files that count.
      what: begins the error.
      fault: the error to raise.

    Raises:
      fault: if a writer is faster each time, or `read` fails.
    """

    def marks() -> dict[str, Hashable]:
        return {os.fspath(path): mark_of(path) for path in paths()}

    for i in range(_TRIES):
        before = marks()
        try:
            value = read()
        except JloraError:
            if marks() == before:
                raise
        else:
            if marks() == before:
                return value
        time.sleep(0.0001 * i)
    raise fault(
        f"{what} cannot be read: it was replaced each of the {_TRIES} times that this "
        "was tried. Wait until its writer has finished."
    )
