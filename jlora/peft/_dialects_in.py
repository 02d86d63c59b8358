"""Adapter files of other tools, read as PEFT's."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from .._io import paired
from .._io.disk import Json, read_json
from .._io.shards import FileSlot, Slot, open_tensors
from .._io.torch_models import head_of, is_table
from .._tables import listed
from ..errors import PeftError
from ._dialects import (
    ALPHA,
    DIFFUSERS_KEY,
    MLX,
    SWITCH,
    TABLE_A,
    TABLE_B,
    A,
    B,
    Dialect,
    Found,
    names_of,
    rows_of_tables,
    settings_of,
)
from .config import (
    CONFIG,
    FLOATS,
    PREFIX,
    PeftConfig,
    config_fields,
    is_number,
    most_common,
    pattern_lookup,
    patterns,
)
from .layers import MAGNITUDE

_OF_TABLES = {A: TABLE_A, B: TABLE_B}
Opened = tuple[Json, dict[str, Slot], dict[str, str]]  # config, tensors, metadata


@dataclasses.dataclass(frozen=True)
class _Moved(FileSlot):
    """A tensor of another tool, with PEFT's axes.

    Attributes:
      transposed: whether its two axes are swapped.
      sizes: what is its shape then, with axes of size 1 added or left out.
    """

    transposed: bool
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.sizes

    def read(self) -> np.ndarray:
        """Returns the tensor."""
        array = super().read()
        return (array.T if self.transposed else array).reshape(self.sizes)


def translated(
    found: Found,
    place: pathlib.Path,
    modules: Mapping[str, int] | None,
    component: str | None,
    tied: bool | None,
) -> Opened:
    """Returns an adapter of another tool as PEFT would have written it.

    Args:
      found: whose it is, and its file.
      place: the file or the directory, as the user knows it.
      modules: the model's modules, and how many axes their weights have; None if there
        is no model at hand.
      component: which of the models that the file is for; None if there is only one.
      tied: whether the model's table is its output head too; None if nothing tells.

    Raises:
      PeftError: if a file is missing or damaged, or says too little; or if there are
        several models in it and none is chosen, or another one.
    """
    dialect = found.dialect
    slots, metadata = open_tensors(found.file, fault=PeftError)
    if dialect.flat and modules is None:
        raise PeftError(
            f"{str(place)!r} is of {dialect.tool}, which writes `_` for the dots in "
            "names: only with the model at hand are they known. Give base=, the model."
        )
    names = _Names(dialect, modules or {})
    chosen = _chosen(place, names, slots, component)
    if component is not None:
        slots = {k: x for k, x in slots.items() if names.model_of(k) in (chosen, None)}
    named, alphas = _as_named(place, names, slots, chosen, modules or {})
    if dialect is MLX and tied:
        named |= _of_tied_heads(named, slots)
    ends = (f".{A}", f".{TABLE_A}")
    ranks = {
        key.removeprefix(PREFIX).rpartition(".lora_")[0]: slot.shape[
            dialect is MLX and len(slot.shape) == 3
        ]
        for key, slot in named.items()
        if key.endswith(ends) and slot.shape
    }
    _check_ranks(place, ranks, alphas, slots)
    if dialect is MLX:
        config = _of_mlx(place, ranks, metadata)
    else:
        alphas = _of_diffusers(metadata, ranks, chosen) | alphas
        dora = any(key.endswith(MAGNITUDE) for key in named)
        config = _config(ranks, alphas, dora=dora)
    fields = config_fields(config, base_model=None, task_type=None)
    return fields, named, {}


def _chosen(
    place: pathlib.Path, names: "_Names", slots: Iterable[str], component: str | None
) -> str:
    """Returns which model's tensors to read of a file."""
    there = sorted({names.model_of(x) or "" for x in slots if names.is_known(x)})
    told = ", ".join(map(repr, there))
    if component is None and len(there) > 1:
        raise PeftError(
            f"{str(place)!r} has adapters of {len(there)} models: {told}. Say which "
            "one to read, component= (--component)."
        )
    if component is not None and component not in there:
        raise PeftError(
            f"{str(place)!r} has no adapter of component={component!r:.50}, but of "
            f"{told or 'no model that its names tell'}."
        )
    return there[0] if component is None and there else component or ""


