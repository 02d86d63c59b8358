"""Named tensors in one safetensors file, or in several with an index."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from .._tables import listed
from ..errors import CheckpointError
from ..factors import Array
from . import tensors as tensors
from .beside import remove
from .disk import Fault, Json, Path, read_json, reading, told, write_text
from .handles import Handles, settled

_FILE = ".safetensors"
_INDEX = ".safetensors.index.json"
_SAVE = "jlora_save"  # key of the checksum by which shards of one save are known
_UNKNOWN = "0" * 16  # before it is known
_PIECE = 16 * 2**20
_PICKLES = (".bin", ".pt", ".pth")


class Slot(Protocol):
    """A tensor that can be read, in a file or not."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    def read(self) -> np.ndarray:
        """Returns the tensor."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class HeldSlot:
    """A tensor in memory, of the host or of a device."""

    array: Array

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return np.dtype(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.array.shape)

    def read(self) -> np.ndarray:
        """Returns the tensor."""
        return np.asarray(self.array)


@dataclasses.dataclass(frozen=True)
class FileSlot:
    """Where one tensor lies in a file.

    Attributes:
      file: the file.
      info: what the tensor is, and its place in the file.
      handles: what the file is kept open by.
      fault: the error to raise if the file has changed since its header was read.
    """

    file: Path
    info: tensors.TensorInfo
    handles: Handles
    fault: Fault

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.info.shape

    def read(self) -> np.ndarray:
        """Returns the tensor."""
        size = self.info.stop - self.info.start
        data = self.handles.read(self.file, self.info.start, size)
        try:
            return tensors.array(data, self.info)
        except CheckpointError as error:
            raise self.fault(f"{os.fspath(self.file)!r}: {error}") from error

    def pieces(self) -> Iterator[memoryview]:
        """Yields the tensor's bytes in pieces of bounded size."""
        stop = self.info.stop
        for start in range(self.info.start, stop, _PIECE):
            yield self.handles.read(self.file, start, min(_PIECE, stop - start))


def find_tensors(folder: pathlib.Path, stem: str = "*") -> pathlib.Path | None:
    """Returns the file or the index in `folder` that holds all tensors, if one does.

    Where an index has one file of the same name beside it, the file counts. Among
    several, `model.safetensors` does. Hidden files do not count, and neither do shards
    by themselves: a save that was killed may have left them.

    Args:
      folder: a directory.
      stem: the name before `.safetensors`; by default there may be only one.
    """
    indices = sorted(_shown(folder.glob(stem + _INDEX)))
    files = sorted(f for f in _shown(folder.glob(stem + _FILE)) if not _is_part(f.name))
    if len(indices) == 1:
        single = folder / (indices[0].name.removesuffix(_INDEX) + _FILE)
        return single if single in files else indices[0]
    usual = [file for file in files if file.name == f"model{_FILE}"]
    files = usual or files
    return files[0] if len(files) == 1 and not indices else None


