"""Adapter files of other tools, read as PEFT's: MLX, kohya's scripts, diffusers.

Each differs from PEFT in names, axes and in where the scale is. What a tool calls the
parts of an adapter is data. A file of a tool that jlora does not read is told by name.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from .._io import paired
from .._io.disk import Json, read_json
from .._io.shards import FileSlot, Slot, find_tensors, open_tensors, tensor_files
from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError, PeftError
from ._sdxl import stability_name
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
from .layers import ENDS, MAGNITUDE

Opened = tuple[Json, dict[str, Slot], dict[str, str]]  # config, tensors, metadata

MLX_STEM, DIFFUSERS_STEM = "adapters", "pytorch_lora_weights"
DIFFUSERS_KEY = "lora_adapter_metadata"  # in the metadata of diffusers' files
_COMPONENTS = "unet|transformer(?:_2)?|text_encoder(?:_[23])?|controlnet|prior|vae"


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a tool calls the tensors of an adapter.

    Attributes:
      name: as `save` takes it.
      tool: as a user knows it.
      keys: for each of PEFT's names the patterns of the tool's, which have a group
        `module`, and perhaps `component`, the model of several, and `last`.
      turned: whether A is `[in, r]` and B `[r, out]`.
      flat: whether the module's name has underscores in place of dots. Reading then
        takes Stability's names of SDXL's modules too.
      begin: a pattern of the beginning of names, where the rest is as other tools'.
      place: where the tool's source says so.
    """

    name: str
    tool: str
    keys: tuple[tuple[str, str], ...]
    place: str
    turned: bool = False
    flat: bool = False
    begin: str = ""


SWITCH = ".switch_mlp."  # what MLX calls the experts of most models
A, B, ALPHA = *ENDS["linear"], "alpha"
# What one model of diffusers writes lacks the component that its pipeline writes.
_IN = r"(?:(?P<component>" + _COMPONENTS + r")\.)?(?P<module>.+)\."
_OLD = r"processor\.(?P<last>to_[qkv]|to_out|add_[qkv]_proj)_lora\."
_KOHYA = r"lora_(?P<component>unet|te\d?|transformer|text_encoder\d?|prior_te|prior)_"
_KOHYA += r"(?P<module>[^.]+)\."
MLX = Dialect(
    name="mlx",
    tool="MLX (mlx-lm)",
    keys=(
        (A, r"(?P<module>.+)\.lora_a"),
        (B, r"(?P<module>.+)\.lora_b"),
        (MAGNITUDE, r"(?P<module>.+)\.m"),
    ),
    place="mlx-lm 0.32.2, mlx_lm/tuner/lora.py: LoRALinear",
    turned=True,
)
KOHYA = Dialect(
    name="kohya",
    tool="kohya's sd-scripts",
    keys=(
        (A, _KOHYA + r"lora_down\.weight"),
        (B, _KOHYA + r"lora_up\.weight"),
        (MAGNITUDE, _KOHYA + r"dora_scale"),
        (ALPHA, _KOHYA + r"alpha"),
    ),
    place="diffusers 0.42.1, loaders/lora_conversion_utils.py: "
    "_convert_non_diffusers_lora_to_diffusers",
    flat=True,
)
KOHYA_SDXL = dataclasses.replace(
    KOHYA, name="kohya-sdxl", tool="kohya's sd-scripts for SDXL"
)
DIFFUSERS = Dialect(
    name="diffusers",
    tool="diffusers",
    keys=(
        (A, _IN + r"(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight"),
        (B, _IN + r"(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight"),
        (A, _IN + _OLD + r"down\.weight"),
        (B, _IN + _OLD + r"up\.weight"),
        (MAGNITUDE, _IN + r"lora_magnitude_vector(?:\.weight)?"),
        (ALPHA, _IN + r"alpha"),
    ),
    place="diffusers 0.42.1, loaders/lora_base.py and loaders/peft.py",
    begin=f"({_COMPONENTS})\\.",
)
DIALECTS = (MLX, KOHYA, DIFFUSERS)  # as they are read
WRITTEN = (MLX, KOHYA, KOHYA_SDXL, DIFFUSERS)
# Files that jlora does not read, by a name in them that no other has.
_PEFT = r".*\.lora_[AB]\.weight"
_OTHERS = (
    (r".*\.hada_w[12]_[ab]", "LoHa (LyCORIS)"),
    (r".*\.lokr_w[12](_[ab])?", "LoKr (LyCORIS)"),
    (r".*\.lora_mid\.weight", "LoCon with a Tucker core (LyCORIS)"),
    (r".*\.dora_scale", "DoRA of LyCORIS or kohya"),
    (r".*\.oft_(blocks|diag|R).*", "OFT"),
    (r".*\.ia3_l", "IA3 (PEFT)"),
    (r".*\.vera_lambda_[bd]", "VeRA (PEFT)"),
    (r".*\.(diff|diff_b)", "full differences (ComfyUI, LyCORIS)"),
    (r".*\.lora_[ab]\.weight", "torchtune"),
    (r".*processor\.\w*lora\d\.(down|up)\.weight", "x-flux (XLabs)"),
    (r".*adapter_layer\.lora_.*", "NeMo"),
    (r".*\.lora_[AB]", "loralib, without an adapter_config.json"),
    (_PEFT, "PEFT, without its adapter_config.json"),
    (r".*\.lora_[AB]\.[^.]+\.weight", "PEFT's model, and not its `save_pretrained`"),
    (r".*\.lora_(down|up)\.weight", "kohya's scripts, for a model of another kind"),
)