def _as_named(
    place: pathlib.Path,
    names: "_Names",
    slots: Mapping[str, FileSlot],
    chosen: str,
    modules: Mapping[str, int],
) -> tuple[dict[str, Slot], dict[str, float]]:
    """Returns the tensors by PEFT's names, and the alphas by module."""
    named: dict[str, Slot] = {}
    alphas: dict[str, float] = {}
    for name, slot in slots.items():
        part, module = names.of(name, chosen)
        if part == ALPHA:
            alphas[module] = _number(name, slot)
            continue
        own: Slot = slot
        if part:
            own = _as_peft(names.dialect, part, name, slot, modules.get(module))
        if part in _OF_TABLES and names.dialect is MLX and is_table(module):
            part = _OF_TABLES[part]
        # What has no part is taken by nothing, and told.
        key = f"{PREFIX}{module}.{part}" if part else f"{PREFIX}{name}"
        if key in named:
            raise PeftError(f"{str(place)!r}: {name!r:.200} is there twice.")
        named[key] = own
    return named, alphas


def _of_tied_heads(
    named: Mapping[str, Slot], slots: Mapping[str, FileSlot]
) -> dict[str, Slot]:
    """Returns the factors of heads: MLX has those of their table, with its own axes."""
    found: dict[str, Slot] = {}
    for name in named:
        table = name.removeprefix(PREFIX).removesuffix(f".{TABLE_A}")
        head = head_of(table) if name.endswith(f".{TABLE_A}") else None
        if head is not None and f"{table}.lora_b" in slots:
            found[f"{PREFIX}{head}.{A}"] = slots[f"{table}.lora_b"]
            found[f"{PREFIX}{head}.{B}"] = slots[f"{table}.lora_a"]
    return found


def _check_ranks(
    place: pathlib.Path,
    ranks: Mapping[str, int],
    alphas: Iterable[str],
    slots: Iterable[str],
) -> None:
    """Raises a PeftError for an alpha without its A, or if there is no A at all."""
    lost = [module for module in alphas if module not in ranks]
    if lost:
        raise PeftError(
            f"{str(place)!r} has an alpha, and no A, of {listed(map(repr, lost), 3)}: "
            "take the rest of the file too, or leave the alpha out."
        )
    if not ranks:
        raise PeftError(
            f"{str(place)!r}: none of its tensors is A of a module of the model, "
            f"{listed(map(repr, slots), 2, ', ')}. Give names=, or the model with "
            "the names that the tool has for it."
        )


class _Names:
    """What the modules of a tool's file are called in torch."""

    def __init__(self, dialect: Dialect, modules: Collection[str]):
        self.dialect = dialect
        self.keys = [(part, re.compile(p)) for part, p in dialect.keys]
        self.begin = re.compile(dialect.begin)
        self.modules: dict[str, str] = {}
        own = {self._written(module) for module in modules}
        twice = set()
        for module in modules:
            first, *others = map(self._written, names_of(module))
            for name in (first, *(x for x in others if x not in own)):
                twice |= {name} if name in self.modules else set()
                self.modules[name] = module
        for name in twice:  # two modules of one name: neither is meant
            del self.modules[name]

    def _written(self, module: str) -> str:
        """Returns a name as the tool writes it."""
        return module.replace(".", "_") if self.dialect.flat else module

    def is_known(self, name: str) -> bool:
        """Returns whether the tool has tensors of such a name."""
        return any(pattern.fullmatch(name) for _, pattern in self.keys)

    def model_of(self, name: str) -> str | None:
        """Returns the model that a name begins with; None if it does not."""
        match = self.begin.match(name)
        return match.groupdict().get("component") if match else None

    def of(self, name: str, chosen: str) -> tuple[str, str]:
        """Returns the part and the module of a tensor of the chosen model.

        They are empty texts for any other tensor.
        """
        for part, pattern in self.keys:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            groups = match.groupdict()
            module = groups["module"]
            if self.dialect is MLX:
                module = module.replace(SWITCH, ".experts.")
            if last := groups.get("last"):
                module = f"{module}.{'to_out.0' if last == 'to_out' else last}"
            module = self.modules.get(module, None if self.dialect.flat else module)
            if module is None or (groups.get("component") or "") != chosen:
                return "", ""
            return part, module
        return "", ""


def _as_peft(
    dialect: Dialect, part: str, name: str, slot: FileSlot, ndim: int | None
) -> Slot:
    """Returns a tensor with PEFT's axes: those of a convolution if the weight has."""
    sizes = slot.shape
    # MLX's SwitchLinear, of all experts, has the axes that `layout="stacked"` has.
    transposed = dialect.transposed and part in (A, B) and len(sizes) == 2
    if transposed:
        sizes = sizes[::-1]
    elif part == MAGNITUDE and dialect.flat:
        sizes = _lengths(name, sizes, ndim or 2)
    elif part in (A, B) and ndim is not None and not set(sizes[2:]) - {1}:
        sizes = (*sizes, *[1] * ndim)[:ndim]
    if sizes == slot.shape and not transposed:
        return slot
    return _Moved(slot.file, slot.info, slot.handles, slot.fault, transposed, sizes)


