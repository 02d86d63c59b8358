"""Which layout an adapter's experts have, and which one a server reads."""

import dataclasses
import re
from collections.abc import Sequence

from .._expert_reading import is_unsloth
from ._adapter import Adapter, Piece
from ._base import Base
from ._fit import FACTORS
from ._report import Verdict
from ._torch_names import bare

ONE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")  # a module for each expert
STACK = re.compile(r"(.*\.experts)\.([^\d\W]\w*)")  # one tensor for all of a layer
_CONVERT = "`jlora convert --to peft --base BASE"
_SHARED = "start vLLM with --enable-moe-shared-loras"


def form_of(piece: Piece) -> str:
    """Returns the layout that factors of experts have, empty for other tensors.

    `"unsloth"` looks as `"peft"` does, and `"shared"` as `"stacked"`.
    """
    module = bare(piece.module)
    if piece.part not in FACTORS:
        return ""
    if module.endswith(".experts"):
        return "peft"
    if ONE.fullmatch(module):
        return "per-expert"
    return "stacked" if STACK.fullmatch(module) else ""


def banks_of(base: Base) -> dict[str, int | None]:
    """Returns how many experts a model's files have, by the module that holds them."""
    found: dict[str, int | None] = {}
    for module in base.modules:
        if own := ONE.fullmatch(module):
            many = found.get(own[1]) or 0
            found[own[1]] = max(many, int(own[2]) + 1)
    for name, shape in base.tensors.items():
        own = STACK.fullmatch(name)
        if own and not name.endswith((".weight", ".bias", "_bias")):
            number = shape[0] if shape is not None and len(shape) == 3 else None
            found[own[1]] = number or found.get(own[1])
    return found


def with_layout(
    verdict: Verdict, piece: Piece, adapter: Adapter, layouts: Sequence[str]
) -> Verdict:
    """Returns a verdict on experts that says which `layout=` to save with.

    Args:
      verdict: what the server does with a tensor.
      piece: the tensor.
      adapter: which it is of.
      layouts: those that the server reads, the best first.
    """
    form = form_of(piece)
    if not form:
        return verdict
    if verdict.outcome == "applied" and form == "peft" and is_unsloth(adapter.fields):
        return dataclasses.replace(
            verdict,
            outcome="altered",
            why="unsloth wrote it, and until September 2026 it paired B's experts "
            "otherwise",
            instead=f"{_CONVERT} --to-layout peft --layout unsloth` if it was older, "
            "--layout peft if not",
        )
    known = form in layouts or verdict.outcome == "altered"
    if verdict.fine or (verdict.instead and known):
        return verdict
    instead = advice(layouts)
    if form == "stacked" and verdict.why.endswith("in vLLM is called so"):
        instead += f", or {_SHARED}"
    return dataclasses.replace(verdict, instead=instead)


def advice(layouts: Sequence[str]) -> str:
    """Returns in words how to write experts for a server that reads these layouts."""
    if not layouts:
        return "merge it, with `jlora merge`"
    best = layouts[0]
    return f"save with layout={best!r} ({_CONVERT} --to-layout {best}`)"
