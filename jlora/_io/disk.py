"""Files read only if they are regular, and written whole or not at all."""

import contextlib
import os
import pathlib
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from ..errors import CheckpointError

Path = str | os.PathLike[str]
Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps names, as tqdm does


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Yields the open file `path`; what the system refuses is a `CheckpointError`.

    Raises:
      CheckpointError: if it is missing, a directory or a device, or must not be read.
    """
    try:
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a directory" if os.path.isdir(path) else "no regular file"
            raise CheckpointError(
                f"{_name(path)} is {kind}. Give the path of a file that was saved."
            )
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{_name(path)} cannot be read: {_why(error)}."
        ) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before the text of a `CheckpointError`."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{_name(path)}: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes the place of `path` when the block ends well.

    The bytes go to a file of another name in the same directory, reach the disk, and
    then the name changes in one step: whoever reads `path`, also after a crash, finds
    the old file or the new one, whole. After an error the old file is as it was.

    Raises:
      CheckpointError: if it cannot be written (no such directory, no permission, disk
        full), or `path` is something else than a regular file.
    """
    target = pathlib.Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "no regular file"
        raise CheckpointError(f"Not saved: {_name(path)} is {kind}.")
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        try:
            with open(part, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"Not saved: {_name(path)} cannot be written: {_why(error)}. What was "
            "there before is still there."
        ) from error


def sync_directory(directory: pathlib.Path) -> None:
    """Makes the new name last; not every system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _name(path: Path) -> str:
    return repr(os.fspath(path))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
