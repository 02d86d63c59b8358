"""Options that several commands share."""

import os
import re
from collections.abc import Callable
from typing import TypedDict

import click

Command = Callable[..., None]


class How(TypedDict, total=False):
    """How an adapter is read, by the names of the options.

    Attributes:
      step: which step of an Orbax checkpoint.
      names: a name map of PEFT's tensors.
      tied: whether the embedding table is the output head too.
      layout: how a PEFT adapter keeps a mixture's experts.
      component: which model's adapter, of a file for several.
    """

    step: int | None
    names: str | None
    tied: bool | None
    layout: str | None
    component: str | None


class _PathType(click.Path):
    """A path that a file can have: not empty, and without NUL."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        name = os.fspath(value)
        if not name or "\0" in name:
            self.fail(f"{name!r} is not the name of a file or a directory.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _PathType()


class _SizeType(click.ParamType):
    """A number of bytes, as 5GB, 500MB or 2GiB."""

    name = "size"

    def convert(
        self,
        value: str | int,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", value.upper())
        size = 0
        if found:
            number, prefix, binary = found.groups()
            size = float(number) * (1024 if binary else 1000) ** " KMGT".index(
                prefix or " "
            )
        if size < 1:
            self.fail(f"{value!r} is not a size, such as 5GB or 500MB.", param, ctx)
        return int(size)


SIZE = _SizeType()

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")

_HOW = {
    "step": click.option(
        "--step",
        type=click.IntRange(0),
        help="Of Orbax; the newest if absent.",
    ),
    "base": click.option("--base", type=PATH, help="The MODEL it is for."),
    "names": click.option(
        "--names",
        help="Names of PEFT tensors: a map of jlora.peft.maps (llama, gpt2, …) or "
        "module:attribute.",
    ),
    "tied": click.option(
        "--tied/--untied",
        default=None,
        help="For PEFT: whether an adapted embedding table is the output head too.",
    ),
    "layout": click.option(
        "--layout",
        metavar="LAYOUT",
        help="For PEFT: how experts are kept: peft, unsloth, per-expert, stacked or "
        "shared; with :interleaved or :concatenated, how gate and up lie in one.",
    ),
    "component": click.option(
        "--component",
        help="Of kohya's and diffusers' files: which model's adapter, as unet or te1.",
    ),
}

to_layout = click.option(
    "--to-layout", metavar="LAYOUT", help="To PEFT: how to keep experts, as --layout."
)

_CONFIG = [
    click.option("--config", type=PATH, help="A LoraConfig in JSON."),
    click.option("--rank", type=click.IntRange(1), help="Size of the rank axis."),
    click.option("--alpha", type=float, help="The scale is alpha / rank."),
    click.option("--targets", multiple=True, help="Glob over paths; repeatable."),
    click.option("--exclude", multiple=True, help="Glob; repeatable."),
    click.option("--train", multiple=True, help="Glob of leaves trained in full."),
    click.option("--method", help="Such as lora, dora, vera, adalora."),
]


_QUANTIZE = [
    click.option(
        "--kind",
        type=click.Choice(["nf4", "int8", "int4"]),
        default="nf4",
        show_default=True,
        help="What a code is.",
    ),
    click.option("--targets", multiple=True, help="Glob over paths; repeatable."),
    click.option("--block", type=click.IntRange(2), help="Numbers that share a scale."),
    click.option("--double", is_flag=True, help="Quantise the scales too, to 8 bits."),
    click.option(
        "--scale-dtype", default="float32", show_default=True, help="Of the scales."
    ),
]


class Scheme(TypedDict, total=False):
    """How weights are quantised, by the names of the options.

    Attributes:
      kind: of the codes.
      targets: globs of leaves; empty for those that jlora chooses.
      block: how many numbers share a scale.
      double: whether the scales are quantised too.
      scale_dtype: dtype of the scales.
    """

    kind: str
    targets: tuple[str, ...]
    block: int | None
    double: bool
    scale_dtype: str


def scheme(command: Command) -> Command:
    """Adds the options of `Scheme`."""
    return _all(_QUANTIZE)(command)


def how(*names: str) -> Callable[[Command], Command]:
    """Returns a decorator that adds the options of `How`, or `base`, by name."""
    return _all([_HOW[name] for name in names])


def config(command: Command) -> Command:
    """Adds the options that make a config."""
    return _all(_CONFIG)(command)


def _all(options: list[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
