"""Reads the experts of a file in any layout, and renames them as the model has them."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from .._io.disk import Json
from .._io.shards import HeldSlot, Slot
from .._tables import listed
from ..errors import PeftError
from ._experts import (
    BLOCK,
    ROLES,
    Expert,
    ExpertLayout,
    Experts,
    Form,
    Named,
    from_parameter,
    in_order,
    in_transformers,
    named,
    role_of,
)
from ._leaves import TargetLeaf
from ._places import Place, own_place
from .config import (
    FLOATS,
    Pattern,
    PeftConfig,
    endings,
    is_plain,
    names_module,
    pattern_lookup,
    patterns,
)
from .layers import RAW
from .names import Names

T = TypeVar("T")
_END = r"\.lora_([AB])\.weight"
_PATTERNS = {  # kinds of names: the module, what follows it, and the half
    "one": re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)" + _END),
    "stack": re.compile(r"(.*\bexperts)\.([^\d\W]\w*)" + _END),
    "raw": re.compile(r"(.*\bexperts)((?:\.base_layer)*)" + _END),
}
_IN_MODEL = re.compile(r"(.*\bexperts)\.(?:(\d+)\.)?(\w+?)(?:\.weight)?")


Scales = Callable[[str], tuple[int, float]]  # a module's rank and multiplier


class Module(NamedTuple):
    """The experts of one module of the model.

    Attributes:
      form: `"peft"` for bare parameters, `"per-expert"` for a module each.
      names: the parameters in the order of their registration, or the projections.
      number: how many experts it has.
      transposed: whether a parameter is `[E, in, out]`.
    """

    form: Form
    names: tuple[str, ...]
    number: int
    transposed: bool


def modules_of(leaves: Iterable[TargetLeaf], names: Names | None) -> dict[str, Module]:
    """Returns what the model calls its experts, by the module's name in torch.

    Args:
      leaves: of the model.
      names: what the leaves are called in torch; None if their paths are torch's names.
    """
    found: dict[str, dict[str, list[tuple[Place, int]]]] = {}
    for leaf in leaves:
        for place in _places(leaf, names):
            match = _IN_MODEL.fullmatch(place.name)
            if match is None or (match[2] is None and place.kind not in RAW):
                continue
            sizes = place.shape(leaf.shape)
            many = int(match[2]) + 1 if match[2] else sizes[0] if len(sizes) > 2 else 1
            own = found.setdefault(match[1], {})
            own.setdefault(match[3], []).append((place, many))
    return {module: _module(own, names is not None) for module, own in found.items()}


def _places(leaf: TargetLeaf, names: Names | None) -> tuple[Place, ...]:
    if names is None:
        raw = not leaf.path.endswith((".weight", ".bias")) and len(leaf.shape) == 3
        kind = "experts" if raw else "linear" if len(leaf.shape) == 2 else "other"
        return (own_place(leaf.path, len(leaf.shape), kind),)
    try:
        return names.places(leaf.path, leaf.shape, op=leaf.op, axes=leaf.axes)
    except PeftError:  # the reader tells
        return ()


def _module(own: Mapping[str, list[tuple[Place, int]]], known: bool) -> Module:
    places = {name: group[0][0] for name, group in own.items()}
    raw = any(place.kind in RAW for place in places.values())
    names = in_order(own)
    if raw and known:
        names = sorted(own, key=lambda name: places[name].order)
    count = max(many for group in own.values() for _, many in group)
    transposed = not known or any(p.kind == "experts_t" for p in places.values())
    return Module("peft" if raw else "per-expert", tuple(names), count, transposed)


def relaid(
    slots: Mapping[str, Slot],
    config: PeftConfig,
    fields: Json,
    modules: Mapping[str, Module],
    layout: ExpertLayout | None,
    *,
    interleaved: bool | None = None,
) -> tuple[dict[str, Slot], PeftConfig, list[str]]:
    """Returns tensors and config with the model's names for experts, and questions.

    Args:
      slots: the file's tensors by name, without PEFT's prefix.
      config: the file's config.
      fields: the same, as JSON.
      modules: what the model calls its experts.
      layout: how the file keeps them; None if names and shapes are to tell.
      interleaved: as in `ExpertLayout`, where `layout` does not say it and the model's
        type does.

    Raises:
      PeftError: if the file is not in `layout`, or its experts do not fit together.
    """
    file = _File(slots, config, modules, layout)
    file.read()
    questions = []
    if layout is None and "peft" in file.forms.values() and is_unsloth(fields):
        questions.append(
            "unsloth wrote the file, and until September 2026 it paired the experts "
            "of B otherwise than PEFT: say layout='unsloth' (--layout) if it trained "
            "with an older one, layout='peft' if not"
        )
    if layout is not None:
        _check_form(file.forms, layout)
    made = Named({}, {}, {}, [])
    for module, experts in file.experts.items():
        name, own = file.name(module), file.own(module)
        target = _target(own, layout, interleaved)
        new = named({name: experts}, target, {name: own.names}, file.forms[module])
        if new.ranks.keys() & made.ranks.keys():
            raise PeftError(f"Two modules of the file are for the experts of {name!r}.")
        made.tensors.update(new.tensors)
        made.ranks.update(new.ranks)
        made.scales.update(new.scales)
        made.parameters.extend(new.parameters)
    if not made.tensors:
        return dict(slots), config, questions
    kept = {name: slot for name, slot in slots.items() if name not in file.used}
    kept |= {name: HeldSlot(x) for name, x in made.tensors.items()}
    return kept, _renamed(config, kept, made, file.sources), questions


@dataclasses.dataclass
class _File:
    """The experts of a file that the model calls otherwise.

    Attributes:
      slots: its tensors by name.
      config: its config.
      modules: what the model calls its experts.
      layout: how the file keeps them, if that was said.
      forms: the form of each module in the file.
      experts: the factors of those that are not in the model's form.
      used: the tensors that they are.
      sources: the names of their modules or parameters, as patterns know them.
    """

    slots: Mapping[str, Slot]
    config: PeftConfig
    modules: Mapping[str, Module]
    layout: ExpertLayout | None
    forms: dict[str, str] = dataclasses.field(default_factory=dict)
    experts: Experts = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    sources: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.lookup = _scales(self.config)

    def name(self, module: str) -> str:
        """Returns what the model calls a module of the file that has experts."""
        return _match(module, self.modules) or ""

    def own(self, module: str) -> Module:
        """Returns what the model calls the experts of a module of the file."""
        return self.modules[self.name(module)]

    def read(self) -> None:
        """Reads the experts."""
        ones: dict[tuple[str, str], dict[int, Expert]] = {}
        for (module, kind, key), halves in self._pairs().items():
            same = (BLOCK in module) == (BLOCK in self.name(module))
            if same and _is_native(kind, key, self.own(module), self.layout):
                self.forms[module] = self.own(module).form
            elif len(halves) == 2:  # else the reader tells which half is missing
                a, b = (self._factor(halves[half]) for half in "AB")
                source = f"{module}.{key}"
                if kind == "one":
                    number, _, name = key.partition(".")
                    one = _expert(a, b, self.lookup, source)
                    own = ones.setdefault((module, name), {})
                    if int(number) in own:
                        raise PeftError(f"{source}: expert {int(number)} is twice.")
                    own[int(number)] = one
                elif kind == "stack":
                    self._stack(module, key, a, b)
                else:
                    source = self._parameter(module, key, a, b)
                self.used.update(halves.values())
                self.sources.add(source)
        for (module, name), own in ones.items():
            self.forms[module] = "per-expert"
            many = _piled(f"{module}.*.{name}", own, self.own(module).number)
            self._add(module, name, many)

    def _factor(self, name: str) -> Slot:
        """Returns a tensor, which has to hold floats."""
        slot = self.slots[name]
        if slot.dtype not in FLOATS:
            raise PeftError(f"{name!r:.200} is {slot.dtype}, and not a float type.")
        return slot

    def _add(self, module: str, name: str, expert: Expert) -> None:
        """Keeps the factors of a projection, of which a file may have only one set."""
        found = self.experts.setdefault(module, {})
        if role_of(name) in found:
            raise PeftError(
                f"{module}: the file has the factors of {role_of(name)!r} twice, under "
                f"two names or in two layouts. Leave one of them out."
            )
        found[role_of(name)] = expert

    def _pairs(self) -> dict[tuple[str, str, str], dict[str, str]]:
        """Returns the names of A and B by module, kind and what follows its name."""
        pairs: dict[tuple[str, str, str], dict[str, str]] = {}
        for name, slot in self.slots.items():
            for kind, pattern in _PATTERNS.items():
                match = pattern.fullmatch(name)
                if match is None or _match(match[1], self.modules) is None:
                    continue
                if (kind == "stack") != (len(slot.shape) == 3):
                    continue
                *key, half = match.groups()[1:]
                pairs.setdefault((match[1], kind, ".".join(key)), {})[half] = name
                break
        return pairs

    def _stack(self, module: str, name: str, a: Slot, b: Slot) -> None:
        number = self.own(module).number
        expert = _stacked(a, b, self.lookup, f"{module}.{name}", number)
        shared = number > 1 and 1 in (a.shape[0], b.shape[0])
        self.forms[module] = "shared" if shared else "stacked"
        self._add(module, name, expert)

    def _parameter(self, module: str, wrappers: str, a: Slot, b: Slot) -> str:
        own = self.own(module)
        source = _parameter_of(module, wrappers, self.config, own)
        rank, scale = self.lookup(source)
        many = rank * own.number
        if (
            len(b.shape) != 2
            or len(a.shape) != 2
            or (a.shape[0], b.shape[1])
            != (
                many,
                many,
            )
        ):
            raise PeftError(
                f"{source}: A is {list(a.shape)} and B {list(b.shape)}, {own.number} "
                f"experts of rank {rank} (from the config) need [{many}, in] and "
                f"[out, {many}]."
            )
        form = "peft" if self.layout is None else self.layout.form
        self.forms[module] = form = "unsloth" if form == "unsloth" else "peft"
        expert = from_parameter(a.read(), b.read(), own.number, scale, form)
        self._add(module, source.rpartition(".")[2], expert)
        return source


def _target(
    own: Module, layout: ExpertLayout | None, interleaved: bool | None
) -> ExpertLayout:
    """Returns the layout that the model needs."""
    if layout is not None and layout.interleaved is not None:
        interleaved = layout.interleaved
    if interleaved is None and not own.transposed and own.form == "peft":
        interleaved = False
    roles = {role_of(name): name for name in own.names}
    called: tuple[str, ...] = ()
    if own.form == "per-expert" and {"gate", "up", "down"} <= roles.keys():
        called = roles["gate"], roles["up"], roles["down"]
    return ExpertLayout(own.form, called, interleaved)


def _check_form(forms: Mapping[str, str], layout: ExpertLayout) -> None:
    alike = {"stacked": {"stacked"}, "unsloth": {"unsloth", "peft"}}
    odd = [
        f"{module} is {form!r}"
        for module, form in forms.items()
        if form not in alike.get(layout.form, {layout.form})
    ]
    if odd or not forms:
        told = f"by their names and shapes {listed(odd, 3)}" if odd else "it has none"
        raise PeftError(f"The experts of the file are not {layout.form!r}: {told}.")


def _expert(a: Slot, b: Slot, lookup: Scales, source: str) -> Expert:
    rank, scale = lookup(source)
    if (
        len(a.shape) != 2
        or len(b.shape) != 2
        or a.shape[0] != rank
        or b.shape[1] != rank
    ):
        raise PeftError(
            f"{source}: A is {list(a.shape)} and B {list(b.shape)}, rank {rank} (from "
            "the config) needs [rank, in] and [out, rank]."
        )
    return Expert(a.read()[None], b.read()[None], scale)


def _stacked(a: Slot, b: Slot, lookup: Scales, source: str, count: int) -> Expert:
    rank, scale = lookup(source)
    if (
        not {a.shape[0], b.shape[0]} <= {1, count}
        or a.shape[1] != rank
        or b.shape[2] != rank
    ):
        raise PeftError(
            f"{source}: A is {list(a.shape)} and B {list(b.shape)}; {count} experts of "
            f"rank {rank} (from the config) need [experts, rank, in] and [experts, "
            "out, rank], or 1 instead of the experts."
        )
    x, y = a.read(), b.read()
    return Expert(
        np.broadcast_to(x, (count, *x.shape[1:])),
        np.broadcast_to(y, (count, *y.shape[1:])),
        scale,
    )


def _piled(source: str, ones: Mapping[int, Expert], count: int) -> Expert:
    """Returns one `Expert` of many, padded to the largest rank."""
    if sorted(ones) != list(range(count)):
        absent = [str(i) for i in range(count) if i not in ones]
        raise PeftError(
            f"{source}: the model has {count} experts, the file lacks "
            f"{listed(absent, 5, ', ') or 'none'} and has {len(ones)}."
        )
    sizes = {(one.a.shape[2], one.b.shape[1]) for one in ones.values()}
    if len(sizes) > 1:
        told = ", ".join(f"{n_in} to {n_out}" for n_in, n_out in sorted(sizes))
        raise PeftError(f"{source}: the experts differ in their sizes, {told}.")
    rank = max(one.a.shape[1] for one in ones.values())
    scale = ones[0].scale
    a = [_padded(ones[i].a[0], 0, rank) for i in range(count)]
    b = [
        _padded(ones[i].b[0], 1, rank)
        * np.asarray(ones[i].scale / scale, ones[i].b.dtype)
        for i in range(count)
    ]
    return Expert(np.stack(a), np.stack(b), scale)


def _padded(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    more = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return np.pad(x, more)


def _scales(config: PeftConfig) -> Scales:
    """Returns a function from a module to its rank and the multiplier."""
    rank_of = pattern_lookup(config.rank_pattern)
    alpha_of = pattern_lookup(config.alpha_pattern)

    def find(module: str) -> tuple[int, float]:
        rank, alpha = rank_of(module), alpha_of(module)
        r = int(rank[1]) if rank else config.r
        number = alpha[1] if alpha else config.alpha
        return r, number / (math.sqrt(r) if config.rslora else r)

    return find


def _parameter_of(module: str, depth: str, config: PeftConfig, own: Module) -> str:
    """Returns which parameter a wrapper of a module is for, the outermost the last."""
    known = own.names if own.form == "peft" else [n for r in ROLES.values() for n in r]
    there = [
        name
        for name in known
        if any(names_module(t, f"{module}.{name}") for t in config.parameters)
    ]
    ordered = there if own.form == "peft" else in_order(there)
    at = len(ordered) - 1 - depth.count(".base_layer")
    if at < 0:
        raise PeftError(
            f"{module}{depth} has factors, but target_parameters names "
            f"{listed(map(repr, there), 3, ', ') or 'none'} of its parameters."
        )
    return f"{module}.{ordered[at]}"


def _match(module: str, modules: Collection[str]) -> str | None:
    """Returns which module of the model is meant, with or without a prefix."""
    if module in modules:
        return module
    own = in_transformers(module)
    known = {m: in_transformers(m) for m in modules}
    near = [m for m, n in known.items() if f".{n}".endswith(f".{own}")]
    near = near or [m for m, n in known.items() if own.endswith(f".{n}")]
    return near[0] if len(near) == 1 else None


def _is_native(kind: str, key: str, own: Module, layout: ExpertLayout | None) -> bool:
    """Returns whether the model calls these factors as the file does."""
    if kind == "raw":
        return own.form == "peft" and (layout is None or layout.form != "unsloth")
    if kind == "one":
        return own.form == "per-expert" and key.partition(".")[2] in own.names
    return False


def is_unsloth(fields: Json) -> bool:
    """Returns whether a config is of unsloth, which once ordered B otherwise."""
    mapping = fields.get("auto_mapping")
    return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))


def _renamed(
    config: PeftConfig,
    slots: Mapping[str, Slot],
    made: Named,
    sources: Collection[str],
) -> PeftConfig:
    """Returns the config with the names of `made` in place of those of `sources`."""
    modules = {name.rpartition(".lora_")[0] for name in slots if ".lora_" in name}
    rest = modules - {name.rpartition(".lora_")[0] for name in made.tensors}
    gone, kept = ({end for m in own for end in endings(m)} for own in (sources, rest))

    def is_needed(entry: str) -> bool:
        return entry not in gone or entry in kept

    def needed(pattern: Pattern[T]) -> Pattern[T]:
        return tuple(
            (key, value)
            for key, value in pattern
            if (is_needed(key) if is_plain(key) else _hits(key, sources, rest))
        )

    alphas = {
        name: made.scales[name] * (math.sqrt(r) if config.rslora else r)
        for name, r in made.ranks.items()
    }
    targets = config.targets
    if isinstance(targets, str):
        targets = "all-linear"  # the pattern is for the names in the file
    elif targets is not None:
        new = [name for name in made.ranks if name not in made.parameters]
        targets = (*filter(is_needed, targets), *new)
    return dataclasses.replace(
        config,
        rank_pattern=(
            *patterns(made.ranks, config.r),
            *needed(config.rank_pattern),
        ),
        alpha_pattern=(
            *patterns(alphas, config.alpha),
            *needed(config.alpha_pattern),
        ),
        targets=targets,
        parameters=(*filter(is_needed, config.parameters), *made.parameters),
    )


def _hits(key: str, sources: Collection[str], rest: Collection[str]) -> bool:
    """Returns whether a pattern is for a module that is left, or for none."""
    find = pattern_lookup(((key, 0),))
    return any(map(find, rest)) or not any(map(find, sources))
