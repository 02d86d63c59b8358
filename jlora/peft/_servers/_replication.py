"""What PEFT's `layer_replication` makes of the modules of a model.

Read from PEFT 0.21.2: `tuners/tuners_utils.py: replicate_layers`. The layers are put in
another order, each as often as the field says, and their names are the new places.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

_LISTS = ("layers", "encoder.layer", "h")  # of the kinds of Llama, BERT and Falcon
_MOST = 10_000  # layers; a field of a few bytes may ask for any number


@dataclasses.dataclass(frozen=True)
class Replication:
    """The order of a model's layers, after `layer_replication`.

    Attributes:
      place: what the names of layers begin with, before their numbers.
      order: the layer that stands at each place; None if all stay as they are.
      fault: why PEFT refuses the field, empty if it does not.
    """

    place: str = ""
    order: tuple[int, ...] | None = None
    fault: str = ""

    def applied(self, table: Mapping[str, T]) -> dict[str, T]:
        """Returns a table by the names of modules or tensors, with the new names.

        Examples:
          >>> Replication("h.", (1, 1)).applied({"h.0.q": 4, "h.1.q": 5, "wte": 6})
          {'wte': 6, 'h.0.q': 5, 'h.1.q': 5}
        """
        if self.order is None:
            return dict(table)
        kept: dict[str, T] = {}
        layers: dict[int, list[tuple[str, T]]] = {}
        for name, value in table.items():
            number, _, rest = name.removeprefix(self.place).partition(".")
            if name.startswith(self.place) and number.isdecimal():
                layers.setdefault(int(number), []).append((rest, value))
            else:
                kept[name] = value
        for place, layer in enumerate(self.order):
            for rest, value in layers.get(layer, ()):
                kept[f"{self.place}{place}.{rest}"] = value
        return kept


def replication_of(value: object, names: Collection[str]) -> Replication:
    """Returns what a value of `layer_replication` makes of a model.

    Args:
      value: the field.
      names: the model's tensors, as its class names them.

    Examples:
      >>> names = ["model.layers.0.up.weight", "model.layers.1.up.weight"]
      >>> replication_of([[0, 2], [1, 2]], names)
      Replication(place='model.layers.', order=(0, 1, 1), fault='')
      >>> replication_of([[0, 3]], names).fault
      'it names layer 2, the model has 2 layers'
    """
    if not value:
        return Replication()
    place = _layers(names)
    if place is None:
        return Replication(fault="PEFT finds no list of layers in this model")
    spans = _spans(value)
    if spans is None:
        return Replication(fault="it is not a list of pairs of whole numbers")
    begins = (name.removeprefix(place) for name in names if name.startswith(place))
    count = len({begin.partition(".")[0] for begin in begins})
    order: list[int] = []
    for start, end in spans:
        for layer in range(start, end):
            if not -count <= layer < count:
                why = f"it names layer {layer}, the model has {count} layers"
                return Replication(fault=why)
            if len(order) == _MOST:
                return Replication(fault=f"it asks for more than {_MOST:,} layers")
            order.append(layer % count)
    return Replication(place, tuple(order))


def _layers(names: Collection[str]) -> str | None:
    """Returns what the names of the layers that PEFT replicates begin with."""
    body = ""
    while any(name.startswith(f"{body}model.") for name in names):
        body += "model."
    if any(name.startswith(f"{body}bert.") for name in names):
        body += "bert."
    for own in _LISTS:
        place = f"{body}{own}."
        inner = [n.removeprefix(place) for n in names if n.startswith(place)]
        if inner:
            numbered = all(n.partition(".")[0].isdecimal() for n in inner)
            return place if numbered else None
    return None


def _spans(value: object) -> Sequence[tuple[int, int]] | None:
    """Returns the pairs in a value, None if it is something else."""
    if not isinstance(value, list):
        return None
    found = []
    for pair in value:
        match pair:
            case [int(start), int(end)]:
                found.append((start, end))
            case _:
                return None
    return found
