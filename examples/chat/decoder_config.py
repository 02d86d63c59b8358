"""What a decoder is made of, as `config.json` of a Hub directory says it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
      theta: base of the angles.
      kind: `"default"`, or how long contexts are scaled: `"linear"`, `"dynamic"` or
        `"llama3"`.
      factor: how much longer contexts become.
      low, high: `"llama3"`: waves that fit fewer than `low` times into the length the
        model was trained on are stretched, those that fit more than `high` times stay.
      trained: `"llama3"` and `"dynamic"`: that length.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    trained: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and the variants of a decoder; hashable.

    Attributes:
      vocab: number of tokens.
      width: features of the residual stream.
      hidden: features inside the MLP.
      layers: number of layers.
      heads: number of query heads.
      kv_heads: number of key and value heads, a divisor of `heads`.
      head: features of a head.
      eps: added to the mean square in a norm.
      activation: of the MLP's gate, a key of `model.ACTIVATIONS`.
      tied: whether the output head is the embedding table.
      qkv_bias, out_bias, mlp_bias: whether these linear layers have one.
      qk_norm: whether queries and keys are normalised, head by head.
      unit_offset: whether norms multiply by `1 + scale`, as Gemma's do.
      post_norms: whether norms also stand behind attention and MLP.
      embed_scale: multiplies the embeddings.
      query_scale: multiplies the attention scores; None is `head ** -0.5`.
      attention_cap, logit_cap: scores and logits become `cap * tanh(x / cap)`.
      windows: for each layer, how many tokens it sees; None is all before it.
      ropes: for each layer, its rotary positions; None is none. One of either is for
        all layers.
      scan: whether layers are one leaf each and one `scan`, `model/layers/...` with a
        first axis for the layer; otherwise they are `model/layers/0/...` and so on.
      remat: whether the backward pass computes each layer again, to save memory.
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_offset: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    ropes: tuple[Rope | None, ...] = (Rope(),)
    scan: bool = True
    remat: bool = False

    @classmethod
    def from_hub(
        cls, source: Json | Path | str, *, ignore: Sequence[str] = (), **switches: bool
    ) -> "DecoderConfig":
        """Returns what a `config.json` says: its dict, or the directory it lies in.

        Absent keys have the values that `transformers` gives them.

        Args:
          source: the dict or the directory.
          ignore: keys that are unknown here, and do not change the maths.
          **switches: `scan` and `remat`.

        Raises:
          ValueError: for a model type, a rope type, an activation or a key that is not
            known, or a key that is missing; the message names it.
        """
        if not isinstance(source, Mapping):
            source = json.loads((Path(source) / "config.json").read_text())
        return cls(**_fields(source, ignore), **switches)


_COMMON: Json = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": None,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
_SLIDING: Json = {
    "layer_types": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: Json = {
    **_COMMON,
    "head_dim": 256,
    "hidden_activation": None,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA_2: Json = {
    **_GEMMA,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}

# For each model type, the keys that change the maths and their defaults.
FAMILIES: Mapping[str, Json] = {
    "llama": {**_COMMON, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_SLIDING},
    "qwen3": {**_COMMON, **_SLIDING, "head_dim": 128, "attention_bias": False},
    "smollm3": {
        **_COMMON,
        **_SLIDING,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": {
        **_GEMMA_2,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Keys that do not change the logits of these models, whatever they say.
_HARMLESS = {
    *("architectures", "auto_map", "dtype", "model_type", "name_or_path"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version"),
    *("attention_dropout", "initializer_range", "is_llama_config", "pretraining_tp"),
    *("attn_implementation", "cache_implementation", "gradient_checkpointing"),
    *("quantization_config", "use_cache", "chunk_size_feed_forward", "return_dict"),
    *("output_attentions", "output_hidden_states", "sliding_window_size"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type"),
    *("do_sample", "max_length", "repetition_penalty", "temperature", "top_k", "top_p"),
}
# Keys of switches that these models do not have: they may be there, and off.
_OFF = {
    *("attention_bias", "mlp_bias", "rope_interleaved", "use_mrope", "use_qk_norm"),
    *("use_bidirectional_attention", "use_sliding_window", "qk_layernorm"),
    *("add_cross_attention", "cross_attention_hidden_size", "is_decoder"),
    *("is_encoder_decoder", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
}
# Names of the Hub, and those of `model.ACTIVATIONS`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def _fields(found: Json, ignore: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that a `config.json` says."""
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not known here, only {', '.join(FAMILIES)} are."
        )
    _check_keys(found, kind, ignore)
    get: dict[str, Any] = {**FAMILIES[kind], **found}
    heads, layers = get["num_attention_heads"], get["num_hidden_layers"]
    gemma = kind.startswith("gemma")
    head = get["head_dim"] or get["hidden_size"] // heads
    kv_heads = get["num_key_value_heads"] or heads
    if heads % kv_heads or head % 2:
        raise ValueError(
            f"{heads} query heads of {head} features and {kv_heads} key heads: the key "
            "heads must divide the query heads, and the features be even."
        )
    act = get["hidden_act"]
    if gemma:  # whose first files say "gelu" and mean its approximation
        approximate = "gelu_pytorch_tanh" if act == "gelu" else act
        act = get["hidden_activation"] or approximate
    if act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r} is not one of {', '.join(_ACTIVATIONS)}.")
    types = _layer_types(get, kind)
    window = get.get("sliding_window")
    bias = bool(get.get("attention_bias"))
    scalar = get.get("query_pre_attn_scalar")
    return {
        "vocab": get["vocab_size"],
        "width": get["hidden_size"],
        "hidden": get["intermediate_size"],
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "eps": get["rms_norm_eps"],
        "activation": _ACTIVATIONS[act],
        "tied": get["tie_word_embeddings"],
        "qkv_bias": bias or kind == "qwen2",
        "out_bias": bias,
        "mlp_bias": bool(get.get("mlp_bias")),
        "qk_norm": kind in ("qwen3", "gemma3_text"),
        "unit_offset": gemma,
        "post_norms": kind in ("gemma2", "gemma3_text"),
        "embed_scale": get["hidden_size"] ** 0.5 if gemma else 1.0,
        "query_scale": scalar and scalar**-0.5,
        "attention_cap": get.get("attn_logit_softcapping"),
        "logit_cap": get.get("final_logit_softcapping"),
        "windows": _one([window if t == _LOCAL else None for t in types]),
        "ropes": _one(_ropes(get, kind, types)),
    }


