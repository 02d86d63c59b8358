"""How PEFT and transformers look tensors up: by the model's own modules."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping

from ..._io.torch_models import (
    head_of,
    is_conv1d,
    is_table,
    is_wrapped,
    name_in_class,
    names_in_classes,
)
from ..config import CONFIG, PREFIX, beginnings, endings, names_module
from ..layers import MAGNITUDE
from ._adapter import Adapter, Piece
from ._base import Base, Shape
from ._fit import FACTORS, Names, misfit
from ._fused import FusedExperts, shapes_in_memory
from ._inits import cut_rank, transposes
from ._layouts import advice, form_of
from ._models import is_converted, peft_targets
from ._replication import replication_of
from ._report import Outcome, Verdict
from ._rules import Server
from ._targets import Targets
from ._torch_config import of_fields, of_modules, of_rows, rows_of, tables_of
from ._torch_names import bare, in_peft, in_transformers, of_older_file, of_tower

# What files call the head of a type of model, and its class since transformers 5.
_HEADS = {"gpt_neox": ("embed_out", "lm_head")}
_CLIP_TOWERS = {"clip_vision_model", "siglip_vision_model", "siglip2_vision_model"}
_OF_TABLES = ("table_a", "table_b")
_MERGED = "write the replicated model, and an adapter of it without the field"
_Found = tuple[Outcome, str, str, str]


def _applied(module: str) -> _Found:
    return "applied", module, "", ""


def _has_clip_tower(base: Base) -> bool:
    """Returns whether transformers has the vision tower without `vision_model`."""
    about = base.config.get("vision_config")
    kind = about.get("model_type") if isinstance(about, dict) else ""
    return str(kind) in _CLIP_TOWERS


def _by_name(read: Mapping[str, Piece], *, last: bool) -> dict[str, str]:
    """Returns the file's name of each tensor, the first or the last one of several."""
    names = sorted(read) if last else sorted(read, reverse=True)
    found = {read[name].name: name for name in names}
    return {piece.name: found[piece.name] for piece in read.values()}


def _last_names(tensors: Iterable[str], module: str) -> Iterator[str]:
    """Yields what the own tensors of a module are called in it."""
    begin = f"{module}."
    inner = (n.removeprefix(begin) for n in tensors if n.startswith(begin))
    yield from (last for last in inner if "." not in last)


