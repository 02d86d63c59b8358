"""Whole models as Hugging Face safetensors: `load_base` and `save_base`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from .._io.disk import Path, check_name, reading, write_text
from .._io.folders import replacing_files
from .._io.shards import Pending, Slot, open_tensors, write_tensors
from .._io.tensors import NAMES
from .._io.torch_models import scale_beside
from .._numerics import narrowed
from ..errors import PeftError
from ..factors import PyTree
from ..paths import flatten
from . import layers
from ._fused import gaps
from ._leaves import Shaped, is_shaped
from ._places import Cut, Place, untied
from .config import FLOATS
from .names import GENERIC, NameMap, unnamed
from .report import LoadReport, check

STEM = "model"
_CONFIG = "config.json"


def load_base(
    path: Path,
    params: PyTree,
    *,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Returns the parameters of a model from Hugging Face safetensors, leaf by leaf.

    Beside the result no more than one leaf and its tensors are in memory. For a file
    that need not fit in all, see `load_base_partial`.

    Args:
      path: a directory with `model.safetensors` or its shards, or such a file.
      params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s; a leaf that has
        a sharding is put there.
      names: what the leaves are called in torch, see `jlora.peft.save`.
      dtype: type of all floating-point leaves; None means that of `params`.

    Raises:
      PeftError: if a file is missing or damaged, or a number is too large for the
        dtype; lists all tensors that are missing, extra or misshapen.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save_base(folder, params)
      ...     read = jlora.peft.load_base(folder, jax.eval_shape(lambda: params))
      >>> read["up"]["kernel"].tolist()
      [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    read, report = load_base_partial(path, params, names=names, dtype=dtype)
    check(report, f"The model in {str(path)!r}", "load_base_partial")
    return read


def load_base_partial(
    path: Path,
    params: PyTree,
    *,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[PyTree, LoadReport]:
    """Returns what `load_base` reads of a model that need not fit, and what does not.

    Leaves that the file lacks, or has in another shape or type, stay as in `params`.

    Args:
      path: see `load_base`.
      params: see `load_base`.
      names: see `load_base`.
      dtype: see `load_base`.

    Returns:
      `(params, report)`; the report is false if everything fits.

    Raises:
      PeftError: if a file is missing or damaged.

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
    slots, _ = open_tensors(path, STEM, fault=PeftError)
    placed, missing, wrong = _placed(arrays, names)
    # A tied model has one tensor, whichever of its two names that bears.
    twins = {p.tied: p.name for places in placed.values() for p in places if p.tied}
    used: set[str] = set()
    for name, places in zip(placed, untied(placed.values()), strict=True):
        keys = {place: _key(place, slots, names, twins) for place in places}
        found = {place: key for place, key in keys.items() if key is not None}
        if len(found) < len(places):
            absent = (place.name for place in places if place not in found)
            missing += [f"{key} for {name!r}" for key in absent]
            continue
        copies = _copies(found, slots)
        used |= {*found.values(), *copies}
        misfits = _misfits(name, arrays[name], found, slots)
        if not misfits:
            leaves[name] = _read_leaf(arrays[name], found, slots, dtype)
        wrong += misfits
        wrong += [
            f"{twin} and {key} are one leaf, their numbers differ"
            for twin, key in copies.items()
            if not np.array_equal(slots[twin].read(), slots[key].read())
        ]
    extra = [key for key in slots if key not in used and not names.ignores(key)]
    report = LoadReport(missing=tuple(missing), extra=tuple(extra), wrong=tuple(wrong))
    return treedef.unflatten(leaves.values()), report


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


def _key(
    place: Place,
    slots: Mapping[str, Slot],
    names: NameMap,
    twins: Mapping[str, str],
) -> str | None:
    """Returns the tensor's name in the file, which may lack the model's prefix."""
    tried = [place.name, place.tied or twins.get(place.name)]
    both = (name for own in tried if own for name in (own, names.other_prefix(own)))
    return next((name for name in both if name in slots), None)


