"""Commands that write: merge, quantize, convert, extract."""

import dataclasses
import os
import pathlib
from typing import Any, Unpack

import click

from .. import export, files
from .._io.clash import clash
from .._io.disk import Json
from .._io.models import open_model
from .._io.torch_models import (
    facts_of,
    has_config,
    is_torch_named,
    names_in_classes,
    tie_of,
)
from ..config import LoraConfig
from ..errors import CheckpointError
from ..factors import Trainable
from ..quantised import is_quantized
from . import _options as options
from ._inputs import config_of, layout_by_text, name_map, planned, read
from ._output import bar, counts, done


@click.command(epilog="Example: jlora merge llama adapter merged")
@click.argument("base", metavar="MODEL", type=options.PATH)
@click.argument("adapter", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option(
    "--shard-size",
    type=options.SIZE,
    help="Most bytes of a file in a directory; 5GB if absent.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="In a file: write a quantised model as codes again.",
)
@options.how("step", "names", "tied", "layout", "component")
@options.overwrite
@options.as_json
def merge(
    base: str,
    adapter: str,
    out: str,
    shard_size: int | None,
    requantize: bool,
    overwrite: bool,
    as_json: bool,
    **how: Unpack[options.How],
) -> None:
    """Write MODEL with ADAPTER merged to OUT.

    If MODEL is a directory with config.json, OUT is one that transformers and servers
    open: config, tokenizer and whatever else MODEL has, and the tensors in shards. For
    any other MODEL, or if the name of OUT ends in .safetensors, OUT is one file.

    Leaf by leaf: memory is bounded by a few times the largest leaf. A PEFT adapter
    merges into a model of Hugging Face as it is, and by --names into one with Flax's
    names. A quantised MODEL becomes dense.
    """
    one_file = out.endswith(".safetensors") or not has_config(base)
    if requantize and not one_file:
        raise click.UsageError(
            f"--requantize: servers do not read jlora's codes. Write {out}.safetensors."
        )
    if shard_size is not None and one_file:
        raise click.UsageError(
            "--shard-size is for a directory, which needs a MODEL with config.json and "
            "an OUT that does not end in .safetensors."
        )
    _check_free(out, overwrite, base, adapter)
    _check_model(base)
    trainable = read(adapter, base=base, **how)
    fields: Json = {"out": out, **counts(trainable)}
    if one_file:
        export.merge_files(
            base, trainable, out, requantize=requantize, progress=bar("merging")
        )
        sizes = [os.path.getsize(out)]
    else:
        export.merge_directory(
            base,
            trainable,
            out,
            overwrite=overwrite,
            progress=bar("merging"),
            **({} if shard_size is None else {"max_shard_bytes": shard_size}),
        )
        sizes = [x.stat().st_size for x in pathlib.Path(out).glob("*.safetensors")]
        fields["files"] = len(sizes)
    done({**fields, "bytes": sum(sizes)}, as_json)


@click.command(epilog="Example: jlora quantize base.safetensors small.safetensors")
@click.argument("base", metavar="MODEL", type=options.PATH)
@click.argument("out", type=options.PATH)
@options.scheme
@click.option(
    "--plan", "model", metavar="PACKAGE.MODULE:ATTRIBUTE", help="See `jlora plan`."
)
@options.overwrite
@options.as_json
def quantize(
    base: str,
    out: str,
    model: str | None,
    overwrite: bool,
    as_json: bool,
    **scheme: Unpack[options.Scheme],
) -> None:
    """Write MODEL with codes and scales for its weights to the safetensors file OUT.

    Leaf by leaf: memory is bounded by a few times the largest leaf. Whatever reads
    models reads OUT: merge, validate, diff, and the library. With --plan the model's
    function says which weights are those of linear operations, and along which axes.
    """
    _check_free(out, overwrite, base)
    _check_model(base)
    plan = None if model is None else planned(model, {"config": None})
    own: Json = {**scheme, "targets": scheme.get("targets") or None}
    export.quantize_files(base, out, plan, **own, progress=bar("quantising"))
    shapes = open_model(out).shapes.values()
    fields = {
        "quantised": sum(map(is_quantized, shapes)),
        "dense": sum(not is_quantized(x) for x in shapes),
        "bytes": os.path.getsize(out),
    }
    done({"out": out, **fields}, as_json)


@click.command(
    epilog="Example: jlora convert run peft --to peft --base-model me/my-model"
)
@click.argument("source", metavar="ADAPTER", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option(
    "--to",
    type=click.Choice(["file", "orbax", "peft"]),
    help="The format of OUT; file for *.safetensors.",
)
@options.how("step", "base", "names", "tied", "layout", "component")
@options.to_layout
@click.option("--base-model", help="PEFT's base_model_name_or_path.")
@click.option("--task-type", help="PEFT's task_type, such as CAUSAL_LM.")
@click.option("--portable", is_flag=True, help="Write only what vLLM loads.")
@click.option(
    "--dialect",
    type=click.Choice(["mlx", "kohya", "kohya-sdxl", "diffusers"]),
    help="Whose files to write in place of PEFT's.",
)
@click.option(
    "--to-component", help="To kohya or diffusers: whose adapter it is; unet if absent."
)
@click.option(
    "--add", is_flag=True, help="Keep what OUT has of the pipeline's other models."
)
@options.overwrite
@options.as_json
def convert(
    source: str,
    out: str,
    to: files.Format | None,
    base: str | None,
    base_model: str | None,
    task_type: str | None,
    portable: bool,
    dialect: str | None,
    to_component: str | None,
    to_layout: str | None,
    add: bool,
    overwrite: bool,
    as_json: bool,
    **how: Unpack[options.How],
) -> None:
    """Write ADAPTER in another format: PEFT, Orbax or one file.

    Adapters of MLX, kohya's scripts and diffusers are read as PEFT's, and written with
    --dialect. Of a file for several models, --component says which one's is read. From
    PEFT, --base says which model it is for; to PEFT, --names what its
    modules are called there, and --base gives the table whose single rows are trained.
    A mixture's experts go from --layout to --to-layout.
    """
    kind = files.detect(source)
    to = to or ("file" if out.endswith(".safetensors") else None)
    if to is None:
        raise click.UsageError("Say --to file, orbax or peft.")
    names, tied = how.get("names"), how.get("tied")
    if kind == "peft" and base is None:
        raise click.UsageError("From PEFT, give --base, the model it is for.")
    reading = {"--base": base, "--names": names, "--tied": tied}
    writing = {
        "--base-model": base_model,
        "--task-type": task_type,
        "--portable": portable or None,
        "--dialect": dialect,
        "--to-layout": to_layout,
        "--to-component": to_component,
        "--add": add or None,
    }
    if to != "peft":
        idle = writing if kind == "peft" else {**reading, **writing}
        given = [name for name, value in idle.items() if value is not None]
        if given:
            raise click.UsageError(f"{', '.join(given)}: only for PEFT.")
    _check_free(out, overwrite or add, source, base)
    if to == "orbax":
        _check_steps(out)
    more: Json = {"overwrite": overwrite} if to == "orbax" else {}
    if to == "peft":
        more = {
            "names": name_map(names),
            "base_model": base_model,
            "portable": portable,
            "task_type": task_type,
            "dialect": dialect or "peft",
            "component": to_component or "unet",
            "add": add,
            **_about_base(base, tied, to_layout),
        }
    trainable = read(source, base=base, **how)
    if to == "peft" and base and names is None:
        trainable = _as_loaded(trainable, base)
    files.write(out, trainable, to, **more)
    done({"out": out, "from": kind, "to": to, **counts(trainable)}, as_json)


@click.command(
    epilog="Example: jlora extract tuned.safetensors base.safetensors new.safetensors"
)
@click.argument("tuned", type=options.PATH)
@click.argument("base", type=options.PATH)
@click.argument("out", type=options.PATH)
@click.option(
    "--plan", "model", metavar="PACKAGE.MODULE:ATTRIBUTE", help="See `jlora plan`."
)
@options.config
@options.overwrite
@options.as_json
def extract(
    tuned: str,
    base: str,
    out: str,
    model: str | None,
    overwrite: bool,
    as_json: bool,
    **config: Any,
) -> None:
    """Write the adapter nearest to the change from model BASE to TUNED to file OUT.

    With --plan the model's function says what is adapted; without it, every matrix is,
    taken as [fan-in, fan-out].
    """
    _check_free(out, overwrite, tuned, base, config["config"])
    if model is not None:
        found = planned(model, config)
    else:
        found = export.flat_plan(base, config_of(config) or LoraConfig())
    trainable = export.extract_files(tuned, base, found, progress=bar("extracting"))
    files.write(out, trainable, "file")
    done({"out": out, **counts(trainable)}, as_json)


def _about_base(base: str | None, tied: bool | None, to_layout: str | None) -> Json:
    """Returns options of `peft.save` that a base tells, where the user did not."""
    layout = layout_by_text("--to-layout", to_layout)
    if base is None:
        return {"tied": tied, "layout": layout}
    model, facts = open_model(base), facts_of(base)
    if layout is not None and layout.interleaved is None:
        layout = dataclasses.replace(layout, interleaved=facts.interleaved)
    tied = tie_of([*model.shapes], facts) if tied is None else tied
    return {"tied": tied, "layout": layout, "params": model.arrays()}


def _as_loaded(trainable: Trainable, base: str) -> Trainable:
    """Returns the adapter with the names that the base's class has for its modules.

    Some files of whole models lack the prefix of the body.
    """
    if not is_torch_named([*trainable.lora, *trainable.full]):
        return trainable
    rename = names_in_classes(open_model(base).shapes, facts_of(base))
    lora = {rename(name): factors for name, factors in trainable.lora.items()}
    full = {rename(name): leaf for name, leaf in trainable.full.items()}
    return Trainable(lora, full)


def _check_model(path: str) -> None:
    """Raises a CheckpointError for an adapter in the place of a model."""
    kind = files.detect(path)
    if kind != "model":
        raise CheckpointError(f"{path!r} is an adapter ({kind}): give its model.")


def _check_free(out: str, overwrite: bool, *inputs: str | None) -> None:
    """Raises a UsageError if something would be replaced, above all an input."""
    found = clash(out, [path for path in inputs if path is not None])
    if found:
        raise click.UsageError(f"{found}. Give another name.")
    if os.path.lexists(out) and not overwrite:
        raise click.UsageError(
            f"{out!r} is already there. Say --overwrite to replace it."
        )


def _check_steps(out: str) -> None:
    """Raises a UsageError if steps would hide the one that is written, step 0."""
    names = os.listdir(out) if os.path.isdir(out) else []
    others = [name for name in names if name.isdecimal() and int(name)]
    if others:
        raise click.UsageError(
            f"{out!r} holds steps {', '.join(sorted(others, key=int))}, which would be "
            "newer than what is written. Give another directory."
        )
