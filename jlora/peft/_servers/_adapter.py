"""An adapter's tensors by what they are, as PEFT calls them."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Literal

from ..._io.disk import Json, told
from ...errors import PeftError
from .._dialects import dialect_of
from .._load import open_adapter
from ..config import (
    PREFIX,
    STEM,
    PeftConfig,
    parse_config,
    pattern_lookup,
)
from ..layers import ENDS, LENGTHS, TOKENS
from ._base import Shape

Part = Literal[
    "a", "b", "table_a", "table_b", "magnitude", "tokens", "bias_b", "copy", "whole"
]
_PARTS: dict[str, Part] = {
    ENDS["linear"][0]: "a",
    ENDS["linear"][1]: "b",
    ENDS["embedding"][0]: "table_a",
    ENDS["embedding"][1]: "table_b",
    **dict.fromkeys(LENGTHS, "magnitude"),
    TOKENS: "tokens",
    "lora_B.bias": "bias_b",
    "base_layer.weight": "copy",
}
A, B = ("a", "table_a"), ("b", "table_b")
OTHER: dict[str, Part] = {
    "a": "b",
    "b": "a",
    "table_a": "table_b",
    "table_b": "table_a",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of an adapter.

    Attributes:
      name: as it is in the file.
      module: what it belongs to, without PEFT's prefix.
      part: what of the adapter it is; "whole" for whatever else.
      shape: its sizes.
    """

    name: str
    module: str
    part: Part
    shape: Shape

    @property
    def prefixed(self) -> bool:
        """Whether its name begins as PEFT's do."""
        return self.name.startswith(PREFIX)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's files, without its numbers.

    Attributes:
      fields: of `adapter_config.json`.
      config: the same, read.
      pieces: the tensors.
      one_file: whether they lie in `adapter_model.safetensors`.
    """

    fields: Json
    config: PeftConfig
    pieces: tuple[Piece, ...]
    one_file: bool

    @functools.cached_property
    def parts(self) -> Mapping[tuple[str, Part], Piece]:
        """The tensors by module and part."""
        return {(piece.module, piece.part): piece for piece in self.pieces}

    def rank(self, module: str) -> int:
        """Returns the rank that the config gives a module."""
        found = self._ranks(module)
        return found[1] if found else self.config.r

    def scale(self, module: str) -> float:
        """Returns what PEFT multiplies the update of a module by."""
        found, rank = self._alphas(module), self.rank(module)
        alpha = found[1] if found else self.config.alpha
        return alpha / (rank**0.5 if self.config.rslora else rank)

    @functools.cached_property
    def _ranks(self):
        return pattern_lookup(self.config.rank_pattern)

    @functools.cached_property
    def _alphas(self):
        return pattern_lookup(self.config.alpha_pattern)


def read_adapter(directory: pathlib.Path) -> Adapter:
    """Returns what the files of a PEFT adapter say, without its numbers.

    Raises:
      PeftError: if a file is missing, damaged or not a LoRA adapter.
    """
    with told(f"{str(directory)!r} cannot be read", PeftError):
        found = dialect_of(directory)
    if found is not None:
        raise PeftError(
            f"{str(directory)!r} is an adapter of {found.dialect.tool}. Servers read "
            "PEFT's: write it so first, with `jlora convert --to peft`."
        )
    fields, slots, _ = open_adapter(directory)
    config, _ = parse_config(fields)
    pieces = tuple(piece_of(name, slot.shape) for name, slot in slots.items())
    one = {str(slot.file) for slot in slots.values()}
    usual = str(directory / f"{STEM}.safetensors")
    return Adapter(fields, config, pieces, not one or one == {usual})


def piece_of(name: str, shape: Shape) -> Piece:
    """Returns a tensor by its name.

    Examples:
      >>> own = piece_of("base_model.model.h.0.q.lora_A.weight", (2, 4))
      >>> own.module, own.part
      ('h.0.q', 'a')
    """
    inner = name.removeprefix(PREFIX)
    for end, part in _PARTS.items():
        if inner.endswith(f".{end}"):
            return Piece(name, inner.removesuffix(f".{end}"), part, shape)
    return Piece(name, inner.rpartition(".")[0], "whole", shape)
