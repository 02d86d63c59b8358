"""Names: which torch tensors hold a Flax leaf, as data read in both directions."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from .. import paths
from .._io.torch_models import is_torch_named
from ..errors import PeftError
from ..factors import Axes
from ._places import KINDS, At, Cut, Place, own_place, tied_head
from ._templates import Groups, fill, parse_axes, regex, variants, words_of
from .config import beginnings


@dataclasses.dataclass(frozen=True)
class Entry:
    """One rule between a Flax leaf and torch tensors.

    In both names `{i}` stands for a number. `[...]` stands for text that is in both
    names or in neither: `"[bert/]pooler/dense/kernel"` and
    `"[bert.]pooler.dense.weight"` cover models with and without their prefix.
    `{part:q_proj,k_proj,v_proj}` stands for one of the words. A placeholder that is
    only in the tensor's name is an axis of the leaf: its first axis for stacked layers,
    or the parts of a fused weight.

    `axes` names the leaf's axes. After the arrow it says which of them make up each
    axis of the tensor: `"d h k -> (h k) d"` for a query of `[features, heads, width]`.
    An axis with the name of a placeholder selects the tensor: `"i d o -> o d"` for
    stacked layers, and `"d part h k -> (h k) d"` for parts with an axis of their own.
    `"d (part o) -> o d"` is for parts side by side, with lengths in the proportions of
    `sizes`. The other way round, where torch fuses what are several leaves, the words
    stand in the path, and `"i o -> (part o) i"` says where the parts lie in the tensor.

    Attributes:
      flax: the leaf's path; `params/` before it is optional.
      torch: the tensor's name.
      axes: see above. None transposes a kernel into torch's order, and keeps the axes
        of all other leaves.
      kind: what torch calls the layer: `"linear"`, `"conv1d"` (GPT-2's, `[in, out]`),
        `"packed"` (the `in_proj_weight` of attention), `"embedding"`, `"conv"`,
        `"experts"` (a parameter `[E, out, in]`), `"experts_t"` (`[E, in, out]`),
        `"parameter"` (a bare `[out, in]`) or `"other"`, which cannot be adapted. None
        chooses by the last name of the path and the number of axes. Rules for several
        parameters of one torch module must be in the order in which the module
        registers them.
      sizes: proportions of the parts side by side; if empty, the parts are equal.
      tied: a second tensor that is the same weight in models that tie the two.
      groups: feature groups of a convolution.

    Examples:
      >>> entry = Entry("layer_{i}/q/kernel", "h.{i}.q.weight", "d h k -> (h k) d")
      >>> entry.flax
      'layer_{i}/q/kernel'
    """

    flax: str
    torch: str
    axes: str | None = None
    kind: str | None = None
    sizes: tuple[int, ...] = ()
    tied: str | None = None
    groups: int = 1

    def __post_init__(self):
        if self.kind is not None and self.kind not in KINDS:
            raise PeftError(
                f"{self}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}."
            )
        for template in (self.flax, self.torch, self.tied or ""):
            variants(template)
        if self.axes is not None:
            parse_axes(self.axes, self.inside)

    @property
    def inside(self) -> tuple[str, ...]:
        """Placeholders of words that only the path has."""
        there = words_of(self.torch)
        words = words_of(self.flax).items()
        return tuple(name for name, own in words if own and name not in there)


class Described(NamedTuple):
    """What a rule says of a torch tensor.

    Attributes:
      kind: see `Entry`.
      tied: a second name of the tensor in models that tie it, or None.
    """

    kind: str
    tied: str | None


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Ordered rules between leaves and torch tensors; the first that fits is used.

    Attributes:
      entries: the rules.
      prefix: what torch's names begin with in models with a head, but not in the bare
        model: `"bert."`. Files of both kinds can be read.
      ignore: tensors of whole models that are not parameters (masks, buffers).
      generic: whether a leaf without a rule has its own path, joined by dots, as its
        name.

    Examples:
      >>> rule = Entry("layer_{i}/up/kernel", "bert.layer.{i}.up.weight")
      >>> names = NameMap((rule,), prefix="bert.", ignore=("bert.position_ids",))
      >>> [place.name for place in names.places("params/layer_3/up/kernel", (4, 8))]
      ['bert.layer.3.up.weight']
      >>> names.ignores("bert.position_ids"), names.other_prefix("bert.pooler.weight")
      (True, 'pooler.weight')
    """

    entries: tuple[Entry, ...] = ()
    prefix: str = ""
    ignore: tuple[str, ...] = ()
    generic: bool = False

    def places(
        self,
        path: str,
        shape: tuple[int, ...],
        *,
        op: str = "",
        axes: Axes | None = None,
    ) -> tuple[Place, ...]:
        """Returns the torch tensors that hold the leaf, `()` if no rule fits its path.

        Args:
          path: the path of the leaf.
          shape: the shape of the leaf.
          op: the operation that uses the leaf, if known; only for the generic rule.
          axes: the roles of the leaf's axes, if known; only for the generic rule.

        Raises:
          PeftError: if a rule fits the path, but not the shape.
        """
        for order, entry in enumerate(self.entries):
            found = _match(entry, path)
            if found is not None:
                template, tied, values = found
                places = _places(entry, path, template, tied, values, shape)
                return tuple(dataclasses.replace(p, order=order) for p in places)
        return _generic(path, shape, op, axes) if self.generic else ()

    def describes(self, tensor: str) -> "Described | None":
        """Returns what the rules say of a torch tensor, None if none is for it.

        Args:
          tensor: the tensor's name.

        Examples:
          >>> rule = Entry("layer_{i}/up/kernel", "h.{i}.up.weight", kind="conv1d")
          >>> NameMap((rule,)).describes("h.0.up.weight").kind
          'conv1d'
        """
        for entry in self.entries:
            for n, template in enumerate(variants(entry.torch)):
                found = regex(template).fullmatch(tensor)
                if found:
                    ties = variants(entry.tied) if entry.tied else (None,)
                    tied = ties[min(n, len(ties) - 1)]
                    return Described(
                        entry.kind or _kind(entry.flax, 2),
                        None if tied is None else fill(tied, found.groupdict()),
                    )
        return None

    def ignores(self, name: str) -> bool:
        """Returns whether the tensor `name` of a whole model is not a parameter.

        Args:
          name: the tensor's name.
        """
        return any(
            regex(variant).fullmatch(name)
            for template in self.ignore
            for variant in variants(template)
        )

    def other_prefix(self, name: str) -> str:
        """Returns `name` without the prefix if it has it, or else with the prefix.

        Args:
          name: a tensor's name.
        """
        if self.prefix and name.startswith(self.prefix):
            return name.removeprefix(self.prefix)
        return self.prefix + name


GENERIC = NameMap(generic=True)


class Names(Protocol):
    """What tells the torch tensors of a leaf; see `NameMap`."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The rules."""
        ...

    @property
    def prefix(self) -> str:
        """What names begin with in models with a head."""
        ...

    def places(
        self,
        path: str,
        shape: tuple[int, ...],
        *,
        op: str = "",
        axes: Axes | None = None,
    ) -> tuple[Place, ...]:
        """Returns the torch tensors that hold the leaf."""
        ...

    def other_prefix(self, name: str) -> str:
        """Returns `name` with or without the prefix."""
        ...


def _match(entry: Entry, path: str) -> tuple[str, str | None, dict[str, str]] | None:
    """Returns the templates of the tensor and its tied name, and the path's values."""
    path = path.removeprefix("params/")
    flax, torch = variants(entry.flax), variants(entry.torch)
    tied = variants(entry.tied) if entry.tied else (None,)
    for n, variant in enumerate(flax):
        found = regex(variant).fullmatch(path)
        if found:
            at = min(n, len(torch) - 1), min(n, len(tied) - 1)
            return torch[at[0]], tied[at[1]], found.groupdict()
    return None


def _places(
    entry: Entry,
    path: str,
    template: str,
    tied: str | None,
    values: dict[str, str],
    shape: tuple[int, ...],
) -> tuple[Place, ...]:
    words = words_of(template)
    own = [name for name in words if name not in values]
    left, right = _axes_of(entry, path, own, shape)
    if len(left) != len(shape):
        raise PeftError(
            f"{path!r} has shape {shape}, but the rule {entry.axes or entry.flax!r} is "
            f"for {len(left)} axes."
        )
    picks = {name: i for i, group in enumerate(left) for name in group if name in own}
    absent = [name for name in own if name not in picks]
    if absent:
        raise PeftError(
            f"{path!r}: nothing says which axis {{{absent[0]}}} of {template!r} is. "
            f"Name an axis of the leaf {absent[0]!r} in axes=, or use it in flax=."
        )
    at = {name: i for i, group in enumerate(left) for name in group if name not in own}
    groups = tuple(tuple(at[n] for n in group if n in at) for group in right)
    cut = _cut(entry, path, values, right, groups, shape)
    kind = entry.kind or _kind(path, len(right))
    out = []
    for chosen in _choices(own, words, picks, left, shape, entry, path):
        names = values | {name: word for name, (word, _) in chosen.items()}
        index: list[At | None] = [None] * len(shape)
        for name, (_, where) in chosen.items():
            index[picks[name]] = where
        out.append(
            Place(
                fill(template, names),
                kind,
                tuple(index),
                groups,
                None if tied is None else fill(tied, names),
                entry.groups,
                tuple(
                    axis
                    for name, axis in picks.items()
                    if words[name] and len(left[axis]) == 1
                ),
                cut=cut,
            )
        )
    return tuple(out)


def _cut(
    entry: Entry,
    path: str,
    values: Mapping[str, str],
    right: Groups,
    groups: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
) -> Cut | None:
    """Returns the share of the tensor that the leaf is, if the rule says parts."""
    for axis, group in enumerate(right):
        if group[0] not in entry.inside:
            continue
        words = words_of(entry.flax)[group[0]]
        ratio = entry.sizes or (1,) * len(words)
        number = words.index(values[group[0]])
        size = math.prod(shape[i] for i in groups[axis])
        unit, odd = divmod(size, ratio[number]) if len(ratio) == len(words) else (0, 1)
        if odd or not groups[axis]:
            raise PeftError(
                f"{path!r}: its axis of size {size} is not a multiple of its share in "
                f"{ratio} of {words}. Give their proportions in sizes=."
            )
        start = unit * sum(ratio[:number])
        return Cut(start, start + size, unit * sum(ratio), axis)
    return None


def _choices(
    own: list[str],
    words: dict[str, tuple[str, ...]],
    picks: dict[str, int],
    left: Groups,
    shape: tuple[int, ...],
    entry: Entry,
    path: str,
) -> Iterator[dict[str, tuple[str, At]]]:
    """Yields for each tensor its own placeholders, each with its word and its place."""
    if not own:
        yield {}
        return
    name, rest = own[0], own[1:]
    size = shape[picks[name]]
    if len(left[picks[name]]) > 1:  # parts side by side
        ratio = entry.sizes or (1,) * len(words[name])
        unit, odd = divmod(size, sum(ratio))
        if odd or len(ratio) != len(words[name]):
            raise PeftError(
                f"{path!r}: its axis of size {size} does not divide into {words[name]} "
                f"as {ratio}. Give their proportions in sizes=."
            )
        ends = [unit * sum(ratio[: i + 1]) for i in range(len(ratio))]
        spans = zip([0, *ends[:-1]], ends, strict=True)
        picked = list(zip(words[name], spans, strict=True))
    elif words[name] and len(words[name]) != size:
        raise PeftError(
            f"{path!r}: the size of its axis {name!r} is {size}, but the rule names "
            f"{len(words[name])} parts: {', '.join(words[name])}."
        )
    else:
        labels = words[name] or tuple(map(str, range(size)))
        picked = [(label, i) for i, label in enumerate(labels)]
    for pick in picked:
        for more in _choices(rest, words, picks, left, shape, entry, path):
            yield {name: pick, **more}


def _axes_of(
    entry: Entry, path: str, own: list[str], shape: tuple[int, ...]
) -> tuple[Groups, Groups]:
    """Returns the axes of the rule; if it has none, those for the kind of the leaf."""
    if entry.axes is not None:
        return parse_axes(entry.axes, entry.inside)
    inner = [f"_{i}" for i in range(len(shape) - len(own))]
    kind = entry.kind or _kind(path, len(inner))
    right = inner
    if kind in ("linear", "experts") and len(inner) > 1:
        right = [*inner[:-2], inner[-1], inner[-2]]
    elif kind == "conv":
        right = [*inner[:-3:-1], *inner[:-2]]
    return tuple((n,) for n in [*own, *inner]), tuple((n,) for n in right)


def _kind(path: str, ndim: int) -> str:
    """Returns the kind of a leaf, from its name and its number of axes."""
    name = path.rpartition("/")[2]
    if name == "embedding" and ndim == 2:
        return "embedding"
    if name in ("kernel", "w", "weight") and ndim >= 2:
        return "linear" if ndim == 2 else "conv"
    return "other"


_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "embeddings": "weight",
    "w": "weight",
    "scale": "weight",
    "b": "bias",
}