class Lookup:
    """Where PEFT, or transformers by itself, applies the tensors of an adapter."""

    def __init__(self, server: Server, adapter: Adapter, base: Base):
        self.server, self.adapter, self.base = server, adapter, base
        names = tuple(base.tensors)
        self._wrapped = any(map(is_wrapped, names))
        self._tower = of_tower if _has_clip_tower(base) else str
        self._class_name = names_in_classes(names, base.facts)
        self.fused = FusedExperts(adapter, base, self._in_memory)
        self.modules, self.tensors = shapes_in_memory(base, self.fused, self._in_memory)
        self._ties: dict[str, list[str]] = {}  # modules with a table's weight
        shared = base.tables.get("shared")
        for place in ("encoder", "decoder"):  # T5's kind has its table three times
            if "shared" in base.tables and any(n.startswith(place) for n in names):
                self.modules[f"{place}.embed_tokens"] = shared
                self.tensors[f"{place}.embed_tokens.weight"] = shared
        ties: dict[str, str] = {}
        for table, shape in base.tables.items():
            head = head_of(table, base.tensors)
            if head is not None and base.facts.tied is not False:
                self.modules.setdefault(head, shape)
                self.tensors.setdefault(f"{head}.weight", shape)
                own = self._in_memory(table)
                ties[own] = head
                inner = [n for n in self.modules if n.endswith(".embed_tokens")]
                self._ties[own] = [*(inner if table == "shared" else ()), head]
        named = {*self.modules, *self.tensors}
        self.layers = replication_of(adapter.fields.get("layer_replication"), named)
        self.modules = self.layers.applied(self.modules)
        self.tensors = self.layers.applied(self.tensors)
        by_task = server.name == "peft"  # its own classes keep heads whole
        as_listed, config = adapter, self.fused.config()
        adapter = dataclasses.replace(adapter, config=config)
        self.targets = Targets(
            adapter,
            self.modules,
            ties,
            of_type=peft_targets(str(base.config.get("model_type"))),
            by_task=by_task,
        )
        self.parents = {n.rpartition(".")[0] for n in self.tensors}
        self._own = self._read(adapter)
        self._first = _by_name(self._own, last=server.name == "peft")
        read = [self._own[name] for name in self._first.values()]
        pieces = tuple(piece for piece in read if piece.prefixed)  # what is looked up
        self.adapter = adapter = dataclasses.replace(adapter, pieces=pieces)
        listed = dataclasses.replace(as_listed, pieces=pieces)
        self.fused = FusedExperts(listed, base, self._in_memory, self.layers)
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
        return self._tower(self._class_name(name))

    def _read(self, adapter: Adapter) -> dict[str, Piece]:
        """Returns the tensors that an adapter's are taken for, by the file's names."""

        def renamed(name: str) -> str:
            if self._wrapped:
                return self._tower(of_older_file(name))
            return name_in_class(name, self.base.facts.kind)

        if self.server.name == "peft":
            converts = is_converted(str(self.base.config.get("model_type")))
            own = renamed if converts else None
            return {piece.name: in_peft(piece, own) for piece in adapter.pieces}
        banks = self.layers.applied(self.fused.banks)
        known = {*self.modules, *self.parents, *banks}
        t5s = any(name.startswith("encoder.block.") for name in self.tensors)
        body = self.base.facts.prefix or ("transformer." if t5s else "model.")
        return {
            piece.name: in_transformers(piece, renamed, known, body)
            for piece in adapter.pieces
        }

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what is done with a tensor."""
        own = self._own[piece.name]
        if (other := self._first[own.name]) != piece.name:
            outcome, target, instead = "dropped", "", "leave one of them out"
            why = f"{other!r:.200} is taken for the same tensor"
        else:
            outcome, target, why, instead = self._found(own)
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    def _found(self, piece: Piece) -> _Found:
        if not piece.prefixed:
            why = "PEFT looks for names that begin with base_model.model."
            return "dropped", "", why, f"call it base_model.model.{piece.name}"
        name, fields = piece.module, self.adapter.fields
        if piece.part == "whole" or name in self._around:
            return self._whole(piece)
        module = bare(name)
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
        if piece.part not in FACTORS or (shape is not None and len(shape) > 2):
            return _applied(module)
        return self._factor(piece, module, shape)

    def _factor(self, piece: Piece, module: str, shape: Shape | None) -> _Found:
        """Returns what is done with A or B of a matrix or a table."""
        init, rank = self.adapter.fields.get("init_lora_weights"), None
        crossed = False
        if shape is not None and piece.part not in _OF_TABLES:
            source = self.targets.table if module == self.targets.tied else module
            rank = cut_rank(init, self.adapter.rank(source), shape)
            conv1d = self.base.facts.conv1d and is_conv1d(module)
            crossed = conv1d and transposes(init) and shape[0] != shape[1]
        own = shape[::-1] if shape is not None and crossed else shape
        fault = misfit(self.server, self.adapter, piece, own, self.base, rank)
        if not crossed:
            return (fault[0], module, *fault[1:]) if fault else _applied(module)
        why = "PEFT's init takes the weight of this Conv1D, [in, out], for [out, in]"
        again = "write init_lora_weights true, and convert it where it was trained"
        runs = not (fault or self.adapter.config.dora)
        return "altered" if runs else "refused", module, why, again

    def _tokens(self, piece: Piece, module: str) -> _Found:
        named = [n for n, _ in self.adapter.config.tokens]
        if any(not n or names_module(n, module) for n in named):
            return "applied", module, "", ""
        why = "trainable_token_indices does not name its table"
        return "dropped", "", why, "write the rows' numbers there"

    @functools.cached_property
    def _around(self) -> dict[str, str]:
        """Tables with trained rows, and their ties, by what PEFT puts around them."""
        entries = [name for name, _ in rows_of(self.adapter.config, self._ties) or ()]
        tables = [t for entry in entries for t in tables_of(entry, self.modules)]
        tied = [t for t in tables if t in self._ties and not self.targets.keeps(t)]
        around = (*tables, *(name for table in tied for name in self._ties[table]))
        return {f"{name}.token_adapter": name for name in around}

    def _kept_as(self, module: str) -> str:
        """Returns what a file calls a module that is in it whole."""
        rows = module in self._around.values()
        return f"{module}.token_adapter.base_layer" if rows else module

    def _copy(self, piece: Piece, module: str) -> _Found:
        shape = self.modules[module]
        if shape is None or shape == piece.shape:
            return "copy", module, "the base's own", ""
        why = f"it is {list(piece.shape)}, the base's {list(shape)}"
        return "refused", module, why, "call resize_token_embeddings on the model first"

    def _whole(self, piece: Piece) -> _Found:
        """Returns what is done with a whole tensor: it is put over the base's own."""
        module, last = piece.module, piece.name.rpartition(".")[2]
        if module in self._around:
            module = self._around[module]
        elif module in self._around.values():
            why = f"PEFT looks for {self._kept_as(module)}.{last}"
            return "dropped", "", why, "leave it out, or write it so"
        plain = bare(module)
        kept = self.targets.keeps(plain)
        if module.count(".base_layer") != (0 if kept else self._wraps(plain)):
            why = "it is adapted" if plain == module else "it is not adapted so"
            return "dropped", "", why, "save the adapter with PEFT's `save_pretrained`"
        if f"{plain}.{last}" not in self.tensors:
            why = f"{self.base.architecture} has no tensor of this name"
            return "dropped", "", why, self.names.nearest(plain)
        shape = self.tensors[f"{plain}.{last}"]
        if shape is not None and shape != piece.shape:
            why = f"it is {list(piece.shape)}, the base's {list(shape)}"
            return "refused", plain, why, "give the base that it was trained on"
        return "applied", plain, "", ""

    def _wraps(self, module: str) -> int:
        """Returns how many layers PEFT puts around a module: one for each parameter."""
        if module in self.raw:
            named = (f"{module}.{last}" for last in _last_names(self.tensors, module))
            entries = self.adapter.config.parameters
            return sum(any(names_module(e, name) for e in entries) for name in named)
        return int(self.targets.adapts(module))

    def of_config(self) -> Iterator[Verdict]:
        """Yields what PEFT makes of the config before it reads a tensor."""
        fields, config = self.adapter.fields, self.adapter.config
        if why := self.layers.fault:
            yield self._told("layer_replication", "refused", why, _MERGED)
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
        experts = self.fused.banks and self.fused.targeted
        if not (adapted or self.raw or experts):
            why = f"it names no module of {self.base.architecture}"
            lost = any(map(form_of, self.adapter.pieces))
            instead = advice(self.layouts) if lost else "name its modules"
            yield self._told("target_modules", "refused", why, instead)
        if half := self.fused.half:
            why = f"PEFT makes one of {' and '.join(self.fused.projections[:2])}"
            yield self._told("target_modules", "refused", why, f"adapt {half} too")
        routers = [] if self.targets.every else self.fused.routers.intersection(adapted)
        for name in sorted(routers)[:1]:
            why = f"PEFT does not adapt the router {name!r:.100}"
            yield self._told("target_modules", "refused", why, "leave it out there")
        wrapped = {*self.raw, *(self.fused.banks if self.fused.targeted else ())}
        for name in filter(self.targets.keeps, (*adapted, *sorted(wrapped))):
            why = f"target_modules or target_parameters name {name!r:.100} too"
            yield self._told("modules_to_save", "refused", why, "leave it out in one")
            break
        strict = self.server.name == "peft"
        for told in (
            *of_fields(self.adapter, self.base, by_task=strict),
            *of_modules(self.adapter, self.targets, self.modules, self.tensors),
            *of_rows(
                self.adapter, self.targets, self.modules, self._ties, strict=strict
            ),
        ):
            yield self._told(*told)
        if strict and (absent := self._absent()):
            why = f"the file has no {absent!r:.100}"
            yield self._told("modules_to_save", "refused", why, "leave it out there")

    def _absent(self) -> str:
        """Returns a tensor of a module that is kept whole, and is not in the file."""
        there = {p.name.removeprefix(PREFIX) for p in self.adapter.pieces if p.prefixed}
        for name in sorted(self.tensors):
            module, _, last = name.rpartition(".")
            if any(map(self.targets.keeps, (module, *beginnings(module)))):
                own = f"{self._kept_as(module)}.{last}"
                if own not in there:
                    return own
        return ""

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
