"""Adapters of any format: detect the format, read and write."""

import json
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np

from . import checkpoint
from ._io import adapter_file, tensors
from ._io.disk import Json, Path, read_json, reading, told
from ._io.models import is_orbax_tree, open_model
from ._io.shards import open_tensors
from ._tables import listed
from .errors import CheckpointError, PeftError
from .factors import Axes, Factors, Spec, Trainable

if TYPE_CHECKING:
    from .peft import NameMap

Format = Literal["file", "peft", "orbax", "model"]


def detect(path: Path) -> Format:
    """Returns the format of what is at `path`.

    `"file"` is an adapter that `jlora.save` wrote. `"peft"` is a directory of Hugging
    Face PEFT. `"orbax"` is a directory of `checkpoint.save`. `"model"` is the whole
    parameters of a model, as safetensors or Orbax.

    Args:
      path: a file or a directory.

    Raises:
      CheckpointError: if there is nothing at `path`, or no format that jlora knows.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     jlora.export.safetensors(file, {"w": np.ones(2)})
      ...     detect(file)
      'model'
    """
    place = pathlib.Path(path)
    if not os.path.isdir(path):
        with reading(path) as file:
            header = tensors.read_header(file)
        return "file" if adapter_file.is_adapter(header.metadata) else "model"
    with told(f"{str(path)!r} cannot be read"):
        if (place / "adapter_config.json").exists():
            return "peft"
        steps = [step for step in place.iterdir() if step.name.isdecimal()]
        if any((step / "about").is_dir() for step in steps):
            return "orbax"
        if is_orbax_tree(place) or any(place.glob("*.safetensors*")):
            return "model"
    raise CheckpointError(
        f"{str(path)!r} holds neither an adapter nor a model: there is no "
        "adapter_config.json (PEFT), and there are no steps of jlora.checkpoint, no "
        "safetensors and no Orbax parameters."
    )


def read(
    path: Path,
    *,
    base: Path | None = None,
    names: "NameMap | None" = None,
    tied: bool | None = None,
    step: int | None = None,
) -> Trainable:
    """Returns the adapter at `path`, of any format.

    Args:
      path: see `detect`.
      base: for PEFT: the model on disk that the adapter is for, see
        `export.merge_files`. The adapter then has the paths of the model. Without
        `base` it keeps torch's axes and names, as
        `model.layers.0.self_attn.q_proj.weight`.
      names: for PEFT with `base`: see `jlora.peft.load`.
      tied: for PEFT with `base`: see `jlora.peft.load`.
      step: for Orbax: the step to read; None is the newest.

    Raises:
      JloraError: if the adapter cannot be read, or if `path` is a model.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "adapter.safetensors")
      ...     jlora.save(file, jlora.Trainable(full={"head": np.ones(2, np.float32)}))
      ...     read(file).full["head"]
      Array([1., 1.], dtype=float32)
    """
    match detect(path):
        case "file":
            return adapter_file.load(path)
        case "orbax":
            return checkpoint.restore(path, step=step).trainable
        case "peft" if base is not None:
            from . import peft

            return peft.load(path, open_model(base).arrays(), names=names, tied=tied)
        case "peft":
            return _in_torch_names(pathlib.Path(path))
    raise CheckpointError(
        f"{str(path)!r} is a model, not an adapter. `jlora extract` makes an adapter "
        "from a fine-tuned model and its base."
    )


def write(path: Path, trainable: Trainable, format: Format, **options: Any) -> None:
    """Writes an adapter in the given format.

    Args:
      path: the file or directory.
      trainable: the adapter.
      format: `"file"`, `"orbax"` or `"peft"`, see `detect`.
      **options: for PEFT see `jlora.peft.save`, for Orbax `jlora.checkpoint.save`.

    Raises:
      JloraError: if the adapter cannot be written in that format.

    Examples:
      >>> import os, tempfile, numpy as np, jlora
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "adapter.safetensors")
      ...     write(file, jlora.Trainable(full={"head": np.ones(2)}), "file")
      ...     detect(file)
      'file'
    """
    match format:
        case "file":
            adapter_file.save(path, trainable)
        case "orbax":
            checkpoint.save(path, trainable, **options)
        case "peft":
            from . import peft

            peft.save(path, trainable, **options)
        case _:
            raise CheckpointError(
                f"format must be file, orbax or peft, got {format!r}."
            )


