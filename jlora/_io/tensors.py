"""The safetensors format, read strictly and written tensor by tensor.

A file is eight bytes with the header's length, the header in JSON (dtype, shape and
place of each tensor, and a table of strings under `__metadata__`), and the tensors'
bytes without gaps. Everything is checked before a tensor is read, and only one tensor
at a time has to be in memory.

References:
  https://huggingface.co/docs/safetensors
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Protocol

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError
from .disk import Json, Path, replacing

Buffer = bytes | memoryview

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEADER_LIMIT = 100_000_000  # as in the reference implementation
_SIZE_LIMIT = 2**48


class Form(Protocol):
    """Anything with a dtype and a shape."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is in its file, and what it is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors in the order of their bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO) -> Header:
    """Returns the header of an open file, checked against the file's length.

    Raises:
      CheckpointError: if the file is not a whole safetensors file: it is cut or too
        long, the header is not JSON or names a tensor twice, a dtype is unknown, or
        tensors overlap or leave gaps.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise _damaged(
            f"it has {size} bytes, and its header would have {length}"
            if len(first) == 8
            else f"it has {size} bytes, fewer than a header"
        )
    fields = _parse(file.read(length))
    metadata = fields.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # as MLX writes it
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged("its metadata is not a table of strings")
    end = 8 + length
    found = {name: _info(name, value, end) for name, value in fields.items()}
    found = dict(sorted(found.items(), key=lambda kv: (kv[1].start, kv[1].stop)))
    for name, info in found.items():
        if info.start != end:
            raise _damaged(f"tensor {name!r} overlaps another one or leaves a gap")
        end = info.stop
    if end != size:
        raise _damaged(f"it has {size} bytes, its header describes {end}")
    return Header(found, metadata)


def read(file: BinaryIO, info: TensorInfo) -> np.ndarray:
    """Returns one tensor, as a read-only array."""
    file.seek(info.start)
    return array(file.read(info.stop - info.start), info)


def array(data: Buffer, info: TensorInfo) -> np.ndarray:
    """Returns the tensor whose bytes are `data`."""
    if len(data) != info.stop - info.start:
        raise _damaged("it became shorter while it was read")
    if info.dtype == np.bool_ and data and max(data) > 1:
        raise _damaged("a truth value is neither 0 nor 1")
    return np.frombuffer(data, info.dtype).reshape(info.shape)


def write(
    path: Path,
    tensors: Mapping[str, Form],
    pieces: Callable[[str], Iterable[Buffer]],
    metadata: Mapping[str, str],
    *,
    turns: Iterable[str] | None = None,
) -> None:
    """Writes a file whole or not at all, asking for one tensor at a time.

    Args:
      path: the file; one that is there is replaced in one step.
      tensors: anything with a dtype and a shape, by name.
      pieces: gives the bytes of the tensor of that name, in buffers.
      metadata: strings for the header.
      turns: the order in which to ask for the tensors; None is that of the file.

    Raises:
      CheckpointError: if the format lacks a dtype or cannot hold a name, or the file
        cannot be written.
    """
    unknown = [
        f"{name!r} is {x.dtype}"
        for name, x in tensors.items()
        if not has_dtype(x.dtype)
    ]
    if unknown:
        raise CheckpointError(
            f"Not saved: safetensors has no such dtype: {listed(unknown, 5)}. "
            f"It has {', '.join(str(d) for d in NAMES)}. Of a random key write "
            "jax.random.key_data(key), or use Orbax."
        )
    wrong = [repr(name) for name in tensors if not _is_name(name)]
    if wrong:
        raise CheckpointError(
            f"Not saved: a tensor of safetensors cannot be called {listed(wrong, 5)}."
        )
    order = in_order(tensors)
    fields: Json = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = _little(tensors[name].dtype), tuple(tensors[name].shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {
            "dtype": NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order if turns is None else turns:
            place = fields[name]["data_offsets"]
            file.seek(8 + len(text) + place[0])
            written = sum(file.write(piece) for piece in pieces(name))
            assert written == place[1] - place[0], (name, written, place)


def _is_name(name: str) -> bool:
    """Returns whether a header can hold `name`: text of UTF-8, not its own key."""
    try:
        return name.encode() != b"__metadata__"
    except UnicodeEncodeError:
        return False


def set_metadata(path: Path, key: str, old: str, new: str) -> None:
    """Replaces a value in a file's metadata by one that is as long."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        before, after = (
            f"{json.dumps(key)}:{json.dumps(x)}".encode() for x in (old, new)
        )
        text = file.read(length)
        assert text.count(before) == 1, (path, key)
        assert len(before) == len(after), (path, key)
        file.seek(8)
        file.write(text.replace(before, after))
        file.flush()
        os.fsync(file.fileno())


def in_order(tensors: Mapping[str, Form]) -> list[str]:
    """Returns the names in a file's order: wide dtypes first, so that all are aligned.

    Examples:
      >>> in_order({"a": np.ones(1, np.int8), "c": np.ones(1), "b": np.ones(1)})
      ['b', 'c', 'a']
    """
    return sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))


def raw(x: ArrayLike) -> memoryview:
    """Returns the bytes of an array, little-endian and in the order of its axes."""
    x = np.asarray(x)
    little = x.astype(_little(x.dtype), order="C", copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8).data


def has_dtype(dtype: Any) -> bool:
    """Returns whether the format has a dtype; it has none for random keys."""
    try:
        return _little(dtype) in NAMES
    except TypeError:  # one of JAX's own, which NumPy does not know
        return False


def _little(dtype: DTypeLike) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _parse(text: bytes) -> Json:
    # Each bracket becomes an object of a hundred bytes; a tensor has three in sixty.
    if len(text) > 10**6 and text.count(b"[") + text.count(b"{") > len(text) // 10:
        raise _damaged("its header has more brackets than tensors take")
    try:
        fields = parse_json(text)
        if not isinstance(fields, dict):
            raise ValueError("it is not a table")
    except ValueError as error:
        raise _damaged(f"its header is not a JSON table ({error})") from error
    return fields


def _info(name: str, value: object, data: int) -> TensorInfo:
    match value:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [start, stop],
            **rest,
        } if not rest and all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            pass
        case _:
            raise _damaged(f"tensor {name!r} is described by {value!r:.100}")
    if dtype not in DTYPES:
        raise _damaged(f"tensor {name!r} has the unknown dtype {dtype!r:.40}")
    room = math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize
    size = room if all(shape) else 0
    if len(shape) > 32 or room > _SIZE_LIMIT or stop - start != size:
        raise _damaged(
            f"tensor {name!r} of {dtype}{shape!r:.100} does not take {stop - start} "
            "bytes"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), data + start, data + stop)


def _damaged(why: str) -> CheckpointError:
    return CheckpointError(f"This is not a whole safetensors file: {why}.")