def _lengths(name: str, sizes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns the sizes that PEFT's magnitude has for a `dora_scale`.

    LyCORIS has the norms over the inputs as `[out, 1, ...]` (`wd_on_out`, its default
    today), which are PEFT's `[out]`, of a convolution `[1, out, 1, ...]`.
    """
    count = math.prod(sizes)
    if not sizes or sizes[0] != count:
        raise PeftError(
            f"{name!r:.200} is {list(sizes)}: a length for each input (wd_on_out=False "
            "of LyCORIS), and PEFT's DoRA and jlora's have one for each output, "
            "[out, 1]. Merge the adapter where it was made, and take the difference "
            "with jlora.extract."
        )
    return (1, count, *[1] * (ndim - 2)) if ndim > 2 else (count,)


def _number(name: str, slot: Slot) -> float:
    """Returns the one number that a tensor holds."""
    size = math.prod(slot.shape)
    array = slot.read() if size == 1 and slot.dtype in FLOATS else np.full(1, np.nan)
    value = float(array.reshape(()) if size == 1 else np.nan)
    if not (math.isfinite(value) and value > 0):
        raise PeftError(f"{name!r:.200} is not one positive number.")
    return value


def _config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    dora: bool,
    dropout: float = 0.0,
) -> PeftConfig:
    """Returns the config; a module without an alpha has its rank, a scale of one."""
    own = {module: float(alphas.get(module, rank)) for module, rank in ranks.items()}
    rank, alpha = most_common(ranks.values()), most_common(own.values())
    return PeftConfig(
        r=rank,
        alpha=alpha,
        rank_pattern=patterns(ranks, rank),
        alpha_pattern=patterns(own, alpha),
        dora=dora,
        dropout=dropout,
        targets=tuple(ranks),
    )


def _of_mlx(
    place: pathlib.Path, ranks: Mapping[str, int], metadata: Mapping[str, str]
) -> PeftConfig:
    """Returns the config that MLX has beside its tensors."""
    folder = place if place.is_dir() else place.parent
    fields = read_json(paired.find(folder, CONFIG, metadata), PeftError)
    kind = fields.get("fine_tune_type", "lora")
    own = fields.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(own, dict):
        raise PeftError(
            f"{str(folder / CONFIG)!r}: fine_tune_type is {kind!r:.50} and "
            f"lora_parameters {own!r:.50}. jlora reads MLX's LoRA and DoRA, with "
            "lora_parameters."
        )
    scale, drop = own.get("scale"), own.get("dropout", 0.0)
    if not (is_number(scale) and is_number(drop) and scale > 0 and 0 <= drop < 1):
        raise PeftError(
            f"{str(folder / CONFIG)!r}: scale is {scale!r:.50} and dropout "
            f"{drop!r:.50}. A scale is a positive number, and a drop rate is in [0, 1)."
        )
    alphas = {module: scale * rank for module, rank in ranks.items()}
    tables = [module for module in ranks if is_table(module)]
    if tables and kind == "dora":
        raise PeftError(rows_of_tables(tables))
    found = _config(ranks, alphas, dora=kind == "dora", dropout=float(drop))
    # A table that MLX has for the head too is adapted in both places.
    return dataclasses.replace(found, tying=bool(tables))


def _of_diffusers(
    metadata: Mapping[str, str], ranks: Mapping[str, int], component: str
) -> dict[str, float]:
    """Returns the alphas that diffusers wrote into a file's metadata, if it did."""
    if DIFFUSERS_KEY not in metadata:
        return {}
    begin = f"{component}." if component else ""
    own = {
        k.removeprefix(begin): v
        for k, v in settings_of(metadata).items()
        if k.startswith(begin)
    }
    pattern = own.get("alpha_pattern")
    by_module = pattern if isinstance(pattern, dict) else {}
    numbers = [own.get("lora_alpha"), *by_module.values()]
    wrong = [repr(x) for x in numbers if not (is_number(x) and x > 0)]
    if wrong:
        raise PeftError(f"{DIFFUSERS_KEY} has other alphas: {listed(wrong, 3)}.")
    try:
        find = pattern_lookup(by_module.items())
    except ValueError as error:
        raise PeftError(f"{DIFFUSERS_KEY}: {error}.") from error
    out = {}
    for module, rank in ranks.items():
        hit = next(filter(None, map(find, names_of(module))), None)
        alpha = float(hit[1] if hit else own["lora_alpha"])
        out[module] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
    return out
