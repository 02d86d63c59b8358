"""`save`: an adapter as a Hugging Face PEFT directory."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import paths
from .._io.disk import replacing_files, write_text
from .._io.shards import pending, write_tensors
from .._io.tensors import NAMES
from ..errors import PeftError
from ..factors import Axes, Factors, Trainable
from ..methods import find_init, low_rank_pair
from . import layers
from .config import (
    CONFIG,
    FLOATS,
    PREFIX,
    SIGNED,
    STEM,
    PeftConfig,
    config_fields,
    most_common,
    patterns,
    signature,
)
from .layers import RAW, Layer, nested
from .names import GENERIC, NameMap, Place, unnamed


def save(
    directory: str | os.PathLike,
    trainable: Trainable,
    *,
    names: NameMap | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    tied: bool | None = None,
    base: Any = None,
    portable: bool = False,
    dtype: Any = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes an adapter as `adapter_config.json` and `adapter_model.safetensors`.

    The files are those that Hugging Face PEFT writes for the torch model that `names`
    leads to. They appear whole or not at all: a save that is killed leaves the former
    ones as they were. Methods that PEFT has in another form (AdaLoRA, VeRA) are written
    as the LoRA that computes the same.

    Args:
      directory: made if it does not exist.
      trainable: the adapter.
      names: what the leaves are called in torch, see `jlora.peft.maps`; None joins the
        components of each path by dots, with `weight` for a kernel or an embedding.
      base_model: what to write as the base model's name or path.
      task_type: what to write as the task, `"CAUSAL_LM"` or the like.
      tied: whether an adapted embedding table is the output head too. Needed where
        `names` says that it may be, as the adapter alone does not tell.
      base: the frozen parameters; needed where single rows of a table are trained, as
        PEFT keeps the rows and jlora what is added to them.
      portable: write only what vLLM loads, and refuse the rest by name.
      dtype: float type to write in; None keeps that of each array.
      max_shard_bytes: split the tensors into files of at most so many bytes.

    Raises:
      PeftError: lists every leaf without a name in torch, or that PEFT has no form for.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jlora
      >>> params = {"up": {"kernel": jnp.ones((4, 6))}}
      >>> fn = lambda p, x: x @ p["up"]["kernel"]
      >>> config = jlora.LoraConfig(rank=2)
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
      >>> _, adapter = jlora.split(jax.random.key(0), params, plan)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.peft.save(folder, adapter)
      ...     read = jlora.peft.load(folder, plan)
      >>> bool((read.lora["up/kernel"].a == adapter.lora["up/kernel"].a).all())
      True

    References:
      https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    tensors, config, conv1d = _tensors(
        trainable, names or GENERIC, tied, paths.flatten(base)[0], dtype
    )
    if portable:
        _check_portable(tensors, config, max_shard_bytes)
    fields = config_fields(
        config, base_model=base_model, task_type=task_type, conv1d=conv1d
    )
    metadata = {"format": "pt", SIGNED: signature(fields)}
    directory = pathlib.Path(directory)
    with replacing_files(directory, f"{STEM}*.safetensors*", PeftError) as new:
        write_tensors(
            new,
            STEM,
            {PREFIX + k: pending(x) for k, x in tensors.items()},
            metadata=metadata,
            max_bytes=max_shard_bytes,
        )
        write_text(new / CONFIG, json.dumps(fields, indent=2) + "\n")


@dataclasses.dataclass
class _Writing:
    """What `_tensors` gathers: tensors, and what the config has to say of them."""

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    targets: list[str] = dataclasses.field(default_factory=list)
    raw: list[Place] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tying: bool = False
    conv1d: bool = False


def _tensors(
    trainable: Trainable,
    names: NameMap,
    tied: bool | None,
    base: Mapping[str, Any],
    dtype: Any,
) -> tuple[dict[str, np.ndarray], PeftConfig, bool]:
    """Returns PEFT's tensors by name, the config, and whether layers are Conv1D."""
    if not isinstance(trainable, Trainable):
        raise PeftError(
            f"trainable must be a jlora.Trainable, got {type(trainable).__name__}."
        )
    if dtype is not None and np.dtype(dtype) not in FLOATS:
        raise PeftError(f"dtype must be a float type that torch has, got {dtype!r}.")
    out = _Writing()
    cast = _caster(dtype, out.wrong)
    specs = [f.spec for f in trainable.lora.values() if not f.spec.rows]
    rslora = bool(specs) and all(s.rslora and s.method in _AS_IS for s in specs)
    for path, factors in trainable.lora.items():
        _write_factors(out, path, factors, names, tied, base, rslora, cast)
    _write_raw(out)
    saved, bias = _write_full(out, trainable.full, names, cast)
    factors = {p: f for p, f in trainable.lora.items() if not f.spec.rows}
    drops = {f.spec.dropout for f in factors.values()}
    if len(drops) > 1:
        out.wrong.append(
            f"dropout differs between leaves ({sorted(drops)}), PEFT has one for all"
        )
    dora = {path for path, f in factors.items() if f.spec.method == "dora"}
    if dora and len(dora) < len(factors):
        rest = sorted(set(factors) - dora)
        out.wrong.append(
            "PEFT has DoRA for all adapted modules or none, these are without: "
            + ", ".join(rest[:5])
        )
    if out.wrong:
        raise PeftError(
            "This adapter has no form as PEFT files: " + "; ".join(out.wrong) + "."
        )
    rank = most_common(out.ranks.values()) if out.ranks else 8
    alpha = most_common(out.alphas.values()) if out.alphas else float(rank)
    config = PeftConfig(
        r=rank,
        alpha=alpha,
        rank_pattern=patterns(out.ranks, rank),
        alpha_pattern=patterns(out.alphas, alpha),
        rslora=rslora,
        dora=bool(dora),
        dropout=max(drops, default=0.0),
        bias=bias,
        targets=tuple(out.targets),
        parameters=tuple(place.name for place in out.raw),
        saved=tuple(saved),
        tokens=tuple(out.tokens.items()),
        tying=out.tying,
    )
    return out.tensors, config, out.conv1d


