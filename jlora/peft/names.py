"""Names: which torch tensors hold a Flax leaf, as data read in both directions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from .. import paths
from ..errors import PeftError
from ..factors import Axes

Groups = tuple[tuple[str, ...], ...]  # names of axes, "d (h k)" as (("d",), ("h", "k"))
At = int | tuple[int, int]  # a place on an axis of a leaf: one index, or (start, stop)

# Roles of the tensor's own axes: e experts, o out, i in.
KINDS = {
    "linear": "oi",
    "conv1d": "io",
    "embedding": "io",
    "conv": "oi",
    "experts": "eoi",
    "experts_t": "eio",
    "parameter": "oi",
    "other": "",
}


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
    `sizes`.

    Attributes:
      flax: the leaf's path; `params/` before it is optional.
      torch: the tensor's name.
      axes: see above. None transposes a kernel into torch's order, and keeps the axes
        of all other leaves.
      kind: what torch calls the layer: `"linear"`, `"conv1d"` (GPT-2's, `[in, out]`),
        `"embedding"`, `"conv"`, `"experts"` (a parameter `[E, out, in]`), `"experts_t"`
        (`[E, in, out]`), `"parameter"` (a bare `[out, in]`) or `"other"`, which cannot
        be adapted. None chooses by the last name of the path and the number of axes.
        Rules for several parameters of one torch module must be in the order in which
        the module registers them.
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
            _variants(template)
        if self.axes is not None:
            _parse_axes(self.axes)


@dataclasses.dataclass(frozen=True)
class Place:
    """One torch tensor that holds a leaf, or a slice of it.

    Attributes:
      name: the tensor's name.
      kind: see `Entry`.
      index: for each axis of the leaf, what the tensor holds of it: one index, a slice
        `(start, stop)`, or None for the whole axis.
      groups: for each axis of the tensor, the leaf's axes that make it up.
      tied: a second name of the tensor in models that tie it.
      feature_groups: feature groups of a convolution.
      parts: the leaf's axes that select a part of a fused weight.
      order: number of the rule.
    """

    name: str
    kind: str
    index: tuple[At | None, ...]
    groups: tuple[tuple[int, ...], ...]
    tied: str | None = None
    feature_groups: int = 1
    parts: tuple[int, ...] = ()
    order: int = 0

    @property
    def module(self) -> str:
        """The tensor's name without `.weight`; the whole name of a bare parameter."""
        return self.name.removesuffix(".weight")

    @property
    def roles(self) -> str:
        """A letter for each axis of the tensor: o out, i in, e expert."""
        roles = KINDS[self.kind]
        return roles + "i" * (len(self.groups) - len(roles)) if roles else ""

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the slice in this tensor, for a leaf of `shape`."""
        return tuple(
            n if at is None else 1 if isinstance(at, int) else at[1] - at[0]
            for n, at in zip(shape, self.index, strict=True)
        )

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of this tensor, for a leaf of `shape`."""
        sizes = self.sizes(shape)
        return tuple(math.prod(sizes[i] for i in group) for group in self.groups)

    def axes(self) -> Axes:
        """Returns the roles that the leaf's axes have in the layer."""
        roles = {i: r for r, group in zip(self.roles, self.groups, strict=True)
                 for i in group}  # fmt: skip
        stacked = [i for i, at in enumerate(self.index) if isinstance(at, int)]
        roles |= dict.fromkeys(stacked, "e") | dict.fromkeys(self.parts, "o")
        batch, fan_in, fan_out = (
            tuple(i for i in range(len(self.index)) if roles.get(i) == role)
            for role in "eio"
        )
        return Axes(batch, fan_in, fan_out)


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

    def ignores(self, name: str) -> bool:
        """Returns whether the tensor `name` of a whole model is not a parameter.

        Args:
          name: the tensor's name.
        """
        return any(
            _regex(variant).fullmatch(name)
            for template in self.ignore
            for variant in _variants(template)
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

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")


def _words(template: str) -> dict[str, tuple[str, ...]]:
    """Returns the words of each placeholder; `()` for one that stands for a number."""
    return {
        name: tuple(words.split(",")) if words else ()
        for name, words in _PLACEHOLDER.findall(template)
    }


@functools.lru_cache(maxsize=4096)
def _variants(template: str) -> tuple[str, ...]:
    """Returns the template with its optional texts, and without them."""
    if template.count("[") != template.count("]"):
        raise PeftError(f"{template!r} has a '[' or ']' without its partner.")
    full = template.replace("[", "").replace("]", "")
    bare = re.sub(r"\[[^\]]*\]", "", template)
    return (full,) if full == bare else (full, bare)


@functools.lru_cache(maxsize=4096)
def _regex(template: str) -> re.Pattern[str]:
    out, end, seen = "", 0, set()
    for found in _PLACEHOLDER.finditer(template):
        out += re.escape(template[end : found.start()])
        name, words = found.groups()
        if name in seen:
            out += f"(?P={name})"
        else:
            choice = "|".join(map(re.escape, words.split(","))) if words else r"\d+"
            out += f"(?P<{name}>{choice})"
        seen.add(name)
        end = found.end()
    return re.compile(out + re.escape(template[end:]))


def _match(entry: Entry, path: str) -> tuple[str, str | None, dict[str, str]] | None:
    """Returns the templates of the tensor and its tied name, and the path's values."""
    path = path.removeprefix("params/")
    flax, torch = _variants(entry.flax), _variants(entry.torch)
    tied = _variants(entry.tied) if entry.tied else (None,)
    for n, variant in enumerate(flax):
        found = _regex(variant).fullmatch(path)
        if found:
            at = min(n, len(torch) - 1), min(n, len(tied) - 1)
            return torch[at[0]], tied[at[1]], found.groupdict()
    return None


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(values[found.group(1)]), template)


