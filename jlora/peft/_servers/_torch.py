"""How PEFT and transformers look tensors up: by the model's own modules."""

import dataclasses
from collections.abc import Collection, Iterator

from ..._io.torch_models import head_of, is_table, is_wrapped, name_in_memory
from ..config import CONFIG, PREFIX, beginnings, endings, names_module
from ..layers import MAGNITUDE
from ._adapter import Adapter, Piece
from ._base import Base
from ._fit import FACTORS, Names, misfit
from ._fused import FusedExperts, shapes_in_memory
from ._layouts import advice, form_of
from ._models import peft_targets
from ._report import Outcome, Verdict
from ._rules import Server
from ._targets import Targets
from ._torch_config import of_fields, of_modules, of_rows

# What files call the head of a type of model, and its class since transformers 5.
_HEADS = {"gpt_neox": ("embed_out", "lm_head")}
_OF_TABLES = ("table_a", "table_b")
_Found = tuple[Outcome, str, str, str]


def _applied(module: str) -> _Found:
    return "applied", module, "", ""


def _bare(module: str) -> str:
    return module.replace(".base_layer", "")


class Lookup:
    """Where PEFT, or transformers by itself, applies the tensors of an adapter."""

    def __init__(self, server: Server, adapter: Adapter, base: Base):
        self.server, self.adapter, self.base = server, adapter, base
        names = tuple(base.tensors)
        self._wrapped = any(map(is_wrapped, names))
        prefix = base.facts.prefix
        self._prefix = "" if any(n.startswith(prefix) for n in names) else prefix
        self.fused = FusedExperts(adapter, base, self._in_memory)
        self.modules, self.tensors = shapes_in_memory(base, self.fused, self._in_memory)
        for place in ("encoder", "decoder"):  # T5's kind has its table three times
            if "shared" in base.tables and any(n.startswith(place) for n in names):
                shape = base.tables["shared"]
                self.modules[f"{place}.embed_tokens"] = shape
                self.tensors[f"{place}.embed_tokens.weight"] = shape
        ties: dict[str, str] = {}
        for table, shape in base.tables.items():
            head = head_of(table, base.tensors)
            if head is not None and base.facts.tied is not False:
                self.modules.setdefault(head, shape)
                self.tensors.setdefault(f"{head}.weight", shape)
                ties[self._in_memory(table)] = head
        by_task = server.name == "peft"  # its own classes keep heads whole
        self.targets = Targets(
            adapter,
            self.modules,
            ties,
            of_type=peft_targets(str(base.config.get("model_type"))),
            by_task=by_task,
        )
        self.parents = {n.rpartition(".")[0] for n in self.tensors}
        known = {*self.modules, *self.parents, *self.fused.banks}
        self.adapter = adapter = self._renamed(adapter, known)
        self.fused = FusedExperts(adapter, base, self._in_memory)
        self._own = {piece.name: piece for piece in adapter.pieces}
        self.names = Names([*self.modules, *(self.parents - self.modules.keys())])
        entries = {*adapter.config.parameters}
        raw = (n for n in self.tensors if entries and entries & {*endings(n)})
        self.raw = {name.rpartition(".")[0] for name in raw}
        self.raw |= {name for name in self.fused.banks if self.fused.is_raw(name)}

    def _in_memory(self, name: str) -> str:
        """Returns what the model's class calls a module of its files."""
        old, new = _HEADS.get(str(self.base.config.get("model_type")), ("", ""))
        if old and name.startswith(old):
            return new + name.removeprefix(old)
        return name_in_memory(name) if self._wrapped else self._prefix + name

    def _renamed(self, adapter: Adapter, known: Collection[str]) -> Adapter:
        """Returns the adapter with modules as they are looked up.

        PEFT takes names as they are. transformers takes PEFT's prefix out, and what it
        calls a model's body in and out of names, to one that it has.
        """
        if self.server.name == "peft":
            return adapter
        body = self._prefix or self.base.facts.prefix or "model."
        pieces = []
        for piece in adapter.pieces:
            prefix = PREFIX if piece.prefixed else ""
            module = (prefix + piece.module).replace(f"{PREFIX}model.", "model.", 1)
            module = module.replace(PREFIX, "", 1)
            inner = module.removeprefix(body)
            if inner != module and _bare(inner) in known:
                module = inner
            elif _bare(body + module) in known:
                module = body + module
            pieces.append(dataclasses.replace(piece, module=module))
        return dataclasses.replace(adapter, pieces=tuple(pieces))

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what is done with a tensor."""
        outcome, target, why, instead = self._found(self._own[piece.name])
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    def _found(self, piece: Piece) -> _Found:
        converted = piece.part in FACTORS and (self._wrapped or self.fused.family)
        if not (piece.prefixed or converted or self.server.name != "peft"):
            why = "PEFT looks for names that begin with base_model.model."
            return "dropped", "", why, f"call it base_model.model.{piece.name}"
        name, fields = piece.module, self.adapter.fields
        if piece.part == "whole":
            return self._whole(piece)
        module = _bare(name)
        if module in self.raw and piece.part in ("a", "b"):
            fault = self.fused.misfit(piece, module)
            return (fault[0], module, *fault[1:]) if fault else _applied(module)
        if piece.part in FACTORS and self.fused.holds(module):
            outcome, why, instead = self.fused.one(piece)
            return outcome, self.fused.renamed(module), why, instead
        if module not in self.modules:
            why = f"{self.base.architecture} has no module of this name"
            return "dropped", "", why, self.names.nearest(module)
        if piece.part == "tokens":
            return self._tokens(piece, module)
        if piece.part in FACTORS and is_table(module) != (piece.part in _OF_TABLES):
            kind = (
                "lora_embedding_A and _B" if is_table(module) else "lora_A and lora_B"
            )
            why = f"PEFT calls the factors of this module {kind}"
            return "dropped", "", why, "save it again with PEFT's `save_pretrained`"
        if not self.targets.adapts(module):
            why = "target_modules does not name it"
            return "dropped", "", why, f"add {module.rpartition('.')[2]!r:.100} to it"
        if self.targets.keeps(module):
            why = "PEFT keeps the module whole, as modules_to_save says"
            return "dropped", "", why, "leave it out there"
        if piece.part == "copy":
            return self._copy(piece, module)
        if piece.part == "magnitude" and not fields.get("use_dora"):
            return "dropped", "", "use_dora is false", "write use_dora true"
        if self.server.name != "peft" and piece.name.endswith(f".{MAGNITUDE}"):
            why = "load_adapter looks for another name, and leaves it as it began"
            return "dropped", "", why, "load it with peft.PeftModel.from_pretrained"
        if piece.part == "bias_b" and not fields.get("lora_bias"):
            return "dropped", "", "lora_bias is false", "write lora_bias true"
        shape = self.modules[module]
        if piece.part == "magnitude" and shape and len(piece.shape) != 1:
            why = f"its shape is {list(piece.shape)}, not a vector's"
            return "refused", module, why, "save it again with PEFT's `save_pretrained`"
        if piece.part not in FACTORS:
            return _applied(module)
        if shape is not None and len(shape) > 2:
            return _applied(module)
        fault = misfit(self.server, self.adapter, piece, shape, self.base)
        return (fault[0], module, *fault[1:]) if fault else _applied(module)

    def _tokens(self, piece: Piece, module: str) -> _Found:
        named = [n for n, _ in self.adapter.config.tokens]
        if any(not n or names_module(n, module) for n in named):
            return "applied", module, "", ""
        why = "trainable_token_indices does not name its table"
        return "dropped", "", why, "write the rows' numbers there"

    def _copy(self, piece: Piece, module: str) -> _Found:
        shape = self.modules[module]
        if shape is None or shape == piece.shape:
            return "copy", module, "the base's own", ""
        why = f"it is {list(piece.shape)}, the base's {list(shape)}"
        return "refused", module, why, "call resize_token_embeddings on the model first"

    def _whole(self, piece: Piece) -> _Found:
        """Returns what is done with a whole tensor: it is put over the base's own."""
        module, last = piece.module, piece.name.rpartition(".")[2]
        plain = module.removesuffix(".base_layer")
        if not self.targets.keeps(plain) and (plain != module) != self.targets.adapts(
            plain
        ):
            why = "target_modules names it" if plain == module else "it is not adapted"
            return "dropped", "", why, "save the adapter with PEFT's `save_pretrained`"
        if f"{plain}.{last}" not in self.tensors:
            why = f"{self.base.architecture} has no tensor of this name"
            return "dropped", "", why, self.names.nearest(plain)
        shape = self.tensors[f"{plain}.{last}"]
        if shape is not None and shape != piece.shape:
            why = f"it is {list(piece.shape)}, the base's {list(shape)}"
            return "refused", plain, why, "give the base that it was trained on"
        return "applied", plain, "", ""

    def of_config(self) -> Iterator[Verdict]:
        """Yields what PEFT makes of the config before it reads a tensor."""
        fields, config = self.adapter.fields, self.adapter.config
        if fields.get("target_modules") is None and not config.parameters:
            kind = str(self.base.config.get("model_type"))
            if self.targets.of_type:
                names = ", ".join(self.targets.of_type)
                why = f"without it PEFT adapts {names} of {kind}"
                yield self._told("target_modules", "altered", why, "write it")
            else:
                why = f"PEFT needs it for models of type {kind!r:.50}"
                yield self._told("target_modules", "refused", why, "write it")
        adapted = [name for name in self.modules if self.targets.adapts(name)]
        if not (adapted or config.parameters or self.fused.targeted):
            why = f"it names no module of {self.base.architecture}"
            experts = any(map(form_of, self.adapter.pieces))
            instead = advice(self.layouts) if experts else "name its modules"
            yield self._told("target_modules", "refused", why, instead)
        strict = self.server.name == "peft"
        for told in (
            *of_fields(self.adapter, self.base, by_task=strict),
            *of_modules(self.adapter, self.targets, self.modules, self.tensors),
            *of_rows(self.adapter, self.targets, self.modules, strict=strict),
        ):
            yield self._told(*told)
        whole = {
            p.module for p in self.adapter.pieces if p.part == "whole" and p.prefixed
        }
        every = {*self.parents, *self.modules} - whole
        absent = sorted(
            name
            for name in every
            if any(map(self.targets.keeps, (name, *beginnings(name))))
        )
        if absent and self.server.name == "peft":
            why = f"the file has no {absent[0]!r:.100}"
            yield self._told("modules_to_save", "refused", why, "leave it out there")

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts of experts that are read; as in files, if not in one."""
        raw = any(name.rpartition(".")[0] in self.fused.banks for name in self.tensors)
        if self.fused.projections or raw:
            return self.fused.layouts
        return ("per-expert",)

    def _told(self, field: str, outcome: Outcome, why: str, instead: str) -> Verdict:
        name = f"{CONFIG}: {field}"
        return Verdict(name=name, outcome=outcome, why=why, instead=instead)
