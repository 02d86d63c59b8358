"""`save` and `tensors`: an adapter as PEFT's files, or as its config and tensors."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from .._checks import check_known
from .._io import paired
from .._io.describe import check_whole
from .._io.disk import check_name, write_text
from .._io.folders import replacing_files
from .._io.processes import first_writes, on_host
from .._io.shards import pending, write_tensors
from .._io.torch_models import facts_of, is_torch_named
from .._tables import listed
from ..errors import PeftError
from ..factors import PyTree, Trainable
from ..paths import flatten
from ._dialects import WRITTEN, Dialect
from ._dialects_out import Written, in_dialect, with_others
from ._experts import ExpertLayout, layout_of
from ._servers import refused_by_vllm
from ._writing import Writing
from .config import (
    CONFIG,
    FLOATS,
    PREFIX,
    SIGNED,
    STEM,
    PeftConfig,
    config_fields,
    parse_config,
    signature,
)
from .names import GENERIC, NameMap

_HEADS = {  # modules that PEFT saves whole, by the task
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save(
    directory: str | os.PathLike[str],
    trainable: Trainable,
    *,
    names: NameMap | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    tied: bool | None = None,
    params: PyTree = None,
    portable: bool = False,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
    max_shard_bytes: int | None = None,
    dialect: str = "peft",
    component: str = "unet",
    add: bool = False,
) -> None:
    """Writes an adapter as `adapter_config.json` and `adapter_model.safetensors`.

    The files are those that Hugging Face PEFT writes for the torch model that `names`
    leads to. They appear whole or not at all: a save that is killed leaves the former
    adapter or the new one, and other files in `directory` stay. Methods that PEFT has
    in another form (AdaLoRA, VeRA) are written as the plain LoRA that computes the
    same. In a program of several processes all call it, and the first one writes.

    Args:
      directory: made if it does not exist.
      trainable: the adapter.
      names: what the leaves are called in torch, see `jlora.peft.maps`; None joins the
        components of each path by dots, with `weight` for a kernel or an embedding.
      base_model: what to write as the base model's name or path.
      task_type: what to write as the task, `"CAUSAL_LM"` or the like, which PEFT's
        `AutoPeftModel` classes need. None takes it from the `config.json` of
        `base_model`, where that is a directory.
      tied: whether an adapted embedding table is the output head too. Needed where
        `names` says that it may be, as the adapter does not tell.
      params: the base's parameters, `frozen` or whole; needed where single rows of a
        table are trained, as PEFT keeps the rows and jlora what is added to them.
      portable: write only what vLLM loads, and refuse the rest by name.
      dtype: float type to write in; None keeps that of each array.
      layout: how to write the experts of a mixture: `"peft"`, `"unsloth"`,
        `"per-expert"`, `"stacked"` or `"shared"`, or an `ExpertLayout`. None writes
        what `names` says, a parameter or a module for each.
      max_shard_bytes: split the tensors into files of at most so many bytes.
      dialect: whose files to write instead of PEFT's: `"mlx"` (`adapters.safetensors`
        and its config), `"kohya"` (`lora.safetensors`), `"kohya-sdxl"` (the same, with
        Stability's names for diffusers' modules of SDXL's U-Net) or `"diffusers"`
        (`pytorch_lora_weights.safetensors`). They have linear layers and DoRA; MLX has
        experts with `layout="stacked"`, the others have convolutions. `load` reads them
        back.
      component: what kohya's scripts and diffusers call the model in its pipeline:
        `"unet"`, `"transformer"`, `"te1"`, `"text_encoder"`.
      add: keep the adapters of the pipeline's other models that the file of kohya's
        scripts or of diffusers has. Without it the file is written anew.

    Raises:
      PeftError: lists every leaf without a name in torch, or that PEFT has no form for,
        and leaves whose shapes do not fit together.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.ones((4, 6))}}
      >>> fn = lambda p, x: x @ p["up"]["kernel"]
      >>> config = jlora.LoraConfig(rank=2)
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> _, adapter = jlora.split(jax.random.key(0), params, plan)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, adapter)
      ...     read = jlora.peft.load(folder, plan)
      >>> bool((read.lora["up/kernel"].a == adapter.lora["up/kernel"].a).all())
      True

    References:
      https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    check_name(directory, PeftError)
    other = _dialect(dialect, portable=portable, max_bytes=max_shard_bytes, add=add)
    check_known("peft.save", trainable, params)
    if isinstance(trainable, Trainable):  # else the next line says what came
        trainable = on_host(trainable)
    fields, named = _converted(
        trainable,
        names=names,
        base_model=base_model,
        task_type=task_type,
        tied=tied,
        params=params,
        portable=portable,
        dtype=dtype,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
    )
    if other is not None:
        inner = {name.removeprefix(PREFIX): x for name, x in named.items()}
        config, _ = parse_config(fields)
        written = in_dialect(other, inner, config, component)
        if add:
            written = with_others(other, pathlib.Path(directory), written, component)
        _write_other(pathlib.Path(directory), written)
        return
    text = json.dumps(fields, indent=2) + "\n"
    metadata = {"format": "pt", SIGNED: signature(fields), **paired.sum_of(text)}
    folder = pathlib.Path(directory)
    with first_writes(PeftError) as first:
        if not first:
            return
        with replacing_files(folder, STEM, PeftError, pair=CONFIG) as new:
            write_tensors(
                new,
                STEM,
                {name: pending(x) for name, x in named.items()},
                metadata=metadata,
                max_bytes=max_shard_bytes,
            )
            write_text(new / CONFIG, text)


