"""The leaves of a model in a file: plain tensors, and those that several make up."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import CheckpointError
from ..quantised import Quantized
from . import coded, torch_quantised
from .disk import Fault, Path
from .shards import Slot
from .torch_models import facts_of


@dataclasses.dataclass(frozen=True, eq=False)
class CodedSlot:
    """A leaf that several tensors make up.

    Attributes:
      form: its shape and dtype, or `Quantized` of shapes.
      read: returns it, as an array or `Quantized` of arrays on the host.
      widened: why it is read as a dense array, if it is: what its codes are.
    """

    form: Any
    read: Callable[[], Any]
    widened: str = ""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array that it stands for."""
        return self.form.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        return tuple(self.form.shape)


LeafSlot = Slot | CodedSlot


def leaves_in(
    slots: Mapping[str, Slot],
    metadata: Mapping[str, str],
    place: Path,
    fault: Fault = CheckpointError,
) -> tuple[dict[str, LeafSlot], dict[str, str]]:
    """Returns the leaves that tensors make up, and what of them cannot be read.

    Args:
      slots: the tensors by name.
      metadata: of their files.
      place: where they are; a `config.json` there says more of some formats.
      fault: the error to raise.

    Returns:
      The leaves by name. Also, by the name that a leaf would have, in words why it is
      not read: it is quantised in a format that jlora does not have.

    Raises:
      fault: if the description of quantised arrays is damaged.
    """
    made: dict[str, CodedSlot] = {}
    used: set[str] = set()
    try:
        if coded.KEY in metadata:
            own = coded.described_in(metadata[coded.KEY], slots)
            for path, q in own.items():
                form = coded.of_forms(q, slots)
                made[path] = CodedSlot(form, lambda q=q: _read(q, slots))
                used |= {*jax.tree.leaves(q)}
        plain = {name: slot for name, slot in slots.items() if name not in used}
        if not torch_quantised.has_scales(plain):
            return _in_order(slots, made, used), {}
        found, refused = torch_quantised.found_in(plain, facts_of(pathlib.Path(place)))
    except CheckpointError as error:
        raise fault(f"{str(place)!r}: {error}") from error
    for name, leaf in found.items():
        made[name] = CodedSlot(leaf.form, leaf.read, leaf.widened)
        used |= {name, *leaf.tensors}
    return _in_order(slots, made, used), refused


def _read(q: Quantized, slots: Mapping[str, Slot]) -> Quantized:
    return jax.tree.map(lambda name: slots[name].read(), q)


def _in_order(
    slots: Mapping[str, Slot], made: Mapping[str, CodedSlot], used: set[str]
) -> dict[str, LeafSlot]:
    """Returns plain leaves in the order of the file, and the others after them."""
    return {name: slot for name, slot in slots.items() if name not in used} | {**made}
