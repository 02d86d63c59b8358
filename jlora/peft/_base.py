"""Whole models as Hugging Face safetensors: `load_base` and `save_base`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from .._checks import check_known
from .._io.disk import Path, check_name, reading, write_text
from .._io.folders import replacing_files
from .._io.leaves import CodedSlot, LeafSlot, leaves_in
from .._io.placing import Quantize, encoders_for, placed as placed_leaf
from .._io.processes import write_in_first
from .._io.shards import Pending, open_tensors, write_tensors
from .._io.tensors import has_dtype
from .._io.torch_models import CONFIG
from .._io.torch_quantised import tell_widened
from .._numerics import narrowed
from .._plan.plan import Plan
from ..errors import PeftError
from ..factors import Leaf, PyTree
from ..paths import flatten
from ..quantised import is_quantized
from . import layers
from ._coded import leaf_of
from ._fused import gaps
from ._leaves import Shaped, is_shaped, on_host
from ._places import Cut, Place, untied
from .config import FLOATS
from .names import GENERIC, NameMap, unnamed
from .report import LoadReport, check

STEM = "model"
Read = Callable[[str], Leaf]  # of the leaf of a path


def load_base(
    path: Path,
    params: PyTree,
    *,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    quantize: Quantize = None,
    plan: Plan | None = None,
) -> PyTree:
    """Returns the parameters of a model from Hugging Face safetensors, leaf by leaf.

    Beside the result no more than one leaf and its tensors are in memory: with
    `quantize`, never the dense model. For a file that need not fit in all, see
    `load_base_partial`.

    Quantised tensors are read as `jlora.Quantized`: those of `jlora quantize`, those of
    bitsandbytes (nf4; 8 bits) and float8 with scales. A leaf whose blocks do not lie
    along its axes is widened, with a warning.

    Args:
      path: a directory with `model.safetensors` or its shards, or such a file.
      params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s; a leaf that has
        a sharding is put there.
      names: what the leaves are called in torch, see `jlora.peft.save`.
      dtype: type of all floating-point leaves; None means that of `params`.
      quantize: a kind, such as `"nf4"`, or a mapping of options of `jlora.quantize`,
        such as `{"kind": "nf4", "double": True}`: weights are quantised as they come.
        The result is that of `jlora.quantize`, bit for bit.
      plan: with `quantize`: which leaves, and along which axes, see `jlora.quantize`.

    Raises:
      PeftError: if a file is missing or damaged, or a number is too large for the
        dtype; lists all tensors that are missing, extra or misshapen, or quantised in a
        format that jlora does not read (GPTQ, AWQ and others).
      ConfigError: for `quantize` or `plan`, see `jlora.quantize`.
      TreeError: for `quantize` or `plan`, see `jlora.quantize`.

    Warns:
      UserWarning: names quantised leaves that were widened.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save_base(folder, params)
      ...     read = jlora.peft.load_base(folder, jax.eval_shape(lambda: params))
      >>> read["up"]["kernel"].tolist()
      [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    read, report = load_base_partial(
        path, params, names=names, dtype=dtype, quantize=quantize, plan=plan
    )
    check(report, f"The model in {str(path)!r}", "load_base_partial")
    return read


def load_base_partial(
    path: Path,
    params: PyTree,
    *,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    quantize: Quantize = None,
    plan: Plan | None = None,
) -> tuple[PyTree, LoadReport]:
    """Returns what `load_base` reads of a model that need not fit, and what does not.

    Leaves that the file lacks, or has in another shape or type, stay as in `params`.

    Args:
      path: see `load_base`.
      params: see `load_base`.
      names: see `load_base`.
      dtype: see `load_base`.
      quantize: see `load_base`.
      plan: see `load_base`.

    Returns:
      `(params, report)`; the report is false if everything fits.

    Raises:
      PeftError: if a file is missing or damaged.
      ConfigError: see `load_base`.
      TreeError: see `load_base`.

    Examples:
      >>> import tempfile, numpy as np, jlora
      >>> like = {"up": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save_base(folder, {"up": {"bias": np.ones(3)}})
      ...     read, report = jlora.peft.load_base_partial(folder, like)
      >>> read["up"]["bias"].tolist(), report.missing
      ([1.0, 1.0, 1.0], ("up.weight for 'up/kernel'",))
    """
    names = names or GENERIC
    leaves, treedef = flatten(params)
    arrays = {name: x for name, x in leaves.items() if is_shaped(x)}
    encoders = encoders_for(leaves, plan, quantize)
    tensors, metadata = open_tensors(path, STEM, fault=PeftError)
    file = _File(*leaves_in(tensors, metadata, path, PeftError), names)
    slots = file.slots
    placed, missing, wrong = _placed(arrays, names)
    # A tied model has one tensor, whichever of its two names that bears.
    twins = {p.tied: p.name for places in placed.values() for p in places if p.tied}
    used: set[str] = set()
    widened: list[str] = []
    for name, places in zip(placed, untied(placed.values()), strict=True):
        keys = {place: file.key(place, twins) for place in places}
        found = {place: key for place, key in keys.items() if key is not None}
        if len(found) < len(places):
            absent = (place.name for place in places if place not in found)
            missing += [f"{key} for {name!r}" for key in absent]
            continue
        copies = _copies(found, slots)
        used |= {*found.values(), *copies}
        encoder = encoders.get(name)
        misfits = file.misfits(name, arrays[name], found, encoder is not None)
        if not misfits:
            x, own = _read_leaf(arrays[name], found, slots, dtype)
            widened += own
            encoder = None if is_quantized(x) else encoder
            leaves[name] = placed_leaf(name, x, arrays[name], encoder)
            del x  # before the next leaf is read
        wrong += misfits
        wrong += [
            f"{twin} and {key} are one leaf, their numbers differ"
            for twin, key in copies.items()
            if not _are_equal(slots[twin], slots[key])
        ]
    tell_widened(widened, "They are dense in the result")
    report = LoadReport(tuple(missing), file.extra(used), tuple(wrong))
    return treedef.unflatten(leaves.values()), report


@dataclasses.dataclass(frozen=True, eq=False)
class _File:
    """The leaves of a file.

    Attributes:
      slots: those that are read.
      refused: in words why others are not.
      names: what they are called.
    """

    slots: Mapping[str, LeafSlot]
    refused: Mapping[str, str]
    names: NameMap

    def key(self, place: Place, twins: Mapping[str, str]) -> str | None:
        """Returns the tensor's name in the file, which may lack the model's prefix."""
        tried = [place.name, place.tied or twins.get(place.name)]
        both = (
            name for own in tried if own for name in (own, self.names.other_prefix(own))
        )
        return next((n for n in both if n in self.slots or n in self.refused), None)

    def misfits(
        self, name: str, leaf: Shaped, keys: Mapping[Place, str], encoded: bool
    ) -> list[str]:
        """Returns in words where tensors have another shape or type than the leaf."""
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        found = []
        for place, key in keys.items():
            if key in self.refused:
                found.append(self.refused[key])
                continue
            slot, wanted = self.slots[key], place.shape(tuple(leaf.shape))
            form = slot.form if isinstance(slot, CodedSlot) else None
            if slot.shape != wanted:
                sizes = list(slot.shape), list(wanted)
                found.append(f"{key} is {sizes[0]}, {name!r} needs {sizes[1]}")
            elif floating != (slot.dtype in FLOATS):
                found.append(f"{key} is {slot.dtype}, {name!r} is {leaf.dtype}")
            elif encoded and is_quantized(form) and not is_quantized(leaf):
                found.append(
                    f"{key} is quantised already ({form.kind}): leave out quantize=, "
                    "or name other leaves in its targets"
                )
        return found

    def extra(self, used: Collection[str]) -> tuple[str, ...]:
        """Returns what no leaf is for; tensors of refused leaves are told already."""
        modules = tuple(f"{n.removesuffix('.weight')}." for n in self.refused)
        return tuple(
            key
            for key in self.slots
            if key not in used
            and not self.names.ignores(key)
            and not key.startswith(modules)
        )


def _are_equal(a: LeafSlot, b: LeafSlot) -> bool:
    both = (jax.tree.leaves(slot.read()) for slot in (a, b))
    return all(map(np.array_equal, *both))


def _placed(
    arrays: Mapping[str, Shaped], names: NameMap
) -> tuple[dict[str, tuple[Place, ...]], list[str], list[str]]:
    """Returns the torch tensors of each leaf, and in words which leaves have none.

    The first list is of leaves without a rule, the second of those that their rule does
    not fit.
    """
    placed: dict[str, tuple[Place, ...]] = {}
    nameless: list[str] = []
    wrong: list[str] = []
    for path, x in arrays.items():
        try:
            found = names.places(path, tuple(x.shape))
        except PeftError as error:
            wrong.append(str(error).rstrip("."))
            continue
        if found:
            placed[path] = found
        else:
            nameless.append(unnamed(path, names))
    return placed, nameless, wrong


def _copies(keys: Mapping[Place, str], slots: Mapping[str, LeafSlot]) -> dict[str, str]:
    """Returns the second copies of tied tensors, with the names of the first."""
    return {
        place.tied: key
        for place, key in keys.items()
        if place.tied in slots and place.tied not in (None, key)
    }


def _read_leaf(
    leaf: Shaped,
    keys: Mapping[Place, str],
    slots: Mapping[str, LeafSlot],
    dtype: DTypeLike | None,
) -> tuple[Any, list[str]]:
    """Returns a leaf on the host, and what of it was quantised and is widened."""
    own = jax.dtypes.canonicalize_dtype(_dtype(leaf, dtype))
    read = {place: slots[key] for place, key in keys.items()}
    coded = [slot for slot in read.values() if isinstance(slot, CodedSlot)]
    told = [slot.widened for slot in coded if slot.widened]
    if len(coded) == len(keys) and not told:
        tensors: dict[Place, Any] = {place: slot.read() for place, slot in read.items()}
        q = leaf_of(tensors, tuple(leaf.shape), own)
        if q is not None:
            return q, []

    def dense(place: Place) -> np.ndarray:
        tensor: Any = read[place].read()
        if is_quantized(tensor):
            told.append(f"{keys[place]} ({tensor.kind}, blocks {tensor.blocks})")
            tensor = np.asarray(tensor.dense())
        return narrowed(keys[place], tensor, own, PeftError)

    shape = tuple(leaf.shape)
    first = next(iter(read))
    if first.sizes(shape) == shape:  # the one tensor of the leaf, which is not copied
        return layers.as_leaf(first, dense(first), shape), told
    out = np.zeros(shape, own)
    for place in read:
        layers.weight_in(place, dense(place), out)
    return out, told


def _dtype(leaf: Shaped, dtype: DTypeLike | None) -> np.dtype:
    """Returns the type to read or write a leaf in; `dtype` is for floats only."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.dtype(dtype if dtype is not None and floating else leaf.dtype)


def save_base(
    directory: Path,
    params: PyTree,
    *,
    names: NameMap | None = None,
    config: Mapping[str, Any] | Path | None = None,
    tied: bool = False,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = 5_000_000_000,
) -> None:
    """Writes a model, merged or not, as safetensors that `transformers` loads.

    One leaf at a time is transposed and written, so memory is bounded by the largest
    leaf, also of a model that several processes share: all call this, and the first
    writes. The files appear whole or not at all. Quantised leaves are written dense:
    `export.safetensors` writes codes.

    Args:
      directory: made if it does not exist.
      params: the model's parameters, of `jlora.merge` or as they are.
      names: what the leaves are called in torch, see `jlora.peft.save`.
      config: the model's `config.json`, as a mapping or a file to copy; None writes
        none.
      tied: write a tied output head a second time under its own name, for readers that
        do not tie.
      dtype: type of all floating-point tensors; None keeps each leaf's.
      max_shard_bytes: size from which the tensors are split into several files.

    Raises:
      PeftError: lists every leaf without a name in torch. Also if a number is too large
        for `dtype`.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> from safetensors.numpy import load_file
      >>> names = jlora.peft.NameMap((jlora.peft.Entry("up/kernel", "mlp.up.weight"),))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_base(folder, {"up": {"kernel": np.ones((2, 3))}}, names=names)
      ...     tensors = load_file(os.path.join(folder, "model.safetensors"))
      >>> {name: x.shape for name, x in tensors.items()}
      {'mlp.up.weight': (3, 2)}
    """
    check_name(directory, PeftError)
    names = names or GENERIC
    check_known("peft.save_base", params)
    leaves, _ = flatten(params)
    arrays = {path: x for path, x in leaves.items() if is_shaped(x)}
    wrong = [f"{path!r} is not an array" for path in leaves if path not in arrays]
    tensors, faults = _tensors(arrays, names, tied, dtype)
    wrong += faults
    if wrong:
        raise PeftError(f"This model has no form in torch: {'; '.join(wrong)}.")
    about = _config_text(config)

    def write(read: Read) -> None:
        own = {name: tensor.pending(read) for name, tensor in tensors.items()}
        with replacing_files(pathlib.Path(directory), STEM, PeftError) as new:
            metadata = {"format": "pt"}
            write_tensors(new, STEM, own, metadata=metadata, max_bytes=max_shard_bytes)
            if about is not None:
                write_text(new / CONFIG, about)

    write_in_first(write, arrays, PeftError)


class _Tensor(NamedTuple):
    """A tensor of torch's: what it is, and how it is made of the leaves."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[Read], np.ndarray]

    def pending(self, read: Read) -> Pending:
        """Returns it as one to write, whose leaves `read` returns."""
        return Pending(self.dtype, self.shape, functools.partial(self.make, read))


def _tensors(
    arrays: Mapping[str, Shaped],
    names: NameMap,
    tied: bool,
    dtype: DTypeLike | None,
) -> tuple[dict[str, _Tensor], list[str]]:
    """Returns torch's tensors of a model, and what has no form there."""
    placed, nameless, faults = _placed(arrays, names)
    wrong = faults + nameless
    tensors: dict[str, _Tensor] = {}
    shares: dict[str, dict[Cut, _Tensor]] = {}
    for path, places in zip(placed, untied(placed.values()), strict=True):
        own = arrays[path].dtype
        own = _dtype(arrays[path], dtype) if has_dtype(own) else own
        if not has_dtype(own):
            wrong.append(f"{path!r} is {own}, which torch files do not have")
            continue
        for place in places:
            shape = place.shape(tuple(arrays[path].shape))
            tensor = _Tensor(own, shape, functools.partial(_made, path, place, own))
            if place.cut is not None:
                shares.setdefault(place.name, {})[place.cut] = tensor
                continue
            for name in (place.name, place.tied) if tied else (place.name,):
                if name in tensors:
                    wrong.append(f"two leaves are {name} in torch")
                if name is not None:
                    tensors[name] = tensor
    for name, found in shares.items():
        absent = gaps(list(found))
        wrong += [f"no leaf has {absent} of {name}"] if absent else []
        tensors[name] = _beside(found)
    return tensors, wrong


def _made(path: str, place: Place, dtype: np.dtype, read: Read) -> np.ndarray:
    own = narrowed(path, on_host(read(path)), dtype, PeftError)
    return layers.weight_out(place, own)


def _beside(shares: Mapping[Cut, _Tensor]) -> _Tensor:
    """Returns the tensor that holds several leaves side by side."""
    axis = next(iter(shares)).axis
    parts = [shares[cut] for cut in sorted(shares)]
    return _Tensor(
        np.result_type(*(part.dtype for part in parts)),
        parts[0].shape,
        lambda read: np.concatenate([part.make(read) for part in parts], axis),
    )


def _config_text(config: Mapping[str, Any] | Path | None) -> str | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return json.dumps(config, indent=2) + "\n"
    with reading(config, PeftError) as file:
        return file.read().decode()
