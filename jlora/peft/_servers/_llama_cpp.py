"""How llama.cpp's converter takes an adapter: by the names of the base's tensors."""

import collections
import re

from ._adapter import Adapter, Piece
from ._base import Base, Shape
from ._fit import FACTORS, Names, misfit
from ._models import llama_cpp_knows
from ._report import Outcome, Verdict
from ._rules import LLAMA_CPP

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")
# Beginnings that its text models do without, and those of models that they pass over.
_TEXT = (("model.language_model.", "model."), ("language_model.", ""))
_OTHERS = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.")
_OTHERS += (
    "audio_tower.",
    "model.visual.",
    "model.vision_tower.",
    "model.audio_tower.",
)


class Lookup:
    """Where llama.cpp applies the tensors of an adapter."""

    def __init__(self, adapter: Adapter, base: Base):
        self.adapter, self.base = adapter, base
        self.known = llama_cpp_knows(base.architecture)
        every = {**base.tables, **base.linear}
        self.shapes = {_text(name): shape for name, shape in every.items()}
        self.names = Names(self.shapes)
        self.experts = collections.Counter(_bank(name) for name in base.linear)
        self.own = collections.Counter(
            _bank(p.module) for p in adapter.pieces if p.part == "a"
        )

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what llama.cpp does with a tensor."""
        outcome, target, why, instead = self._found(piece)
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layout of experts that it converts, if the base has one for each."""
        return ("per-expert",) if any(self.experts) else ()

    def of_config(self) -> tuple[Verdict, ...]:
        """Returns nothing: what is refused of a config is in the rules."""
        return ()

    def _found(self, piece: Piece) -> tuple[Outcome, str, str, str]:
        if not self.known:
            why = f"llama.cpp has no converter for {self.base.architecture}"
            return "refused", "", why, "merge it, with `jlora merge`"
        if piece.module.startswith(_OTHERS):
            why = "llama.cpp converts only the text model"
            return "dropped", "", why, "merge it, with `jlora merge`"
        if piece.part == "copy":
            return "copy", "", "the base's own", ""
        if piece.part not in FACTORS:
            if "_layernorm" in piece.name or ".norm" in piece.name:
                why = "llama.cpp passes over norms"
                return "dropped", "", why, "merge it, with `jlora merge`"
            why = "the converter takes only lora_A and lora_B"
            return "refused", "", why, "merge it, with `jlora merge`"
        name = _text(piece.module)
        if name == "lm_head" and name not in self.shapes:
            why = "the head is the embedding table, and no tensor of its own"
            return "refused", "", why, "merge it, with `jlora merge`"
        if name not in self.shapes:
            why = "the base has no tensor of this name"
            return "refused", "", why, self.names.nearest(name)
        bank = _bank(piece.module)
        if bank and self.own[bank] != self.experts[bank]:
            why = f"the converter needs all experts of {bank}"
            return "refused", "", why, "adapt each of them"
        shape: Shape | None = self.shapes[name]
        fault = misfit(LLAMA_CPP, self.adapter, piece, shape, self.base)
        return (fault[0], name, *fault[1:]) if fault else ("applied", name, "", "")


def _text(name: str) -> str:
    """Returns the name of a module in the text model."""
    for old, new in _TEXT:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _bank(module: str) -> str:
    """Returns the experts that a module is one of, empty if it is of none."""
    found = _EXPERT.fullmatch(module)
    return found[1] if found else ""