def _check_keys(found: Json, kind: str, ignore: Sequence[str]) -> None:
    """Raises a ValueError for sizes that are absent, and for keys that are not known.

    An unknown key that is null is off, whatever it is. One that is false need not be.
    """
    absent = [key for key in _SIZES if found.get(key) is None]
    if absent:
        raise ValueError(f"config.json of a {kind} model lacks {', '.join(absent)}.")
    known = {*_SIZES, *FAMILIES[kind], *_HARMLESS, *ignore}
    unknown = [
        key
        for key, value in found.items()
        if key not in known
        and value is not None
        and not (key in _OFF and value is False)
        and not key.startswith("_")
        and not key.endswith(("_token_id", "_token_ids"))
    ]
    if unknown:
        said = ", ".join(f"{key} = {found[key]!r}" for key in unknown)
        raise ValueError(
            f"config.json has keys that are not known for {kind}: {said}. If they do "
            f"not change the model's maths, pass ignore={unknown}, or take them out of "
            "config.json."
        )
    if kind == "gemma3_text" and found.get("attn_logit_softcapping"):
        raise ValueError(
            "gemma3_text with attn_logit_softcapping = "
            f"{found['attn_logit_softcapping']}: readers of these models differ in "
            "whether they apply it, so it must be null."
        )


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _layer_types(get: Json, kind: str) -> tuple[str, ...]:
    """Returns for each layer whether it sees a window or everything before it."""
    layers = range(get["num_hidden_layers"])
    types = get.get("layer_types")
    on = get.get("sliding_window") and get.get("use_sliding_window", True)
    if types is not None:
        wrong = sorted({*types} - {_LOCAL, _GLOBAL})
        if wrong or len(types) < len(layers) or (_LOCAL in types and not on):
            raise ValueError(
                f"layer_types {types}: {len(layers)} layers need {_LOCAL!r} or "
                f"{_GLOBAL!r} each, and the first a sliding_window that is in use."
            )
        return tuple(types[i] for i in layers)
    match kind:
        case "mistral":
            local = [True for _ in layers]
        case "qwen2" | "qwen3":
            local = [i >= get["max_window_layers"] for i in layers]
        case "smollm3":
            local = [not has_rope for has_rope in _with_rope(get)]
        case "gemma2":
            local = [i % 2 == 0 for i in layers]
        case "gemma3_text":
            local = [(i + 1) % get["sliding_window_pattern"] != 0 for i in layers]
        case _:
            local = [False for _ in layers]
    return tuple(_LOCAL if own and on else _GLOBAL for own in local)


