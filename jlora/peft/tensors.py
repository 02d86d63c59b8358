"""safetensors files: read with every length checked first, written whole or not at all.

The format is eight bytes of header length, a JSON header, and the tensors' bytes. No
tensor is read before the header has been compared with the size of the file, so a
damaged file costs no memory, and only what is asked for is read.
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

import ml_dtypes
import numpy as np

from ..errors import PeftError

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F16", "BF16", "F32", "F64")
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
_MAX_JSON = 20_000_000
_MAX_AXES = 32


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor lies.

    Attributes:
      file: the file.
      dtype: its safetensors name, `"F32"`.
      shape: its sizes.
      offset: its first byte in the file.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Returns the tensor.

        Raises:
          PeftError: if the file has changed since its header was read.
        """
        dtype, count = DTYPES[self.dtype], math.prod(self.shape)
        with reading(self.file), open(self.file, "rb") as stream:
            stream.seek(self.offset)
            data = stream.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise PeftError(f"{self.file} became shorter while it was read.")
        return np.frombuffer(data, dtype).reshape(self.shape)


@contextlib.contextmanager
def reading(file: os.PathLike) -> Iterator[None]:
    """Turns the system's errors into PeftErrors that name the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, PeftError):
            raise
        raise PeftError(f"{file} cannot be read: {_said(error)}.") from error


@contextlib.contextmanager
def writing(directory: os.PathLike) -> Iterator[None]:
    """Turns the system's errors into PeftErrors that name the directory."""
    try:
        yield
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
    return parse_json(data, str(file))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Returns the JSON object in `data`.

    Raises:
      PeftError: says what `what` is instead.
    """

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
        raise PeftError(f"{what} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise PeftError(f"{what} is no JSON object but {type(value).__name__}.")
    return value


def read_header(file: pathlib.Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """Returns the tensors in a safetensors file, by name, and the file's metadata.

    Raises:
      PeftError: if it is no safetensors file, truncated, or inconsistent.
    """
    with reading(file):
        if file.is_dir():
            raise PeftError(f"{file} is a directory, not a safetensors file.")
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
                raise PeftError(
                    f"{file} is no safetensors file, or truncated: of its {size} bytes "
                    f"the header is said to take {length}."
                )
            header = parse_json(stream.read(length), f"The header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise PeftError(f"The metadata in {file} is no mapping of text to text.")
    slots = {
        name: _slot(file, name, entry, 8 + length) for name, entry in header.items()
    }
    _check_layout(file, slots, 8 + length, size)
    return slots, metadata


def _slot(file: pathlib.Path, name: str, entry: Any, data: int) -> Slot:
    where = f"Tensor {name!r:.200} in {file}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise PeftError(
            f"{where} has no dtype, shape and data_offsets: {entry!r:.200}."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise PeftError(f"{where} has the dtype {dtype!r:.50}; known are {known}.")
    if not _sizes(shape) or len(shape) > _MAX_AXES:
        raise PeftError(f"{where} has the shape {shape!r:.100}.")
    if not _sizes(offsets) or len(offsets) != 2:
        raise PeftError(f"{where} has the offsets {offsets!r:.100}.")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise PeftError(
            f"{where} is {dtype}{shape}, {size} bytes, but takes those from "
            f"{offsets[0]} to {offsets[1]}."
        )
    return Slot(file, dtype, tuple(shape), data + offsets[0])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(
    file: pathlib.Path, slots: Mapping[str, Slot], start: int, size: int
) -> None:
    """Raises a PeftError unless the tensors fill the file without gap or overlap."""
    end = start
    by_offset = sorted(slots.items(), key=lambda item: (item[1].offset, item[0]))
    # An empty tensor may share its offset with the one that follows.
    by_offset.sort(key=lambda item: (item[1].offset, math.prod(item[1].shape) > 0))
    for name, slot in by_offset:
        if slot.offset != end:
            raise PeftError(
                f"Tensor {name!r:.200} in {file} begins at byte {slot.offset}, the one "
                f"before it ends at {end}."
            )
        end += math.prod(slot.shape) * DTYPES[slot.dtype].itemsize
    if end != size:
        raise PeftError(
            f"{file} has {size} bytes, its header speaks of {end}: it is "
            f"{'truncated' if end > size else 'damaged'}."
        )


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
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = tensor.make()
            if array.dtype != tensor.dtype or array.shape != tensor.shape:
                raise AssertionError(f"{name}: {array.dtype}{array.shape}")
            stream.write(array.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


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
    _sync(directory)


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Returns whether both are the same small file, so that none needs replacing."""
    if a.suffix != ".json" or not b.is_file():
        return False
    return a.read_bytes() == b.read_bytes()


def _sync(directory: pathlib.Path) -> None:
    """Waits until renames in `directory` are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