@functools.lru_cache(maxsize=4096)
def _parse_axes(text: str) -> tuple[Groups, Groups]:
    """Returns both sides of `"d h k -> (h k) d"` as groups of names."""
    sides = text.split("->")
    if len(sides) != 2:
        raise PeftError(f"axes {text!r} needs one arrow, as in 'd h k -> (h k) d'.")
    left, right = (
        tuple(
            tuple((inner or single).split())
            for inner, single in re.findall(r"\(([^)]*)\)|(\S+)", side)
        )
        for side in sides
    )
    names = [name for group in left for name in group]
    used = [name for group in right for name in group]
    wrong = [n for n in used if n not in names]
    if wrong or len(set(names)) != len(names) or len(set(used)) != len(used):
        raise PeftError(
            f"axes {text!r}: each axis needs one name, and a name on the right must "
            "also be on the left."
        )
    return left, right


def _places(
    entry: Entry,
    path: str,
    template: str,
    tied: str | None,
    values: dict[str, str],
    shape: tuple[int, ...],
) -> tuple[Place, ...]:
    words = _words(template)
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
    groups = tuple(tuple(at[name] for name in group) for group in right)
    kind = entry.kind or _kind(path, len(right))
    out = []
    for chosen in _choices(own, words, picks, left, shape, entry, path):
        names = values | {name: word for name, (word, _) in chosen.items()}
        index: list[At | None] = [None] * len(shape)
        for name, (_, where) in chosen.items():
            index[picks[name]] = where
        out.append(
            Place(
                _fill(template, names),
                kind,
                tuple(index),
                groups,
                None if tied is None else _fill(tied, names),
                entry.groups,
                tuple(
                    axis
                    for name, axis in picks.items()
                    if words[name] and len(left[axis]) == 1
                ),
            )
        )
    return tuple(out)


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
        return _parse_axes(entry.axes)
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


def _generic(
    path: str, shape: tuple[int, ...], op: str, axes: Axes | None
) -> tuple[Place, ...]:
    """Returns the tensor whose name is the leaf's own path, with dots."""
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
    return (Place(name, kind, (None,) * ndim, groups),)


def untied(placed: Iterable[tuple[Place, ...]]) -> list[tuple[Place, ...]]:
    """Returns the places of a model, without ties to names of other leaves."""
    placed = list(placed)
    own = {place.name for places in placed for place in places}
    return [
        tuple(
            dataclasses.replace(place, tied=None) if place.tied in own else place
            for place in places
        )
        for places in placed
    ]


def unnamed(path: str, names: NameMap) -> str:
    """Returns the message that no rule fits the leaf, with the nearest rule."""
    known = [entry.flax for entry in names.entries]
    near = paths.nearest(path, known, n=1)
    return f"{path!r} has no name in torch" + (
        f" (nearest rule: {near[0]!r})" if near else ""
    )
