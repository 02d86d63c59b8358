"""A JSON file that belongs to tensors, and changes together with them.

Two files cannot change in one step. So the new JSON file lies there under a hidden name
before the tensors change, and the former one under another; the tensors' header tells
by a checksum which of them belongs to it. Programs that know only the plain name find
none for that moment, rather than the wrong one.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping

from ..errors import CheckpointError
from .shards import open_tensors

_SUM = "jlora_config_sha256"  # key in the tensors' metadata


def sum_of(text: str) -> dict[str, str]:
    """Returns what to write into the tensors' metadata about their JSON file."""
    return {_SUM: hashlib.sha256(text.encode()).hexdigest()}


def places(directory: pathlib.Path, pair: str) -> list[pathlib.Path]:
    """Returns where the JSON file called `pair` may be: itself, and its two others."""
    return [directory / name for name in (pair, f".{pair}.new", f".{pair}.old")]


def find(
    directory: pathlib.Path, pair: str, metadata: Mapping[str, str]
) -> pathlib.Path:
    """Returns the JSON file that belongs to tensors with this metadata.

    It is the one of the plain name, which need not be there, unless a save was killed.
    """
    plain, new, old = places(directory, pair)
    if plain.exists():
        return plain
    with contextlib.suppress(OSError):
        if hashlib.sha256(new.read_bytes()).hexdigest() == metadata.get(_SUM):
            return new
    return old if old.is_file() else plain


@contextlib.contextmanager
def replacing_pair(
    new: pathlib.Path, directory: pathlib.Path, stem: str, pair: str
) -> Iterator[None]:
    """Moves the file `pair` into `directory`; the block moves the tensors."""
    _mend(directory, stem, pair)
    plain, hidden, old = places(directory, pair)
    text = (new / pair).read_bytes()
    if plain.is_file() and plain.read_bytes() == text:
        (new / pair).unlink()
        yield
        return
    try:
        os.replace(new / pair, hidden)
        if plain.exists():
            os.replace(plain, old)
        yield
        os.replace(hidden, plain)
        old.unlink(missing_ok=True)
    except BaseException:
        _mend(directory, stem, pair)
        raise


def _mend(directory: pathlib.Path, stem: str, pair: str) -> None:
    """Ends what a save that was killed had begun, one way or the other."""
    plain, *hidden = places(directory, pair)
    if not any(file.exists() for file in hidden):
        return
    try:
        metadata = open_tensors(directory, stem)[1]
    except CheckpointError:
        metadata = {}
    found = find(directory, pair, metadata)
    if found != plain:
        os.replace(found, plain)
    for file in hidden:
        file.unlink(missing_ok=True)