_AS_IS = ("lora", "dora")


def _caster(dtype: Any, wrong: list[str]) -> Callable[[str, Any], np.ndarray]:
    def cast(path: str, x: Any) -> np.ndarray:
        array = np.asarray(x)
        if array.dtype not in NAMES:
            wrong.append(f"{path!r} is {array.dtype}, which torch files do not have")
            return np.zeros(array.shape, np.float32)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        if floating and not np.isfinite(array).all():
            wrong.append(f"{path!r} holds NaN or infinity")
        with np.errstate(over="ignore"):
            out = array if dtype is None or not floating else array.astype(dtype)
        if floating and not np.isfinite(out).all() and np.isfinite(array).all():
            wrong.append(f"{path!r} holds numbers too large for {np.dtype(dtype)}")
        return out

    return cast


def _write_factors(
    out: _Writing,
    path: str,
    factors: Factors,
    names: NameMap,
    tied: bool | None,
    base: Mapping[str, Any],
    rslora: bool,
    cast: Callable[[str, Any], np.ndarray],
) -> None:
    spec = factors.spec
    init = find_init(spec.init)
    if init is not None and init.changes_base:
        remedy = "save the merged model, its base is in no file of PEFT's"
        if init.base == "residual":
            remedy = "call jlora.rebase first, it gives an adapter for the original"
        out.wrong.append(
            f"{path!r} began with {spec.init!r}, which changed the base weights: "
            f"{remedy}"
        )
        return
    if spec.rows:
        _write_rows(out, path, factors, names, base, cast)
        return
    a, b = (cast(path, x) for x in low_rank_pair(factors))
    shape = _weight_shape(spec.axes, a.shape, b.shape)
    magnitude = None
    if spec.method == "dora":
        magnitude = cast(path, factors.magnitude)
    try:
        places = names.places(path, shape, op=spec.op, axes=spec.axes)
    except PeftError as error:
        out.wrong.append(str(error).rstrip("."))
        return
    if not places:
        out.wrong.append(unnamed(path, names))
        return
    rank, scale = a.shape[-1], factors.scale
    own_parts = layers.apart(spec.parts, places)
    if own_parts:  # the part's own numbers and scale, not those of the whole
        b = layers.spread(spec, shape, cast(path, factors.b))
    found: dict[Place, Layer] = {}
    for place in places:
        reason = layers.misfit(place, spec.axes)
        if reason:
            out.wrong.append(f"{path!r}: {reason}")
            return
        layer = layers.layer_out(
            place, spec.axes, shape, a, b, magnitude, scale, spec.parts
        )
        if len(places) == 1 or magnitude is not None or not layers.is_empty(layer):
            found[place] = layer
    if not found:
        out.wrong.append(f"{path!r} is zero in A and B throughout, so it is no adapter")
    for place, layer in layers.in_use(found).items():
        out.conv1d |= place.kind == "conv1d"
        count = math.prod(
            n for r, n in zip(place.roles, place.shape(shape), strict=True) if r == "e"
        )
        own_rank = layer.a.shape[0] // (count if place.kind in RAW else 1)
        as_is = own_parts or (own_rank == rank and spec.parts is None)
        as_is = as_is and spec.method in _AS_IS and spec.rslora == rslora
        own_scale = spec.part_scale(own_rank) if own_parts else scale
        root = math.sqrt(own_rank) if rslora else own_rank
        alpha = spec.alpha if as_is else own_scale * root
        if place.kind in RAW:
            out.raw.append(place)
            if spec.dropout:
                out.wrong.append(f"{path!r}: PEFT has no dropout on a bare parameter")
            if magnitude is not None:
                out.wrong.append(f"{path!r}: PEFT has no DoRA on a bare parameter")
        else:
            _write_layer(out, place, layer, tied, path)
        out.layers[place.module] = layer
        both = [place.module]
        if tied and place.kind == "embedding" and place.tied is not None:
            both.append(place.tied.removesuffix(".weight"))
        for module in both:
            out.ranks[module], out.alphas[module] = own_rank, alpha


