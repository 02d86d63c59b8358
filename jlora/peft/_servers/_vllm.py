"""How vLLM looks an adapter's tensors up: by the names of its own modules."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

from ..config import PREFIX
from ._adapter import A, Adapter, Piece
from ._base import Base, Shape
from ._fit import FACTORS, Fault, Names, lone, no_matrix, unfit
from ._models import VllmModel, is_classifier, vllm_model
from ._report import Verdict
from ._rules import Server

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+")
_STACKED = re.compile(r"(.*\.experts)\.[^.0-9]+")  # of all experts of a layer
_TABLES = ("embed_tokens", "lm_head")  # whose copies of the base are passed over
_HEADS = ("score", "classifier")
_MERGE = "merge it, with `jlora merge`"
_ABOUT = {
    "magnitude": ("vLLM has no DoRA", _MERGE),
    "tokens": ("vLLM has no trained token rows", _MERGE),
    "bias_b": ("vLLM has no bias of lora_B", _MERGE),
    "copy": ("vLLM takes no weights of the base", "leave it out"),
}


@dataclasses.dataclass(frozen=True)
class Taker:
    """What an adapter's factors can be for in vLLM.

    Attributes:
      module: vLLM's module.
      part: what of it the factors are for, empty for the whole.
      shape: of the weight in the base, a table's transposed, if it is known.
      bank: the experts that it is one of, or empty.
      why: why vLLM leaves it without an adapter; empty if it does not.
    """

    module: str
    part: str = ""
    shape: Shape | None = None
    bank: str = ""
    why: str = ""

    @property
    def target(self) -> str:
        """The module and the part, as a user reads it."""
        return f"{self.module} ({self.part})" if self.part else self.module


class Lookup:
    """Where vLLM applies the tensors of an adapter.

    Attributes:
      server: its rules, with the largest rank that it was started with.
      adapter: the adapter.
      base: the model.
      model: what vLLM's class of it says; None if it takes no adapters.
      takers: what takes factors, by the name that an adapter has for it.
      expected: last parts of names that vLLM lets pass.
    """

    def __init__(self, server: Server, adapter: Adapter, base: Base):
        self.server, self.adapter, self.base = server, adapter, base
        self.model = vllm_model(base.architecture)
        self.takers: dict[str, Taker] = {}
        self.expected: set[str] = set()
        if self.model is not None:
            self._gather(self.model)
        there = {self._name(p) for p in adapter.pieces if p.part in FACTORS}
        self.names = Names(self.takers)
        self.missing: dict[str, str] = {}  # by bank, the first that is not there
        for name, taker in self.takers.items():
            if taker.bank and name not in there:
                self.missing.setdefault(taker.bank, name)

    def _name(self, piece: Piece) -> str:
        """Returns what vLLM calls the module of a tensor.

        It takes PEFT's prefix out of a name as often as it is there.
        """
        module = piece.module
        if piece.prefixed:
            module = module.replace(PREFIX, "")
        return (self.model and self.model.renamed(module)) or module

    @functools.cached_property
    def _slots(self) -> dict[tuple[str, bool], list[Piece]]:
        """The tensors that vLLM takes for A, and for B, of a module."""
        found: dict[tuple[str, bool], list[Piece]] = {}
        for piece in self.adapter.pieces:
            last = piece.module.rpartition(".")[2]
            if piece.part == "whole" and last in _HEADS:
                found.setdefault((last, False), []).append(piece)
            elif piece.part in FACTORS:
                slot = self._name(piece), piece.part in A
                found.setdefault(slot, []).append(piece)
        return found

    def _gather(self, model: VllmModel) -> None:
        """Finds what takes factors, by the base's own names."""
        part_of = {p: whole for whole, parts in model.packed.items() for p in parts}
        together = {p: (n, ps) for n, ps in model.siblings.items() for p in ps}
        for module, shape in self.base.linear.items():
            name = model.renamed(module, loading=True)
            if name is None or name.endswith("lm_head"):
                continue
            parent, dot, last = name.rpartition(".")
            if expert := _EXPERT.fullmatch(name):
                self._expert(model, name, expert[1], shape)
            elif last in part_of:
                part = last if part_of[last] != last else ""
                self._add(name, Taker(f"{parent}{dot}{part_of[last]}", part, shape))
            elif last in together and self._beside(module, together[last][1]):
                whole = f"{parent}{dot}{together[last][0]}"
                self._add(name, Taker(whole, last, shape))
            elif last in model.packed:  # the base has it packed, an adapter its parts
                for part in model.packed[last]:
                    self._add(f"{parent}{dot}{part}", Taker(name, part))
            else:
                self._add(name, Taker(name, shape=shape))
        for tensor in self.base.tensors:
            found = _STACKED.fullmatch(tensor)
            name = model.renamed(found[1], loading=True) if found else None
            if name is not None and model.stacked_experts:
                self._stack(name)
        for module, shape in self._tables().items():
            name = model.renamed(module, loading=True)
            last = module.rpartition(".")[2]
            if name is not None and last in model.embeddings:
                if shape is not None and last != "lm_head":
                    shape = shape[::-1]
                self._add(name, Taker(name, shape=shape))
        self.expected |= {*model.embeddings}

    def _beside(self, module: str, parts: Sequence[str]) -> bool:
        """Returns whether the base has all parts in the block of a module."""
        parent, dot, _ = module.rpartition(".")
        return all(f"{parent}{dot}{part}" in self.base.linear for part in parts)

    def _tables(self) -> dict[str, Shape | None]:
        """Returns tables, and the head, which is not in the files if it is tied."""
        tables = self.base.tables
        of_tokens = {n.rpartition(".")[2]: shape for n, shape in tables.items()}
        heads = {n: x for n, x in self.base.linear.items() if n.endswith("lm_head")}
        return tables | (heads or {"lm_head": of_tokens.get("embed_tokens")})

    @functools.cached_property
    def _headless(self) -> bool:
        """Returns whether the A at which vLLM looks first is not there.

        It looks for its device: of the first module by name that is not a part of
        another one, or else of the first module that is made of parts.
        """
        order = sorted(self.adapter.pieces, key=lambda piece: piece.name)
        names = dict.fromkeys(self._name(p) for p in order if p.part in FACTORS)
        single = [name for name in names if not self._is_packed(name)]
        if single:
            return not self._slots.get((single[0], True))
        packed = [t.module for name, t in self.takers.items() if name in names]
        first = [n for n in names if self.takers[n].module == next(iter(packed), "")]
        return bool(first) and not any(self._slots.get((n, True)) for n in first)

    def _is_packed(self, name: str) -> bool:
        taker = self.takers.get(name)
        return taker is not None and bool(taker.part) and not taker.why

    def _expert(
        self, model: VllmModel, name: str, bank: str, shape: Shape | None
    ) -> None:
        """Adds one expert's weight, of which vLLM has all in one module."""
        if model.stacked_experts:
            self._stack(bank)
            return
        self.expected |= {"experts", name[name.index(".experts") + 1 :]}
        part = name.removeprefix(f"{bank}.")
        self.takers[name] = Taker(bank, part, shape, bank)

    def _stack(self, bank: str) -> None:
        """Adds the two tensors that an adapter has for all experts of a layer."""
        self.expected.add("experts")
        self.takers[bank] = Taker(bank, "down_proj", bank=bank)
        self.takers[f"{bank}.base_layer"] = Taker(bank, "gate_up_proj", bank=bank)

    def _add(self, name: str, taker: Taker) -> None:
        """Adds a taker by every name under which vLLM looks for its factors."""
        assert self.model is not None
        self.expected.add(name.rpartition(".")[2])
        language = self.model.language.rstrip(".")
        if language and not name.startswith(self.model.language):
            why = f"only {language}.* takes an adapter"
            taker = dataclasses.replace(taker, why=why)
        names = [name]
        if is_classifier(self.base.architecture):
            names.append(name.removeprefix("model."))
        if language and name.startswith(f"{language}."):
            inner = name.removeprefix(f"{language}.")
            text = inner.startswith(("model.", "lm_head"))
            names += [inner] if text else [f"model.{inner}", inner]
        for other in names:
            self.takers.setdefault(other, taker)

    def verdict(self, piece: Piece) -> Verdict:
        """Returns what vLLM does with a tensor."""
        target, (outcome, why, instead) = self._found(piece)
        return Verdict(
            name=piece.name, outcome=outcome, target=target, why=why, instead=instead
        )

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layout of experts that it reads."""
        fused = self.model is not None and self.model.stacked_experts
        return ("peft",) if fused else ("per-expert",)

    def of_config(self) -> Iterator[Verdict]:
        """Yields what vLLM refuses of all tensors together."""
        for why, instead in of_all(self.adapter.pieces):
            name = "the tensors"
            yield Verdict(name=name, outcome="refused", why=why, instead=instead)

    def _found(self, piece: Piece) -> tuple[str, Fault]:
        last = piece.module.rpartition(".")[2]
        if self.model is None:
            why = f"vLLM takes no adapter for {self.base.architecture}"
            return "", ("refused", why, _MERGE)
        own = piece.name.endswith(f".{last}.base_layer.weight")  # not at its begin
        if piece.part == "copy" and last in _TABLES and own:
            return "", self._copy(piece, last)
        skip = tuple(self.model.skip)
        if skip and any(f".{s}" in piece.name for s in skip):
            return "", ("dropped", f"vLLM passes {', '.join(skip)}* over", _MERGE)
        if piece.part == "whole" and last in _HEADS:
            return last, self._whole(piece, last)
        if piece.part not in FACTORS:
            return "", ("refused", *_unsupported(piece))
        name = self._name(piece)
        if name in self.adapter.config.saved:
            return name, self._for_weight(name)
        taker = self.takers.get(name)
        unread = self._unread(piece, name)
        if unread is not None:
            return taker.target if taker else "", unread
        if taker is None:
            return "", self._unknown(name, last)
        if taker.why:
            more = "start vLLM with --enable-tower-connector-lora"
            return "", ("dropped", taker.why, more)
        fault = self._fault(piece, taker) or self._twice(name)
        return taker.target, fault or ("applied", "", "")

    def _for_weight(self, head: str) -> Fault:
        """Returns what vLLM does with A and B of a head that `modules_to_save` names.

        It takes each for the head's weight, and keeps the last one by name.
        """
        pieces = self.adapter.pieces
        whole = any(p.part == "whole" and p.module == head for p in pieces)
        why = f"modules_to_save names {head}, so vLLM takes it for its weight"
        return "dropped" if whole else "refused", why, "leave it out there"

    def _twice(self, name: str) -> Fault | None:
        """Returns what is wrong where several tensors are one factor of a module."""
        for first in (True, False):
            taken = self._slots.get((name, first), ())
            if len(taken) > 1:
                names = " and ".join(f"{other.name!r:.100}" for other in taken[:2])
                why = f"vLLM takes {names} for one factor, and keeps one of them"
                return "altered", why, "leave one of them out"
        return None

    def _unread(self, piece: Piece, name: str) -> Fault | None:
        """Returns what stops vLLM before it looks for the module of a factor."""
        size = self.base.vocabulary
        if piece.part == "table_a" and size is not None and piece.shape[1:] != (size,):
            why = f"it is for {list(piece.shape[1:])} tokens, the base has {size}"
            return "refused", why, "give the base with the added tokens"
        alone = piece.part in A and not self._slots.get((name, False))
        if alone and self.adapter.scale(piece.module) != 1:
            return "refused", "vLLM scales B, which is missing", "write both"
        if self._headless:
            return "refused", "the A that vLLM reads first is missing", "write it"
        return None

    def _unknown(self, name: str, last: str) -> Fault:
        """Returns what vLLM does with factors for which it has no module."""
        assert self.model is not None
        near = self.names.nearest(name)
        expert = ".experts" in name and name[name.index(".experts") + 1 :]
        if "base_layer" in name or (expert or last) in self.expected:
            return "dropped", "vLLM has no module of this name, and says nothing", near
        why = f"no module of {self.base.architecture} in vLLM is called so"
        parts = self.model.packed.get(last, ())
        return "refused", why, f"write its parts: {', '.join(parts)}" if parts else near

    def _fault(self, piece: Piece, taker: Taker) -> Fault | None:
        """Returns what is wrong with factors that vLLM has a module for."""
        if taker.bank:
            if taker.bank in self.missing:
                why = f"vLLM needs {self.missing[taker.bank]!r:.100} too"
                return "refused", why, "adapt all experts, and all their weights"
            if taker.shape is None:
                return None
            if self._uneven(piece, taker):
                why = "its sizes are not those of the other experts"
                return "refused", why, "save the adapter again where it was trained"
        other = self._slots.get((self._name(piece), piece.part not in A))
        if other is None:
            outcome = "refused" if not taker.part or taker.bank else "altered"
            return outcome, *lone(piece)
        pair = piece, other[0]
        return unfit(self.server, self.adapter, pair, taker.shape, self.base)

    def _uneven(self, piece: Piece, taker: Taker) -> bool:
        """Returns whether a factor cannot be stacked with those of other experts."""
        which = taker.part.rpartition(".")[2], piece.part
        return len(self._sizes[taker.bank, *which]) > 1

    @functools.cached_property
    def _sizes(self) -> dict[tuple[str, str, str], set[Shape]]:
        """The shapes of experts' factors, by bank, weight and part."""
        found: dict[tuple[str, str, str], set[Shape]] = {}
        for piece in self.adapter.pieces:
            taker = self.takers.get(self._name(piece))
            if taker is not None and taker.bank:
                which = taker.part.rpartition(".")[2], piece.part
                found.setdefault((taker.bank, *which), set()).add(piece.shape)
        return found

    def _copy(self, piece: Piece, last: str) -> Fault:
        tables = {n.rpartition(".")[2]: shape for n, shape in self._tables().items()}
        shape = tables.get(last)
        if shape is None or shape == piece.shape:
            return "copy", "the base's own", ""
        why = f"it is {list(piece.shape)}, the base's {list(shape)}: its rows are lost"
        return "dropped", why, "serve the base with the added tokens"

    def _whole(self, piece: Piece, last: str) -> Fault:
        """Returns what vLLM does with a classifier's head."""
        if last not in self.adapter.config.saved:
            if self._slots.get((last, True)):
                why = "modules_to_save does not name it, so vLLM takes it for a B"
                return "altered", why, f"write {last} there"
            why = f"modules_to_save does not name {last}"
            return "refused", why, f"write {last} there"
        heads = {n.rpartition(".")[2]: x for n, x in self.base.modules.items()}
        if not is_classifier(self.base.architecture) or last not in heads:
            why = f"{self.base.architecture} has no classification head called {last}"
            return "refused", why, "give the classifier's config.json"
        whole = {p.name for p in self.adapter.pieces if p.part == "whole"}
        stem, _, end = piece.name.rpartition(".")
        if f"{stem}.weight" not in whole:
            return "refused", f"{last} has no weight", "write it too"
        shape = heads[last]
        if end == "weight" and shape and piece.shape[1:] != shape[1:]:
            why = f"it is {list(piece.shape)}, the base's {list(shape)}"
            return "refused", why, "give the base that it was trained on"
        return "applied", "", ""


