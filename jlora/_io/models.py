"""Models on disk, whose arrays are read one at a time."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from .. import paths
from .._tables import listed
from ..errors import CheckpointError
from ..factors import Leaf, PyTree
from ..quantised import Quantized, is_quantized, like_dense
from . import coded, tensors as tensors
from .beside import put_back
from .disk import Path, Progress, check_files, reading, told
from .handles import mark_of
from .leaves import CodedSlot, leaves_in
from .shards import find_tensors, open_tensors

if TYPE_CHECKING:
    from orbax.checkpoint import PyTreeCheckpointer

_GROUP = 32 * 2**20  # bytes of an Orbax checkpoint to read at once
QUANTISED = f"{coded.KEY}.json"  # beside Orbax's own files
_MOST_TEXT = 100_000_000


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on disk: what its arrays are, and how to get one.

    Attributes:
      shapes: shape and dtype of each array, by name; `Quantized` of shapes for a
        quantised one.
      read: returns the array of a name, or `Quantized` of arrays.
      pieces: yields the bytes of the array of a name, in buffers of bounded size.
      metadata: strings from the files' headers.
      refused: in words why some leaf, by its name, cannot be read.
      widened: in words which leaves are quantised in a way that `Quantized` does not
        have, and read as dense arrays.
    """

    shapes: Mapping[str, Any]
    read: Callable[[str], Any]
    pieces: Callable[[str], Iterable[tensors.Buffer]]
    metadata: Mapping[str, str]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    widened: tuple[str, ...] = ()

    def unreadable(self) -> list[str]:
        """Returns in words which leaves are certainly not what a tensor says.

        A tensor of 16 bits or more, with another beside it that is called as a scale,
        may be a weight like any other.
        """
        return [
            why
            for name, why in self.refused.items()
            if name not in self.shapes
            or self.shapes[name].dtype.itemsize < 2
            or not jnp.issubdtype(self.shapes[name].dtype, jnp.inexact)
        ]

    def dense(self, name: str) -> np.ndarray:
        """Returns the array of a name, widened if it is quantised."""
        x = self.read(name)
        return np.asarray(x.dense()) if is_quantized(x) else x

    def dense_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns `shapes` without quantised ones: what they stand for."""
        return {name: like_dense(x) for name, x in self.shapes.items()}

    def arrays(self) -> PyTree:
        """Returns the arrays as nested dicts, each read when NumPy asks for it.

        Examples:
          >>> tree = of_tree({"a": {"b": np.ones(2)}}).arrays()
          >>> tree["a"]["b"].shape, np.asarray(tree["a"]["b"])
          ((2,), array([1., 1.]))
        """
        return nested(
            {
                name: _Unread(x.shape, x.dtype, functools.partial(self.dense, name))
                for name, x in self.shapes.items()
            }
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Unread:
    """An array on disk, as NumPy takes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(
        self, dtype: DTypeLike | None = None, copy: bool | None = None
    ) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def nested(named: Mapping[str, Any]) -> PyTree:
    """Returns nested dicts of what is named by paths."""
    tree: PyTree = {}
    for name, x in named.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{name!r} lies below another array.")
        if last in node:
            raise CheckpointError(f"{name!r} lies above another array.")
        node[last] = x
    return tree


def open_model(path: Path) -> Model:
    """Returns the model at `path`: safetensors, one file or sharded, or Orbax.

    Only headers and metadata are read; an array is read when it is asked for. If the
    model is replaced meanwhile, safetensors stay those that were opened here, and Orbax
    is an error.

    Raises:
      CheckpointError: if there is no model, or it is damaged.
    """
    folder = pathlib.Path(path)
    with told(f"{str(path)!r} cannot be read"):
        put_back(folder)
        is_tree = (
            os.path.isdir(path)
            and find_tensors(folder) is None
            and is_orbax_tree(folder)
        )
    if is_tree:
        check_files(folder)
        return _of_orbax(folder)
    slots, metadata = open_tensors(path)
    leaves, refused = leaves_in(slots, metadata, path)
    coded_ = {name: x for name, x in leaves.items() if isinstance(x, CodedSlot)}

    def pieces(name: str) -> Iterable[tensors.Buffer]:
        if name in coded_:
            return [tensors.raw(coded_[name].read())]
        return slots[name].pieces()

    return Model(
        {
            name: x.form
            if isinstance(x, CodedSlot)
            else jax.ShapeDtypeStruct(x.shape, x.dtype)
            for name, x in leaves.items()
        },
        lambda name: leaves[name].read(),
        pieces,
        {key: text for key, text in metadata.items() if key != coded.KEY},
        refused,
        tuple(x.widened for x in coded_.values() if x.widened),
    )