@dataclasses.dataclass(frozen=True)
class _Moved(FileSlot):
    """A tensor of another tool, with PEFT's axes.

    Attributes:
      turned: whether its two axes are swapped.
      sizes: what is its shape then, with axes of size 1 added or left out.
    """

    turned: bool
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.sizes

    def read(self) -> np.ndarray:
        """Returns the tensor."""
        array = super().read()
        return (array.T if self.turned else array).reshape(self.sizes)


def dialect_of(place: pathlib.Path) -> Dialect | None:
    """Returns whose adapter a file or a directory holds, None for PEFT or no adapter.

    Raises:
      PeftError: for an adapter of a tool that jlora does not read.
    """
    if place.is_dir():
        if _has_config(place) and not (place / f"{MLX_STEM}.safetensors").exists():
            return None
        file = _file_in(place)
        if file is None or file.name.endswith(".json"):
            return None
    else:
        file = place
    try:
        slots, metadata = open_tensors(file)
    except CheckpointError:
        return None  # whoever reads it says why
    if DIFFUSERS_KEY in metadata or file.name == f"{DIFFUSERS_STEM}.safetensors":
        return DIFFUSERS
    return _by_names(place, list(slots))


def _has_config(folder: pathlib.Path) -> bool:
    """Returns whether a folder has a config where PEFT has it."""
    return any(x.exists() for x in paired.places(folder, CONFIG))


