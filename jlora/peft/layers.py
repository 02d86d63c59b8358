"""Layers: a leaf and its factors as the tensors of PEFT's layers, and back.

Writing takes arrays on the host, where numbers decide which ranks and parts are in use,
or JAX arrays, of which it keeps all. Reading is NumPy.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .._numerics import filled
from ..errors import PeftError
from ..factors import Axes, FusedParts, Spec
from ._places import Place

Label = int | str  # an axis of the leaf, or "r" for the rank axis

RAW = ("experts", "experts_t", "parameter")  # bare parameters, without `.weight`
ENDS = {  # what PEFT calls A and B of a module
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
MAGNITUDE = "lora_magnitude_vector"
LENGTHS = (MAGNITUDE, f"{MAGNITUDE}.weight")  # as it is saved, and as it was once
TOKENS = "token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What PEFT keeps of one adapted module.

    Attributes:
      a: `lora_A`, `[r, in]`, of convolutions `[r, in, *window]`.
      b: `lora_B`, `[out, r]`, of convolutions `[out, r, 1, ...]`.
      scale: the multiplier of their product.
      magnitude: DoRA's, `[out]`, or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


def weight_out(place: Place, leaf: np.ndarray) -> np.ndarray:
    """Returns the tensor that `place` is, or the leaf's share of it, from the leaf."""
    part = leaf[_cut(place.index)]
    order = [i for group in place.groups for i in group]
    rest = [i for i in range(leaf.ndim) if i not in order]
    whole = dataclasses.replace(place, cut=None)
    return part.transpose(*rest, *order).reshape(whole.shape(leaf.shape))


def weight_in(place: Place, tensor: np.ndarray, out: np.ndarray) -> None:
    """Writes the tensor that `place` is into its part of the leaf `out`."""
    out[_cut(place.index)] = as_leaf(place, tensor, out.shape)


