"""Whether A and B fit the weight that a server adds them to."""

from collections.abc import Iterable, Iterator

from ..._io.torch_models import is_conv1d
from ..._tables import shortened
from .._own_names import core_of
from ._adapter import OTHER, A, Adapter, B, Piece
from ._base import Base, Shape
from ._report import Outcome
from ._rules import Server

Fault = tuple[Outcome, str, str]  # outcome, why, instead

FACTORS = (*A, *B)
REMEDY = "save the adapter again where it was trained"
_ENDS = {"a": "lora_A", "b": "lora_B"}
_ENDS |= {"table_a": "lora_embedding_A", "table_b": "lora_embedding_B"}


def misfit(
    server: Server,
    adapter: Adapter,
    piece: Piece,
    shape: Shape | None,
    base: Base,
    rank: int | None = None,
) -> Fault | None:
    """Returns what is wrong with A or B of a module, None if nothing is.

    Args:
      server: it may take factors that are too small, and leave the rest zero.
      adapter: for the rank, and the other factor.
      piece: A or B; a fault of the other is its fault too.
      shape: of the weight in the base, `[out, in]`, tables `[tokens, features]`; None
        where it is not known.
      base: says whether a weight may be `[in, out]`.
      rank: of A and B; None is what the config says.
    """
    other = adapter.parts.get((piece.module, OTHER[piece.part]))
    if shape is not None and piece.part in ("table_a", "table_b"):
        shape = shape[::-1]
    if other is None:
        fault = unfit(server, adapter, (piece,), shape, base, rank)
        refused = fault is not None and fault[0] == "refused"
        return fault if refused else (server.one_factor, *lone(piece))
    return unfit(server, adapter, (piece, other), shape, base, rank)


def no_matrix(piece: Piece) -> str:
    """Returns in words that a factor has not two axes."""
    return f"its shape is {list(piece.shape)}, not a matrix's"


def lone(piece: Piece) -> tuple[str, str]:
    """Returns what is wrong with A or B alone, and what to do."""
    name = shortened(f"{piece.module}.{_ENDS[OTHER[piece.part]]}", 200)
    return f"{name} is missing", "write both factors"


def unfit(
    server: Server,
    adapter: Adapter,
    pair: tuple[Piece, ...],
    shape: Shape | None,
    base: Base,
    rank: int | None = None,
) -> Fault | None:
    """Returns what is wrong with A and B of a weight `[out, in]`, None if nothing is.

    Args:
      server: see `misfit`.
      adapter: likewise.
      pair: both factors, or the one that is there. The first one's fault is told, but
        for a worse one.
      shape: of the weight, a table's transposed; None where it is not known.
      base: see `misfit`.
      rank: likewise.
    """
    rank = adapter.rank(pair[0].module) if rank is None else rank
    faults = [
        fault for one in pair for fault in _misfits(server, one, rank, shape, base)
    ]
    worst = [fault for fault in faults if fault[0] == "refused"]
    return next(iter(worst or faults), None)


def _misfits(
    server: Server, piece: Piece, rank: int, shape: Shape | None, base: Base
) -> Iterator[Fault]:
    """Yields what is wrong with the sizes of one factor."""
    if len(piece.shape) != 2:
        yield "refused", no_matrix(piece), REMEDY
        return
    first = piece.part in A
    own, size = piece.shape if first else piece.shape[::-1]
    if own != rank:
        why = f"its rank is {own}, by the config {rank}"
        larger = own > max(server.ranks, default=own)
        yield "refused" if larger else server.other_rank, why, REMEDY
    if shape is None or len(shape) != 2:
        return
    transposed = base.facts.conv1d and is_conv1d(piece.module)
    wanted = shape[int(first is not transposed)]
    if size != wanted:
        which = "inputs" if first else "outputs"
        outcome = "refused" if size > wanted else server.smaller
        yield outcome, f"it has {size} {which}, the weight {wanted}", REMEDY


class Names:
    """Names of modules, found by their core: without what only holds a model's body.

    Examples:
      >>> known = Names(["model.layers.0.q", "model.layers.1.q"])
      >>> known.nearest("layers.0.q"), known.nearest("layers.7.q")
      ("the base has 'model.layers.0.q'", '')
    """

    def __init__(self, known: Iterable[str]):
        self._by_core: dict[str, list[str]] = {}
        for name in known:
            self._by_core.setdefault(core_of(name), []).append(name)

    def nearest(self, module: str) -> str:
        """Returns in words which module has the same core, if one has."""
        found = self._by_core.get(core_of(module), [])
        return f"the base has {found[0]!r:.200}" if len(found) == 1 else ""
