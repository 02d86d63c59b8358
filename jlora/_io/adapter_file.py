"""An adapter in one file: safetensors, with its settings in the header."""

import hashlib
import json
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from .._checks import check_known
from .._numerics import not_finite
from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError, TreeError
from ..factors import Trainable
from . import tensors as tensors
from .describe import arrays, check_whole, check_width, describe, rebuild
from .disk import Json, Path, reading
from .processes import first_writes, on_host

FORMAT = "jlora"
_VERSION = "1"
_KEYS = {"format", "version", "adapter", "sha256"}


def save(path: Path, trainable: Trainable) -> None:
    """Writes an adapter to one file, which `load` needs nothing else to read.

    The file is in the safetensors format: each array under its path and name
    (`blocks/0/q/kernel.a`), the settings and a checksum in the header. No pickle. It is
    written whole or not at all: a save that fails or is killed leaves the file that
    was there. In a program of several processes all call it, and the first one writes.

    Args:
      path: the file; its directory must exist.
      trainable: the adapter.

    Raises:
      CheckpointError: if an array holds NaN or infinity, the adapter is one that `load`
        would refuse, or the file cannot be written.
      TreeError: if `trainable` is not a `Trainable`.

    Examples:
      >>> import os, tempfile, jax.numpy as jnp, jlora
      >>> adapter = jlora.Trainable(full={"head": jnp.arange(3.0)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "adapter.safetensors")
      ...     jlora.save(file, adapter)
      ...     jlora.load(file).full["head"]
      Array([0., 1., 2.], dtype=float32)

    References:
      https://huggingface.co/docs/safetensors
    """
    if not isinstance(trainable, Trainable):
        raise TreeError(
            f"jlora.save writes a jlora.Trainable, got {type(trainable).__name__}. "
            "Take it from jlora.split; export.safetensors writes whole models."
        )
    check_known("save", trainable)
    trainable = on_host(trainable)
    check_whole(trainable)
    names = {f"{path}.{leaf}": x for _, path, leaf, x in arrays(trainable)}
    named = dict(zip(names, jax.device_get(list(names.values())), strict=True))
    named = {name: np.asarray(x) for name, x in named.items()}
    bad = not_finite(named)
    if bad:
        raise CheckpointError(f"Not saved: NaN or infinity in {listed(bad, 5, ', ')}.")
    adapter = json.dumps(describe(trainable), ensure_ascii=False)
    metadata = {
        "format": FORMAT,
        "version": _VERSION,
        "adapter": adapter,
        "sha256": _checksum(adapter, named.items()),
    }
    with first_writes() as first:
        if first:
            tensors.write(
                path, named, lambda name: [tensors.raw(named[name])], metadata
            )


def load(path: Path) -> Trainable:
    """Returns the adapter that `save` wrote, bit for bit.

    All of the file is checked first: length, header, checksum, settings, and that the
    settings and the arrays fit together. Nothing in it is executed.

    Args:
      path: the file.

    Raises:
      CheckpointError: if there is no such file, it is damaged, of another format, or
        holds NaN or infinity.

    Examples:
      >>> load("there is none")
      Traceback (most recent call last):
      jlora.errors.CheckpointError: 'there is none' cannot be read: No such file or
      directory.
    """
    with reading(path) as file:
        header = tensors.read_header(file)
        about = _about(header.metadata)
        named = {k: tensors.read(file, x) for k, x in header.tensors.items()}
        checksum = _checksum(header.metadata["adapter"], named.items())
        if header.metadata["sha256"] != checksum:
            raise CheckpointError("Its checksum does not match: it is damaged.")
        return _trainable(about, named)


def is_adapter(metadata: Mapping[str, str]) -> bool:
    """Returns whether a safetensors header is that of an adapter in one file."""
    return metadata.get("format") == FORMAT


def _about(metadata: Mapping[str, str]) -> Json:
    if not is_adapter(metadata):
        raise CheckpointError(
            "It is a safetensors file, but not an adapter of jlora.save. Is it a "
            "model, or the adapter_model.safetensors of a PEFT directory "
            "(jlora.peft.load)?"
        )
    if metadata.get("version") != _VERSION or metadata.keys() != _KEYS:
        raise CheckpointError(
            f"It is of version {metadata.get('version')!r:.40} of the format; this "
            f"jlora reads version {_VERSION!r}."
        )
    try:
        return parse_json(metadata["adapter"])
    except ValueError as error:
        raise CheckpointError(f"Its settings are not JSON: {error}.") from error


def _trainable(about: Json, named: dict[str, np.ndarray]) -> Trainable:
    bad = not_finite(named)
    if bad:
        raise CheckpointError(f"NaN or infinity in {listed(bad, 5, ', ')}.")
    check_width({name: x.dtype for name, x in named.items()})
    placed = jax.device_put(list(named.values()))
    found = {}
    for name, x in zip(named, placed, strict=True):
        path, _, leaf = name.rpartition(".")
        found[path, leaf] = x
    return rebuild(about, found)


def _checksum(adapter: str, named: Iterable[tuple[str, np.ndarray]]) -> str:
    """Returns SHA-256 over settings, names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(adapter.encode())
    for name, x in sorted(named):
        digest.update(f"\n{name}\n{x.dtype.name} {x.shape}\n".encode())
        digest.update(tensors.raw(x))
    return digest.hexdigest()