def _with_rope(get: Json) -> list[bool]:
    """Returns for each layer of SmolLM3 whether it has rotary positions."""
    layers = range(get["num_hidden_layers"])
    stated = get["no_rope_layers"]
    if stated is not None and len(stated) < len(layers):
        raise ValueError(f"no_rope_layers {stated}: there are {len(layers)} layers.")
    if stated is not None:
        return [bool(stated[i]) for i in layers]  # 1 is *with*, despite its name
    return [(i + 1) % get["no_rope_layer_interval"] != 0 for i in layers]


def _one(each: Sequence[Any]) -> tuple[Any, ...]:
    """Returns one for all layers where they are alike."""
    return (each[0],) if len({*each}) == 1 else tuple(each)


def _ropes(get: Json, kind: str, types: Sequence[str]) -> list[Rope | None]:
    """Returns the rotary positions of each layer."""
    said = get["rope_scaling"] or get["rope_parameters"] or {}
    nested = {_LOCAL, _GLOBAL} & {*said}
    own = {t: (said.get(t) or {}) if nested else said for t in (_LOCAL, _GLOBAL)}
    theta = {_LOCAL: get["rope_theta"], _GLOBAL: get["rope_theta"]}
    if kind == "gemma3_text":
        theta[_LOCAL] = get["rope_local_base_freq"]
        own[_LOCAL] = own[_LOCAL] if nested else {}
    ropes = {t: _rope(own[t], theta[t], get["max_position_embeddings"]) for t in theta}
    has_rope = _with_rope(get) if kind == "smollm3" else [True] * len(types)
    return [ropes[t] if has else None for t, has in zip(types, has_rope, strict=True)]


# For each rope type, the keys that it needs.
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
# Those that may be there. As in transformers, only llama3 reads the trained length.
_ROPE_EXTRA = {"rope_type", "type", "rope_theta", "original_max_position_embeddings"}


def _rope(said: Json, theta: float, longest: int | None) -> Rope:
    """Returns what `rope_scaling` or `rope_parameters` says."""
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ValueError(
            f"rope type {kind!r} is not known here, only {', '.join(_ROPE_KEYS)} are."
        )
    known = _ROPE_KEYS[kind] | _ROPE_EXTRA
    off = {"partial_rotary_factor": 1.0}
    wrong = [
        f"{key} = {value!r}"
        for key, value in said.items()
        if key not in known and value is not None and off.get(key) != value
    ]
    wrong += [f"{key} is missing" for key in sorted(_ROPE_KEYS[kind] - {*said})]
    # As in transformers: dynamic scaling begins at `max_position_embeddings`.
    trained = longest
    if kind == "llama3":
        trained = said.get("original_max_position_embeddings", longest)
    if kind in ("dynamic", "llama3") and not trained:
        wrong.append("max_position_embeddings is missing")
    if wrong:
        raise ValueError(f"rope type {kind!r} with {'; '.join(wrong)}.")
    return Rope(
        theta=float(said.get("rope_theta", theta)),
        kind=kind,
        factor=float(said.get("factor", 1.0)),
        low=float(said.get("low_freq_factor", 1.0)),
        high=float(said.get("high_freq_factor", 4.0)),
        trained=int(trained or 0) if kind in ("dynamic", "llama3") else 0,
    )
