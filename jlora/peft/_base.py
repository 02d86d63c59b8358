"""Whole models as Hugging Face safetensors: `load_base` and `save_base`."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import paths
from .._io.disk import reading, replacing_files, write_text
from .._io.shards import Pending, Slot, open_tensors, write_tensors
from .._io.tensors import NAMES
from ..errors import PeftError
from . import layers
from .config import FLOATS
from .names import GENERIC, NameMap, Place, unnamed, untied
from .report import LoadReport

STEM = "model"
_CONFIG = "config.json"


def load_base(
    path: str | os.PathLike,
    params: Any,
    *,
    names: NameMap | None = None,
    dtype: Any = None,
    strict: bool = True,
) -> Any:
    """Returns the parameters of a model from Hugging Face safetensors, leaf by leaf.

    Beside the result no more than one leaf and its tensors are in memory.

    Args:
      path: a directory with `model.safetensors` or its shards, or such a file.
      params: the model's parameters, arrays or `jax.ShapeDtypeStruct`s; a leaf that has
        a sharding is put there.
      names: what the leaves are called in torch, see `jlora.peft.save`.
      dtype: type of all floating-point leaves; None means that of `params`.
      strict: False keeps leaves of `params` that the file lacks, takes what fits, and
        returns `(params, report)`.

    Raises:
      PeftError: if a file is missing or damaged; with `strict`, lists all tensors that
        are missing, extra or misshapen.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save_base(folder, params)
      ...     read = jlora.peft.load_base(folder, jax.eval_shape(lambda: params))
      >>> read["up"]["kernel"].tolist()
      [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    names = names or GENERIC
    leaves, treedef = paths.flatten(params)
    slots, _ = open_tensors(path, STEM, fault=PeftError)
    missing: list[str] = []
    wrong: list[str] = []
    placed: dict[str, tuple[Place, ...]] = {}
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            continue
        try:
            found = names.places(name, tuple(leaf.shape))
        except PeftError as error:
            wrong.append(str(error).rstrip("."))
            continue
        if not found:
            missing.append(unnamed(name, names))
        placed[name] = found
    aliases = {
        twin: place.name
        for places in placed.values()
        for place in places
        for twin in (place.tied,)
        if twin is not None
    }
    placed = dict(zip(placed, untied(placed.values()), strict=True))
    resolve = _resolver(slots, names, aliases)
    used: set[str] = set()
    out = dict(leaves)
    for name, found in placed.items():
        chosen = {place: resolve(place) for place in found}
        absent = [place.name for place, key in chosen.items() if key is None]
        if absent or not found:
            missing += [f"{key} for {name!r}" for key in absent]
            continue
        keys = {place: key for place, key in chosen.items() if key is not None}
        used |= set(keys.values())
        array = _read_leaf(name, leaves[name], keys, slots, dtype, wrong)
        for place, key in keys.items():
            twin = _twin(place, key, slots, names)
            if twin is not None:
                used.add(twin)
                if not np.array_equal(slots[twin].read(), slots[key].read()):
                    wrong.append(f"{twin} and {key} are one leaf, their numbers differ")
        if array is not None:
            out[name] = array
    extra = [key for key in slots if key not in used and not names.ignores(key)]
    report = LoadReport(missing=tuple(missing), extra=tuple(extra), wrong=tuple(wrong))
    tree = treedef.unflatten(out.values())
    if not strict:
        return tree, report
    if report:
        raise PeftError(
            f"The model in {str(path)!r} does not fit, {len(report)} findings:\n"
            f"{report}\nstrict=False takes what fits."
        )
    return tree


def _resolver(
    slots: Mapping[str, Slot], names: NameMap, aliases: Mapping[str, str]
) -> Callable[[Place], str | None]:
    def resolve(place: Place) -> str | None:
        """Returns the tensor's name in the file, which may lack the model's prefix."""
        tried = [place.name, names.other_prefix(place.name)]
        # A tied model has one tensor, whichever of its two names that bears.
        other = place.tied or aliases.get(place.name)
        if other is not None:
            tried += [other, names.other_prefix(other)]
        return next((name for name in tried if name in slots), None)

    return resolve


def _twin(
    place: Place, key: str, slots: Mapping[str, Slot], names: NameMap
) -> str | None:
    """Returns the name of a second copy of a tied tensor, if the file has one."""
    if place.tied is None or place.tied == key:
        return None
    return place.tied if place.tied in slots else None


def _read_leaf(
    name: str,
    leaf: Any,
    keys: Mapping[Place, str],
    slots: Mapping[str, Slot],
    dtype: Any,
    wrong: list[str],
) -> Any:
    shape = tuple(leaf.shape)
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    wanted = np.dtype(dtype) if dtype is not None and floating else leaf.dtype
    before = len(wrong)
    for place, key in keys.items():
        slot = slots[key]
        if slot.shape != place.shape(shape):
            wrong.append(
                f"{key} is {list(slot.shape)}, "
                f"{name!r} needs {list(place.shape(shape))}"
            )
        elif floating != (slot.dtype in FLOATS):
            wrong.append(f"{key} is {slot.dtype}, {name!r} is {leaf.dtype}")
    if len(wrong) > before:
        return None
    out = np.zeros(shape, wanted)
    for place, key in keys.items():
        layers.weight_in(place, slots[key].read().astype(wanted), out)
    sharding = getattr(leaf, "sharding", None)
    return jnp.asarray(out) if sharding is None else jax.device_put(out, sharding)


def save_base(
    directory: str | os.PathLike,
    params: Any,
    *,
    names: NameMap | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    tied: bool = False,
    dtype: Any = None,
    max_shard_bytes: int | None = 5_000_000_000,
) -> None:
    """Writes a model, merged or not, as safetensors that `transformers` loads.

    One leaf at a time is turned and written, so memory is bounded by the largest leaf.
    The files appear whole or not at all.

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
      PeftError: lists every leaf without a name in torch.

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
    names = names or GENERIC
    leaves, _ = paths.flatten(params)
    tensors: dict[str, Pending] = {}
    wrong: list[str] = []
    placed: dict[str, tuple[Place, ...]] = {}
    for path, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            wrong.append(f"{path!r} is no array")
            continue
        try:
            placed[path] = names.places(path, tuple(leaf.shape))
        except PeftError as error:
            wrong.append(str(error).rstrip("."))
            continue
        if not placed[path]:
            wrong.append(unnamed(path, names))
    for path, found in zip(placed, untied(placed.values()), strict=True):
        leaf = leaves[path]
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        own = np.dtype(dtype if dtype is not None and floating else leaf.dtype)
        if own not in NAMES:
            wrong.append(f"{path!r} is {own}, which torch files do not have")
            continue
        for place in found:
            own_names = [place.name, *([place.tied] if tied and place.tied else [])]
            for name in own_names:
                if name in tensors:
                    wrong.append(f"two leaves are {name} in torch")
                tensors[name] = _pending(place, leaf, own)
    if wrong:
        raise PeftError("This model has no form in torch: " + "; ".join(wrong) + ".")
    directory = pathlib.Path(directory)
    about = _config_fields(config)
    with replacing_files(directory, f"{STEM}*.safetensors*", PeftError) as new:
        write_tensors(
            new, STEM, tensors, metadata={"format": "pt"}, max_bytes=max_shard_bytes
        )
        if about is not None:
            write_text(new / _CONFIG, about)


def _pending(place: Place, leaf: Any, dtype: np.dtype) -> Pending:
    def make() -> np.ndarray:
        return layers.weight_out(place, np.asarray(leaf).astype(dtype))

    return Pending(dtype, place.shape(tuple(leaf.shape)), make)


def _config_fields(config: Any) -> str | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return json.dumps(config, indent=2) + "\n"
    with reading(config, PeftError) as file:
        return file.read().decode()
