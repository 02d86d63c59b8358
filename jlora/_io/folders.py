"""Folders written whole or not at all."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

import jax

from ..errors import CheckpointError
from . import paired
from .beside import swap, unfinished
from .disk import Fault, Path, sync, told
from .locks import locked
from .processes import of_first
from .shards import delete_others, indexed, move_tensors, with_free_names

_THEN = " What was there before is still there."


@contextlib.contextmanager
def replacing_files(
    directory: pathlib.Path,
    stem: str,
    fault: Fault = CheckpointError,
    *,
    pair: str | None = None,
) -> Iterator[pathlib.Path]:
    """Yields a new folder whose files move into `directory` when the block ends well.

    A directory that is not there yet appears whole. In one that is there, new tensors
    take the place of the former ones in one step, see `move_tensors`. Other JSON files
    follow. Files of other names stay. After an error all is as it was.

    Args:
      directory: where the files shall be.
      stem: what the tensors are called.
      fault: the error to raise.
      pair: the name of a JSON file that changes together with the tensors, see
        `paired`.

    Raises:
      fault: if it cannot be written, or `directory` is a file.
    """
    with told(f"Not saved: {str(directory)!r} cannot be written", fault, then=_THEN):
        target = pathlib.Path(os.path.realpath(directory))
        if os.path.lexists(directory) and not os.path.isdir(directory):
            raise OSError(errno.ENOTDIR, "it is a file, not a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(target, folder=True) as new:
            yield new
            if not _appeared(new, target):
                with locked(target):
                    _move_into(new, target, stem, pair)
            sync(target)


def _appeared(new: pathlib.Path, target: pathlib.Path) -> bool:
    """Renames a folder, unless there is one of that name; returns whether it did."""
    if target.exists():
        return False
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster
            return False
        raise
    return True


def _move_into(
    new: pathlib.Path, directory: pathlib.Path, stem: str, pair: str | None
) -> None:
    with_free_names(new, directory, stem)
    former = indexed(directory, stem)
    together = (
        contextlib.nullcontext()
        if pair is None
        else paired.replacing_pair(new, directory, stem, pair)
    )
    with together:
        move_tensors(new, directory, stem)
    for file in sorted(new.iterdir()):
        os.replace(file, directory / file.name)
    delete_others(directory, stem, former)


@contextlib.contextmanager
def replacing_folder(
    directory: Path, name: str, *, overwrite: bool
) -> Iterator[pathlib.Path]:
    """Yields a new folder; what is made in it as `name` takes the place of `directory`.

    What stood there is deleted last, and only if `overwrite`. All processes of
    `jax.distributed` get the same folder, and the first one renames. After an error all
    is as it was.

    Raises:
      OSError: if it cannot be written.
    """
    target = pathlib.Path(os.path.realpath(directory))
    first = jax.process_index() == 0
    target.parent.mkdir(parents=True, exist_ok=True)
    own = unfinished(target, folder=True) if first else contextlib.nullcontext()
    with own as new:
        folder = pathlib.Path(of_first(str(new)))
        yield folder
        of_first("written")
        if first:
            (swap if overwrite else os.rename)(folder / name, target)
            sync(target.parent)
        of_first("swapped")
