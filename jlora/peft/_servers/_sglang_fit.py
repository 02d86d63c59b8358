"""What SGLang makes of factors whose sizes are not those of its buffers."""

import dataclasses

from ._adapter import Piece
from ._base import Shape
from ._fit import REMEDY, Fault

# What SGLang makes one module of, in this order.
PARTS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
FUSED = {part: name for name, parts in PARTS.items() for part in parts}
# A part, with those that lie before it.
EARLIER: dict[str, tuple[str, ...]] = {
    part: parts[: at + 1] for parts in PARTS.values() for at, part in enumerate(parts)
} | {"w1": ("w1",), "w3": ("w1", "w3")}
# Modules whose inputs are shared out between devices, which cuts A.
_CUT_A = ("o_proj", "down_proj", "out_proj", "wo_ud")
_CUT_B = (*FUSED, "qkv_proj", "gate_up_proj")


@dataclasses.dataclass(frozen=True)
class Module:
    """What factors are for.

    Attributes:
      last: the last part of the module's name.
      shape: of its weight, `[out, in]`; None if it is not known.
      earlier: A and B of the parts up to this one, of those that SGLang fuses.
      rows: how many outputs these parts have.
      expert: whether it is one expert's.
      rank: the rank that the config gives, which is every module's.
    """

    last: str
    shape: Shape | None
    earlier: tuple[tuple[Piece | None, Piece | None], ...]
    rows: tuple[int | None, ...]
    expert: bool
    rank: int


def size_fault(module: Module, piece: Piece, other: Piece | None) -> Fault | None:
    """Returns what is wrong with a factor or with its other half."""
    first = piece.part == "a"
    a, b = (piece, other) if first else (other, piece)
    found = [_without(module, first)] if other is None else []
    found += [_of_a(module, a)] if a is not None else []
    found += [_of_b(module, b)] if b is not None else []
    faults = [fault for fault in found if fault is not None]
    worst = [fault for fault in faults if fault[0] == "refused"]
    return next(iter(worst or faults), None)


def _without(module: Module, first: bool) -> Fault:
    why = f"lora_{'B' if first else 'A'} of it is missing"
    refused = first and not module.expert and module.last != "up_proj"
    return ("refused" if refused else "altered"), why, "write both factors"


def _of_a(module: Module, a: Piece) -> Fault | None:
    if len(a.shape) != 2:
        return "refused", f"its shape is {list(a.shape)}, not a matrix's", REMEDY
    rank, inputs = a.shape
    if rank != module.rank:
        cut = module.expert and rank > module.rank
        why = f"its rank is {rank}, by the config {module.rank}"
        return ("altered" if cut else "refused"), why, REMEDY
    wanted = module.shape[1] if module.shape else inputs
    if inputs != wanted:
        cut = module.last in _CUT_A and not module.expert and inputs > wanted
        why = f"it has {inputs} inputs, the weight {wanted}"
        return ("altered" if cut else "refused"), why, REMEDY
    for before, _ in module.earlier if module.expert else ():
        if before is not None and before.shape[0] > module.rank:
            return "altered", f"{before.module} before it has a larger rank", REMEDY
    return None


def _of_b(module: Module, b: Piece) -> Fault | None:
    if len(b.shape) != 2:
        return "refused", f"its shape is {list(b.shape)}, not a matrix's", REMEDY
    outputs, rank = b.shape
    if rank != module.rank:
        why = f"its rank is {rank}, by the config {module.rank}"
        return "refused", why, REMEDY
    wanted = module.shape[0] if module.shape else outputs
    cut = module.last in _CUT_B and not module.expert
    if outputs != wanted:
        why = f"it has {outputs} outputs, the weight {wanted}"
        return ("altered" if cut and outputs > wanted else "refused"), why, REMEDY
    for (_, before), rows in zip(module.earlier, module.rows, strict=True):
        if before is not None and rows is not None and before.shape[0] > rows:
            return "altered", f"{before.module} before it has too many outputs", REMEDY
    return None
