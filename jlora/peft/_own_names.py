"""Torch's own names: which leaf an adapter's tensors are for, without a name map.

Where a model's leaves have torch's names and axes, a leaf is the tensor of the same
name. What kind of layer it belongs to comes from the adapter's tensors and from shapes.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from .._io.shards import Slot
from .._io.torch_models import Facts, Side, head_of, sides, sides_by_bias
from .._tables import listed
from ..factors import Axes
from ._leaves import TargetLeaf
from ._places import Place, is_order, own_place, tied_head
from .config import PREFIX, PeftConfig, beginnings, names_module
from .layers import ENDS, LENGTHS, TOKENS
from .names import NameMap

_A, _B = ENDS["linear"]
_TABLE_A, _TABLE_B = ENDS["embedding"]
_ENDS = (_A, _B, _TABLE_A, _TABLE_B, *LENGTHS, TOKENS)
_OUT = ".base_layer.out_proj."  # inside of packed attention
_INNER = ".base_layer"
_WRAPPERS = ("model", "language_model", "vision_model", "module", "_orig_mod")
_Shape = tuple[int, ...]
_Slots = Mapping[str, Slot]
_OPEN = (
    "are square, and nothing tells whether they are [out, in] or [in, out], as GPT-2's "
    "Conv1D. Put the model's config.json beside it, or give names= (--names), such as "
    "jlora.peft.maps.GPT2"
)


@dataclasses.dataclass(frozen=True)
class OwnNames:
    """The places of leaves that have torch's own names, in the way of a `NameMap`.

    Attributes:
      found: the place of each leaf.
      entries: empty.
      prefix: empty.
    """

    found: Mapping[str, Place]
    entries: tuple[()] = ()
    prefix: str = ""

    def places(
        self, path: str, shape: _Shape, *, op: str = "", axes: Axes | None = None
    ) -> tuple[Place, ...]:
        """Returns the place of the leaf."""
        del shape, op, axes
        return (self.found[path],)

    def other_prefix(self, name: str) -> str:
        """Returns `name`."""
        return name


def with_plain_names(slots: _Slots) -> tuple[dict[str, Slot], frozenset[str]]:
    """Returns an adapter's tensors with the second layer of packed attention renamed.

    PEFT keeps the adapter of `out_proj` inside of the module that it wraps; the base
    has no `base_layer`.

    Returns:
      The tensors, and the names of these `out_proj`.
    """
    plain = {name.replace(_OUT, ".out_proj."): slot for name, slot in slots.items()}
    inner = (n.partition(_OUT)[0].removeprefix(PREFIX) for n in slots if _OUT in n)
    return plain, frozenset(f"{module}.out_proj" for module in inner)


def own_names(
    leaves: Sequence[TargetLeaf],
    slots: _Slots,
    file: PeftConfig,
    facts: Facts,
    names: NameMap | None,
) -> tuple[OwnNames, list[str]]:
    """Returns the places of a model's leaves, and in words what nothing decides.

    Args:
      leaves: of the model; their paths are torch's names.
      slots: the adapter's tensors by name, without PEFT's prefix.
      file: the adapter's config.
      facts: what the model's `config.json` says.
      names: a map that knows torch's names of the model, if there is one.
    """
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    in_file = _in_file(shapes, slots)
    raw, questions = _bare(shapes, in_file, slots, file)
    kinds = {path: _kind(in_file[path], shapes[path], slots) for path in shapes}
    flat = [p for p, kind in kinds.items() if kind == "linear" and p not in raw]
    chosen = _sides(leaves, flat, in_file, slots, file, facts, names)
    questions += _unknown([path for path in flat if chosen[path] is None])
    found: dict[str, Place] = {}
    for path, shape in shapes.items():
        place = raw.get(path)
        if place is None:
            kind = chosen.get(path) or kinds[path]
            place = own_place(in_file[path], len(shape), kind)
        known = names and names.describes(path)
        tied = known.tied if known else tied_head(path, shapes)
        found[path] = dataclasses.replace(place, tied=tied)
    return OwnNames(found), questions


def leaves_in(slots: _Slots, file: PeftConfig) -> tuple[list[TargetLeaf], list[str]]:
    """Returns the leaves that an adapter is for, without the model, and what is open.

    Args:
      slots: see `own_names`.
      file: see `own_names`.
    """
    bare = {p.rpartition(".")[0] for p in file.parameters}
    modules = [
        module
        for module in _modules(slots)
        if not any(names_module(b, module.replace(_INNER, "")) for b in bare)
    ]
    heads = {head_of(n) for m in slots for n in beginnings(m)} if file.tying else set()
    packed = {m for m in modules if f"{m}.out_proj.{_A}" in slots}
    flat = [
        module
        for module in modules
        if module not in heads
        and f"{module}.{_A}" in slots
        and len(slots[f"{module}.{_A}"].shape) == 2
    ]
    chosen = sides(
        flat,
        dict.fromkeys(packed, "linear"),
        Facts(),
        flag=file.conv1d,
        adapted=flat,
        strict=False,
    )
    questions = _unknown([m for m in flat if chosen[m] is None])
    if file.parameters or file.tokens:
        questions.append("it adapts bare parameters or rows of a table")
    found = []
    for module in modules:
        end = ".in_proj_weight" if module in packed else ".weight"
        layer = _shape_of(module, slots, chosen.get(module))
        if layer is not None and module not in heads:
            shape, axes = layer
            found.append(_leaf(module + end, shape, slots, axes))
    for name, slot in slots.items():
        own = name.replace(".base_layer.bias", ".bias")
        whole = not name.endswith((*_ENDS, f"{_INNER}.weight"))
        if whole and own.removesuffix(".weight") not in heads:
            found.append(_leaf(own, slot.shape, slots, None, slot))
    return found, questions


def _leaf(
    path: str, shape: _Shape, slots: _Slots, axes: Axes | None, slot: Slot | None = None
) -> TargetLeaf:
    """Returns a leaf of which only the adapter knows."""
    dtype = (slot or next(iter(slots.values()))).dtype
    return TargetLeaf(path, shape, dtype, None, "", axes, None, "")


def _shape_of(
    module: str, slots: _Slots, side: Side | None
) -> tuple[_Shape, Axes] | None:
    """Returns shape and axes of the weight that a module's A and B are for."""
    ends = (_TABLE_A, _TABLE_B) if f"{module}.{_TABLE_A}" in slots else (_A, _B)
    a, b = (slots.get(f"{module}.{end}") for end in ends)
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
        return None
    inputs, outputs = Axes((), (0,), (1,)), Axes((), (1,), (0,))
    if ends[0] == _TABLE_A or side == "conv1d":
        return (a.shape[1], b.shape[0]), inputs
    if len(a.shape) == 2:
        return (b.shape[0], a.shape[1]), outputs
    groups = max(1, a.shape[0] // max(1, b.shape[1]))
    window = tuple(range(1, len(a.shape)))
    return (b.shape[0], a.shape[1] // groups, *a.shape[2:]), Axes((), window, (0,))


def _unknown(names: Sequence[str]) -> list[str]:
    return [f"{listed(names, 3, ', ')} {_OPEN}"] if names else []


def _modules(slots: _Slots) -> list[str]:
    """Returns the modules of the adapter's layers."""
    return list(
        dict.fromkeys(
            name.removesuffix(f".{end}")
            for name in slots
            for end in _ENDS
            if name.endswith(f".{end}")
        )
    )


def _in_file(paths: Collection[str], slots: _Slots) -> dict[str, str]:
    """Returns what each tensor of the model is called in the adapter.

    A model without a head has no prefix before its names, and its adapter may have
    one; or the other way round. What has a text model inside of it is in files
    `language_model.model.layers...`, and in memory `model.language_model.layers...`.
    """
    wholes = (
        n for n in slots if n.endswith((".weight", ".bias")) and ".lora_" not in n
    )
    there = {m.replace(_INNER, "") for m in (*_modules(slots), *wholes)}

    def is_there(name: str) -> bool:
        return name in there or name.rpartition(".")[0] in there

    lost = [name for name in paths if not is_there(name)]
    firsts = {name.partition(".")[0] for name in (*there, *paths) if "." in name}
    tried = [(first, cut) for first in sorted(firsts) for cut in (True, False)]
    moved = [
        {
            name: new
            for name in lost
            if (new := _renamed(name, first, cut)) not in paths and is_there(new)
        }
        for first, cut in tried
    ]
    moved.append(_rewrapped(lost, there))
    return {name: name for name in paths} | max(moved, key=len)


def _rewrapped(lost: Sequence[str], there: Collection[str]) -> dict[str, str]:
    """Returns new names of those that differ from the adapter's only by wrappers.

    A name that would have two new ones, or share one with another, keeps its own.

    Examples:
      >>> _rewrapped(["language_model.model.0.q.weight"], ["model.language_model.0.q"])
      {'language_model.model.0.q.weight': 'model.language_model.0.q.weight'}
    """
    by_core: dict[str, set[str]] = {}
    for name in there:
        by_core.setdefault(core_of(name), set()).add(name)
    found: dict[str, list[str]] = {}  # by what each would be called
    for name in lost:
        module, _, last = name.rpartition(".")
        new = {f"{own}.{last}" for own in by_core.get(core_of(module), ())}
        new |= by_core.get(core_of(name), set())
        if len(new) == 1:
            found.setdefault(new.pop(), []).append(name)
    return {names[0]: new for new, names in found.items() if len(names) == 1}


def core_of(name: str) -> str:
    """Returns a name without the modules that only hold the model's body."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _renamed(name: str, first: str, cut: bool) -> str:
    """Returns the name without its first component, or with another before it."""
    return name.removeprefix(f"{first}.") if cut else f"{first}.{name}"


def _kind(name: str, shape: _Shape, slots: _Slots) -> str:
    """Returns the kind of layer that a tensor is of, `linear` also for a Conv1D."""
    module, _, last = name.rpartition(".")
    ends = [end for end in _ENDS if f"{module}.{end}" in slots]
    if not ends:
        return "other"
    if last == "in_proj_weight" and len(shape) == 2:
        return "packed"
    if last != "weight" or len(shape) < 2:
        return "other"
    if {_TABLE_A, _TABLE_B, TOKENS} & set(ends):
        return "embedding"
    return "linear" if len(shape) == 2 else "conv"


def _sides(
    leaves: Sequence[TargetLeaf],
    flat: Sequence[str],
    in_file: Mapping[str, str],
    slots: _Slots,
    file: PeftConfig,
    facts: Facts,
    names: NameMap | None,
) -> dict[str, Side | None]:
    """Returns the side of each matrix, by shapes, a plan, a map, the model's type."""
    by_path = {leaf.path: leaf for leaf in leaves}
    stem = {path: path.removesuffix(".weight") for path in flat}
    proven = sides_by_bias(
        {leaf.path: leaf.shape for leaf in leaves if leaf.axes is None}
    )
    proven |= {
        module: "linear"  # of packed attention
        for module in stem.values()
        if f"{module.removesuffix('.out_proj')}.in_proj_weight" in by_path
    }
    for path in flat:
        leaf, module = by_path[path], in_file[path].removesuffix(".weight")
        known = names and names.describes(path)
        side = _side_by_shape(leaf.shape, module, slots)
        if leaf.axes is not None:
            side = "conv1d" if leaf.axes.fan_in == (0,) else "linear"
        elif known and known.kind in ("linear", "conv1d"):
            side = "conv1d" if known.kind == "conv1d" else "linear"
        if side is not None:
            proven[stem[path]] = side
    found = sides(
        stem.values(), proven, facts, flag=file.conv1d, adapted=list(stem.values())
    )
    return {path: proven.get(stem[path]) or found[stem[path]] for path in flat}


def _side_by_shape(shape: _Shape, module: str, slots: _Slots) -> Side | None:
    """Returns the side that A and B fit; None if they fit both, or none."""
    a, b = (slots.get(f"{module}.{end}") for end in (_A, _B))
    if a is None or b is None or shape[0] == shape[1]:
        return None
    if len(a.shape) != 2 or len(b.shape) != 2:
        return None
    sizes = b.shape[0], a.shape[1]
    return "linear" if sizes == shape else "conv1d" if sizes == shape[::-1] else None


def _bare(
    shapes: Mapping[str, _Shape],
    in_file: Mapping[str, str],
    slots: _Slots,
    file: PeftConfig,
) -> tuple[dict[str, Place], list[str]]:
    """Returns the places of bare parameters with an adapter, and what is open.

    PEFT wraps a module once for each of its parameters, in the order in which the
    module registers them, which is not in the file. Shapes tell which wrapper is whose.
    """
    by_module: dict[str, list[str]] = {}
    for path in shapes:
        name = in_file[path]
        if any(names_module(entry, name) for entry in file.parameters):
            by_module.setdefault(name.rpartition(".")[0], []).append(path)
    found: dict[str, Place] = {}
    questions = []
    for module, paths in by_module.items():
        fits = list(itertools.islice(_fits(module, paths, shapes, slots), 2))
        if len(fits) > 1:
            questions.append(
                f"{', '.join(paths)}: their shapes do not tell which tensors are "
                "whose, or which axis is the input. Give names= with an Entry for "
                "each, in the order in which the module registers them"
            )
        order = fits[0] if fits else [(0, "experts")] * len(paths)
        for path, (depth, kind) in zip(paths, order, strict=True):
            ndim = len(shapes[path])
            own = kind if ndim == 3 else "parameter" if ndim == 2 else "other"
            place = own_place(in_file[path], ndim, own)
            found[path] = dataclasses.replace(place, order=-depth)
    return found, questions


def _fits(
    module: str, paths: Sequence[str], shapes: Mapping[str, _Shape], slots: _Slots
) -> Iterator[list[tuple[int, str]]]:
    """Yields each parameter's depth of wrapper and kind, in every way that fits."""
    if len(paths) > 6:
        return
    last = [path.rpartition(".")[2] for path in paths]
    for depths in itertools.permutations(range(len(paths))):
        if not is_order([last[depths.index(d)] for d in range(len(paths))][::-1]):
            continue
        stems = [module + _INNER * depth for depth in depths]
        kinds = [
            _raw_kinds(
                shapes[path], slots.get(f"{stem}.{_A}"), slots.get(f"{stem}.{_B}")
            )
            for path, stem in zip(paths, stems, strict=True)
        ]
        for choice in itertools.product(*kinds):
            yield list(zip(depths, choice, strict=True))


def _raw_kinds(shape: _Shape, a: Slot | None, b: Slot | None) -> list[str]:
    """Returns the kinds of bare parameter that A and B fit."""
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return []
    count = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or a.shape[0] % count or b.shape[1] != a.shape[0]:
        return []
    sizes = b.shape[0], a.shape[1]
    if len(shape) == 2:
        return ["parameter"] if sizes == shape else []
    transposed = ["experts_t"] if sizes == (shape[2], shape[1]) else []
    return (["experts"] if sizes == shape[1:] else []) + transposed
