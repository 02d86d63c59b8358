"""Outputs that are inputs: told before anything is written."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator

from ..errors import JloraError
from .disk import Path, read_json


def clash(out: Path, inputs: Iterable[Path]) -> str:
    """Returns in words which input writing `out` would change, or an empty text.

    That is one that `out` is, lies in, or contains, by any link.

    Examples:
      >>> clash("model", ["other"]), clash("./model", ["model"])
      ('', "'./model' is the input 'model'")
      >>> clash("model/new", ["model"]), clash(".", ["model"])
      ("'model/new' lies in the input 'model'", "'.' contains the input 'model'")
    """
    target = pathlib.Path(os.path.realpath(out))
    for path in inputs:
        for own in _places(pathlib.Path(path)):
            if target == own:
                return f"{os.fspath(out)!r} is the input {os.fspath(path)!r}"
            if own in target.parents:
                return f"{os.fspath(out)!r} lies in the input {os.fspath(path)!r}"
            if target in own.parents:
                return f"{os.fspath(out)!r} contains the input {os.fspath(path)!r}"
    return ""


def _places(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields where an input really lies: itself, what is in it, an index's shards."""
    files = [path]
    with contextlib.suppress(OSError, JloraError):  # its reader will tell
        if os.path.isdir(path):
            files += path.iterdir()
        elif path.name.endswith(".index.json"):
            shards = read_json(path).get("weight_map")
            names = shards.values() if isinstance(shards, dict) else ()
            files += [path.parent / str(name) for name in names]
    for file in dict.fromkeys(files):
        if "\0" not in str(file):
            yield pathlib.Path(os.path.realpath(file))