def _write_rows(
    out: _Writing,
    path: str,
    factors: Factors,
    names: NameMap,
    base: Mapping[str, Any],
    cast: Callable[[str, Any], np.ndarray],
) -> None:
    """Adds the trained rows of a table, which PEFT keeps whole, not as changes."""
    spec = factors.spec
    places = names.places(path, spec.shape, op="embedding", axes=spec.axes)
    if len(places) != 1 or layers.misfit(places[0], spec.axes):
        out.wrong.append(f"{path!r} has trained rows, but is no embedding in torch")
    elif path not in base:
        out.wrong.append(
            f"{path!r} has trained rows: give the frozen parameters as base=, PEFT "
            "keeps rows, not differences"
        )
    else:
        table = layers.weight_out(places[0], np.asarray(base[path]))
        rows = table[list(spec.rows)].astype(np.float32)
        rows = rows + np.asarray(factors.b, np.float32)
        module = places[0].module
        name = f"{module}.token_adapter.trainable_tokens_delta"
        out.tensors[name] = cast(path, rows)
        out.tokens[module] = spec.rows


def _write_layer(
    out: _Writing, place: Place, layer: Layer, tied: bool | None, path: str
) -> None:
    out.targets.append(place.module)
    kind = ("lora_A.weight", "lora_B.weight")
    if place.kind == "embedding":
        kind = ("lora_embedding_A", "lora_embedding_B")
        if place.tied is not None and tied is None:
            out.wrong.append(
                f"{path!r} may be the output head too ({place.tied}). Say tied=True if "
                "the model uses it as both, tied=False if not"
            )
        if place.tied is not None and tied:
            head = place.tied.removesuffix(".weight")
            out.tying = True
            out.targets.append(head)
            out.tensors[f"{head}.lora_A.weight"] = np.ascontiguousarray(layer.b.T)
            out.tensors[f"{head}.lora_B.weight"] = np.ascontiguousarray(layer.a.T)
            if layer.magnitude is not None:
                out.wrong.append(f"{path!r}: PEFT has no DoRA on a tied head")
    out.tensors[f"{place.module}.{kind[0]}"] = layer.a
    out.tensors[f"{place.module}.{kind[1]}"] = layer.b
    if layer.magnitude is not None:
        out.tensors[f"{place.module}.lora_magnitude_vector"] = layer.magnitude