def tensors(
    trainable: Trainable,
    *,
    names: NameMap | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    tied: bool | None = None,
    params: PyTree = None,
    portable: bool = False,
    dtype: DTypeLike | None = None,
    layout: ExpertLayout | str | None = None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Returns `(config, {name: array})`: what `save` writes, without files.

    The arrays stay on their devices, and the function works under `jax.jit`: a step
    compiles it once, however the numbers change. So the names and shapes follow from
    the shapes only. Where `save` leaves out what is zero (padding in a stack, parts of
    a fused leaf that are not adapted), the tensors have it; leaves that are one tensor
    in torch do not share A.

    Outside `jit` the numbers are checked as in `save`: it waits for them once, and
    compiles nothing again. Under `jit` there are none to check. NaN and infinity pass
    there, and what `dtype` does not hold becomes infinite.

    Args:
      trainable: the adapter.
      names: see `save`.
      base_model: see `save`.
      task_type: see `save`.
      tied: see `save`.
      params: see `save`.
      portable: see `save`.
      dtype: see `save`.
      layout: see `save`; `"shared"` needs the numbers, which are not looked at here.

    Returns:
      The fields of `adapter_config.json`, and arrays by PEFT's names. A jitted function
      returns only the arrays: `jax.jit(lambda t: jlora.peft.tensors(t)[1])`.

    Raises:
      PeftError: see `save`.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> a, b = jnp.ones((4, 2)), jnp.ones((2, 6))
      >>> own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=4))
      >>> adapter = jlora.Trainable({"up/kernel": own})
      >>> config, arrays = jlora.peft.tensors(adapter)
      >>> config["r"], {name: x.shape for name, x in arrays.items()}
      (2, {'base_model.model.up.lora_A.weight': (2, 4),
           'base_model.model.up.lora_B.weight': (6, 2)})
      >>> back = jlora.peft.from_tensors(config, arrays, {"up": {"kernel": a @ b}})
      >>> bool((back.lora["up/kernel"].a == a).all())
      True
    """
    return _converted(
        trainable,
        names=names,
        base_model=base_model,
        task_type=task_type,
        tied=tied,
        params=params,
        portable=portable,
        dtype=dtype,
        layout=layout,
        on_device=True,
    )


def _converted(
    trainable: Trainable,
    *,
    names: NameMap | None,
    base_model: str | None,
    task_type: str | None,
    tied: bool | None,
    params: PyTree,
    portable: bool,
    dtype: DTypeLike | None,
    layout: ExpertLayout | str | None,
    max_shard_bytes: int | None = None,
    on_device: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields of the config, and the arrays by name."""
    if not isinstance(trainable, Trainable):
        raise PeftError(
            f"trainable must be a jlora.Trainable, got {type(trainable).__name__}."
        )
    if dtype is not None and np.dtype(dtype) not in FLOATS:
        raise PeftError(f"dtype must be a float type that torch has, got {dtype!r}.")
    check_whole(trainable, PeftError)
    if (
        portable
        and names is None
        and not is_torch_named([*trainable.lora, *trainable.full])
    ):
        raise PeftError(
            "portable=True needs names=, the map that says what the model's modules "
            "are called in torch: vLLM silently ignores tensors of other names. See "
            "jlora.peft.maps."
        )
    leaves = flatten(params)[0]
    out = Writing(names or GENERIC, tied, leaves, dtype, on_device, layout_of(layout))
    config = out.write(trainable)
    task_type = _task(task_type, base_model, config)
    if names is not None and (task_type == "CAUSAL_LM" or _has_head(leaves, out)):
        _check_prefix(names.prefix, out.tensors)
    fields = config_fields(config, base_model=base_model, task_type=task_type)
    if portable:
        size = sum(x.nbytes for x in out.tensors.values())
        one_file = max_shard_bytes is None or size <= max_shard_bytes
        shapes = {name: x.shape for name, x in out.tensors.items()}
        wrong = [*refused_by_vllm(fields, config, shapes, one_file=one_file)]
        if wrong:
            raise PeftError(f"vLLM would reject: {'; '.join(wrong)}.")
    return fields, {PREFIX + name: x for name, x in out.tensors.items()}


