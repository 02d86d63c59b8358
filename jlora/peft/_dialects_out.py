"""An adapter of PEFT's as files of other tools."""

import json
import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from .._io.shards import open_tensors
from .._io.torch_models import is_head, is_table
from .._tables import listed
from ..errors import PeftError
from ._dialects import (
    ALPHA,
    CLIP,
    DIFFUSERS,
    DIFFUSERS_KEY,
    DIFFUSERS_STEM,
    KOHYA_SDXL,
    MLX,
    MLX_STEM,
    SWITCH,
    TABLE_A,
    TABLE_B,
    A,
    B,
    Dialect,
    in_pipeline,
    rows_of_tables,
    settings_of,
)
from ._experts import ROLES, role_of
from ._sdxl import stability_name
from .config import PeftConfig, pattern_lookup
from .layers import MAGNITUDE

KOHYA_STEM = "lora"
_HEAD = "lm_head"
_HASHES = "sshs_"  # kohya's, of the tensors
_LAYER = re.compile(r".+?\.layers\.\d+\.(.+)")

Written = tuple[str, dict[str, np.ndarray], dict[str, str], str | None]


def in_dialect(
    dialect: Dialect,
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    component: str,
) -> Written:
    """Returns the stem, the tensors, the metadata and the config of a tool's files.

    Args:
      dialect: of the tool.
      tensors: as PEFT calls them, without its prefix.
      config: of PEFT.
      component: what the tool calls the model, where it has several.

    Raises:
      PeftError: lists what the tool has no form for.
    """
    if config.invocation:
        raise PeftError(
            f"{dialect.tool} has no form for activated LoRA (invocation="
            f"{config.invocation}): it would apply the adapter to all tokens. "
            "dialect='peft' keeps it."
        )
    pairs, magnitudes = _pairs(dialect, tensors, config)
    if dialect is MLX:
        return _mlx(pairs, magnitudes, config)
    return _of_images(dialect, pairs, magnitudes, component)


def with_others(
    dialect: Dialect, folder: pathlib.Path, written: Written, component: str
) -> Written:
    """Returns `written`, with what its file has of the pipeline's other models.

    Args:
      dialect: of the tool.
      folder: where the file is, or will be.
      written: what `in_dialect` returned.
      component: whose tensors are replaced.

    Raises:
      PeftError: if the file is damaged, or has names that are not the tool's.
    """
    stem, tensors, metadata, text = written
    file = folder / f"{stem}.safetensors"
    if not file.exists():
        return written
    slots, about = open_tensors(file, fault=PeftError)
    begins = {name: re.match(dialect.begin, name) for name in slots}
    others = {}
    for name, begin in begins.items():
        if begin is None:
            raise PeftError(
                f"{str(file)!r} has {name!r:.200}, whose name is of no model of "
                f"{dialect.tool}: write into another directory, or leave add out."
            )
        if begin["component"] != component:
            others[name] = slots[name].read()
    kept = {k: v for k, v in about.items() if not k.startswith(_HASHES)} | metadata
    settings = {
        name: value
        for name, value in settings_of(about).items()
        if not name.startswith(f"{component}.")
    }
    if settings := settings | settings_of(metadata):
        kept[DIFFUSERS_KEY] = json.dumps(settings, indent=2, sort_keys=True)
    return stem, others | tensors, kept, text


_Pair = tuple[np.ndarray, np.ndarray, float]  # A, B and the scale