def is_orbax_tree(folder: pathlib.Path) -> bool:
    """Returns whether a directory is an Orbax checkpoint of one pytree."""
    return (folder / "_METADATA").is_file() or (folder / "manifest.ocdbt").is_file()


@dataclasses.dataclass(frozen=True, eq=False)
class _OrbaxTree:
    """An Orbax checkpoint of one pytree of arrays."""

    folder: pathlib.Path
    mark: Hashable
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    unflatten: Callable[[Iterable[Leaf]], PyTree]

    def read(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Returns the arrays of these names."""
        import orbax.checkpoint as ocp

        like = [0 if name in names else ocp.PLACEHOLDER for name in self.shapes]
        to_host = [ocp.RestoreArgs(restore_type=np.ndarray) for _ in self.shapes]
        args = ocp.args.PyTreeRestore(self.unflatten(like), self.unflatten(to_host))
        try:
            with _opened(self.folder) as checkpointer:
                tree = checkpointer.restore(self.folder.absolute(), args=args)
        finally:
            if mark_of(self.folder) != self.mark:
                raise CheckpointError(
                    f"{str(self.folder)!r} was replaced while it was read."
                )
        leaves, _ = paths.flatten(tree)
        found = {name: leaves[name] for name in names}
        odd = [n for n, x in found.items() if np.shape(x) != self.shapes[n].shape]
        if odd:
            raise CheckpointError(
                f"{str(self.folder)!r} is damaged: its metadata has other shapes for "
                f"{listed(odd, 5, ', ')}."
            )
        return found


@contextlib.contextmanager
def _opened(folder: pathlib.Path) -> Iterator["PyTreeCheckpointer"]:
    """Yields Orbax's reader of a pytree; whatever it raises is a CheckpointError."""
    import orbax.checkpoint as ocp

    with (
        told(f"{str(folder)!r} cannot be read", catch=Exception),
        ocp.PyTreeCheckpointer() as checkpointer,
    ):
        yield checkpointer


def _of_orbax(folder: pathlib.Path) -> Model:
    """Returns an Orbax checkpoint as a model; small arrays are read some at a time."""
    mark = mark_of(folder)
    with _opened(folder) as checkpointer:
        meta = checkpointer.metadata(folder.absolute()).item_metadata
        if meta is None:  # Orbax has logged why
            raise CheckpointError(
                f"{str(folder)!r} cannot be read: its metadata is missing or damaged."
            )
        leaves, treedef = paths.flatten(meta.tree)
        shapes = _shapes(leaves, f"{str(folder)!r} cannot be read")
    tree, groups = _OrbaxTree(folder, mark, shapes, treedef.unflatten), _groups(shapes)
    several = functools.lru_cache(maxsize=2)(tree.read)  # two widths alternate

    def read(name: str) -> np.ndarray:
        group = groups[name]
        return (several if len(group) > 1 else tree.read)(group)[name]

    quantised = _quantised_in(folder, shapes)
    used = {key for q in quantised.values() for key in jax.tree.leaves(q)}
    forms = {name: x for name, x in shapes.items() if name not in used}
    forms |= {name: coded.of_forms(q, shapes) for name, q in quantised.items()}

    def read_leaf(name: str) -> Any:
        return jax.tree.map(read, quantised[name]) if name in quantised else read(name)

    return Model(forms, read_leaf, lambda name: [tensors.raw(read(name))], {})


def _quantised_in(
    folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Quantized]:
    """Returns the quantised arrays of an Orbax checkpoint, of names."""
    file = folder / QUANTISED
    if not file.exists():
        return {}
    with reading(file) as open_file:
        text = open_file.read(_MOST_TEXT + 1)
        if len(text) > _MOST_TEXT:
            raise CheckpointError(f"It has over {_MOST_TEXT} bytes.")
        return coded.described_in(text, shapes, joint="/")


def _shapes(leaves: Mapping[str, Leaf], what: str) -> dict[str, Any]:
    """Returns shape and dtype of each leaf; `what` begins the error if one has none."""
    odd = [repr(p) for p, x in leaves.items() if getattr(x, "shape", None) is None]
    if odd:
        raise CheckpointError(
            f"{what}: these leaves are not arrays: {listed(odd, 5, ', ')}."
        )
    return {
        p: coded.shapes_of(x)
        if is_quantized(x)
        else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for p, x in leaves.items()
    }


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
    # In the order in which `tensors.write` asks for them.
    for name in tensors.in_order(shapes):
        width = shapes[name].dtype.itemsize
        size = math.prod(shapes[name].shape) * width
        if width != last or filled + size > _GROUP:
            found, filled, last = [*found, []], 0, width
        found[-1].append(name)
        filled += size
    return {name: tuple(group) for group in found for name in group}


def of_tree(params: PyTree, leaf: Callable[[str], Leaf] | None = None) -> Model:
    """Returns parameters in memory as a model; leaves come to the host one by one.

    Args:
      params: any pytree of arrays.
      leaf: returns the leaf of a path when it is read; None takes that of `params`.

    Raises:
      CheckpointError: for leaves that are not arrays.
    """
    leaves, _ = paths.flatten(params)

    def read(name: str) -> Any:
        x = leaves[name] if leaf is None else leaf(name)
        return jax.tree.map(np.asarray, jax.device_get(coded.for_file(x)))

    shapes = _shapes(leaves, "Not saved")
    shapes = {name: coded.for_file(x) for name, x in shapes.items()}
    return Model(shapes, read, lambda name: [tensors.raw(read(name))], {})


def write(path: Path, model: Model, progress: Progress = iter) -> None:
    """Writes a model as one safetensors file, whole or not at all, leaf by leaf.

    Args:
      path: the file.
      model: the model; its quantised arrays are several tensors each.
      progress: wraps the iteration over the leaves.

    Raises:
      CheckpointError: see `tensors.write`; also if a plain leaf is called as a tensor
        of a quantised one.
    """
    forms: dict[str, tensors.Form] = {}
    owner: dict[str, str] = {}
    several = {n: coded.parts(n, x) for n, x in model.shapes.items() if is_quantized(x)}
    for name, x in model.shapes.items():
        own = several.get(name, {name: x})
        twice = [key for key in own if key in forms]
        if twice:
            raise CheckpointError(f"Not saved: two leaves are called {twice[0]!r}.")
        forms |= own
        owner |= dict.fromkeys(own, name)
    held: dict[str, Any] = {}  # the tensors of one quantised leaf
    done: set[str] = set()
    names = iter(())

    def pieces(key: str) -> Iterable[tensors.Buffer]:
        name = owner[key]
        if name not in done:  # advances the progress bar
            done.add(name)
            next(names, None)
        if name not in several:
            return model.pieces(name)
        if key not in held:
            held.clear()
            held.update(coded.parts(name, model.read(name)))
        return [tensors.raw(held[key])]

    names = iter(progress(list(model.shapes)))
    metadata = {**model.metadata, **coded.metadata_of(model.shapes)}
    # All of a leaf at once, wherever in the file its tensors are.
    turns = [key for name in several for key in several[name]]
    turns += [key for key in tensors.in_order(forms) if owner[key] not in several]
    tensors.write(os.fspath(path), forms, pieces, metadata, turns=turns)
    for _ in names:
        pass
