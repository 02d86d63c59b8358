"""Adapters and models of any format: detect the format, read and write."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from . import checkpoint
from ._io import adapter_file, tensors
from ._io.disk import Json, Path, reading, told
from ._io.models import is_orbax_tree, nested, open_model
from ._io.paired import places
from ._io.placing import Quantize, encoders_for, placed
from ._io.torch_models import facts_of
from ._io.torch_quantised import tell_widened
from ._plan.plan import Plan
from ._tables import listed
from .errors import CheckpointError
from .factors import PyTree, Trainable
from .paths import flatten
from .quantised import is_quantized

if TYPE_CHECKING:
    from .peft import ExpertLayout, NameMap

Format = Literal["file", "peft", "orbax", "model"]


def detect(path: Path) -> Format:
    """Returns the format of what is at `path`.

    `"file"` is an adapter that `jlora.save` wrote. `"peft"` is a directory of Hugging
    Face PEFT, or what `jlora.peft.load` reads of other tools. `"orbax"` is a directory
    of `checkpoint.save`. `"model"` is the whole parameters of a model, as safetensors
    or Orbax.

    Args:
      path: a file or a directory.

    Raises:
      CheckpointError: if there is nothing at `path`, or no format that jlora knows.
      PeftError: for an adapter of a tool that jlora does not read.

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
        if adapter_file.is_adapter(header.metadata):
            return "file"
        return "peft" if _is_of_another_tool(place) else "model"
    with told(f"{str(path)!r} cannot be read"):
        if any(file.exists() for file in places(place, "adapter_config.json")):
            return "peft"
        steps = [step for step in place.iterdir() if step.name.isdecimal()]
        if any((step / "about").is_dir() for step in steps):
            return "orbax"
        if is_orbax_tree(place):
            return "model"
        if any(place.glob("[!.]*.safetensors*")):
            return "peft" if _is_of_another_tool(place) else "model"
    raise CheckpointError(
        f"{str(path)!r} holds neither an adapter nor a model: there is no "
        "adapter_config.json (PEFT), and there are no steps of jlora.checkpoint, no "
        "safetensors and no Orbax parameters."
    )


def _is_of_another_tool(place: pathlib.Path) -> bool:
    """Returns whether a place holds an adapter of MLX, kohya's scripts or diffusers.

    Raises:
      PeftError: for an adapter of a tool that jlora does not read.
    """
    from .peft._dialects import dialect_of

    return dialect_of(place) is not None


def read(
    path: Path,
    *,
    base: Path | None = None,
    names: "NameMap | None" = None,
    tied: bool | None = None,
    step: int | None = None,
    layout: "ExpertLayout | str | None" = None,
    component: str | None = None,
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
      layout: for PEFT: how the file keeps experts, see `jlora.peft.load`.
      component: for kohya's scripts and diffusers: which model's adapter, see
        `jlora.peft.load`.

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
        case "peft":
            return _read_peft(path, base, names, tied, layout, component)
    raise CheckpointError(
        f"{str(path)!r} is a model, not an adapter. `jlora extract` makes an adapter "
        "from a fine-tuned model and its base."
    )


def read_params(
    path: Path,
    params: PyTree = None,
    *,
    quantize: Quantize = None,
    plan: Plan | None = None,
) -> PyTree:
    """Returns the parameters of the model at `path`, leaf by leaf.

    Beside the result no more than one leaf is in memory: with `quantize`, never the
    dense model. Leaves have the names that `export.safetensors` and `export.orbax` give
    them; for a model of Hugging Face see `jlora.peft.load_base`.

    Args:
      path: safetensors, one file or a directory with its shards, or Orbax.
      params: the tree that the leaves shall have, of arrays or
        `jax.ShapeDtypeStruct`s; a leaf that has a sharding is put there. None gives
        nested dicts.
      quantize: a kind, such as `"nf4"`, or a mapping of options of `jlora.quantize`,
        such as `{"kind": "nf4", "double": True}`: weights are quantised as they come.
      plan: with `quantize`: which leaves, and along which axes.

    Raises:
      CheckpointError: if there is no model, it is damaged, or quantised in a format
        that jlora does not read; lists all leaves that are missing, extra or misshapen.
      ConfigError: for `quantize` or `plan`, see `jlora.quantize`.
      TreeError: for `quantize` or `plan`, see `jlora.quantize`.

    Warns:
      UserWarning: names quantised leaves that were widened, as `Quantized` does not
        have their blocks.

    Examples:
      >>> import os, tempfile, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.ones((128, 4)), "bias": jnp.zeros(4)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     jlora.export.safetensors(file, params)
      ...     read_params(file, quantize="nf4")["up"]["kernel"]
      Quantized(nf4 of float32[128,4], blocks (64, 1), 288 bytes)
    """
    model = open_model(path)
    unreadable = model.unreadable()
    if unreadable:
        raise CheckpointError(f"{str(path)!r}: {listed(unreadable, 3)}.")
    if params is None:
        wanted, unflatten = model.shapes, None
    else:
        wanted, treedef = flatten(params)
        unflatten = treedef.unflatten
        _check_leaves(path, model.shapes, wanted)
    encoders = encoders_for(model.shapes if params is None else wanted, plan, quantize)
    tell_widened(model.widened, "They are dense in the result")
    leaves = {}
    for name, like in wanted.items():
        x = model.read(name)
        encoder = None if is_quantized(x) else encoders.get(name)
        leaves[name] = placed(name, x, like, encoder)
    return nested(leaves) if unflatten is None else unflatten(leaves.values())


def _check_leaves(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raises a CheckpointError that lists which leaves of a model are not as wanted."""
    wrong = [f"{name!r} is missing" for name in wanted if name not in found]
    wrong += [f"{name!r} is extra" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        own = [(tuple(x.shape), x.dtype) for x in (found[name], wanted[name])]
        if own[0] != own[1]:
            one, other = (f"{dtype}{list(shape)}" for shape, dtype in own)
            wrong.append(f"{name!r} is {one}, not {other}")
    if wrong:
        raise CheckpointError(
            f"The model in {str(path)!r} is not the one asked for: {listed(wrong)}."
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

    For PEFT this is its config, for files of another tool the `tool`. For Orbax it is
    the step, config, metrics, position and metadata. For other formats it is empty.

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
            from .peft._dialects import dialect_of
            from .peft._load import open_adapter

            found = dialect_of(pathlib.Path(path))
            if found is not None:
                return {"tool": found.dialect.tool}
            return open_adapter(pathlib.Path(path), CheckpointError)[0]
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


def _read_peft(
    path: Path,
    base: Path | None,
    names: "NameMap | None",
    tied: bool | None,
    layout: "ExpertLayout | str | None",
    component: str | None,
) -> Trainable:
    """Returns a PEFT adapter with the paths of its base, or torch's without one."""
    from .peft import report
    from .peft._leaves import leaves_of
    from .peft._load import read_adapter

    leaves = None if base is None else leaves_of(open_model(base).arrays())
    facts = None if base is None else facts_of(base)
    trainable, found = read_adapter(
        path,
        leaves,
        names=names,
        tied=tied,
        facts=facts,
        layout=layout,
        component=component,
    )
    report.check(found, f"The adapter in {str(path)!r}")
    return trainable
