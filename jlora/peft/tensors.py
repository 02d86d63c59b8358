"""The safetensors files of an adapter or a model: one, or shards with an index.

The format itself is `jlora._tensors`: no tensor is read before the header has been
compared with the size of the file, so a damaged file costs no memory, and only what is
asked for is read. Here errors become `PeftError`s that name the file.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .._io import disk as _disk, tensors as _tensors
from .._io.tensors import NAMES as NAMES
from ..errors import CheckpointError, PeftError

FLOATS = ("F16", "BF16", "F32", "F64")
_MAX_JSON = 20_000_000


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor lies.

    Attributes:
      file: the file.
      entry: its place in the file.
    """

    file: pathlib.Path
    entry: _tensors.TensorInfo

    @property
    def dtype(self) -> str:
        """The safetensors name of its dtype, `"F32"`."""
        return NAMES[self.entry.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.entry.shape

    def read(self) -> np.ndarray:
        """Returns the tensor.

        Raises:
          PeftError: if the file has changed since its header was read.
        """
        with (
            reading(self.file),
            _disk.reading(self.file) as stream,
            _disk.naming(self.file),
        ):
            return _tensors.read(stream, self.entry)


@contextlib.contextmanager
def reading(file: os.PathLike) -> Iterator[None]:
    """Turns the system's errors into PeftErrors that name the file."""
    try:
        yield
    except CheckpointError as error:
        raise PeftError(str(error)) from error
    except (OSError, ValueError) as error:
        if isinstance(error, PeftError):
            raise
        raise PeftError(f"{file} cannot be read: {_said(error)}.") from error


@contextlib.contextmanager
def writing(directory: os.PathLike) -> Iterator[None]:
    """Turns the system's errors into PeftErrors that name the directory."""
    try:
        yield
    except CheckpointError as error:
        raise PeftError(str(error)) from error
    except OSError as error:
        raise PeftError(
            f"{directory} cannot be written: {_said(error)}. What was there before is "
            "as it was."
        ) from error


def _said(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in `file`.

    Raises:
      PeftError: if it cannot be read, is no JSON object, or names a field twice.
    """
    with reading(file):
        if file.stat().st_size > _MAX_JSON:
            raise PeftError(
                f"{file} has over {_MAX_JSON} bytes, too many to be a config."
            )
        data = file.read_bytes()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"it names {', '.join(map(repr, twice[:5]))} twice")
        return fields

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise PeftError(f"{file} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise PeftError(f"{file} is no JSON object but {type(value).__name__}.")
    return value


def read_header(file: pathlib.Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """Returns the tensors in a safetensors file, by name, and the file's metadata.

    Raises:
      PeftError: if it is no safetensors file, truncated, or inconsistent.
    """
    with reading(file), _disk.reading(file) as stream, _disk.naming(file):
        header = _tensors.read_header(stream)
    slots = {name: Slot(file, entry) for name, entry in header.entries.items()}
    return slots, dict(header.metadata)


def open_tensors(
    path: pathlib.Path, stem: str
) -> tuple[dict[str, Slot], dict[str, str]]:
    """Returns the tensors of a file, or of `stem`.safetensors or its shards.

    Args:
      path: a file or a directory.
      stem: name of the files in a directory, `"model"` or `"adapter_model"`.

    Returns:
      The tensors by name and the metadata, of all shards together.

    Raises:
      PeftError: if there is no such file, or one that is damaged.
    """
    with reading(path):
        directory = path.is_dir()
    if not directory:
        if path.name.endswith(".safetensors.index.json"):
            return _open_shards(path)
        return read_header(path)
    single = path / f"{stem}.safetensors"
    index = path / f"{stem}.safetensors.index.json"
    with reading(path):
        if single.exists():
            return read_header(single)
        if index.exists():
            return _open_shards(index)
        found = sorted(p.name for p in path.iterdir())
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    more = (
        f" {', '.join(pickles)} would have to be unpickled, which can run any program. "
        "Save it as safetensors where it was made."
        if pickles
        else ""
    )
    raise PeftError(
        f"{path} holds neither {single.name} nor {index.name}, but "
        f"{', '.join(found[:10]) or 'nothing'}.{more}"
    )


def _open_shards(index: pathlib.Path) -> tuple[dict[str, Slot], dict[str, str]]:
    fields = read_json(index)
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict):
        raise PeftError(f"{index} has no `weight_map`.")
    files = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        if not plain or not name.endswith(".safetensors"):
            raise PeftError(
                f"{index} names the file {name!r:.200}. A shard is a .safetensors file "
                "beside its index."
            )
        files[name] = read_header(index.parent / name)
    slots: dict[str, Slot] = {}
    metadata: dict[str, str] = {}
    for name, (found, about) in files.items():
        metadata |= about
        for key, slot in found.items():
            if weight_map.get(key) != name:
                raise PeftError(
                    f"{name} holds {key!r:.200}, which {index} has elsewhere."
                )
            slots[key] = slot
    absent = [key for key in weight_map if key not in slots]
    if absent:
        raise PeftError(
            f"{index} names {len(absent)} tensors that no shard holds: "
            f"{', '.join(absent[:5])}."
        )
    return slots, metadata


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to write: its form now, its bytes when its turn comes.

    Attributes:
      dtype: what it is written as.
      shape: its sizes.
      make: returns the array.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pending(array: np.ndarray) -> Pending:
    """Returns an array as a tensor to write."""
    return Pending(array.dtype, array.shape, lambda: array)


def write_tensors(
    directory: pathlib.Path,
    stem: str,
    tensors: Mapping[str, Pending],
    *,
    metadata: Mapping[str, str],
    max_bytes: int | None,
) -> list[str]:
    """Writes the tensors into `directory`, in shards if they are over `max_bytes`.

    One tensor at a time is in memory. Returns the names of the files.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shards: list[list[str]] = [[]]
    filled = 0
    for name in order:
        size = tensors[name].nbytes
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        file = f"{stem}.safetensors"
        _write_file(directory / file, {n: tensors[n] for n in shards[0]}, metadata)
        return [file]
    weight_map, files = {}, []
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, {n: tensors[n] for n in names}, metadata)
        weight_map |= dict.fromkeys(names, file)
        files.append(file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    file = f"{stem}.safetensors.index.json"
    write_text(directory / file, json.dumps(index, indent=2) + "\n")
    return [*files, file]


def _write_file(
    file: pathlib.Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]
) -> None:
    def pieces(name: str) -> Iterable[Any]:
        return (_tensors.raw(tensors[name].make()),)

    _tensors.write(file, tensors, pieces, metadata)


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes `text` and waits until it is on the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replacing(directory: pathlib.Path, stale: Iterable[str]) -> Iterator[pathlib.Path]:
    """Gives a folder to write into; on leaving, its files take their places at once.

    A directory that is not there yet appears whole. In one that is there each file is
    replaced by a rename, tensors before JSON files; `stale` are globs of former files
    that go if nothing replaces them. After an error all is as it was.
    """
    with writing(directory):
        if directory.exists() and not directory.is_dir():
            raise OSError(errno.ENOTDIR, "it is a file, not a directory")
        directory.parent.mkdir(parents=True, exist_ok=True)
        new = directory.parent / f".{directory.name}.{secrets.token_hex(8)}"
        new.mkdir()
        try:
            yield new
            _move_into(new, directory, stale)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _move_into(
    new: pathlib.Path, directory: pathlib.Path, stale: Iterable[str]
) -> None:
    if not directory.exists():
        os.rename(new, directory)
    else:
        files = sorted(new.iterdir(), key=lambda file: (file.suffix == ".json", file))
        names = {file.name for file in files}
        old = [p for glob in stale for p in directory.glob(glob) if p.name not in names]
        for file in files:
            target = directory / file.name
            if _same(file, target):
                continue
            os.replace(file, target)
        for file in old:
            file.unlink()
    _disk.sync_directory(directory)


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Returns whether both are the same small file, so that none needs replacing."""
    if a.suffix != ".json" or not b.is_file():
        return False
    return a.read_bytes() == b.read_bytes()