def of_all(pieces: Iterable[Piece]) -> Iterator[tuple[str, str]]:
    """Yields why vLLM takes no such tensors together, and what to do, of any base."""
    parts = {piece.part for piece in pieces}
    if parts.isdisjoint(FACTORS):
        yield "there is no A and no B", "adapt a module, or serve the merged model"
    last = {p.module.rpartition(".")[2] for p in pieces if p.part == "whole"}
    if last.issuperset(_HEADS):
        yield f"vLLM takes only one of {' and '.join(_HEADS)} whole", _MERGE


def of_any_base(piece: Piece) -> tuple[str, str] | None:
    """Returns why vLLM has no use for a tensor, and what to do, whatever the base is.

    None if it depends on the base.
    """
    last = piece.module.rpartition(".")[2]
    if piece.part in ("table_a", "table_b") and last != "embed_tokens":
        return "vLLM adapts only a table that is called embed_tokens", _MERGE
    if piece.part in FACTORS:
        return None if len(piece.shape) == 2 else (no_matrix(piece), _MERGE)
    kept = piece.part == "copy" and last in _TABLES
    kept |= piece.part == "whole" and piece.module in _HEADS
    return None if kept else _unsupported(piece)


def _unsupported(piece: Piece) -> tuple[str, str]:
    """Returns why vLLM has no use for a tensor, and what to do."""
    if piece.part in _ABOUT:
        return _ABOUT[piece.part]
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", piece.name.removeprefix(PREFIX)):
        why = "PEFT's files have no adapter's name in a tensor's"
        return why, "save it with `save_pretrained`"
    return "vLLM takes no weights whole", _MERGE
