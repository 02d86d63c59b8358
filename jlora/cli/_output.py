"""What the `jlora` command prints: results for people or as JSON, and progress."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator

import click

from .._io.disk import Json, Progress
from .._tables import count
from ..factors import Trainable


def counts(trainable: Trainable) -> dict[str, int]:
    """Returns how many leaves an adapter adapts, and trains in full."""
    return {"lora": len(trainable.lora), "full": len(trainable.full)}


def tell(text: str) -> None:
    """Prints `text` as one line for people, beside the result.

    Findings that have a line each, as in jlora's errors, are parted by a semicolon.
    """
    text = re.sub(r"(?<=[^\s:;,.])\n  (?=\S)", "; ", text)
    click.echo(" ".join(text.split()), err=True)


def done(fields: Json, as_json: bool) -> None:
    """Prints what a command has written to `fields["out"]`."""
    if as_json:
        print_json(fields)
    else:
        rest = ", ".join(
            f"{name} {count(value) if isinstance(value, int) else value}"
            for name, value in fields.items()
            if name != "out"
        )
        click.echo(f"{fields['out']}: {rest}")


def print_json(value: object) -> None:
    """Prints JSON values, NaN and infinity as null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: object) -> object:
    """Returns `value` with null for NaN and infinity, which JSON lacks."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
    return value


def bar(label: str) -> Progress:
    """Returns a wrapper of names that shows progress on a terminal."""

    def progress(names: Iterable[str]) -> Iterator[str]:
        if not sys.stderr.isatty():
            yield from names
            return
        with click.progressbar(names, label=label, file=sys.stderr) as shown:
            yield from shown

    return progress