def _dialect(
    name: str, *, portable: bool, max_bytes: int | None, add: bool
) -> Dialect | None:
    """Returns the dialect of a name, None for PEFT's own.

    Raises:
      PeftError: for another name, or arguments that only PEFT's files have.
    """
    known = {dialect.name: dialect for dialect in WRITTEN}
    if name not in ("peft", *known):
        raise PeftError(
            f"dialect must be one of peft, {', '.join(known)}, got {name!r:.50}."
        )
    if name != "peft" and (portable or max_bytes is not None):
        raise PeftError("portable= and max_shard_bytes= are only for PEFT's files.")
    found = known.get(name)
    if add and not (found and found.begin):
        raise PeftError(
            "add=True is for files of several models, of kohya's scripts and of "
            f"diffusers. A file of {name!r} has one: leave add out."
        )
    return found


def _write_other(folder: pathlib.Path, written: Written) -> None:
    """Writes the files of another tool."""
    stem, arrays, metadata, text = written
    named = {name: pending(x) for name, x in arrays.items()}
    pair = {} if text is None else {"pair": CONFIG}
    if text is not None:
        metadata = metadata | paired.sum_of(text)
    with first_writes(PeftError) as first:
        if not first:
            return
        with replacing_files(folder, stem, PeftError, **pair) as new:
            write_tensors(new, stem, named, metadata=metadata, max_bytes=None)
            if text is not None:
                write_text(new / CONFIG, text)


def _has_head(leaves: Iterable[str], out: Writing) -> bool:
    """Returns whether the model, or what is written, has an output head of its own."""
    names = [*leaves, *(name.replace(".", "/") for name in out.tensors)]
    return any("lm_head" in name.split("/") for name in names)


def _check_prefix(prefix: str, tensors: Iterable[str]) -> None:
    """Raises a PeftError for names that a model with a head does not have.

    PEFT and vLLM would leave these tensors out, and answer as the base does.
    """
    beside = ("lm_head.", "score.", "classifier.")
    bare = [n for n in tensors if not n.startswith((prefix, *beside))]
    if bare:
        raise PeftError(
            f"A model with a head calls its layers {prefix}*, but these would be "
            f"written without {prefix!r}, and PEFT and vLLM would leave them out: "
            f"{listed(bare, 3)}. Give the parameters below {prefix.rstrip('.')!r}, "
            "beside the head, or a NameMap whose torch names begin so."
        )


def _task(task: str | None, base_model: str | None, config: PeftConfig) -> str | None:
    """Returns what the config says of the task: `task`, or what the base is for.

    For some tasks PEFT wants the head to be in the file; such a task is not assumed.
    """
    if task is not None or base_model is None:
        return task
    found = facts_of(base_model, inside=True).task
    heads = _HEADS.get(found or "", ())
    there = any(module.endswith(heads) for module in config.saved)
    return found if not heads or there else None
