"""Experts that files keep one by one, and transformers 5 in one parameter of a layer.

PEFT converts adapters of such models too, in `utils/transformers_weight_conversion.py`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

from .._experts import in_transformers
from ..config import PeftConfig, names_module, pattern_lookup
from ._adapter import Adapter, Piece
from ._base import Base, Shape
from ._fit import Fault, no_matrix
from ._layouts import ONE, banks_of
from ._models import fused_like
from ._replication import Replication

_PROJECTIONS = {
    "mixtral": ("w1", "w3", "w2"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
}
_PARAMETERS = ("gate_up_proj", "down_proj")
_ROUTER = "gate"


class FusedExperts:
    """The experts of a model in memory, and what PEFT makes of an adapter of them.

    Attributes:
      projections: what files call gate, up and down; empty if PEFT converts nothing.
      banks: how many experts a module has, by its name in memory.
      converts: whether PEFT makes parameters of the experts that a config names. It has
        no entry for the type `qwen2_moe` itself, only for those that are like it.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Base,
        in_memory: Callable[[str], str],
        layers: Replication | None = None,
    ):
        self.adapter = adapter
        types = [base.config.get("model_type"), base.text.get("model_type")]
        self.family = next(filter(None, map(fused_like, map(str, types))), "")
        self.projections = _PROJECTIONS.get(self.family, ())
        self.converts = bool(self.projections) and "qwen2_moe" not in types
        banks = {
            self.renamed(in_memory(bank)): count
            for bank, count in banks_of(base).items()
        }
        self.banks = layers.applied(banks) if layers else banks

    def renamed(self, name: str) -> str:
        """Returns what the model's class calls a module of its files."""
        if self.family == "mixtral":
            return in_transformers(name)
        return name

    def holds(self, module: str) -> bool:
        """Returns whether a module of the files is a part of a parameter in memory."""
        found = ONE.fullmatch(self.renamed(module))
        return found is not None and found[3] in self.projections

    @functools.cached_property
    def targeted(self) -> frozenset[str]:
        """The projections that the config names."""
        wanted = self.adapter.config.targets
        listed = wanted if isinstance(wanted, tuple) else ()
        last = {entry.rpartition(".")[2] for entry in listed}
        return frozenset(last.intersection(self.projections if self.converts else ()))

    @property
    def half(self) -> str:
        """The one of gate and up that is missing; empty for both or none."""
        pair = self.projections[:2]
        lacking = [name for name in pair if name not in self.targeted]
        return lacking[0] if len(lacking) == 1 else ""

    @property
    def routers(self) -> frozenset[str]:
        """What may be called a router: its class is none that PEFT adapts."""
        parents = [bank.rpartition(".")[0] for bank in self.banks]
        return frozenset(f"{p}.{n}" for p in parents for n in (_ROUTER, "router"))

    def config(self) -> PeftConfig:
        """Returns what PEFT makes of the config: it takes names of old classes out.

        Those of experts then name parameters, and so does that of the router. PEFT goes
        by their last part, also where they are meant for a layer that has such a name
        still, as one of a shared expert.
        """
        config = self.adapter.config
        if not self.converts or not isinstance(config.targets, tuple):
            return config
        old = {_ROUTER, *self.projections}
        kept = [
            entry for entry in config.targets if entry.rpartition(".")[2] not in old
        ]
        if len(kept) == len(config.targets):
            return config
        routed = any(e.rpartition(".")[2] == _ROUTER for e in config.targets)
        more = (f"{_ROUTER}.weight",) if routed else ()
        parameters = (*config.parameters, *more)
        return dataclasses.replace(config, targets=tuple(kept), parameters=parameters)

    def is_raw(self, module: str) -> bool:
        """Returns whether a module's parameters are adapted as one."""
        return module in self.banks and any(
            names_module(entry, f"{module}.{name}")
            for entry in self.adapter.config.parameters
            for name in _PARAMETERS
        )

    def misfit(self, piece: Piece, module: str) -> Fault | None:
        """Returns what is wrong with A or B of all experts in one."""
        again = "save the adapter again where it was trained"
        if len(piece.shape) != 2:
            return "refused", no_matrix(piece), again
        count = self.banks.get(module)
        ranks = {self.adapter.rank(f"{module}.{name}") for name in _PARAMETERS}
        size = piece.shape[0 if piece.part == "a" else 1]
        if count is None or size in {count * rank for rank in ranks}:
            return None
        told = " or ".join(map(str, sorted(ranks)))
        why = f"it has {size} ranks, {count} experts of rank {told} need another number"
        return "refused", why, again

    def one(self, piece: Piece) -> Fault:
        """Returns what PEFT does with the factors of one expert."""
        found = ONE.fullmatch(self.renamed(piece.module))
        assert found is not None
        bank, _, name = found.groups()
        if bank not in self.banks:
            return "dropped", "the model has no experts of this name", ""
        if name not in self.targeted:
            if not self.converts:
                return "dropped", "PEFT adapts no experts of this type by name", ""
            return "dropped", "target_modules does not name it", f"add {name!r} to it"
        there, count = self._there[bank, name, piece.part], self.banks[bank]
        if count is not None and there != count:
            why = f"PEFT stacks the experts, and {there} of {count} are there"
            return "refused", why, "adapt all experts"
        config = self.adapter.config
        if self.adapter.rank(piece.module) != config.r:
            why = f"PEFT stacks the experts, at the one rank {config.r}"
            return "refused", why, ""
        if pattern_lookup(config.alpha_pattern)(piece.module) is not None:
            return "altered", "PEFT stacks the experts, with one alpha for all", ""
        return "applied", "", ""

    @functools.cached_property
    def _there(self) -> collections.Counter[tuple[str, str, str]]:
        """How many experts have a projection's A or B."""
        found: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for piece in self.adapter.pieces:
            if own := ONE.fullmatch(self.renamed(piece.module)):
                found[own[1], own[3], piece.part] += 1
        return found

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that are read."""
        return ("peft", "per-expert") if self.projections else ("peft",)


def shapes_in_memory(
    base: Base, fused: FusedExperts, in_memory: Callable[[str], str]
) -> tuple[dict[str, Shape | None], dict[str, Shape | None]]:
    """Returns the modules and the tensors that the model's class has."""
    modules, tensors = (
        {
            fused.renamed(in_memory(name)): shape
            for name, shape in every.items()
            if not fused.holds(name.removesuffix(".weight"))
        }
        for every in (base.modules, base.tensors)
    )
    if fused.projections:
        files = {fused.renamed(in_memory(n)): s for n, s in base.modules.items()}
        gate, _, down = fused.projections
        for bank, count in fused.banks.items():
            for name, part, times in zip(
                _PARAMETERS, (gate, down), (2, 1), strict=True
            ):
                one, shape = files.get(f"{bank}.0.{part}"), None
                if count is not None and one is not None:
                    shape = (count, times * one[0], *one[1:])
                tensors.setdefault(f"{bank}.{name}", shape)
    return modules, tensors