def _file_in(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the file of tensors in a folder that has no config of PEFT's."""
    for stem in (MLX_STEM, DIFFUSERS_STEM):
        if (folder / f"{stem}.safetensors").exists():
            return folder / f"{stem}.safetensors"
    return find_tensors(folder) if tensor_files(folder) else None


def _by_names(place: pathlib.Path, names: Collection[str]) -> Dialect | None:
    """Returns the tool by the names of most of its tensors."""
    for dialect in DIALECTS:
        every = _names_of(dialect)
        if 2 * sum(every.fullmatch(name) is not None for name in names) > len(names):
            return dialect
    for pattern, tool in _OTHERS:
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if 3 * len(hits) >= len(names) > 0:
            if pattern == _PEFT and _has_config(place):
                return None  # a writer moved it between two looks
            raise PeftError(
                f"{str(place)!r} looks like an adapter of {tool}: it has "
                f"{hits[0]!r:.200}. jlora reads PEFT, MLX, kohya's scripts and "
                "diffusers. Convert it where it was made, to PEFT if the tool can."
            )
    return None


def _names_of(dialect: Dialect) -> re.Pattern[str]:
    """Returns the pattern of all names that a tool gives."""
    every = "|".join(f"(?:{_plain(p)})" for _, p in dialect.keys)
    return re.compile(f"(?={dialect.begin})(?:{every})")


def _plain(pattern: str) -> str:
    """Returns a pattern without names of its groups."""
    return re.sub(r"\(\?P<\w+>", "(?:", pattern)


def translated(
    dialect: Dialect, place: pathlib.Path, modules: Mapping[str, int] | None
) -> Opened:
    """Returns an adapter of another tool as PEFT would have written it.

    Args:
      dialect: of the tool.
      place: the file or the directory.
      modules: the model's modules, and how many axes their weights have; None if there
        is no model at hand.

    Raises:
      PeftError: if a file is missing or damaged, or says too little.
    """
    file = (_file_in(place) or place) if place.is_dir() else place
    slots, metadata = open_tensors(file, fault=PeftError)
    if dialect.flat and modules is None:
        raise PeftError(
            f"{str(place)!r} is of {dialect.tool}, which writes `_` for the dots in "
            "names: only with the model at hand are they known. Give base=, the model."
        )
    found = _Names(dialect, modules or {})
    named: dict[str, Slot] = {}
    alphas: dict[str, float] = {}
    for name, slot in slots.items():
        part, module = found.of(name)
        if part == ALPHA:
            alphas[module] = _number(name, slot)
            continue
        if part:
            slot = _as_peft(dialect, part, name, slot, (modules or {}).get(module))
        # What has no part is taken by nothing, and told.
        key = f"{PREFIX}{module}.{part}" if part else f"{PREFIX}{name}"
        if key in named:
            raise PeftError(f"{str(place)!r}: {name!r:.200} is there twice.")
        named[key] = slot
    end = f".{A}"
    ranks = {
        key.removeprefix(PREFIX).removesuffix(end): slot.shape[
            dialect is MLX and len(slot.shape) == 3
        ]
        for key, slot in named.items()
        if key.endswith(end) and slot.shape
    }
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
    if dialect is MLX:
        config = _of_mlx(place, ranks, metadata)
    else:
        scales = _of_diffusers(metadata, ranks, found.component)
        alphas = scales | alphas
        dora = any(key.endswith(MAGNITUDE) for key in named)
        config = _config(ranks, alphas, dora=dora)
    fields = config_fields(config, base_model=None, task_type=None)
    return fields, named, {}


class _Names:
    """What the modules of a tool's file are called in torch."""

    def __init__(self, dialect: Dialect, modules: Iterable[str]):
        self.dialect = dialect
        self.keys = [(part, re.compile(p)) for part, p in dialect.keys]
        self.component = ""
        self.flat: dict[str, str] = {}
        twice = set()
        for module in modules if dialect.flat else ():
            for name in filter(None, (module, stability_name(module))):
                flat = name.replace(".", "_")
                twice |= {flat} if flat in self.flat else set()
                self.flat[flat] = module
        for flat in twice:  # two modules of one name: neither is meant
            del self.flat[flat]

    def of(self, name: str) -> tuple[str, str]:
        """Returns the part and the module of a tensor; empty texts for any other."""
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
            if self.dialect.flat:
                known = self.flat.get(module)
                if known is None:
                    return "", ""
                module = known
            component = groups.get("component") or ""
            self.component = self.component or component
            if component != self.component:
                return "", ""  # of another model of the pipeline
            return part, module
        return "", ""


def _as_peft(
    dialect: Dialect, part: str, name: str, slot: FileSlot, ndim: int | None
) -> Slot:
    """Returns a tensor with PEFT's axes: those of a convolution if the weight has."""
    sizes = slot.shape
    # MLX's SwitchLinear, of all experts, has the axes that `layout="stacked"` has.
    turned = dialect.turned and part in (A, B) and len(sizes) == 2
    if turned:
        sizes = sizes[::-1]
    elif part == MAGNITUDE and dialect.flat:
        sizes = _lengths(name, sizes, ndim or 2)
    elif part in (A, B) and ndim is not None and not set(sizes[2:]) - {1}:
        sizes = (*sizes, *[1] * ndim)[:ndim]
    if sizes == slot.shape and not turned:
        return slot
    return _Moved(slot.file, slot.info, slot.handles, slot.fault, turned, sizes)


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
    return _config(ranks, alphas, dora=kind == "dora", dropout=float(drop))


def _of_diffusers(
    metadata: Mapping[str, str], ranks: Mapping[str, int], component: str
) -> dict[str, float]:
    """Returns the alphas that diffusers wrote into a file's metadata, if it did."""
    if DIFFUSERS_KEY not in metadata:
        return {}
    try:
        fields = parse_json(metadata[DIFFUSERS_KEY])
    except ValueError as error:
        raise PeftError(
            f"The metadata {DIFFUSERS_KEY} is not JSON: {error}."
        ) from error
    begin = f"{component}." if component else ""
    own = (
        {k.removeprefix(begin): v for k, v in fields.items() if k.startswith(begin)}
        if isinstance(fields, dict)
        else {}
    )
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
        hit = find(module)
        alpha = float(hit[1] if hit else own["lora_alpha"])
        out[module] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
    return out
