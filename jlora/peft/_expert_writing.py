"""Renames the experts of an adapter that is written: to the layout asked for."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..errors import PeftError
from ._experts import (
    Expert,
    ExpertLayout,
    Experts,
    Named,
    Tensor,
    from_parameter,
    in_transformers,
    named,
    role_of,
)
from ._places import Place
from .layers import Layer

_ONE = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_PARAMETER = re.compile(r"(.*\bexperts)\.(\w+)")
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Relaid(NamedTuple):
    """What a layout makes of the experts of an adapter.

    Attributes:
      made: the tensors in the layout's names.
      modules: the modules, one for each expert, that they replace.
      raw: the bare parameters that they replace.
    """

    made: Named
    modules: list[str]
    raw: list[Place]


def relaid(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, float],
    raw: Mapping[Place, Layer],
    counts: Mapping[Place, int],
    layout: ExpertLayout,
) -> Relaid:
    """Returns the experts among `tensors` and `raw` in the names of `layout`.

    Args:
      tensors: of the modules, by name.
      scales: the multiplier of each module.
      raw: the bare parameters.
      counts: how many experts each of them has.
      layout: what to write.

    Raises:
      PeftError: if the layout cannot hold them, or there are none.
    """
    experts: Experts = {}
    own: dict[str, list[str]] = {}
    places = []
    transposed = False
    for place in sorted(raw, key=lambda place: place.order):
        match = _PARAMETER.fullmatch(place.name)
        if match is None or place.kind == "parameter":
            continue
        layer = raw[place]
        expert = from_parameter(layer.a, layer.b, counts[place], layer.scale, "peft")
        experts.setdefault(match[1], {})[role_of(match[2])] = expert
        own.setdefault(match[1], []).append(match[2])
        places.append(place)
        transposed |= place.kind == "experts_t"
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name in tensors:
        match = _ONE.fullmatch(name.removesuffix(_A)) if name.endswith(_A) else None
        if match is not None:
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = match[0]
    for (module, projection), ones in groups.items():
        if layout.form in ("peft", "unsloth"):
            module = in_transformers(module)
        experts.setdefault(module, {})[role_of(projection)] = _piled(
            tensors, scales, [ones[e] for e in sorted(ones)]
        )
    if not experts:
        raise PeftError(
            f"layout={layout.form!r} is for experts, and the adapter has none: their "
            "names in torch have `experts` before a number or the parameter."
        )
    if places and not transposed and layout.interleaved is None:
        layout = dataclasses.replace(layout, interleaved=False)
    modules = [module for ones in groups.values() for module in ones.values()]
    return Relaid(named(experts, layout, own), modules, places)


def _piled(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float], modules: list[str]
) -> Expert:
    """Returns modules of one projection as one; ranks are filled up with zeros."""
    scale = scales[modules[0]]
    pairs = [(tensors[m + _A], tensors[m + _B]) for m in modules]
    xp = np if all(isinstance(x, np.ndarray) for pair in pairs for x in pair) else jnp
    rank = max(len(a) for a, _ in pairs)
    a = [xp.pad(a, [(0, rank - len(a)), (0, 0)]) for a, _ in pairs]
    b = [
        xp.pad(b, [(0, 0), (0, rank - b.shape[1])])
        * np.asarray(scales[m] / scale, b.dtype)
        for m, (_, b) in zip(modules, pairs, strict=True)
    ]
    return Expert(xp.stack(a), xp.stack(b), scale)
