"""Named tensors in one safetensors file, or in several with an index."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from .._tables import listed
from ..errors import CheckpointError
from . import tensors as tensors
from .disk import Fault, Path, read_json, reading, told, write_text

_FILE = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor lies.

    Attributes:
      file: the file.
      info: what the tensor is, and its place in the file.
      fault: the error to raise if the file has changed since its header was read.
    """

    file: Path
    info: tensors.TensorInfo
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
        with reading(self.file, self.fault) as file:
            return tensors.read(file, self.info)

    def pieces(self) -> Iterator[bytes]:
        """Yields the tensor's bytes in pieces of bounded size."""
        with reading(self.file, self.fault) as file:
            yield from tensors.chunks(file, self.info)


def find_tensors(folder: pathlib.Path, stem: str = "*") -> pathlib.Path | None:
    """Returns the file or the index in `folder` that holds all tensors, if one does.

    Where an index has one file of the same name beside it, the file counts.

    Args:
      folder: a directory.
      stem: the name before `.safetensors`; by default there may be only one.
    """
    indices = sorted(folder.glob(stem + _INDEX))
    files = sorted(folder.glob(stem + _FILE))
    if len(indices) == 1:
        single = folder / (indices[0].name.removesuffix(_INDEX) + _FILE)
        return single if single in files else indices[0]
    return files[0] if len(files) == 1 and not indices else None


def open_tensors(
    path: Path, stem: str = "*", *, fault: Fault = CheckpointError
) -> tuple[dict[str, Slot], dict[str, str]]:
    """Returns the tensors at `path` by name, and the metadata of all its files.

    No tensor is read before the header has been compared with the size of its file.

    Args:
      path: a file, an index, or a directory with either.
      stem: the name of the file in a directory, see `find_tensors`.
      fault: the error to raise.

    Raises:
      fault: if there is no such file, one is damaged, or the index and its shards
        contradict each other.
    """
    with told(f"{str(path)!r} cannot be read", fault):
        place = pathlib.Path(path)
        file = find_tensors(place, stem) if os.path.isdir(path) else place
        if file is None:
            raise fault(_nothing(place, stem))
    if file.name.endswith(_INDEX):
        return _open_shards(file, fault)
    return read_header(file if os.path.isdir(path) else path, fault)


def read_header(
    path: Path, fault: Fault = CheckpointError
) -> tuple[dict[str, Slot], dict[str, str]]:
    """Returns the tensors in one file by name, and its metadata."""
    with reading(path, fault) as file:
        header = tensors.read_header(file)
    slots = {name: Slot(path, info, fault) for name, info in header.tensors.items()}
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
) -> tuple[dict[str, Slot], dict[str, str]]:
    weight_map = read_json(index, fault).get("weight_map")
    if not isinstance(weight_map, dict):
        raise fault(f"{str(index)!r} is not an index: it has no `weight_map`.")
    slots: dict[str, Slot] = {}
    metadata: dict[str, str] = {}
    wrong: list[str] = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if set(name) & set("/\\:\0") or not name.endswith(_FILE):
            raise fault(
                f"{str(index)!r} names the file {name!r:.200}. A shard is a "
                "safetensors file beside its index."
            )
        found, about = read_header(index.parent / name, fault)
        metadata |= about
        slots |= found
        wrong += [
            f"{key!r:.200} is in {name}, where the index does not have it"
            for key in found
            if weight_map.get(key) != name
        ]
    wrong += [f"{key!r:.200} is in no shard" for key in weight_map if key not in slots]
    if wrong:
        raise fault(f"{str(index)!r} and its shards differ: {listed(wrong, 5)}.")
    return slots, metadata


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

    One tensor at a time is in memory.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors.in_order(named):
        size = named[name].nbytes
        if max_bytes is not None and shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        which = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{which}{_FILE}"
        own = {name: named[name] for name in names}
        tensors.write(
            directory / file,
            own,
            lambda name: [tensors.raw(named[name].make())],
            metadata,
        )
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in named.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(directory / (stem + _INDEX), json.dumps(index, indent=2) + "\n")