def _own_kind(path: str, ndim: int, op: str, axes: Axes | None) -> str:
    """Returns the kind of a leaf that has torch's name, by what is known of its use."""
    if axes is None or op not in ("linear", "embedding", "conv") or ndim < 2:
        return "other"
    if op != "linear":
        return op
    in_first = axes.fan_in < axes.fan_out
    if axes.batch:
        return "experts_t" if in_first else "experts"
    if path.endswith(".weight"):
        return "conv1d" if in_first else "linear"
    return "packed" if path.endswith(".in_proj_weight") else "parameter"


def _generic(
    path: str, shape: tuple[int, ...], op: str, axes: Axes | None
) -> tuple[Place, ...]:
    """Returns the tensor whose name is the leaf's own path, with dots."""
    if is_torch_named([path]):
        return (own_place(path, len(shape), _own_kind(path, len(shape), op, axes)),)
    if "/" not in path:
        path = path.replace(".", "/")
    *parents, leaf = path.removeprefix("params/").split("/")
    name = ".".join([*parents, _LEAVES.get(leaf, leaf)])
    ndim = len(shape)
    kind = _kind(path, ndim)
    everything = tuple((i,) for i in range(ndim))
    if axes is not None and op == "linear" and ndim >= 2:
        if axes.batch:
            raise PeftError(
                f"{path!r} is a stack with {len(axes.batch)} batch axes. Give names= "
                "with an Entry that says which torch tensors they are."
            )
        groups = (axes.fan_out, axes.fan_in)
        return (Place(name, "linear", (None,) * ndim, groups),)
    if op == "embedding" and ndim == 2:
        kind = "embedding"
    if op == "conv" and axes is not None:
        if axes.fan_out < axes.fan_in:  # [out, in, *window], as in torch
            features, *window = axes.fan_in
        else:
            *window, features = axes.fan_in
        groups = (axes.fan_out, (features,), *((i,) for i in window))
        return (Place(name, "conv", (None,) * ndim, groups),)
    if kind == "linear":
        groups = everything[::-1]
    elif kind == "conv":
        if ndim == 3 and not op:
            raise PeftError(
                f"{path!r} of shape {shape} is a one-dimensional convolution, or a "
                "weight with heads; its name does not say which. Give the plan instead "
                "of the parameters, or names= with an Entry for it."
            )
        groups = (everything[-1], everything[-2], *everything[:-2])
    else:
        groups = everything
    return (Place(name, kind, (None,) * ndim, groups, tied_head(name)),)


def unnamed(path: str, names: Names) -> str:
    """Returns the message that no rule fits the leaf, with the nearest rule."""
    known = [entry.flax for entry in names.entries]
    near = paths.nearest(path, known, n=1)
    return f"{path!r} has no name in torch" + (
        f" (nearest rule: {near[0]!r})" if near else ""
    )


def with_prefix(
    placed: Sequence[tuple[Place, ...]], names: Names, tensors: Iterable[str]
) -> Sequence[tuple[Place, ...]]:
    """Returns the places with or without their prefix, as more are among `tensors`."""
    if not names.prefix:
        return placed

    def other(place: Place) -> Place:
        return dataclasses.replace(place, name=names.other_prefix(place.name))

    modules = {end for name in tensors for end in beginnings(name)}
    places = [place for found in placed for place in found]
    as_is = sum(place.module in modules for place in places)
    if sum(other(place).module in modules for place in places) <= as_is:
        return placed
    return [tuple(map(other, found)) for found in placed]