def _pairs(
    dialect: Dialect, tensors: Mapping[str, np.ndarray], config: PeftConfig
) -> tuple[dict[str, _Pair], dict[str, np.ndarray]]:
    """Returns A, B and the scale of each module, and magnitudes."""
    rank_of, alpha_of = (
        pattern_lookup(p) for p in (config.rank_pattern, config.alpha_pattern)
    )
    pairs: dict[str, _Pair] = {}
    lengths: dict[str, np.ndarray] = {}
    wrong = []
    if dialect is MLX:
        tensors = _tables_as_linear(tensors, config)
    for name, array in tensors.items():
        module = name.removesuffix(f".{A}")
        if module != name:
            rank = hit[1] if (hit := rank_of(module)) else config.r
            alpha = hit[1] if (hit := alpha_of(module)) else config.alpha
            scale = alpha / (math.sqrt(rank) if config.rslora else rank)
            if array.ndim == 3 and dialect is MLX and ".experts." in module:
                pairs[module] = array, tensors[f"{module}.{B}"], scale
            elif array.shape[0] != rank or ".base_layer" in module:
                how = " (layout='stacked' has a form)" if dialect is MLX else ""
                wrong.append(f"{module}: experts or nested modules{how}")
            elif array.ndim > 2 and dialect is MLX:
                wrong.append(f"{module}: a convolution")
            else:
                pairs[module] = array, tensors[f"{module}.{B}"], scale
        elif name.endswith(f".{MAGNITUDE}"):
            lengths[name.removesuffix(f".{MAGNITUDE}")] = array
        elif not name.endswith(f".{B}"):
            wrong.append(name)
    if wrong or not pairs:
        told = listed(wrong or ["an adapter without A"], 5)
        raise PeftError(
            f"{dialect.tool} has no form for {told}. Leave it out, or save the merged "
            "model."
        )
    return pairs, lengths


def _tables_as_linear(
    tensors: Mapping[str, np.ndarray], config: PeftConfig
) -> dict[str, np.ndarray]:
    """Returns the tensors with a table's factors called as a linear layer's.

    MLX has no head beside a table that is tied, and in DoRA the lengths of rows.
    """
    end = f".{TABLE_A}"
    tables = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    if tables and config.dora:
        raise PeftError(rows_of_tables(tables))
    return {
        name.replace(f".{TABLE_A}", f".{A}").replace(f".{TABLE_B}", f".{B}"): x
        for name, x in tensors.items()
        if not (tables and config.tying and is_head(name.rpartition(".lora_")[0]))
    }


def _mlx(
    pairs: Mapping[str, _Pair],
    magnitudes: Mapping[str, np.ndarray],
    config: PeftConfig,
) -> Written:
    """Returns MLX's files: one rank and scale, for modules in layers and the head.

    Smaller ranks are filled up with zeros, and other scales go into B.
    """
    pairs = {_in_mlx(module): pair for module, pair in pairs.items()}
    keys = {module: found[1] for module in pairs if (found := _LAYER.fullmatch(module))}
    keys |= {m: m for m in pairs if m == _HEAD or is_table(m)}
    outside = [module for module in pairs if module not in keys]
    if outside:
        raise PeftError(
            f"MLX adapts only modules in `layers.N.`, tables and {_HEAD}: "
            f"{listed(outside, 5, ', ')}. Leave them out of the adapter."
        )
    rank = max(a.shape[-2] for a, _, _ in pairs.values())
    scales = [scale for _, _, scale in pairs.values()]
    scale = max(scales, key=scales.count)
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b, own) in pairs.items():
        more, rest = (0, rank - a.shape[-2]), [(0, 0)] * (a.ndim - 2)
        a = np.pad(a, [*rest, more, (0, 0)])
        b = (b * np.float64(own / scale)).astype(b.dtype)
        b = np.pad(b, [*rest, (0, 0), more])
        if a.ndim == 2:
            a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
    tensors |= {f"{module}.m": m for module, m in magnitudes.items()}
    fields = {
        "fine_tune_type": "dora" if config.dora else "lora",
        "lora_parameters": {
            "dropout": config.dropout,
            "keys": sorted({*keys.values()}),
            "rank": rank,
            "scale": scale,
        },
        "num_layers": -1,  # all of them
    }
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return MLX_STEM, tensors, {"format": "mlx"}, text


