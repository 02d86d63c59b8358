"""Unfinished files and folders, beside what they will replace.

Their writer holds a lock on them. What has the name of an unfinished file and no lock
was left by a process that was killed, and the next writer to the place deletes it.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator

from .locks import Lock, take

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}(\.part)?")
_FORMER = "former"  # in an unfinished folder: what stood in the target's place


@contextlib.contextmanager
def unfinished(target: pathlib.Path, *, folder: bool) -> Iterator[pathlib.Path]:
    """Yields a new file or folder beside `target`, which is deleted if it stays there.

    What killed writers to `target` have left is deleted first.
    """
    sweep(target)
    new, own = _made(target, folder)
    try:
        yield new
    finally:
        remove(new)
        if own is not None:
            own.release()


def _made(target: pathlib.Path, folder: bool) -> tuple[pathlib.Path, Lock | None]:
    """Returns a new file or folder and the lock on it."""
    while True:
        new = target.with_name(_begin(target) + secrets.token_hex(8))
        if folder:
            new.mkdir()
        else:
            new = new.with_name(new.name + ".part")
            new.touch(exist_ok=False)
        # Another writer may find it before it has its lock, and delete it.
        with contextlib.suppress(BlockingIOError):
            own = take(new)
            if os.path.lexists(new):
                return new, own


def sweep(target: pathlib.Path) -> None:
    """Deletes what killed writers to `target` have left beside it.

    What stood at `target` itself, if it was being swapped, is put back.
    """
    put_back(target)
    for path, lock in _left(target):
        remove(path)
        lock.release()


def put_back(target: pathlib.Path) -> None:
    """Puts back what stood at `target`, if a killed writer has left nothing there."""
    if not os.path.lexists(target):
        for path, lock in _left(target):
            with contextlib.suppress(OSError):
                os.rename(path / _FORMER, target)
            lock.release()


def targets(directory: pathlib.Path) -> set[str]:
    """Returns the names of what writers in a directory were to replace or are to."""
    try:
        found = [_UNFINISHED.fullmatch(name) for name in os.listdir(directory)]
    except (OSError, ValueError):
        return set()
    return {match[1] for match in found if match}


def _left(target: pathlib.Path) -> Iterator[tuple[pathlib.Path, Lock]]:
    """Yields what killed writers have left, locked."""
    pattern = re.compile(re.escape(_begin(target)) + r"[0-9a-f]{16}(\.part)?")
    try:
        names = [name for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    except (OSError, ValueError):
        return
    for name in names:
        with contextlib.suppress(BlockingIOError):
            lock = take(target.with_name(name))
            if lock is not None:
                yield target.with_name(name), lock


def _begin(target: pathlib.Path) -> str:
    """Returns what names of unfinished files begin with, short enough for a disk."""
    return f".{target.name.encode(errors='ignore')[:100].decode(errors='ignore')}."


def remove(path: pathlib.Path) -> None:
    """Deletes a file or a folder, as far as that works."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def swap(new: pathlib.Path, target: pathlib.Path) -> None:
    """Puts `new`, from a folder of `unfinished`, into the place of `target`.

    The two change names in one step, where the disk can do that. Elsewhere `target` is
    missing for a moment, and after a kill in it until `sweep` puts it back.
    """
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not _exchanged(new, target):
        former = new.with_name(_FORMER)
        os.rename(target, former)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(former, target)
            raise


def _exchanged(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Exchanges two names in one step, and returns whether the system did."""
    names = os.fsencode(a.absolute()), os.fsencode(b.absolute())
    try:
        system = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # on Windows
        return False
    if hasattr(system, "renameat2"):  # Linux
        return system.renameat2(-100, names[0], -100, names[1], 2) == 0
    if hasattr(system, "renamex_np"):  # macOS
        return system.renamex_np(*names, 2) == 0
    return False
