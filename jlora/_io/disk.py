"""Files read only if they are regular, and written whole or not at all."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from .._text.json_text import parse_json
from ..errors import CheckpointError, JloraError
from .beside import unfinished

Json = dict[str, Any]  # fields of a JSON object
Path = str | os.PathLike[str]
Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps names, as tqdm does
Fault = type[JloraError]  # the class of the errors that the caller's user sees

_MAX_JSON, _MAX_ORBAX_JSON, _MAX_FILES = 20_000_000, 200_000_000, 1_000_000
# What Orbax reads whole, by name.
_JSON_FILES = (
    "metadata",
    "metrics",
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "_sharding",
    "array_metadata",
)


@contextlib.contextmanager
def told(
    what: str,
    fault: Fault = CheckpointError,
    *,
    catch: type[Exception] | tuple[type[Exception], ...] = OSError,
    then: str = "",
) -> Iterator[None]:
    """Raises what goes wrong in the block as a `fault`.

    A `fault` passes as it is, and a `CheckpointError` only changes its class.

    Args:
      what: begins the message, "'x.json' cannot be read"; the reason follows.
      fault: the class to raise.
      catch: the errors of others to catch.
      then: a last sentence, " The old file is still there."
    """
    try:
        yield
    except (CheckpointError, fault) as error:
        if isinstance(error, fault):
            raise
        raise fault(str(error)) from error
    except catch as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise fault(f"{what}: {why.rstrip('.')}.{then}") from error


def check_name(path: Path, fault: Fault = CheckpointError) -> None:
    """Raises a `fault` if `path` is empty or holds a NUL: no file has such a name."""
    name = os.fspath(path)
    if not name or "\0" in name:
        raise fault(f"Not saved: {name!r} is not the name of a file or a directory.")


@contextlib.contextmanager
def reading(path: Path, fault: Fault = CheckpointError) -> Iterator[BinaryIO]:
    """Yields the open file `path`, and names it in each error of the block.

    Raises:
      fault: if it is missing, a directory or a device, or must not be read.
    """
    name = repr(os.fspath(path))
    with (
        told(f"{name} cannot be read", fault, catch=(OSError, ValueError)),
        _open_regular(path) as file,
    ):
        try:
            yield file
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error


def _open_regular(path: Path) -> BinaryIO:
    """Returns an open file, which is a regular one."""
    other = CheckpointError(
        f"{os.fspath(path)!r} is {_kind(path)}. Give the path of a file that was saved."
    )
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device can do something
        raise other
    # If it has become a pipe since, opening does not wait for the pipe's other end.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise other
    return open(handle, "rb")


def read_bounded(
    path: Path, limit: int = _MAX_JSON, fault: Fault = CheckpointError
) -> bytes:
    """Returns the bytes of the file `path`.

    Raises:
      fault: if it cannot be read, or has more than `limit` bytes.
    """
    with reading(path, fault) as file:
        data = file.read(limit + 1)
        if len(data) > limit:
            raise CheckpointError(f"it has over {limit} bytes, too many for JSON.")
        return data


def read_json(path: Path, fault: Fault = CheckpointError) -> Json:
    """Returns the JSON object in the file `path`.

    Raises:
      fault: if it cannot be read, is not a JSON object, or names a field twice.
    """
    data = read_bounded(path, fault=fault)
    name = repr(os.fspath(path))
    try:
        value = parse_json(data)
    except ValueError as error:
        raise fault(f"{name}: it is not JSON: {error}.") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise fault(f"{name}: it is not a JSON object but a {kind}.")
    return value


def check_files(folder: pathlib.Path, fault: Fault = CheckpointError) -> None:
    """Raises a `fault` unless all files below `folder` are ones that can be read.

    Orbax opens files by itself, and would wait for ever on a pipe, or read a device
    until memory is full. So whatever it may open is looked at before.

    Raises:
      fault: for a file that is not a regular one, a JSON file that is too large, a
        link to a directory, or over 1,000,000 files.
    """
    waiting, seen = [os.fspath(folder)], 0
    with told(f"{str(folder)!r} cannot be read", fault):
        while waiting:
            # Another process may delete an old step meanwhile.
            with contextlib.suppress(FileNotFoundError):
                for entry in list(os.scandir(waiting.pop())):
                    seen += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        _check_file(entry.path)
            if seen > _MAX_FILES:
                raise CheckpointError(
                    f"{str(folder)!r} holds over {_MAX_FILES} files, too many for a "
                    "checkpoint."
                )


def _check_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        _check_found(path, os.stat(path))


def _check_found(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = "a link to a directory" if stat.S_ISDIR(found.st_mode) else _kind(path)
        raise CheckpointError(f"{path!r} is {what}, which a checkpoint does not hold.")
    if os.path.basename(path) in _JSON_FILES and found.st_size > _MAX_ORBAX_JSON:
        raise CheckpointError(f"{path!r} has over {_MAX_ORBAX_JSON} bytes.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes the place of `path` when the block ends well.

    The bytes go to a file of another name in the same directory and reach the disk.
    Then the name changes in one step: whoever reads `path`, also after a crash, finds
    the old file or the new one, whole. After an error the old file is as it was.

    Raises:
      CheckpointError: if it cannot be written (no such directory, no permission, disk
        full), or `path` is something else than a regular file.
    """
    name = repr(os.fspath(path))
    check_name(path)
    target = pathlib.Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"Not saved: {name} is {_kind(target)}.")
    then = " What was there before is still there."
    with (
        told(f"Not saved: {name} cannot be written", then=then),
        unfinished(target, folder=False) as new,
    ):
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
        sync(target.parent)


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes `text` and waits until it is on the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(directory: pathlib.Path) -> None:
    """Waits until the new names in a directory are on the disk, where that works."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _kind(path: Path) -> str:
    return "a directory" if os.path.isdir(path) else "not a regular file"
