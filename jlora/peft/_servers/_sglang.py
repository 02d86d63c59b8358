"""How SGLang looks an adapter's tensors up: by layer, and by a part of their names.

`tests/golden/check_sglang.py` runs SGLang's own code beside this.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from ..._io.disk import Json
from ..._text.automata import first_match
from ..._text.regexes import compile_all
from ..config import CONFIG, PREFIX
from ._adapter import OTHER, Adapter, Part, Piece
from ._base import Base, Shape
from ._fit import FACTORS, Fault, Names, misfit
from ._layouts import banks_of
from ._models import sglang_modules, sglang_pattern
from ._report import Outcome, Verdict
from ._rules import SGLANG
from ._sglang_fit import EARLIER, FUSED, PARTS, Module, size_fault

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")
# PEFT's name of a factor, with the name of an adapter, which SGLang takes too.
_NAMED = re.compile(r"(.+)\.lora_([AB])\.\w+\.weight")
# Tensors that lora_B is written over, since their names come before its.
_BEFORE_B = re.compile(r"(.+)\.(base_layer\.weight|base_layer\.bias|lora_B\.bias)")
_EXPERTS: dict[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SPELLED = {ours: mixtrals for mixtrals, ours in _EXPERTS.items()}
_TABLES = ("embed_tokens", "lm_head")
# What else `get_normalized_target_modules` calls otherwise.
_ALIASES = {
    **dict.fromkeys(("vocab_emb", "embeddings", "word_embeddings"), "embed_tokens"),
    **dict.fromkeys(("output", "unembed_tokens"), "lm_head"),
    "wq_b": "indexer.wq_b",
    "wk": "indexer.wk",
    "weights_proj": "indexer.weights_proj",
}
# Parts without which SGLang cannot make the fused module; k only if the layer has it.
_NEEDS = {
    "q_proj": ("v_proj", "k_proj"),
    "k_proj": ("q_proj",),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}


def _slot(piece: Piece) -> tuple[str, ...]:
    """Returns what SGLang knows a tensor by: layer, module, expert and part."""
    layer, expert = _LAYER.search(piece.name), _EXPERT.search(piece.name)
    last = piece.module.rpartition(".")[2]
    if layer is None:
        return (piece.name,)
    return layer[1], last, expert[1] if expert else "", piece.part


def _as_read(piece: Piece) -> Piece:
    """Returns a tensor as SGLang reads its name."""
    found = _NAMED.fullmatch(piece.name) if piece.part == "whole" else None
    if found is None:
        return piece
    part: Part = "a" if found[2] == "A" else "b"
    return dataclasses.replace(piece, module=_module(found[1]), part=part)


def _module(name: str) -> str:
    return name.removeprefix(PREFIX)


class Lookup:
    """Where SGLang applies the tensors of an adapter."""

    def __init__(self, adapter: Adapter, base: Base):
        self.adapter, self.base = adapter, base
        pieces = tuple(map(_as_read, adapter.pieces))
        self.parts = {(piece.module, piece.part): piece for piece in pieces}
        pattern = sglang_pattern(base.architecture)
        self.takes = (
            compile_all({pattern.replace("\\.", "[.]"): 0}) if pattern else None
        )
        self.shapes: dict[tuple[str, str], Shape | None] = {}
        for module, shape in {**base.linear, **_banks(base)}.items():
            if layer := _LAYER.search(module):
                last = module.rpartition(".")[2]
                if self._is_taken(module):
                    self.shapes[layer[1], _EXPERTS.get(last, last)] = shape
        banks = {_LAYER.search(bank): n for bank, n in banks_of(base).items()}
        self.experts = {layer[1]: count for layer, count in banks.items() if layer}
        self.names = Names(base.linear)
        self.counts = collections.Counter(map(_slot, pieces))
        self.in_layer = {slot[:2] for slot in self.counts if len(slot) > 1}
        self.targets = self._targets(adapter.fields)
        own = base.text.get("num_hidden_layers")
        layers = [int(layer) for layer, _ in self.shapes]
        self.layers = own if isinstance(own, int) else max(layers, default=-1) + 1

    def _targets(self, fields: Json) -> frozenset[str]:
        """Returns what SGLang adapts: what `target_modules` says, in its names."""
        given = fields.get("target_modules")
        if isinstance(given, list):
            last = [str(name).rpartition(".")[2] for name in given]
            return frozenset(_ALIASES.get(n, FUSED.get(n, n)) for n in last)
        found = {FUSED.get(part, part) for _, part in self.shapes}
        tables = {n.rpartition(".")[2] for n in (*self.base.tables, *self.base.linear)}
        return sglang_modules() & (found | (tables & {*_TABLES}))

    def _is_taken(self, module: str) -> bool:
        """Returns whether a class that says what it adapts names the module."""
        if self.takes is None:
            return True
        parent, _, last = module.rpartition(".")
        module = _EXPERT.sub("experts", f"{parent}.{FUSED.get(last, last)}.")[:-1]
        own = re.sub(r"^model\.language_model\.", "language_model.model.", module)
        bare = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", module)
        tried = {module, own, bare, bare.replace("model.", "language_model.", 1)}
        names = {n for t in tried for n in (t, t.partition(".experts")[0] + ".experts")}
        return any(first_match(self.takes, name) is not None for name in names)

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what SGLang does with a tensor."""
        outcome, target, why, instead = self._found(_as_read(piece))
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts of experts that it reads."""
        return ("per-expert", "stacked")

    def of_config(self) -> Iterator[Verdict]:
        """Yields what SGLang refuses of `target_modules`, before it reads a tensor."""
        for name in sorted(self.targets - sglang_modules()):
            instead = "leave it out, or merge the adapter with `jlora merge`"
            if name in _EXPERTS:
                instead = f"write {_EXPERTS[name]} instead"
            yield Verdict(
                name=f"{CONFIG}: target_modules",
                outcome="refused",
                why=f"SGLang has no adapter of {name!r:.60}",
                instead=instead,
            )

    def _found(self, piece: Piece) -> tuple[Outcome, str, str, str]:
        layer = _LAYER.search(piece.name)
        if layer is None:
            return self._outside(piece)
        if int(layer[1]) >= self.layers:
            why = f"the model has only {self.layers} layers"
            return "refused", "", why, "take the adapter of this model"
        if piece.part not in FACTORS:
            return self._beside(piece)
        last = piece.module.rpartition(".")[2]
        part = _EXPERTS.get(last, last) if "experts" in piece.module else last
        fused = FUSED.get(part, part)
        refused = self._refused(piece, last, fused)
        if refused:
            return "refused", "", *refused
        key = layer[1], part
        if key not in self.shapes and (layer[1], fused) not in self.shapes:
            near = self.names.nearest(piece.module)
            return "dropped", "", "the base has no such module that SGLang adapts", near
        if self.counts[_slot(piece)] > 1:
            why = f"SGLang knows modules by layer, and layer {layer[1]} has two {last}"
            return "altered", "", why, "adapt only one of them"
        if "experts" in piece.module and not _EXPERT.search(piece.module):
            if len(piece.shape) != 3:
                why = (
                    "SGLang takes all experts' factors in three axes, or each by itself"
                )
                return "refused", "", why, ""
            fault = self._count_fault(piece, layer[1], part)
            target = f"layers.{layer[1]} {fused} (experts)"
            return (*fault[:1], target, *fault[1:])
        fault = self._fault(piece, last, key)
        target = f"layers.{layer[1]} {fused}" + (f" ({part})" if part != fused else "")
        return (fault[0], target, *fault[1:]) if fault else ("applied", target, "", "")

    def _count_fault(self, piece: Piece, layer: str, part: str) -> Fault:
        """Returns what is done with as many experts as a factor of a layer has."""
        shared = (piece.part == "a") != (part == "down_proj")
        own, count = piece.shape[0], self.experts.get(layer)
        if count is None or own == count or (shared and own == 1):
            return "applied", "", ""
        why = f"it has {own} experts, the layer {count}"
        outcome = "refused" if own > count else "altered"
        return outcome, why, "save the adapter again where it was trained"

    def _refused(self, piece: Piece, last: str, fused: str) -> tuple[str, str] | None:
        """Returns why SGLang can load no adapter with this factor, and what to do."""
        if fused not in sglang_modules():
            return (
                f"SGLang has no adapter of {last!r:.60}",
                "merge it, with `jlora merge`",
            )
        missing = self._missing(piece, last)
        if missing:
            why = f"SGLang cannot make {fused} without {missing}"
            return why, f"adapt {missing} too"
        name = f"{piece.module.removesuffix(last)}{fused}"
        if not any(target in name for target in self.targets):
            return f"target_modules does not name {last}", f"write {last} there"
        return None

    def _beside(self, piece: Piece) -> tuple[Outcome, str, str, str]:
        """Returns what is done with a layer's tensor that is not a factor."""
        found = _BEFORE_B.fullmatch(piece.name)
        module = _module(found[1]) if found else ""
        last = module.rpartition(".")[2]
        kept = last not in ("up_proj", "w3", *PARTS["qkv_proj"])
        if kept and (module, "b") in self.parts:
            if piece.part == "copy":
                return "copy", "", "the base's own", ""
            why = "SGLang writes lora_B over it"
            return "dropped", "", why, "merge it, with `jlora merge`"
        why = "SGLang takes it for lora_B, whose shape it does not have"
        return "refused", "", why, "leave it out, or merge it with `jlora merge`"

    def _fault(self, piece: Piece, last: str, key: tuple[str, str]) -> Fault | None:
        """Returns what is wrong with A and B of a module, None if nothing is."""
        stem = piece.module.removesuffix(last)
        names = EARLIER.get(last, (last,))
        own = [_EXPERTS.get(name, name) for name in names]
        rows = [self.shapes.get((key[0], name)) for name in own]
        module = Module(
            last=_EXPERTS.get(last, last),
            shape=self.shapes.get(key),
            earlier=tuple(
                (self.parts.get((stem + name, "a")), self.parts.get((stem + name, "b")))
                for name in names
            ),
            rows=tuple(shape[0] if shape else None for shape in rows),
            expert=_EXPERT.search(piece.name) is not None,
            rank=self.adapter.config.r,
        )
        return size_fault(
            module, piece, self.parts.get((piece.module, OTHER[piece.part]))
        )

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
        layer = _LAYER.search(piece.name)
        stem = piece.module.removesuffix(last)
        for need in _NEEDS.get(_EXPERTS.get(last, last), ()):
            name = _SPELLED[need] if last in _EXPERTS else need
            if need == "k_proj" and layer and (layer[1], need) not in self.in_layer:
                continue
            if (stem + name, piece.part) not in self.parts:
                return name
        return ""


def _banks(base: Base) -> dict[str, Shape | None]:
    """Returns the projections of experts that are one tensor."""
    ends = (".experts.gate_up_proj", ".experts.down_proj")
    found = [name for name in base.tensors if name.endswith(ends)]
    return dict.fromkeys(found)