def _write_raw(out: _Writing) -> None:
    for place, stem in nested(out.raw).items():
        layer = out.layers[place.module]
        out.tensors[f"{stem}.lora_A.weight"] = layer.a
        out.tensors[f"{stem}.lora_B.weight"] = layer.b


def _write_full(
    out: _Writing,
    full: Mapping[str, Any],
    names: NameMap,
    cast: Callable[[str, Any], np.ndarray],
) -> tuple[list[str], str]:
    """Adds the leaves trained in full; returns `modules_to_save` and `bias`."""
    found: dict[str, np.ndarray] = {}
    for path, leaf in full.items():
        array = cast(path, leaf)
        try:
            places = names.places(path, array.shape)
        except PeftError as error:
            out.wrong.append(str(error).rstrip("."))
            continue
        if not places:
            out.wrong.append(unnamed(path, names))
        for place in places:
            found[place.name] = layers.weight_out(place, array)
    modules: dict[str, list[str]] = {}
    for name in found:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    adapted = set(out.targets)
    saved, bias = [], "none"
    for module, leaves in sorted(modules.items()):
        if module in adapted:
            if leaves != ["bias"]:
                out.wrong.append(
                    f"{module} is adapted and its {', '.join(leaves)} trained in full, "
                    "PEFT does one or the other"
                )
            bias = "lora_only" if bias == "none" else bias
        elif leaves == ["bias"]:
            bias = "all"
        elif not module:
            out.wrong.append(f"{', '.join(leaves)} belongs to no module of torch's")
        else:
            saved.append(module)
    for name, array in found.items():
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.base_layer.{leaf}" if module in adapted else name
        out.tensors[inner] = np.ascontiguousarray(array)
    return saved, bias


def _weight_shape(
    axes: Axes, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[int, ...]:
    n = len(axes.batch)
    sizes = dict(zip((*axes.batch, *axes.fan_in), a, strict=False))
    sizes |= dict(zip(axes.fan_out, b[n + 1 :], strict=False))
    return tuple(sizes[i] for i in range(len(sizes)))


def _check_portable(
    tensors: Mapping[str, np.ndarray], config: PeftConfig, max_bytes: int | None
) -> None:
    """Raises a PeftError that lists what vLLM would reject.

    `tests/golden/check_vllm.py` compares these rules with vLLM's own functions.
    """
    wrong = []
    if not config.targets and not config.parameters:
        wrong.append("an adapter without A and B")
    if max_bytes is not None and sum(x.nbytes for x in tensors.values()) > max_bytes:
        wrong.append(f"several files (max_shard_bytes={max_bytes})")
    if config.dora:
        wrong.append(
            "DoRA magnitudes: write the merged model with jlora.peft.save_base instead"
        )
    if config.bias != "none":
        wrong.append(f"trained biases (bias={config.bias!r})")
    heads = [m.rpartition(".")[2] for m in config.saved]
    if len(heads) > 1 or not set(heads) <= {"classifier", "score"}:
        wrong.append(
            f"modules_to_save={list(config.saved)}: only one, `classifier` or `score`, "
            "is read"
        )
    elif config.saved and config.saved != tuple(heads):
        wrong.append(f"modules_to_save={list(config.saved)}, inside another module")
    top = max([config.r, *(r for _, r in config.rank_pattern)])
    if top > 512:
        wrong.append(f"rank {top}: the largest max_lora_rank is 512")
    if config.tokens:
        wrong.append("trained token rows")
    end = ".lora_embedding_A"
    tables = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    wrong += [
        f"the table {table}: only one called embed_tokens is adapted"
        for table in tables
        if table.rpartition(".")[2] != "embed_tokens"
    ]
    wrong += [
        f"{name}: a convolution of {x.ndim - 2} dimensions"
        for name, x in tensors.items()
        if name.endswith("lora_A.weight") and x.ndim > 2
    ]
    if wrong:
        raise PeftError("vLLM would reject: " + "; ".join(wrong) + ".")