def describe(path: Path, *, step: int | None = None) -> Json:
    """Returns what is stored with the adapter at `path` besides its leaves, as JSON.

    For PEFT this is its config. For Orbax it is the step, config, metrics, position and
    metadata. For other formats it is empty.

    Args:
      path: see `detect`.
      step: for Orbax: the step to read; None is the newest.

    Raises:
      CheckpointError: if the adapter cannot be read.

    Examples:
      >>> import tempfile, numpy as np, jlora
      >>> adapter = jlora.Trainable(full={"head/kernel": np.ones((2, 3), np.float32)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, adapter, base_model="tiny")
      ...     describe(folder)["base_model_name_or_path"]
      'tiny'
    """
    match detect(path):
        case "peft":
            return read_json(pathlib.Path(path) / "adapter_config.json")
        case "orbax":
            read = checkpoint.restore(path, step=step)
            config = read.config and json.loads(read.config.to_json())
            told = {
                "step": read.step,
                "metrics": read.metrics,
                "position": read.position,
                "metadata": read.metadata,
                "config": config,
            }
            return {name: value for name, value in told.items() if value is not None}
    return {}


def _in_torch_names(folder: pathlib.Path) -> Trainable:
    """Returns a PEFT adapter under torch's own names and axes, without a model.

    It reads what can be understood without the model: linear layers, Conv1D,
    convolutions, embeddings, DoRA of linear layers, and modules saved whole.
    """
    from .peft.config import CONFIG, PREFIX, STEM, parse_config, pattern_lookup
    from .peft.layers import ENDS, MAGNITUDE

    fields = read_json(folder / CONFIG, PeftError)
    config, wrong = parse_config(fields)
    slots, _ = open_tensors(folder, STEM, fault=PeftError)
    transposed = bool(fields.get("fan_in_fan_out"))
    ranks, alphas = map(pattern_lookup, (config.rank_pattern, config.alpha_pattern))
    lora: dict[str, Factors] = {}
    left = dict(slots)
    if config.parameters or config.tokens:
        wrong.append("it adapts parameters or token rows")
    pairs = [
        (name.removesuffix(f".{a}"), op, a, b)
        for name in slots
        for op, (a, b) in ENDS.items()
        if name.endswith(f".{a}") and f"{name.removesuffix(a)}{b}" in slots
    ]
    for stem, op, *ends in pairs:
        module = stem.removeprefix(PREFIX)
        a, b = (left.pop(f"{stem}.{end}").read() for end in ends)
        magnitude = left.pop(f"{stem}.{MAGNITUDE}", None)
        magnitude = magnitude or left.pop(f"{stem}.{MAGNITUDE}.weight", None)
        if min(a.ndim, b.ndim) < 2:
            wrong.append(f"{module} has factors of {a.ndim} and {b.ndim} axes")
            continue
        if op == "embedding" and magnitude is not None:
            wrong.append(f"{module} is an embedding with a magnitude")
        rank, alpha = ranks(module), alphas(module)
        said = rank[1] if rank else config.r
        if said != a.shape[0]:
            wrong.append(f"{module} has rank {a.shape[0]}, but its config says {said}")
        inputs = tuple(range(1, a.ndim))
        in_first = transposed or op == "embedding"
        spec = Spec(
            op=op if a.ndim == 2 else "conv",
            axes=Axes((), (0,), (1,)) if in_first else Axes((), inputs, (0,)),
            rank=a.shape[0],
            alpha=alpha[1] if alpha else config.alpha,
            rslora=config.rslora,
            method="lora" if magnitude is None else "dora",
        )
        lora[f"{module}.weight"] = Factors(
            jnp.asarray(np.moveaxis(a, 0, -1)),
            jnp.asarray(b.reshape(b.shape[0], math.prod(b.shape[1:])).T),
            spec,
            None if magnitude is None else jnp.asarray(magnitude.read().reshape(-1)),
        )
    whole = [n for n in left if ".lora_" not in n and n.startswith(PREFIX)]
    full = {n.removeprefix(PREFIX): jnp.asarray(left.pop(n).read()) for n in whole}
    wrong += [f"tensor {name!r}" for name in left]
    if wrong:
        raise CheckpointError(
            f"{str(folder)!r} cannot be read without its model: {listed(wrong, 5)}. "
            "Pass base=, the model on disk."
        )
    return Trainable(lora, full)
