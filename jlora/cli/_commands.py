"""The `jlora` command: inspect, plan, merge, convert, diff, extract, validate.

A thin layer: each command calls the functions of the same name. Exit code 0 means fine,
1 that a problem was found, 2 a wrong call.
"""

import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click
import jax

from .. import export, files, inspection
from .._core.tree import check
from .._io.fingerprint import fingerprint
from .._io.models import open_model
from .._tables import table
from ..config import LoraConfig
from ..errors import JloraError
from ..factors import Trainable
from ._inputs import config_of, name_map, planned
from ._output import bar, counts, done, print_json


def main() -> None:
    """Runs the `jlora` command and exits."""
    # Files are looked at on the host; a GPU's memory would be taken for nothing.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Returns the exit code of `jlora` with these arguments.

    Args:
      arguments: words of the command line, without `jlora` itself.

    Examples:
      >>> run(["inspect", "--help"])
      Usage: jlora inspect [OPTIONS] ADAPTER
      ...
      0
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _warn
            return commands.main(list(arguments), "jlora", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "jlora"
        _tell(f"{place}: {error.format_message()} See `{place} --help`.")
        return 2
    except (click.Abort, KeyboardInterrupt):
        _tell("jlora: interrupted")
        return 130
    except BrokenPipeError:
        sys.stdout = None  # nobody reads it any more
        return 0
    except (JloraError, OSError) as error:
        _tell(f"jlora: {error}")
        return 1


def _tell(text: str) -> None:
    click.echo(" ".join(text.split()), err=True)


def _warn(message: Any, *rest: Any, **more: Any) -> None:
    _tell(f"jlora: warning: {message}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jlora", prog_name="jlora")
def commands() -> None:
    """LoRA adapters and models on disk.

    An ADAPTER is a file of jlora.save, a directory of Hugging Face PEFT, or one of
    jlora.checkpoint. A MODEL is a safetensors file, a directory with its shards, or an
    Orbax checkpoint of parameters. Formats are recognised.
    """


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


_step = click.option("--step", type=click.IntRange(0), help="Of Orbax; the newest.")


_base = click.option("--base", type=click.Path(), help="The MODEL it is for.")


_names = click.option(
    "--names",
    help="Names of PEFT tensors: a map of jlora.peft.maps (llama, gpt2, …) or "
    "module:attribute.",
)


_tied = click.option(
    "--tied/--untied",
    default=None,
    help="For PEFT: whether an adapted embedding table is the output head too.",
)


_overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")


def _config_options(command: Callable) -> Callable:
    options = [
        click.option("--config", type=click.Path(), help="A LoraConfig in JSON."),
        click.option("--rank", type=click.IntRange(1), help="Size of the rank axis."),
        click.option("--alpha", type=float, help="The scale is alpha / rank."),
        click.option("--targets", multiple=True, help="Glob over paths; repeatable."),
        click.option("--exclude", multiple=True, help="Glob; repeatable."),
        click.option("--train", multiple=True, help="Glob of leaves trained in full."),
        click.option("--method", help="Such as lora, dora, vera, adalora."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@commands.command(epilog="Example: jlora inspect adapter.safetensors")
@click.argument("adapter", type=click.Path())
@_step
@_base
@_names
@_tied
@_json
def inspect(
    adapter: str,
    step: int | None,
    base: str | None,
    names: str | None,
    tied: bool | None,
    as_json: bool,
) -> None:
    """Show an adapter: its config, leaves, norms, effective ranks, what is odd."""
    kind = files.detect(adapter)
    found = inspection.inspect(_read(adapter, base, names, tied, step))
    about = files.describe(adapter, step=step)
    if as_json:
        fields = {"adapter": adapter, "format": kind, "about": about}
        print_json({**fields, **dataclasses.asdict(found)})
        return
    click.echo(f"{adapter}: {kind}")
    for name, value in about.items():
        if value not in (None, False, {}, [], ""):
            click.echo(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    click.echo(str(found))


@commands.command(
    "plan", epilog="Example: jlora plan my_model:model --rank 4 --train head/kernel"
)
@click.argument("model", metavar="PACKAGE.MODULE:ATTRIBUTE")
@_config_options
@_json
def show_plan(model: str, as_json: bool, **options: Any) -> None:
    """Show what a config means for a model: what is adapted, how, at what cost.

    The attribute is a jlora.Plan, a tuple (function, params, *args), of shapes or
    arrays, or a function without arguments that returns either.
    """
    found = planned(model, options)
    if as_json:
        print_json(
            {
                "config": json.loads(found.config.to_json())
                if not callable(found.config.targets)
                else None,
                "trained_count": found.trained_count,
                "total_count": found.total_count,
                "leaves": [
                    {
                        "path": row.path,
                        "shape": row.shape,
                        "dtype": row.dtype,
                        "op": row.op,
                        "status": row.status,
                        "spec": None if row.spec is None else row.spec.to_dict(),
                        "trained": row.trained,
                        "note": row.note,
                    }
                    for row in found.rows()
                ],
            }
        )
    else:
        click.echo(str(found))


@commands.command(epilog="Example: jlora merge base.safetensors run merged.safetensors")
@click.argument("base", type=click.Path())
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@_step
@_names
@_tied
@_overwrite
@_json
def merge(
    base: str,
    adapter: str,
    out: str,
    step: int | None,
    names: str | None,
    tied: bool | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the model BASE with ADAPTER merged to the safetensors file OUT.

    Leaf by leaf: memory is bounded by a few times the largest leaf. A PEFT adapter
    merges into a model with torch's names as it is, and by --names into one with
    Flax's.
    """
    _check_free(out, overwrite)
    trainable = _read_for(base, adapter, names, tied, step)
    export.merge_files(base, trainable, out, progress=bar("merging"))
    size = os.path.getsize(out)
    done({"out": out, **counts(trainable), "bytes": size}, as_json)


@commands.command(
    epilog="Example: jlora convert run peft --to peft --base-model me/my-model"
)
@click.argument("source", metavar="ADAPTER", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(["file", "orbax", "peft"]),
    help="The format of OUT; file for *.safetensors.",
)
@_step
@_base
@_names
@_tied
@click.option("--base-model", help="PEFT's base_model_name_or_path.")
@click.option("--portable", is_flag=True, help="Write only what vLLM loads.")
@_overwrite
@_json
def convert(
    source: str,
    out: str,
    to: files.Format | None,
    step: int | None,
    base: str | None,
    names: str | None,
    tied: bool | None,
    base_model: str | None,
    portable: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER in another format: PEFT, Orbax or one file.

    From PEFT, --base says which model it is for; to PEFT, --names what its modules are
    called there, and --base gives the table whose single rows are trained.
    """
    kind = files.detect(source)
    to = to or ("file" if out.endswith(".safetensors") else None)
    if to is None:
        raise click.UsageError("Say --to file, orbax or peft.")
    if kind == "peft" and base is None:
        raise click.UsageError("From PEFT, give --base, the model it is for.")
    given = {
        "--base": base,
        "--names": names,
        "--tied": tied,
        "--base-model": base_model,
        "--portable": portable or None,
    }
    idle = [name for name, value in given.items() if value is not None]
    if to != "peft":
        reading = ("--base", "--names", "--tied") if kind == "peft" else ()
        idle = [name for name in idle if name not in reading]
        if idle:
            raise click.UsageError(f"{', '.join(idle)}: for PEFT alone.")
    _check_free(out, overwrite)
    if to == "orbax" and os.path.isdir(out):
        others = [name for name in os.listdir(out) if name.isdigit() and int(name)]
        if others:
            raise click.UsageError(
                f"{out!r} holds steps {', '.join(sorted(others, key=int))}, which "
                "would be newer than what is written. Give another directory."
            )
    trainable = _read(source, base, names, tied, step)
    options: dict[str, Any] = {"overwrite": overwrite} if to == "orbax" else {}
    if to == "peft":
        options = {
            "names": name_map(names),
            "tied": tied,
            "base_model": base_model,
            "portable": portable,
            "params": base and open_model(base).arrays(),
        }
    files.write(out, trainable, to, **options)
    done({"out": out, "from": kind, "to": to, **counts(trainable)}, as_json)


@commands.command(epilog="Example: jlora diff adapter.safetensors again.safetensors")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@_base
@_names
@_tied
@_json
def diff(
    a: str,
    b: str,
    base: str | None,
    names: str | None,
    tied: bool | None,
    as_json: bool,
) -> None:
    """Show how two adapters, or two models, differ; exit code 1 if they do."""
    kinds = [files.detect(path) == "model" for path in (a, b)]
    if all(kinds):
        found = inspection.diff_files(a, b, progress=bar("comparing"))
    elif any(kinds):
        raise click.UsageError("One is a model, the other an adapter.")
    else:
        read = [_read(path, base, names, tied, None) for path in (a, b)]
        found = inspection.diff(*read)
    if as_json:
        print_json({"differences": [dataclasses.asdict(d) for d in found]})
    elif found:
        click.echo(table(("leaf", "difference"), [(d.path, d.what) for d in found]))
    else:
        click.echo("equal")
    _exit(1 if found else 0)


@commands.command(
    epilog="Example: jlora extract tuned.safetensors base.safetensors new.safetensors"
)
@click.argument("tuned", type=click.Path())
@click.argument("base", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--plan", "model", metavar="PACKAGE.MODULE:ATTRIBUTE", help="See `jlora plan`."
)
@_config_options
@_overwrite
@_json
def extract(
    tuned: str,
    base: str,
    out: str,
    model: str | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the adapter nearest to the change from model BASE to TUNED to file OUT.

    With --plan the model's function says what is adapted; without it, every matrix is,
    taken as [fan-in, fan-out].
    """
    _check_free(out, overwrite)
    if model is not None:
        found = planned(model, options)
    else:
        found = export.flat_plan(base, config_of(options) or LoraConfig())
    trainable = export.extract_files(tuned, base, found, progress=bar("extracting"))
    files.write(out, trainable, "file")
    done({"out": out, **counts(trainable)}, as_json)


@commands.command(epilog="Example: jlora validate run --base base.safetensors")
@click.argument("adapter", type=click.Path())
@_step
@_base
@_names
@_tied
@_json
def validate(
    adapter: str,
    step: int | None,
    base: str | None,
    names: str | None,
    tied: bool | None,
    as_json: bool,
) -> None:
    """Check that an adapter is whole, finite, and fits its model; exit code 1 if not.

    With --base, shapes are compared, and for Orbax the fingerprint of the base that was
    saved with it.
    """
    problems: list[str] = []
    kind = None
    try:
        kind = files.detect(adapter)
        trainable = (
            _read(adapter, None, names, tied, step)
            if base is None
            else _read_for(base, adapter, names, tied, step)
        )
        found = inspection.inspect(trainable)
        problems += [text for text in found.warnings if text.startswith("NaN")]
        if base is not None:
            check(dict(open_model(base).shapes), trainable)
            if kind == "orbax":
                _check_fingerprint(adapter, base, step, problems)
    except JloraError as error:
        problems.append(" ".join(str(error).split()))
    if as_json:
        print_json({"adapter": adapter, "format": kind, "problems": problems})
    else:
        for text in problems:
            _tell(f"jlora: {text}")
        if not problems:
            click.echo(f"{adapter}: {kind}, fine")
    _exit(1 if problems else 0)


def _check_fingerprint(
    adapter: str, base: str, step: int | None, problems: list[str]
) -> None:
    from .. import checkpoint

    model = open_model(base)
    print_ = checkpoint.Fingerprint(
        {
            name: fingerprint({name: model.read(name)}).leaves[name]
            for name in bar("hashing")(list(model.shapes))
        }
    )
    try:
        checkpoint.restore(adapter, step=step, base=print_)
    except JloraError as error:
        if "without base=" not in str(error):
            problems.append(" ".join(str(error).split()))


def _read(
    adapter: str,
    base: str | None,
    names: str | None,
    tied: bool | None,
    step: int | None,
) -> Trainable:
    own = name_map(names)
    if step is not None and files.detect(adapter) != "orbax":
        raise click.UsageError(f"--step: {adapter!r} is no Orbax checkpoint.")
    return files.read(adapter, base=base, names=own, tied=tied, step=step)


def _read_for(
    base: str, adapter: str, names: str | None, tied: bool | None, step: int | None
) -> Trainable:
    """Returns an adapter whose paths are those of the model `base`."""
    own = names is None and not any("/" in name for name in open_model(base).shapes)
    return _read(adapter, None if own else base, names, tied, step)


def _check_free(out: str, overwrite: bool) -> None:
    if os.path.lexists(out) and not overwrite:
        raise click.UsageError(
            f"{out!r} is already there. Say --overwrite to replace it."
        )


def _exit(code: int) -> None:
    raise click.exceptions.Exit(code)
