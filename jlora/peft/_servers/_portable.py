"""What a server refuses of an adapter that is about to be written."""

from collections.abc import Iterator, Mapping

from ..._io.disk import Json
from ..._tables import listed
from ..config import PREFIX, PeftConfig
from ._adapter import Adapter, piece_of
from ._base import Shape
from ._refusals import of_config
from ._rules import VLLM
from ._vllm import of_all, of_any_base


def refused_by_vllm(
    fields: Json, config: PeftConfig, shapes: Mapping[str, Shape], *, one_file: bool
) -> Iterator[str]:
    """Yields in words what vLLM rejects of an adapter, whatever base it serves.

    Args:
      fields: of `adapter_config.json`.
      config: the same, read.
      shapes: of the tensors, by their names without PEFT's prefix.
      one_file: whether they are written to one file.
    """
    pieces = tuple(piece_of(PREFIX + name, shape) for name, shape in shapes.items())
    about = Adapter(fields, config, pieces, one_file)
    told: set[str] = set()
    for verdict in of_config(VLLM, about):
        told.add(verdict.why)
        field = verdict.name.rpartition(": ")[2]
        value = f" ({field}={fields[field]!r:.100})" if field in fields else ""
        yield f"{verdict.why}{value}: {verdict.instead}"
    for why, instead in of_all(pieces):
        yield f"{why}: {instead}"
    names: dict[tuple[str, str], list[str]] = {}
    for piece in pieces:
        # Of what is kept whole the config has told already.
        if (own := of_any_base(piece)) and not (told and piece.part == "whole"):
            names.setdefault(own, []).append(piece.name.removeprefix(PREFIX))
    for (why, instead), every in names.items():
        if why not in told:
            yield f"{listed(every, 3)}: {why}: {instead}"