def _shown(files: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    return (file for file in files if not file.name.startswith("."))


def _is_part(name: str) -> bool:
    """Returns whether a file is called like one of several shards."""
    found = re.fullmatch(r".*-\d{5}-of-(\d{5})\.safetensors", name)
    return found is not None and int(found[1]) > 1


def open_tensors(
    path: Path, stem: str = "*", *, fault: Fault = CheckpointError
) -> tuple[dict[str, FileSlot], dict[str, str]]:
    """Returns the tensors at `path` by name, and the metadata of all its files.

    No tensor is read before the header has been compared with the size of its file. All
    files are of one save, and stay so: whatever replaces them later, tensors are read
    from those that were opened here.

    Args:
      path: a file, an index, or a directory with either.
      stem: the name of the file in a directory, see `find_tensors`.
      fault: the error to raise.

    Raises:
      fault: if there is no such file, one is damaged, or the index and its shards
        contradict each other.
    """
    place = pathlib.Path(path)
    return settled(
        lambda: _open(path, stem, fault),
        lambda: tensor_files(place, stem),
        repr(os.fspath(path)),
        fault,
    )


def tensor_files(place: pathlib.Path, stem: str = "*") -> list[pathlib.Path]:
    """Returns the files that may hold the tensors at a place, see `open_tensors`."""
    try:
        if os.path.isdir(place):
            return sorted(place.glob(f"{stem}*.safetensors*"))
        if place.name.endswith(_INDEX):
            return [place, *sorted(place.parent.glob(f"*{_FILE}"))]
    except (OSError, ValueError):
        pass
    return [place]


def _open(
    path: Path, stem: str, fault: Fault
) -> tuple[dict[str, FileSlot], dict[str, str]]:
    with told(f"{str(path)!r} cannot be read", fault):
        place = pathlib.Path(path)
        file = find_tensors(place, stem) if os.path.isdir(path) else place
        if file is None:
            raise fault(_nothing(place, stem))
    if file.name.endswith(_INDEX):
        return _open_shards(file, fault)
    return read_header(file if os.path.isdir(path) else path, fault)


def read_header(
    path: Path, fault: Fault = CheckpointError, handles: Handles | None = None
) -> tuple[dict[str, FileSlot], dict[str, str]]:
    """Returns the tensors in one file by name, and its metadata."""
    handles = handles or Handles(fault)
    with reading(path, fault) as file:
        header = tensors.read_header(file)
        handles.keep(path, file)
    found = header.tensors.items()
    slots = {name: FileSlot(path, info, handles, fault) for name, info in found}
    return slots, dict(header.metadata)


def _nothing(folder: pathlib.Path, stem: str) -> str:
    """Returns in words that `folder` holds no tensors, and what it holds instead."""
    found = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in found if name.endswith(_PICKLES)]
    more = (
        f" {listed(pickles, 5, ', ')} would have to be unpickled, which can run any "
        "program. Save it as safetensors where it was made."
        if pickles
        else ""
    )
    return (
        f"{str(folder)!r} holds neither one {stem}{_FILE} nor one {stem}{_INDEX}, but "
        f"{listed(found, separator=', ') or 'nothing'}.{more}"
    )


def _open_shards(
    index: pathlib.Path, fault: Fault
) -> tuple[dict[str, FileSlot], dict[str, str]]:
    fields = read_json(index, fault)
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict):
        raise fault(f"{str(index)!r} is not an index: it has no `weight_map`.")
    about = fields.get("metadata")
    saves = {"the index": about.get(_SAVE) if isinstance(about, dict) else None}
    slots: dict[str, FileSlot] = {}
    metadata: dict[str, str] = {}
    wrong: list[str] = []
    handles = Handles(fault)
    for name in sorted({str(name) for name in weight_map.values()}):
        if set(name) & set("/\\:\0") or not name.endswith(_FILE):
            raise fault(
                f"{str(index)!r} names the file {name!r:.200}. A shard is a "
                "safetensors file beside its index."
            )
        found, own = read_header(index.parent / name, fault, handles)
        saves[name] = own.get(_SAVE)
        metadata |= own
        slots |= found
        wrong += [
            f"{key!r:.200} is in {name}, where the index does not have it"
            for key in found
            if weight_map.get(key) != name
        ]
    wrong += [f"{key!r:.200} is in no shard" for key in weight_map if key not in slots]
    wrong += _other_saves(saves)
    if wrong:
        raise fault(f"{str(index)!r} and its shards differ: {listed(wrong, 5)}.")
    return slots, metadata


