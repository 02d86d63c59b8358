"""Files read only if they are regular, and written whole or not at all."""

import collections
import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from .._tables import listed
from ..errors import CheckpointError, JloraError
from .beside import unfinished

Json = dict[str, Any]  # fields of a JSON object
Path = str | os.PathLike[str]
Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps names, as tqdm does
Fault = type[JloraError]  # the class of the errors that the caller's user sees

_MAX_JSON = 20_000_000


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
    with told(f"{name} cannot be read", fault, catch=(OSError, ValueError)):
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(
                f"{name} is {_kind(path)}. Give the path of a file that was saved."
            )
        with open(path, "rb") as file:
            try:
                yield file
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error


def read_json(path: Path, fault: Fault = CheckpointError) -> Json:
    """Returns the JSON object in the file `path`.

    Raises:
      fault: if it cannot be read, is not a JSON object, or names a field twice.
    """
    with reading(path, fault) as file:
        data = file.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise CheckpointError(f"it has over {_MAX_JSON} bytes, too many for JSON.")
        try:
            value = json.loads(data.decode(), object_pairs_hook=fields_once)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"it is not JSON: {error}.") from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise CheckpointError(f"it is not a JSON object but a {kind}.")
        return value


def fields_once(pairs: list[tuple[str, object]]) -> Json:
    """Returns the fields of a JSON object.

    Raises:
      ValueError: if a name stands there twice.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [f"{name!r:.100}" for name, n in counts.items() if n > 1]
        raise ValueError(f"it names {listed(twice, 5, ', ')} twice")
    return fields


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
