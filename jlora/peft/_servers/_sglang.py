"""How SGLang looks an adapter's tensors up: by layer, and by a part of their names."""

import collections
import re

from ..._text.automata import first_match
from ..._text.regexes import compile_all
from ._adapter import Adapter, Piece
from ._base import Base, Shape
from ._fit import FACTORS, Names, misfit
from ._models import sglang_modules, sglang_pattern
from ._report import Outcome, Verdict
from ._rules import SGLANG

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")
# What SGLang calls the modules that it makes of several.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}
_EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TABLES = ("embed_tokens", "lm_head")
# A part without which SGLang cannot make the fused module.
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj"}
_NEEDS |= {"up_proj": "gate_proj"}


def _slot(piece: Piece) -> tuple[str, ...]:
    """Returns what SGLang knows a tensor by: layer, module, expert and part."""
    layer, expert = _LAYER.search(piece.name), _EXPERT.search(piece.name)
    last = piece.module.rpartition(".")[2]
    if layer is None:
        return (piece.name,)
    return layer[1], last, expert[1] if expert else "", piece.part


class Lookup:
    """Where SGLang applies the tensors of an adapter."""

    def __init__(self, adapter: Adapter, base: Base):
        self.adapter, self.base = adapter, base
        pattern = sglang_pattern(base.architecture)
        self.takes = (
            compile_all({pattern.replace("\\.", "[.]"): 0}) if pattern else None
        )
        self.shapes: dict[tuple[str, str], Shape | None] = {}
        for module, shape in base.linear.items():
            if layer := _LAYER.search(module):
                last = module.rpartition(".")[2]
                if self._is_taken(module):
                    self.shapes[layer[1], _EXPERTS.get(last, last)] = shape
        self.names = Names(base.linear)
        self.counts = collections.Counter(map(_slot, adapter.pieces))

    def _is_taken(self, module: str) -> bool:
        """Returns whether a class that says what it adapts names the module."""
        if self.takes is None:
            return True
        parent, _, last = module.rpartition(".")
        module = _EXPERT.sub("experts", f"{parent}.{_FUSED.get(last, last)}.")[:-1]
        own = re.sub(r"^model\.language_model\.", "language_model.model.", module)
        bare = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", module)
        tried = {module, own, bare, bare.replace("model.", "language_model.", 1)}
        names = {n for t in tried for n in (t, t.partition(".experts")[0] + ".experts")}
        return any(first_match(self.takes, name) is not None for name in names)

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what SGLang does with a tensor."""
        outcome, target, why, instead = self._found(piece)
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    def of_config(self) -> tuple[Verdict, ...]:
        """Returns nothing: what is refused of a config is in the rules."""
        return ()

    def _found(self, piece: Piece) -> tuple[Outcome, str, str, str]:
        layer = _LAYER.search(piece.name)
        if layer is None:
            return self._outside(piece)
        last = piece.module.rpartition(".")[2]
        if piece.part not in FACTORS:
            why = "SGLang takes it for lora_B, whose shape it does not have"
            return "refused", "", why, "leave it out, or merge it with `jlora merge`"
        part = _EXPERTS.get(last, last) if "experts" in piece.module else last
        fused = _FUSED.get(part, part)
        if fused not in sglang_modules():
            why = f"SGLang has no adapter of {part!r:.60}"
            return "refused", "", why, "merge it, with `jlora merge`"
        key = layer[1], part
        if key not in self.shapes and (layer[1], fused) not in self.shapes:
            near = self.names.nearest(piece.module)
            return "dropped", "", "the base has no such module that SGLang adapts", near
        missing = self._missing(piece, last)
        if missing:
            why = f"SGLang cannot make {fused} without {missing}"
            return "refused", "", why, f"adapt {missing} too"
        if self.counts[_slot(piece)] > 1:
            why = f"SGLang knows modules by layer, and layer {layer[1]} has two {last}"
            return "altered", "", why, "adapt only one of them"
        if "experts" in piece.module and not _EXPERT.search(piece.module):
            if len(piece.shape) != 3:
                why = (
                    "SGLang takes all experts' factors in three axes, or each by itself"
                )
                return "refused", "", why, "write one tensor for each expert"
            return "applied", f"layers.{layer[1]} {fused} (experts)", "", ""
        fault = misfit(SGLANG, self.adapter, piece, self.shapes.get(key), self.base)
        target = f"layers.{layer[1]} {fused}" + (f" ({part})" if part != fused else "")
        return (fault[0], target, *fault[1:]) if fault else ("applied", target, "", "")

    def _outside(self, piece: Piece) -> tuple[Outcome, str, str, str]:
        """Returns what is done with a tensor of no layer."""
        table = next((name for name in _TABLES if name in piece.name), None)
        if table is None:
            why = "SGLang takes only modules in `layers.N.`, embed_tokens and lm_head"
            return "dropped", "", why, "merge it, with `jlora merge`"
        if piece.part == "copy":
            return "copy", "", "the base's own", ""
        if piece.part not in FACTORS:
            why = "SGLang has only A and B of it"
            return "dropped", "", why, "merge it, with `jlora merge`"
        targets = self.adapter.fields.get("target_modules")
        last = (
            {t.rpartition(".")[2] for t in targets}
            if isinstance(targets, list)
            else None
        )
        if last is not None and table not in last:
            why = f"target_modules does not name {table}"
            return "dropped", "", why, f"write {table} there"
        shapes = {**self.base.tables, **self.base.linear}
        own = {name.rpartition(".")[2]: shape for name, shape in shapes.items()}
        shape = own.get(table) or own.get("embed_tokens")
        fault = misfit(SGLANG, self.adapter, piece, shape, self.base)
        return (fault[0], table, *fault[1:]) if fault else ("applied", table, "", "")

    def _missing(self, piece: Piece, last: str) -> str:
        """Returns the part that a fused module needs and the adapter lacks."""
        need = _NEEDS.get(last, "")
        stem = piece.module.removesuffix(last)
        has = (stem + need, piece.part) in self.adapter.parts
        return "" if has else need