def _other_saves(saves: Mapping[str, object]) -> list[str]:
    """Returns in words which files are not of the save that the first one is of."""
    first, *others = saves
    return [f"{x} is of another save" for x in others if saves[x] != saves[first]]


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to write: its form now, its numbers when its turn comes.

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
    named: Mapping[str, Pending],
    *,
    metadata: Mapping[str, str],
    max_bytes: int | None,
) -> None:
    """Writes the tensors into `directory`, in shards if they are over `max_bytes`.

    One tensor at a time is in memory. Each shard and the index hold a checksum of all
    tensors, by which the shards of one save are known.
    """
    shards = _parted(named, max_bytes)
    sums: dict[str, int] = {}

    def pieces(name: str) -> list[memoryview]:
        data = tensors.raw(named[name].make())
        sums[name] = zlib.crc32(data)
        return [data]

    metadata = {key: text for key, text in metadata.items() if key != _SAVE}
    if len(shards) > 1:
        metadata[_SAVE] = _UNKNOWN
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        which = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{which}{_FILE}"
        own = {name: named[name] for name in names}
        tensors.write(directory / file, own, pieces, metadata)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) == 1:
        return
    forms = [[name, str(x.dtype), *x.shape, sums[name]] for name, x in named.items()]
    about = json.dumps([sorted(forms), sorted(metadata.items())])
    save = hashlib.sha256(about.encode()).hexdigest()[: len(_UNKNOWN)]
    for file in sorted({*weight_map.values()}):
        tensors.set_metadata(directory / file, _SAVE, _UNKNOWN, save)
    total = sum(tensor.nbytes for tensor in named.values())
    _write_index(
        directory / (stem + _INDEX),
        {
            "metadata": {"total_size": total, _SAVE: save},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def _parted(named: Mapping[str, Pending], max_bytes: int | None) -> list[list[str]]:
    """Returns the names in each shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors.in_order(named):
        size = named[name].nbytes
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_index(file: pathlib.Path, fields: Json) -> None:
    write_text(file, json.dumps(fields, indent=2) + "\n")


def with_free_names(new: pathlib.Path, directory: pathlib.Path, stem: str) -> None:
    """Renames the shards in `new`, if one of their names is taken in `directory`.

    So they can move there, and the former ones stay whole, until the index changes.
    """
    index = new / (stem + _INDEX)
    if not index.exists():
        return
    fields = read_json(index)
    names = sorted({*fields["weight_map"].values()})
    if any((directory / name).exists() for name in names):
        begin = f"{stem}-{fields['metadata'][_SAVE]}"
        free = {name: begin + name.removeprefix(stem) for name in names}
        for name in names:
            (new / name).rename(new / free[name])
        weights = fields["weight_map"].items()
        fields["weight_map"] = {key: free[name] for key, name in weights}
        _write_index(index, fields)


def move_tensors(new: pathlib.Path, directory: pathlib.Path, stem: str) -> None:
    """Moves the tensors in `new` into `directory`, in place of those that are there.

    What names the tensors moves last: the index of shards, or the one file. After a
    kill the former tensors are there, or the new ones, and never some of both.
    """
    single, index = stem + _FILE, stem + _INDEX
    files = {file.name for file in tensor_files(new, stem)}
    for name in sorted(files, key=lambda name: (name in (single, index), name)):
        os.replace(new / name, directory / name)
    if single not in files:  # the former one would count
        (directory / single).unlink(missing_ok=True)


def indexed(directory: pathlib.Path, stem: str) -> set[str]:
    """Returns the names of the shards that the index in a directory names, if any."""
    try:
        weight_map = read_json(directory / (stem + _INDEX)).get("weight_map")
    except CheckpointError:
        return set()
    names = map(str, weight_map.values() if isinstance(weight_map, dict) else ())
    return {name for name in names if "/" not in name}


def delete_others(
    directory: pathlib.Path, stem: str, former: Collection[str] = ()
) -> None:
    """Deletes all shards and indices of `stem` but those that count.

    That is what a former save, or one that was killed, has left.

    Args:
      directory: where they are.
      stem: what the tensors are called.
      former: shards of the former save.
    """
    shard = re.compile(
        re.escape(stem) + r"(-[0-9a-f]{16})?-\d{5}-of-\d{5}\.safetensors"
    )
    whole = (directory / (stem + _FILE)).exists()
    keep = set() if whole else {stem + _INDEX, *indexed(directory, stem)}
    for file in tensor_files(directory, stem):
        ours = shard.fullmatch(file.name) or file.name in (stem + _INDEX, *former)
        if ours and file.name not in (*keep, stem + _FILE):
            remove(file)
