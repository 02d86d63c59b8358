"""Models on disk, whose arrays are read one at a time."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .. import paths
from ..errors import CheckpointError
from . import tensors as tensors
from .disk import Path, naming, reading

_INDEX = ".safetensors.index.json"


_GROUP = 32 * 2**20  # bytes of an Orbax checkpoint to read at once


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on disk: what its arrays are, and how to get one.

    Attributes:
      shapes: shape and dtype of each array, by name.
      read: returns the array of a name.
      pieces: yields the bytes of the array of a name, in buffers of bounded size.
      metadata: strings from the files' headers.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[str], np.ndarray]
    pieces: Callable[[str], Iterable[Any]]
    metadata: Mapping[str, str]

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays as nested dicts, each read when NumPy asks for it.

        Examples:
          >>> tree = of_tree({"a": {"b": np.ones(2)}}).arrays()
          >>> tree["a"]["b"].shape, np.asarray(tree["a"]["b"])
          ((2,), array([1., 1.]))
        """
        return _nested(
            {
                name: _Unread(x.shape, x.dtype, functools.partial(self.read, name))
                for name, x in self.shapes.items()
            }
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Unread:
    """An array on disk, as NumPy takes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of what is named by paths."""
    tree: dict[str, Any] = {}
    for name, x in named.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{name!r} lies below another array.")
        if last in node:
            raise CheckpointError(f"{name!r} lies above another array.")
        node[last] = x
    return tree


def open_model(path: Path) -> Model:
    """Returns the model at `path`: safetensors, one file or sharded, or Orbax.

    Headers and metadata alone are read; arrays when they are asked for.

    Raises:
      CheckpointError: if there is no model, or it is damaged.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return _of_files({path: None})
    indices = sorted(folder.glob("*" + _INDEX))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _of_files(_shards(indices[0]))
    if len(files) == 1 and not indices:
        return _of_files({files[0]: None})
    if is_orbax_tree(folder):
        return _of_orbax(folder)
    raise CheckpointError(
        f"{str(path)!r} is no model: neither one safetensors file, nor one index "
        f"(*{_INDEX}), nor an Orbax checkpoint of parameters."
    )


def is_orbax_tree(folder: pathlib.Path) -> bool:
    """Returns whether a directory is an Orbax checkpoint of one pytree."""
    return (folder / "_METADATA").is_file() or (folder / "manifest.ocdbt").is_file()


def _shards(index: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """Returns the files that an index names, and what it says is in each."""
    with reading(index) as file:
        try:
            weights = json.loads(file.read(100_000_000))["weight_map"]
            pairs = [(str(name), str(place)) for name, place in weights.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise CheckpointError(
                f"{str(index)!r} is no index of safetensors files ({e!r:.100})."
            ) from e
    outside = sorted(
        {f for _, f in pairs if f != os.path.basename(f) or f in ("", "..")}
    )
    if outside:
        raise CheckpointError(
            f"{str(index)!r} names files outside its directory: {outside[:3]}."
        )
    files: dict[pathlib.Path, set[str]] = {}
    for name, place in pairs:
        files.setdefault(index.parent / place, set()).add(name)
    return files


def _of_files(files: Mapping[Any, set[str] | None]) -> Model:
    places: dict[str, tuple[Any, tensors.TensorInfo]] = {}
    metadata: dict[str, str] = {}
    for path, wanted in files.items():
        with reading(path) as file, naming(path):
            header = tensors.read_header(file)
            if wanted is not None and wanted != set(header.entries):
                off = sorted(wanted ^ set(header.entries))
                raise CheckpointError(f"The index and the file differ in {off[:3]}.")
        metadata |= header.metadata
        places |= {name: (path, entry) for name, entry in header.entries.items()}

    def read(name: str) -> np.ndarray:
        path, entry = places[name]
        with reading(path) as file:
            return tensors.read(file, entry)

    def pieces(name: str) -> Iterable[bytes]:
        path, entry = places[name]
        with reading(path) as file:
            yield from tensors.chunks(file, entry)

    shapes = {
        name: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        for name, (_, entry) in places.items()
    }
    return Model(shapes, read, pieces, metadata)


def _of_orbax(folder: pathlib.Path) -> Model:
    """Returns an Orbax checkpoint as a model; small arrays are read some at a time."""
    import orbax.checkpoint as ocp

    with _told(folder), ocp.PyTreeCheckpointer() as checkpointer:
        meta = checkpointer.metadata(folder.absolute()).item_metadata
        if meta is None:  # Orbax has logged why
            raise CheckpointError("what it says of its arrays is missing or damaged.")
        leaves, treedef = paths.flatten(meta.tree)
        odd = [p for p, x in leaves.items() if getattr(x, "shape", None) is None]
        if odd:
            raise CheckpointError(
                f"Only arrays make a model; no array: {', '.join(map(repr, odd[:5]))}."
            )
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()
        }
    groups = _groups(shapes)

    def fetch(names: tuple[str, ...]) -> dict[str, np.ndarray]:
        wanted = {*names}
        like = [0 if name in wanted else ocp.PLACEHOLDER for name in shapes]
        to_host = [ocp.RestoreArgs(restore_type=np.ndarray) for _ in shapes]
        with _told(folder), ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                folder.absolute(),
                args=ocp.args.PyTreeRestore(
                    treedef.unflatten(like), treedef.unflatten(to_host)
                ),
            )
            found = {n: x for n, x in paths.flatten(tree)[0].items() if n in wanted}
            odd = [n for n, x in found.items() if x.shape != shapes[n].shape]
            if odd or len(found) != len(wanted):
                raise CheckpointError(f"its arrays are not as it says: {odd[:5]}.")
            return found

    several = functools.lru_cache(maxsize=2)(fetch)  # arrays of two widths alternate

    def read(name: str) -> np.ndarray:
        group = groups[name]
        return (several if len(group) > 1 else fetch)(group)[name]

    return Model(shapes, read, lambda name: [tensors.raw(read(name))], {})


def _groups(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, tuple[str, ...]]:
    """Returns which arrays to read with each: neighbours of one width, to a bound.

    Opening a checkpoint costs as much as reading some megabytes of it.

    Examples:
      >>> shape = jax.ShapeDtypeStruct((2,), "float32")
      >>> _groups({"a": shape, "b": shape})
      {'a': ('a', 'b'), 'b': ('a', 'b')}
    """
    found: list[list[str]] = []
    filled, last = math.inf, None
    # In the order in which `_tensors.write` asks for them.
    for name in tensors.in_order(shapes):
        width = shapes[name].dtype.itemsize
        size = math.prod(shapes[name].shape) * width
        if width != last or filled + size > _GROUP:
            found, filled, last = [*found, []], 0, width
        found[-1].append(name)
        filled += size
    return {name: tuple(group) for group in found for name in group}


@contextlib.contextmanager
def _told(folder: pathlib.Path) -> Iterator[None]:
    """Turns whatever Orbax raises into a `CheckpointError` that names the folder."""
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, CheckpointError) else _reason(error)
        raise CheckpointError(f"{str(folder)!r} cannot be read: {why}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}."


def of_tree(params: Any) -> Model:
    """Returns parameters in memory as a model; leaves come to the host one by one.

    Raises:
      CheckpointError: for leaves that are no arrays.
    """
    leaves, _ = paths.flatten(params)
    odd = [p for p, x in leaves.items() if not hasattr(x, "dtype")]
    if odd:
        raise CheckpointError(
            f"Only arrays can be saved; no array: {', '.join(map(repr, odd[:5]))}."
        )
    return Model(
        {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()},
        lambda name: np.asarray(jax.device_get(leaves[name])),
        lambda name: [tensors.raw(jax.device_get(leaves[name]))],
        {},
    )