def _copies(keys: Mapping[Place, str], slots: Mapping[str, Slot]) -> dict[str, str]:
    """Returns the second copies of tied tensors, with the names of the first."""
    return {
        place.tied: key
        for place, key in keys.items()
        if place.tied in slots and place.tied not in (None, key)
    }


def _misfits(
    name: str, leaf: Shaped, keys: Mapping[Place, str], slots: Mapping[str, Slot]
) -> list[str]:
    """Returns in words where the tensors have another shape or type than the leaf."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    found = []
    for place, key in keys.items():
        slot, wanted = slots[key], place.shape(tuple(leaf.shape))
        scale = scale_beside(key, slots)
        if scale is not None:
            found.append(
                f"{key} is quantised, its scale is {scale}: load the model in full "
                "precision"
            )
        elif slot.shape != wanted:
            found.append(f"{key} is {list(slot.shape)}, {name!r} needs {list(wanted)}")
        elif floating != (slot.dtype in FLOATS):
            found.append(f"{key} is {slot.dtype}, {name!r} is {leaf.dtype}")
    return found


def _read_leaf(
    leaf: Shaped,
    keys: Mapping[Place, str],
    slots: Mapping[str, Slot],
    dtype: DTypeLike | None,
) -> jax.Array:
    own = jax.dtypes.canonicalize_dtype(_dtype(leaf, dtype))
    out = np.zeros(tuple(leaf.shape), own)
    for place, key in keys.items():
        tensor = narrowed(key, slots[key].read(), out.dtype, PeftError)
        layers.weight_in(place, tensor, out)
    sharding = getattr(leaf, "sharding", None)
    return jnp.asarray(out) if sharding is None else jax.device_put(out, sharding)


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
    leaf. The files appear whole or not at all.

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
    leaves, _ = flatten(params)
    arrays = {path: x for path, x in leaves.items() if is_shaped(x)}
    placed, nameless, wrong = _placed(arrays, names)
    wrong += [f"{path!r} is not an array" for path in leaves if path not in arrays]
    wrong += nameless
    tensors: dict[str, Pending] = {}
    shares: dict[str, dict[Cut, Pending]] = {}
    for path, places in zip(placed, untied(placed.values()), strict=True):
        own = _dtype(arrays[path], dtype)
        if own not in NAMES:
            wrong.append(f"{path!r} is {own}, which torch files do not have")
            continue
        for place in places:
            tensor = _pending(path, place, arrays[path], own)
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
    if wrong:
        raise PeftError(f"This model has no form in torch: {'; '.join(wrong)}.")
    about = _config_text(config)
    with replacing_files(pathlib.Path(directory), STEM, PeftError) as new:
        metadata = {"format": "pt"}
        write_tensors(new, STEM, tensors, metadata=metadata, max_bytes=max_shard_bytes)
        if about is not None:
            write_text(new / _CONFIG, about)


def _pending(path: str, place: Place, leaf: Shaped, dtype: np.dtype) -> Pending:
    def make() -> np.ndarray:
        own = narrowed(path, np.asarray(leaf), dtype, PeftError)
        return layers.weight_out(place, own)

    return Pending(dtype, place.shape(tuple(leaf.shape)), make)


def _beside(shares: Mapping[Cut, Pending]) -> Pending:
    """Returns the tensor that holds several leaves side by side."""
    axis = next(iter(shares)).axis
    parts = [shares[cut] for cut in sorted(shares)]
    return Pending(
        np.result_type(*(part.dtype for part in parts)),
        parts[0].shape,
        lambda: np.concatenate([part.make() for part in parts], axis),
    )


def _config_text(config: Mapping[str, Any] | Path | None) -> str | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return json.dumps(config, indent=2) + "\n"
    with reading(config, PeftError) as file:
        return file.read().decode()