def _in_mlx(module: str) -> str:
    """Returns what MLX calls a module: a SwitchLinear for all experts of a layer."""
    parent, found, last = module.rpartition(".experts.")
    if not found:
        return module
    role = role_of(last)
    return f"{parent}{SWITCH}{ROLES[role][0] if role in ROLES else last}"


def _of_images(
    dialect: Dialect,
    pairs: Mapping[str, _Pair],
    magnitudes: Mapping[str, np.ndarray],
    component: str,
) -> Written:
    """Returns the one file of kohya's scripts or of diffusers."""
    alphas = {module: scale * a.shape[0] for module, (a, _, scale) in pairs.items()}
    if dialect is not DIFFUSERS:
        return _kohya(dialect, pairs, magnitudes, alphas, component)
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b, _) in pairs.items():
        stem = f"{component}.{in_pipeline(module, component)}"
        tensors |= {f"{stem}.{A}": a, f"{stem}.{B}": b}
        if module in magnitudes:  # transformers drops it without the last word
            tensors[f"{stem}.{MAGNITUDE}.weight"] = magnitudes[module]
    ranks = {module: a.shape[0] for module, (a, _, _) in pairs.items()}
    keys = {module: _pattern(module, component) for module in pairs}
    common = max(ranks.values(), key=[*ranks.values()].count)
    alpha = max(alphas.values(), key=[*alphas.values()].count)
    fields = {
        "alpha_pattern": {keys[m]: v for m, v in alphas.items() if v != alpha},
        "lora_alpha": alpha,
        "r": common,
        "rank_pattern": {keys[m]: v for m, v in ranks.items() if v != common},
        "target_modules": sorted(key.removeprefix("^") for key in keys.values()),
        "use_dora": bool(magnitudes),
    }
    own = {f"{component}.{key}": value for key, value in fields.items()}
    text = json.dumps(own, indent=2, sort_keys=True)
    return DIFFUSERS_STEM, tensors, {"format": "pt", DIFFUSERS_KEY: text}, None


def _pattern(module: str, component: str) -> str:
    """Returns PEFT's pattern for a module, also if its model lacks the first part.

    PEFT compares the end of a name. So in transformers 4 and 5 the pattern for a text
    model of CLIP is the name without `text_model`, and is not anchored.
    """
    name = in_pipeline(module, component)
    return name.removeprefix(CLIP) if name.startswith(CLIP) else f"^{module}"


def _kohya(
    dialect: Dialect,
    pairs: Mapping[str, _Pair],
    magnitudes: Mapping[str, np.ndarray],
    alphas: Mapping[str, float],
    component: str,
) -> Written:
    """Returns the file of kohya's scripts, which LyCORIS has too."""
    sdxl = dialect is KOHYA_SDXL
    called = {
        module: stability_name(module) if sdxl else in_pipeline(module, component)
        for module in pairs
    }
    if unknown := [module for module, name in called.items() if name is None]:
        raise PeftError(
            f"SDXL's U-Net has no {listed(map(repr, unknown), 3)}. dialect='kohya' "
            "keeps the names of other models, and of SDXL's text encoders."
        )
    tensors: dict[str, np.ndarray] = {}
    flat: dict[str, str] = {}
    for module, (a, b, _) in pairs.items():
        name = str(called[module]).replace(".", "_")
        if name in flat:
            raise PeftError(
                f"{dialect.tool} has one name, {name!r}, for {flat[name]!r} and "
                f"{module!r}."
            )
        flat[name] = module
        stem = f"lora_{component}_{name}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        tensors[f"{stem}.{ALPHA}"] = np.asarray(alphas[module], np.float32)
        if module in magnitudes:  # of LyCORIS, with wd_on_out
            m = magnitudes[module].reshape(-1, *[1] * (a.ndim - 1))
            tensors[f"{stem}.dora_scale"] = m
    about = {"ss_network_module": "networks.lora"}
    if sdxl:
        about["ss_base_model_version"] = "sdxl_base_v1-0"
    return KOHYA_STEM, tensors, about, None
