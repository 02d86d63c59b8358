"""Commands that look: inspect, plan, diff, validate."""

import dataclasses
import json
from collections import Counter
from typing import Any, Unpack

import click

from .. import files, inspection
from .._core.tree import check
from .._io.disk import Json
from .._io.fingerprint import Fingerprint, fingerprint
from .._io.models import open_model
from .._plan.row import Row
from .._tables import table
from ..errors import JloraError
from ..quantised import is_quantized
from . import _options as options
from ._inputs import planned, read
from ._output import bar, print_json, tell


@click.command(epilog="Example: jlora inspect adapter.safetensors")
@click.argument("adapter", type=options.PATH)
@options.how("step", "base", "names", "tied", "layout", "component")
@options.as_json
def inspect(
    adapter: str, base: str | None, as_json: bool, **how: Unpack[options.How]
) -> None:
    """Show an adapter: its config, leaves, norms, effective ranks, what is odd."""
    kind = files.detect(adapter)
    found = inspection.inspect(read(adapter, base=base, **how))
    about = files.describe(adapter, step=how.get("step"))
    codes = {} if base is None else quantised(base)
    if as_json:
        fields = {"adapter": adapter, "format": kind, "about": about}
        more = {"base": codes} if codes else {}
        print_json({**fields, **more, **dataclasses.asdict(found)})
        return
    click.echo(f"{adapter}: {kind}")
    for name, value in about.items():
        if value not in (None, False, {}, [], ""):
            click.echo(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    if codes:
        click.echo(f"base: {_in_words(codes)}")
    click.echo(str(found))


@click.command(
    "plan", epilog="Example: jlora plan my_model:model --rank 4 --train head/kernel"
)
@click.argument("model", metavar="PACKAGE.MODULE:ATTRIBUTE")
@options.config
@options.as_json
def show_plan(model: str, as_json: bool, **config: Any) -> None:
    """Show what a config means for a model: what is adapted, how, at what cost.

    The attribute is a jlora.Plan, a tuple (function, params, *args), of shapes or
    arrays, or a function without arguments that returns either.
    """
    found = planned(model, config)
    if not as_json:
        click.echo(str(found))
        return
    own = None if callable(found.config.targets) else json.loads(found.config.to_json())
    print_json(
        {
            "config": own,
            "trained_count": found.trained_count,
            "total_count": found.total_count,
            "leaves": [_fields(row) for row in found.rows()],
        }
    )


def _fields(row: Row) -> Json:
    """Returns a row of a plan as JSON values."""
    names = ("path", "shape", "dtype", "op", "status", "spec", "trained", "note")
    fields = {name: getattr(row, name) for name in names}
    return {**fields, "spec": None if row.spec is None else row.spec.to_dict()}


@click.command(epilog="Example: jlora diff adapter.safetensors again.safetensors")
@click.argument("a", type=options.PATH)
@click.argument("b", type=options.PATH)
@options.how("base", "names", "tied", "layout", "component")
@options.as_json
def diff(
    a: str, b: str, base: str | None, as_json: bool, **how: Unpack[options.How]
) -> None:
    """Show how two adapters, or two models, differ; exit code 1 if they do."""
    kinds = [files.detect(path) == "model" for path in (a, b)]
    if all(kinds):
        found = inspection.diff_files(a, b, progress=bar("comparing"))
    elif any(kinds):
        raise click.UsageError("One is a model, the other an adapter.")
    else:
        found = inspection.diff(*(read(path, base=base, **how) for path in (a, b)))
    if as_json:
        print_json({"differences": [dataclasses.asdict(d) for d in found]})
    elif found:
        click.echo(table(("leaf", "difference"), [(d.path, d.what) for d in found]))
    else:
        click.echo("equal")
    _exit(1 if found else 0)


@click.command(epilog="Example: jlora validate run --base base.safetensors")
@click.argument("adapter", type=options.PATH)
@options.how("step", "base", "names", "tied", "layout", "component")
@click.option(
    "--for",
    "server",
    type=click.Choice(["vllm", "sglang", "peft", "transformers", "llama.cpp"]),
    help="Say what becomes of each tensor of a PEFT directory there.",
)
@click.option(
    "--max-lora-rank",
    "max_rank",
    type=click.IntRange(1),
    help="With --for: what the server is started with.",
)
@options.as_json
def validate(
    adapter: str,
    base: str | None,
    server: str | None,
    max_rank: int | None,
    as_json: bool,
    **how: Unpack[options.How],
) -> None:
    """Check that an adapter is whole, finite, and fits its model; exit code 1 if not.

    With --base, shapes are compared, and for Orbax the fingerprint of the base that was
    saved with it. With --for as well, only names, shapes and configs are read, of the
    base config.json and an index: a verdict for each tensor, and exit code 1 unless the
    server applies all of them.
    """
    if server is not None:
        _validate_for(server, adapter, base, max_rank, as_json, how)
    if max_rank is not None:
        raise click.UsageError("--max-lora-rank: only with --for.")
    problems: list[str] = []
    codes: dict[str, int] = {}
    kind = None
    try:
        kind = files.detect(adapter)
        trainable = read(adapter, base=base, **how)
        found = inspection.inspect(trainable)
        problems += [text for text in found.warnings if text.startswith("NaN")]
        if base is not None:
            check(open_model(base).dense_shapes(), trainable)
            codes = quantised(base)
            if kind == "orbax":
                _check_fingerprint(adapter, base, how.get("step"))
    except JloraError as error:
        problems.append(" ".join(str(error).split()))
    if as_json:
        more = {"base": codes} if codes else {}
        print_json({"adapter": adapter, "format": kind, **more, "problems": problems})
    else:
        for text in problems:
            tell(f"jlora: {text}")
        if not problems:
            over = f" (base: {_in_words(codes)})" if codes else ""
            click.echo(f"{adapter}: {kind}, fine{over}")
    _exit(1 if problems else 0)


def _validate_for(
    server: str,
    adapter: str,
    base: str | None,
    max_rank: int | None,
    as_json: bool,
    how: options.How,
) -> None:
    """Shows what a server does with each tensor of an adapter, and exits."""
    given = [f"--{name}" for name, value in how.items() if value is not None]
    if given:
        raise click.UsageError(f"{', '.join(given)}: not with --for.")
    if base is None:
        raise click.UsageError("--for: give --base, the directory of the model.")
    kind = files.detect(adapter)
    if kind != "peft":
        raise click.UsageError(
            f"--for: {adapter!r} is not a PEFT directory ({kind}). Write one first, "
            "with `jlora convert --to peft`."
        )
    from .. import peft

    found = peft.validate(adapter, base, server=server, max_rank=max_rank)
    if as_json:
        print_json(
            {"adapter": adapter, "fine": found.fine, **dataclasses.asdict(found)}
        )
    else:
        click.echo(str(found))
    _exit(0 if found.fine else 1)


def quantised(base: str) -> dict[str, int]:
    """Returns how many leaves of a model are quantised, by kind, and how many not."""
    kinds = [
        x.kind if is_quantized(x) else "dense" for x in open_model(base).shapes.values()
    ]
    return dict(Counter(kinds)) if {*kinds} - {"dense"} else {}


def _in_words(codes: dict[str, int]) -> str:
    return ", ".join(f"{n} leaves {kind}" for kind, n in codes.items())


def _check_fingerprint(adapter: str, base: str, step: int | None) -> None:
    """Raises a CheckpointError if the adapter was saved with another base."""
    from .. import checkpoint

    if checkpoint.restore(adapter, step=step).fingerprint is None:
        return
    model = open_model(base)
    leaves = {
        name: fingerprint({name: model.read(name)}).leaves[name]
        for name in bar("hashing")(list(model.shapes))
    }
    checkpoint.restore(adapter, step=step, params=Fingerprint(leaves))


def _exit(code: int) -> None:
    raise click.exceptions.Exit(code)
