"""Torch tensors that hold several leaves side by side: a leaf's share of one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._numerics import filled
from ..errors import PeftError
from ._places import Cut, Place
from .layers import Layer

Shape = tuple[int, ...]


def whole_of(place: Place, shape: Shape) -> tuple[Place, Shape]:
    """Returns the place of a leaf that were the whole tensor, and its shape.

    Args:
      place: where the leaf is, with a cut.
      shape: of the leaf.
    """
    cut = place.cut
    assert cut is not None
    grown = list(shape)
    first = place.groups[cut.axis][0]
    grown[first] = shape[first] * cut.total // (cut.stop - cut.start)
    return dataclasses.replace(place, cut=None), tuple(grown)


def share_of(layer: Layer, cut: Cut) -> Layer:
    """Returns the layer of one leaf: A is shared, B is the leaf's rows."""
    own = slice(cut.start, cut.stop)
    m = None if layer.magnitude is None else layer.magnitude[own]
    return dataclasses.replace(layer, b=layer.b[own], magnitude=m)


def joined(shares: Mapping[Cut, Layer]) -> Layer:
    """Returns the layer of the whole tensor, from those of its leaves.

    Leaves with equal A and scale share A. Otherwise their ranks stand beside each
    other, and B is zero where it is another leaf's; so they do on a device.

    Raises:
      PeftError: if some leaves have a magnitude (DoRA) and others are not adapted.
    """
    first = next(iter(shares.values()))
    cuts = sorted(shares)
    layers = [shares[cut] for cut in cuts]
    lengths = [layer.magnitude for layer in layers if layer.magnitude is not None]
    if lengths and (len(lengths) < len(cuts) or gaps(cuts)):
        raise PeftError("with DoRA all its parts must be adapted, and some are not")
    alike = all(
        isinstance(layer.a, np.ndarray)
        and np.array_equal(layer.a, first.a)
        and layer.scale == first.scale
        for layer in layers
    )
    ranks = [layer.a.shape[0] for layer in layers]
    starts = [0 if alike else sum(ranks[:i]) for i in range(len(ranks))]
    pairs = [
        (
            (slice(cut.start, cut.stop), slice(start, start + layer.a.shape[0])),
            layer.b * np.asarray(layer.scale / first.scale, first.b.dtype),
        )
        for cut, layer, start in zip(cuts, layers, starts, strict=True)
    ]
    rank = ranks[0] if alike else sum(ranks)
    b = filled((cuts[0].total, rank), first.b.dtype, pairs)
    xp: Any = np if isinstance(first.a, np.ndarray) else jnp
    a = first.a if alike else xp.concatenate([layer.a for layer in layers])
    return Layer(a, b, first.scale, xp.concatenate(lengths) if lengths else None)


def gaps(cuts: Sequence[Cut]) -> str:
    """Returns in words what of a tensor no leaf holds, or an empty text."""
    end = 0
    for cut in sorted(cuts):
        if cut.start != end:
            return f"rows {min(cut.start, end)} to {max(cut.start, end)}"
        end = cut.stop
    return "" if end == cuts[0].total else f"rows {end} to {cuts[0].total}"