def as_leaf(place: Place, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the part of a leaf of `shape` that a tensor is; of axes moved, a view."""
    sizes = place.sizes(shape)
    order = [i for group in place.groups for i in group]
    rest = [i for i in range(len(shape)) if i not in order]
    split = place.own_part(tensor).reshape([sizes[i] for i in (*rest, *order)])
    return split.transpose(np.argsort([*rest, *order]))


def _cut(index: Sequence[int | tuple[int, int] | None]) -> tuple[slice, ...]:
    """Returns the index as slices, so that every axis stays."""
    return tuple(
        slice(None)
        if at is None
        else slice(at, at + 1)
        if isinstance(at, int)
        else slice(*at)
        for at in index
    )


def misfit(place: Place, axes: Axes) -> str | None:
    """Returns in words why factors over `axes` are none of the layer at `place`."""
    if not place.roles:
        return "the rule says kind 'other', which takes no adapter"
    own = place.axes()
    for role in ("batch", "fan_in", "fan_out"):
        if sorted(getattr(own, role)) != sorted(getattr(axes, role)):
            return (
                f"its factors have {role} axes {getattr(axes, role)}, torch's layer "
                f"({place.kind}) has {getattr(own, role)}: plan it with Rule(..., "
                f"axes={own}), or mend the Entry"
            )
    return None


def _split(place: Place, axes: Axes) -> tuple[list[int], list[int], list[int]]:
    """Returns the leaf's axes of experts, fan-in and fan-out in the tensor's order."""
    by_role: dict[str, list[int]] = {"e": [], "i": [], "o": []}
    for role, group in zip(place.roles, place.groups, strict=True):
        by_role[role] += group
    return by_role["e"], by_role["i"], by_role["o"]


def _arranged(
    x: np.ndarray, labels: Sequence[Label], order: Sequence[Label]
) -> np.ndarray:
    """Returns `x` with its labelled axes in `order`, others (of size 1) dropped."""
    rest = [i for i, label in enumerate(labels) if label not in order]
    x = x.transpose(*rest, *(labels.index(label) for label in order))
    return x.reshape(x.shape[len(rest) :])


def _restored(
    x: np.ndarray, labels: Sequence[Label], order: Sequence[Label]
) -> np.ndarray:
    """Returns the inverse of `_arranged`."""
    rest = [label for label in labels if label not in order]
    now = [*rest, *order]
    x = x.reshape(*(1 for _ in rest), *x.shape)
    return x.transpose([now.index(label) for label in labels])


def _labels(axes: Axes) -> tuple[list[Label], list[Label]]:
    return [*axes.batch, *axes.fan_in, "r"], [*axes.batch, "r", *axes.fan_out]


def dims(place: Place, sizes: Sequence[int], role: str) -> list[int]:
    """Returns the tensor's sizes of the axes with `role`."""
    return [
        math.prod(sizes[i] for i in group)
        for r, group in zip(place.roles, place.groups, strict=True)
        if r == role
    ]


def layer_out(
    place: Place,
    axes: Axes,
    shape: tuple[int, ...],
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    scale: float,
    parts: FusedParts | None = None,
) -> Layer:
    """Returns the layer at `place`, from the factors of a leaf of `shape`.

    With `parts`, it has the ranks of the parts that lie in it, none if there are none.
    """
    labels_a, labels_b = _labels(axes)
    cut = dict(enumerate(_cut(place.index))) | {"r": slice(None)}
    a = a[tuple(cut[label] for label in labels_a)]
    b = b[tuple(cut[label] for label in labels_b)]
    if parts is not None:
        own = _columns(place, parts)
        a, b = a[..., own], b[(*(slice(None),) * len(axes.batch), own)]
    elif any(at is not None for at in place.index) and isinstance(a, np.ndarray):
        a, b = _trimmed(a, b, place, len(axes.batch))
    sizes = place.sizes(shape)
    experts, fan_in, fan_out = _split(place, axes)
    ins, outs = dims(place, sizes, "i"), dims(place, sizes, "o")
    rank = a.shape[-1]
    if place.kind in RAW:
        a = _arranged(a, labels_a, [*experts, "r", *fan_in])
        b = _arranged(b, labels_b, [*fan_out, "r", *experts])
        count = math.prod(sizes[i] for i in experts)
        layer_a, layer_b = a.reshape(count * rank, *ins), b.reshape(*outs, rank * count)
        return Layer(layer_a, layer_b, scale)
    layer_a = _arranged(a, labels_a, ["r", *fan_in]).reshape(rank, *ins)
    layer_b = _arranged(b, labels_b, [*fan_out, "r"]).reshape(*outs, rank)
    if place.kind == "conv":
        layer_a, layer_b = _grouped(layer_a, layer_b, place.feature_groups)
        layer_b = layer_b.reshape(*layer_b.shape, *(1 for _ in ins[1:]))
    if magnitude is not None:
        labels_m = [*axes.batch, *axes.fan_out]
        m = magnitude[tuple(cut[label] for label in labels_m)]
        m = _arranged(m, labels_m, fan_out).reshape(outs)
        if place.kind == "conv":
            m = m.reshape(1, *outs, *(1 for _ in ins[1:]))
        magnitude = m
    return Layer(layer_a, layer_b, scale, magnitude)


def _columns(place: Place, parts: FusedParts) -> np.ndarray:
    """Returns for each rank of a fused weight whether its part lies in `place`."""
    at = place.index[parts.axis]
    first, last = (at, at + 1) if isinstance(at, int) else at or (0, sum(parts.sizes))
    out = []
    for i in parts.adapted:
        begin = sum(parts.sizes[:i])
        inside = begin < last and first < begin + parts.sizes[i]
        out += [inside] * parts.ranks[i]
    return np.array(out)


def _trimmed(
    a: np.ndarray, b: np.ndarray, place: Place, rank_axis: int
) -> tuple[np.ndarray, ...]:
    """Returns the factors of a part without the ranks that other parts use.

    A rank whose B is zero adds nothing. In a stack those are padding if A is zero too;
    a fresh adapter, B all zero, stays whole.
    """
    used_a = (a != 0).reshape(-1, a.shape[-1]).any(0)
    used_b = (np.moveaxis(b, rank_axis, -1) != 0).reshape(-1, a.shape[-1]).any(0)
    is_part = any(
        i in place.parts or isinstance(at, tuple) for i, at in enumerate(place.index)
    )
    keep = used_b if is_part and used_b.any() else used_a | used_b
    if keep.all():
        return a, b
    return a[..., keep], np.compress(keep, b, axis=rank_axis)


def is_empty(layer: Layer) -> bool:
    """Returns whether the layer adds nothing; on a device, whether no rank is left."""
    if not isinstance(layer.a, np.ndarray):
        return 0 in layer.a.shape
    return not (layer.a != 0).any() and not (layer.b != 0).any()


def in_use(found: Mapping[Place, Layer]) -> dict[Place, Layer]:
    """Returns the layers without parts of a fused weight that others leave zero.

    In a fresh adapter B is zero in all parts, and all stay; on a device too.
    """
    if not all(isinstance(layer.b, np.ndarray) for layer in found.values()):
        return dict(found)
    fused = any(p.parts or any(isinstance(at, tuple) for at in p.index) for p in found)
    trained = any((layer.b != 0).any() for layer in found.values())
    if not fused or not trained:
        return dict(found)
    return {
        place: layer
        for place, layer in found.items()
        if (layer.b != 0).any() or layer.magnitude is not None
    }


def _grouped(a: np.ndarray, b: np.ndarray, groups: int) -> tuple[np.ndarray, ...]:
    """Returns factors of a grouped kernel as PEFT's, whose A sees every input."""
    if groups == 1:
        return a, b
    rank, n_in, *window = a.shape
    pairs = [((g, slice(None), g), a) for g in range(groups)]
    wide = filled((groups, rank, groups, n_in, *window), a.dtype, pairs)
    return wide.reshape(groups * rank, groups * n_in, *window), b


def _ungrouped(
    place: Place, a: np.ndarray, b: np.ndarray, n_in: int
) -> tuple[np.ndarray, ...]:
    """Returns the inverse of `_grouped`; A may differ between the groups.

    Raises:
      PeftError: if an output group sees inputs of another: no grouped kernel does.
    """
    groups = a.shape[1] // n_in
    if groups == 1:
        return a, b
    n_out, rank = b.shape[0], a.shape[0] // groups
    blocks = a.reshape(groups, rank, groups, n_in, *a.shape[2:])
    own = np.stack([blocks[g, :, g] for g in range(groups)])
    if np.count_nonzero(blocks) != np.count_nonzero(own):
        raise PeftError(
            f"{place.module} is a convolution of {groups} groups whose adapter mixes "
            "them, so no kernel holds its update (PEFT cannot merge it either)"
        )
    if (own == own[0]).all():
        return own[0], b
    wide = np.zeros((groups, n_out // groups, groups, rank), b.dtype)
    for g, part in enumerate(b.reshape(groups, n_out // groups, rank)):
        wide[g, :, g] = part
    return own.reshape(groups * rank, *own.shape[2:]), wide.reshape(n_out, -1)


def check_layer(place: Place, shape: tuple[int, ...], layer: Layer, rank: int) -> str:
    """Returns in words what is wrong with the layer's shapes, or nothing."""
    sizes = place.sizes(shape)
    ins, outs = dims(place, sizes, "i"), dims(place, sizes, "o")
    n_out = math.prod(outs)
    count = math.prod(dims(place, sizes, "e"))
    want_a, want_b = (rank * count, *ins), (n_out, rank * count)
    if place.kind == "conv":
        groups = max(1, layer.a.shape[1] // max(1, ins[0])) if layer.a.ndim > 1 else 1
        if rank % groups or n_out % groups:
            return f"rank {rank} and {n_out} outputs do not divide into {groups} groups"
        want_a = (rank, groups * ins[0], *ins[1:])
        want_b = (n_out, rank // groups, *(1 for _ in ins[1:]))
    if layer.a.shape != want_a or layer.b.shape != want_b:
        return (
            f"A is {list(layer.a.shape)} and B {list(layer.b.shape)}, rank {rank} "
            f"(from the config) needs {list(want_a)} and {list(want_b)}"
        )
    want_m = (1, n_out, *(1 for _ in ins[1:])) if place.kind == "conv" else (n_out,)
    if layer.magnitude is not None and layer.magnitude.shape != want_m:
        return (
            f"the magnitude is {list(layer.magnitude.shape)}, not {list(want_m)} "
            "as the weight needs"
        )
    return ""


def layer_in(
    place: Place, axes: Axes, shape: tuple[int, ...], layer: Layer
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the layer as factors of the part of the leaf that it is for.

    Shapes: those of a leaf with sizes `place.sizes(shape)`.
    """
    sizes = place.sizes(shape)
    experts, fan_in, fan_out = _split(place, axes)
    labels_a, labels_b = _labels(axes)
    a, b = layer.a, layer.b
    if place.kind == "conv":
        b = b.reshape(b.shape[:2])
        a, b = _ungrouped(place, a, b, dims(place, sizes, "i")[0])
    split_in, split_out = [sizes[i] for i in fan_in], [sizes[i] for i in fan_out]
    many = [sizes[i] for i in experts]
    count = math.prod(many)
    rank = a.shape[0] // count if place.kind in RAW else a.shape[0]
    if place.kind in RAW:
        a = a.reshape(*many, rank, *split_in)
        b = b.reshape(*split_out, rank, *many)
        a = _restored(a, labels_a, [*experts, "r", *fan_in])
        b = _restored(b, labels_b, [*fan_out, "r", *experts])
        return a, b, None
    a = _restored(a.reshape(rank, *split_in), labels_a, ["r", *fan_in])
    b = _restored(b.reshape(*split_out, rank), labels_b, [*fan_out, "r"])
    m = layer.magnitude
    if m is not None:
        m = _restored(m.reshape(split_out), [*axes.batch, *axes.fan_out], fan_out)
    return a, b, m


def assemble(
    places: Sequence[Place],
    axes: Axes,
    shape: tuple[int, ...],
    layers: Mapping[str, Layer],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Returns `(a, b, magnitude, scale)` of a leaf from the layers of its places.

    A stack takes one layer each, padded with zeros to the largest rank. Parts of a
    fused weight share A if theirs are equal; otherwise their factors stand beside each
    other, each part with ranks of its own. A place without a layer adds nothing.
    """
    present = [p for p in places if p.name in layers]
    first = layers[present[0].name]
    if len(places) == 1:
        a, b, m = layer_in(places[0], axes, shape, first)
        return a, b, m, first.scale
    by_batch: dict[tuple, list[Place]] = {}
    for place in present:
        by_batch.setdefault(tuple(place.index[i] for i in axes.batch), []).append(place)
    scale = first.scale
    stack = {
        at: _beside(group, axes, shape, layers, scale) for at, group in by_batch.items()
    }
    rank = max(a.shape[-1] for a, _ in stack.values())
    dtype = np.result_type(*(x.dtype for pair in stack.values() for x in pair))
    a = np.zeros(axes.a_shape(shape, rank), dtype)
    b = np.zeros(axes.b_shape(shape, rank), dtype)
    for at, (own_a, own_b) in stack.items():
        cut = _cut(at)
        own = slice(own_a.shape[-1])
        a[(*cut, ..., own)] = own_a
        b[(*cut, own)] = own_b
    magnitude = None
    if first.magnitude is not None:
        magnitude = np.zeros(
            [shape[i] for i in (*axes.batch, *axes.fan_out)], first.magnitude.dtype
        )
        for place in present:
            _, _, m = layer_in(place, axes, shape, layers[place.name])
            cuts = _cut(place.index)
            magnitude[tuple(cuts[i] for i in (*axes.batch, *axes.fan_out))] = m
    return a, b, magnitude, scale


def _beside(
    places: Iterable[Place],
    axes: Axes,
    shape: tuple[int, ...],
    layers: Mapping[str, Layer],
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of one entry of a stack, all parts together."""
    n = len(axes.batch)
    blocks = []
    for place in places:
        layer = layers[place.name]
        a, b, _ = layer_in(place, axes, shape, layer)
        if layer.scale != scale:
            b = (b * np.float64(layer.scale / scale)).astype(b.dtype)
        cuts = _cut(place.index)
        blocks.append((a, b, tuple(cuts[i] for i in axes.fan_out)))
    shared = all(
        a.shape == blocks[0][0].shape and np.array_equal(a, blocks[0][0])
        for a, _, _ in blocks
    )
    ranks = [a.shape[-1] for a, _, _ in blocks]
    rank = ranks[0] if shared else sum(ranks)
    a = blocks[0][0] if shared else np.concatenate([a for a, _, _ in blocks], -1)
    batch = blocks[0][1].shape[:n]
    dtype = np.result_type(*(b.dtype for _, b, _ in blocks))
    wide = np.zeros((*batch, rank, *(shape[i] for i in axes.fan_out)), dtype)
    start = 0
    for own, (_, b, cuts) in zip(ranks, blocks, strict=True):
        span = slice(0, rank) if shared else slice(start, start + own)
        wide[(*(slice(None) for _ in range(n)), span, *cuts)] = b
        start += own
    return a, wide


def by_part(
    spec: Spec, places: Sequence[Place], found: Mapping[str, Layer]
) -> list[tuple[int, Place, Layer]] | None:
    """Returns `(rank, place, layer)` of each adapted part, None if they differ."""
    parts = spec.parts
    assert parts is not None
    out = []
    for i in parts.adapted:
        begin = sum(parts.sizes[:i])
        span = begin, begin + parts.sizes[i]
        own = [p for p in places if p.index[parts.axis] == span and p.name in found]
        if len(own) != 1:
            return None
        out.append((parts.ranks[i], own[0], found[own[0].name]))
    return out if len(out) == len(found) else None


def spread(spec: Spec, shape: tuple[int, ...], b: np.ndarray) -> np.ndarray:
    """Returns the B of fused parts with each part at its place and zeros elsewhere."""
    parts, axes = spec.parts, spec.axes
    assert parts is not None
    rank_axis = len(axes.batch)
    out_axis = rank_axis + 1 + axes.fan_out.index(parts.axis)
    first, pairs = 0, []
    for i in parts.adapted:
        begin = sum(parts.sizes[:i])
        to, of = [slice(None)] * b.ndim, [slice(None)] * b.ndim
        to[rank_axis] = of[rank_axis] = slice(first, first + parts.ranks[i])
        to[out_axis] = slice(begin, begin + parts.sizes[i])
        of[out_axis] = slice(0, parts.sizes[i])
        pairs.append((tuple(to), b[tuple(of)]))
        first += parts.ranks[i]
    return filled(axes.b_shape(shape, spec.rank), b.dtype, pairs)


def apart(parts: FusedParts | None, places: Sequence[Place]) -> bool:
    """Returns whether each of the parts has a place of its own."""
    if parts is None:
        return False
    spans = {place.index[parts.axis] for place in places}
    begins = [sum(parts.sizes[:i]) for i in parts.adapted]
    return {
        (begin, begin + parts.sizes[i])
        for i, begin in zip(parts.adapted, begins, strict=True)
    } <= spans


def compact(
    spec: Spec, shape: tuple[int, ...], pairs: Sequence[tuple[int, Place, Layer]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of `FusedParts`: in B each part begins at index 0."""
    parts, axes = spec.parts, spec.axes
    assert parts is not None
    longest = max(parts.sizes[i] for i in parts.adapted)
    sizes = tuple(longest if i == parts.axis else n for i, n in enumerate(shape))
    a, b = axes.a_shape(sizes, spec.rank), axes.b_shape(sizes, spec.rank)
    dtype = np.result_type(*(layer.a.dtype for _, _, layer in pairs))
    wide_a, wide_b = np.zeros(a, dtype), np.zeros(b, dtype)
    first, batch = 0, (slice(None),) * len(axes.batch)
    for rank, place, layer in pairs:
        own = slice(first, first + rank)
        part_a, part_b, _ = layer_in(place, axes, shape, layer)
        wide_a[..., own] = part_a
        cut = tuple(slice(n) for n in part_b.shape[len(axes.batch) + 1 :])
        wide_b[(*batch, own, *cut)] = part_b
        first += rank
    return wide_a, wide_b


def nested(raw: Iterable[Place]) -> dict[Place, str]:
    """Returns where PEFT keeps the adapters of bare parameters of one module.

    It wraps the module once for each, the one registered first innermost.
    """
    by_module: dict[str, list[Place]] = {}
    for place in raw:
        by_module.setdefault(place.name.rpartition(".")[0], []).append(place)
    stems = {}
    for module, group in by_module.items():
        group.sort(key=lambda place: place.order)
        for depth, place in enumerate(reversed(group)):
            stems[place] = module + ".base_layer" * depth
    return stems
