"""Which tool wrote an adapter file: MLX, kohya's scripts, diffusers, or another one.

Each differs from PEFT in names, axes and in where the scale is. What a tool calls the
parts of an adapter is data. A file of a tool that jlora does not read is told by name.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from .._io import paired
from .._io.disk import Json
from .._io.shards import find_tensors, open_tensors
from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError, PeftError
from ._sdxl import stability_name
from .config import CONFIG
from .layers import ENDS, MAGNITUDE

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
      transposed: whether A is `[in, r]` and B `[r, out]`.
      flat: whether the module's name has underscores in place of dots. Reading then
        takes Stability's names of SDXL's modules too.
      begin: a pattern of the beginning of names, if they begin with the model's, which
        is its group `component`.
      place: where the tool's source says so.
    """

    name: str
    tool: str
    keys: tuple[tuple[str, str], ...]
    place: str
    transposed: bool = False
    flat: bool = False
    begin: str = ""


CLIP = "text_model."
SWITCH = ".switch_mlp."  # what MLX calls the experts of most models
A, B, ALPHA = *ENDS["linear"], "alpha"
TABLE_A, TABLE_B = ENDS["embedding"]  # MLX calls these as those of a linear layer
# What one model of diffusers writes lacks the component that its pipeline writes.
_BEGIN = r"(?P<component>" + _COMPONENTS + r")\."
_IN = "(?:" + _BEGIN + r")?(?P<module>.+)\."
_OLD = r"processor\.(?P<last>to_[qkv]|to_out|add_[qkv]_proj)_lora\."
_TRAINED = r"unet|te\d?|transformer|text_encoder\d?|prior_te|prior"
_KOHYAS = r"lora_(?P<component>" + _TRAINED + ")_"
_KOHYA = _KOHYAS + r"(?P<module>[^.]+)\."
MLX = Dialect(
    name="mlx",
    tool="MLX (mlx-lm)",
    keys=(
        (A, r"(?P<module>.+)\.lora_a"),
        (B, r"(?P<module>.+)\.lora_b"),
        (MAGNITUDE, r"(?P<module>.+)\.m"),
    ),
    place="mlx-lm 0.32.2, mlx_lm/tuner/lora.py: LoRALinear",
    transposed=True,
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
    begin=_KOHYAS,
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
    begin=_BEGIN,
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


def names_of(module: str) -> list[str]:
    """Returns what tools call a module of torch's, its own name first.

    A text model of CLIP has its modules in `text_model`, and none in transformers 5.

    Examples:
      >>> names_of("encoder.layers.0.mlp.fc1")
      ['encoder.layers.0.mlp.fc1', 'text_model.encoder.layers.0.mlp.fc1']
    """
    bare = module.removeprefix(CLIP)
    clip = [bare, CLIP + bare] if bare.startswith("encoder.layers.") else []
    others = [stability_name(module), *clip]
    return [module, *(name for name in others if name and name != module)]


def in_pipeline(module: str, component: str) -> str:
    """Returns what a pipeline's tools call a module of one of its models.

    Examples:
      >>> in_pipeline("encoder.layers.0.mlp.fc1", "te1")
      'text_model.encoder.layers.0.mlp.fc1'
      >>> in_pipeline("mid_block.resnets.0.conv1", "unet")
      'mid_block.resnets.0.conv1'
    """
    is_text = component.startswith(("te", "text_encoder"))
    names = [name for name in names_of(module) if name.startswith(CLIP)]
    return names[0] if is_text and names else module


def rows_of_tables(tables: Iterable[str]) -> str:
    """Returns in words why DoRA of these tables is not exchanged with MLX."""
    return (
        "MLX's DoRA has a length for each row of a table, PEFT's and jlora's for each "
        f"column: leave {listed(tables, 3, ', ')} out of the adapter."
    )


def settings_of(metadata: Mapping[str, str]) -> Json:
    """Returns what diffusers wrote of its adapters into a file's metadata, if it did.

    Raises:
      PeftError: if it is not JSON.
    """
    try:
        fields = parse_json(metadata.get(DIFFUSERS_KEY, "{}"))
    except ValueError as error:
        raise PeftError(
            f"The metadata {DIFFUSERS_KEY} is not JSON: {error}."
        ) from error
    return fields if isinstance(fields, dict) else {}


class Found(NamedTuple):
    """An adapter of another tool: whose it is, and the file of its tensors."""

    dialect: Dialect
    file: pathlib.Path


def dialect_of(place: pathlib.Path) -> Found | None:
    """Returns whose adapter is at a place; None for PEFT's, or no adapter.

    Raises:
      PeftError: for an adapter of a tool that jlora does not read.
      OSError: if the directory cannot be listed.
    """
    file = place if os.path.isfile(place) else None
    if os.path.isdir(place):
        there = os.listdir(place)
        if _has_config(there) and f"{MLX_STEM}.safetensors" not in there:
            return None
        file = _file_in(place, there)
    if file is None or file.name.endswith(".json"):
        return None
    try:
        slots, metadata = open_tensors(file)
    except CheckpointError:
        return None  # whoever reads it says why
    if DIFFUSERS_KEY in metadata or file.name == f"{DIFFUSERS_STEM}.safetensors":
        return Found(DIFFUSERS, file)
    dialect = _by_names(place, list(slots))
    return dialect and Found(dialect, file)


def _has_config(names: Collection[str]) -> bool:
    """Returns whether a folder with these files has a config where PEFT has it."""
    return any(file.name in names for file in paired.places(pathlib.Path(), CONFIG))


def _file_in(folder: pathlib.Path, names: Collection[str]) -> pathlib.Path | None:
    """Returns the file of tensors in a folder that has no config of PEFT's."""
    for stem in (MLX_STEM, DIFFUSERS_STEM):
        if f"{stem}.safetensors" in names:
            return folder / f"{stem}.safetensors"
    return find_tensors(folder)


def _by_names(place: pathlib.Path, names: Collection[str]) -> Dialect | None:
    """Returns the tool by the names of most of its tensors."""
    for dialect in DIALECTS:
        every = _names_of(dialect)
        if 2 * sum(every.fullmatch(name) is not None for name in names) > len(names):
            return dialect
    for pattern, tool in _OTHERS:
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if 3 * len(hits) >= len(names) > 0:
            if pattern == _PEFT and place.is_dir() and _has_config(os.listdir(place)):
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
    return re.compile(f"(?={_plain(dialect.begin)})(?:{every})")


def _plain(pattern: str) -> str:
    """Returns a pattern without names of its groups."""
    return re.sub(r"\(\?P<\w+>", "(?:", pattern)
