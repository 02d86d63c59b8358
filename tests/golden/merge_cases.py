"""The adapters of check_merge.py; needs torch, transformers 5 and PEFT.

A `Case` is data: which base, what to hand to PEFT's config, what is done to the files
afterwards, and whether jlora must refuse what comes out.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
from merge_bases import body, fused, sharded, twice
from safetensors.torch import load_file, save_file
from torch import nn

Config = Callable[..., peft.PeftConfig]
Edit = Callable[[pathlib.Path], None]
Store = Callable[[nn.Module, pathlib.Path], None]


class Case(NamedTuple):
    """An adapter to write.

    Attributes:
      base: a key of `BASES`.
      fields: what the PEFT config is made of.
      make: the class of the config.
      dtype: of the base.
      store: writes the base; None writes it as transformers does.
      model: a key of `BASES`, the model that is adapted if it is not the one on disk.
      plain: whether an init that changed the base is converted away when saving.
      save: how `save_pretrained` is called.
      extract: globs over leaves that are extracted again from the merged model.
      edit: changes the adapter's directory afterwards.
      spoil: changes the base's directory afterwards.
      refuse: text that every refusal has to hold; None where jlora should read.
      ways: which commands must refuse; None for all.
    """

    base: str
    fields: dict[str, Any]
    make: Config = peft.LoraConfig
    dtype: torch.dtype = torch.float32
    store: Store | None = None
    model: str | None = None
    plain: bool = False
    save: Mapping[str, Any] = MappingProxyType({})
    extract: tuple[str, ...] = ()
    edit: Edit | None = None
    spoil: Edit | None = None
    refuse: str | None = None
    ways: tuple[str, ...] | None = None


def in_dtype(dtype: torch.dtype) -> Edit:
    """Returns an edit that rounds the adapter's tensors."""
    return tensors(lambda held: {k: v.to(dtype) for k, v in held.items()})


def tensors(change: Callable[[dict], dict], name: str = "adapter_model") -> Edit:
    """Returns an edit that replaces a file of tensors by `change` of them."""

    def edit(folder: pathlib.Path) -> None:
        file = folder / f"{name}.safetensors"
        held = change(dict(load_file(file)))
        held = {k: v.contiguous() for k, v in held.items()}
        save_file(held, file, metadata={"format": "pt"})

    return edit


def one(end: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Edit:
    """Returns an edit of the first tensor whose name has `end`; None removes it."""

    def edit(held: dict) -> dict:
        name = min(k for k in held if end in k)
        new = change(held.pop(name))
        return held if new is None else {**held, name: new}

    return tensors(edit)


def fields(**changes: Any) -> Edit:
    """Returns an edit of adapter_config.json; a function is applied to the field."""

    def edit(folder: pathlib.Path) -> None:
        file = folder / "adapter_config.json"
        held = json.loads(file.read_text())
        for name, value in changes.items():
            held[name] = value(held.get(name)) if callable(value) else value
        file.write_text(json.dumps(held, indent=2))

    return edit


QV = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
CAUSAL = {**QV, "task_type": "CAUSAL_LM"}


def on(*targets: str, **more: Any) -> dict[str, Any]:
    """Returns fields for these target modules."""
    return {"r": 3, "lora_alpha": 5, "target_modules": [*targets], **more}


def parameters(*names: str, **more: Any) -> dict[str, Any]:
    """Returns fields for these bare parameters."""
    return on(target_parameters=list(names), **more)


def qv(**more: Any) -> dict[str, Any]:
    """Returns fields for the queries and values."""
    return {**QV, **more}


TURNED = {"fan_in_fan_out": True}
ROWS = [2, 5, 21]
TABLE_ROWS = {"embed_tokens": ROWS}
TYING = {"ensure_weight_tying": True}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
PATTERNS = {
    "rank_pattern": {"v_proj": 2, r"layers\.1.*up_proj": 4},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
}
EMBED, HEAD = {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}
ADA = {"init_r": 3, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1}

CASES: dict[str, Case] = {
    # GPT-2: weights of Conv1D lie as [in, out].
    "gpt2": Case("gpt2", on("c_attn", **TURNED)),
    "gpt2_no_flag": Case("gpt2", on("c_attn", "c_fc")),
    "gpt2_bare": Case(
        "gpt2_bare",
        on("c_attn", "c_proj", **TURNED),
        extract=("*c_attn.weight", "*c_proj.weight"),
    ),
    "gpt2_without_prefix": Case("gpt2", on("c_attn", **TURNED), store=body),
    "gpt2_square": Case("gpt2", on("attn.c_proj", **TURNED)),
    "gpt2_and_head": Case("gpt2_untied", on("c_attn", "lm_head", **TURNED)),
    "gpt2_and_tied_head": Case("gpt2", on("c_attn", "lm_head", **TURNED)),
    "gpt2_square_both": Case("gpt2_square", on("attn.c_proj", "lm_head", **TURNED)),
    "gpt2_square_linear": Case("gpt2_square", on("lm_head")),
    "gpt2_square_linear_flag": Case("gpt2_square", on("lm_head", **TURNED)),
    "gpt2_dora": Case("gpt2", on("c_attn", "c_proj", use_dora=True, **TURNED)),
    "gpt2_square_dora": Case(
        "gpt2_square", on("attn.c_proj", "lm_head", "wte", use_dora=True, **TURNED)
    ),
    "gpt2_position": Case("gpt2", on("wpe")),
    "gpt2_rows": Case("gpt2", on("c_attn", trainable_token_indices=ROWS, **TURNED)),
    "gpt2_rows_dict": Case(
        "gpt2", on("c_attn", trainable_token_indices={"wte": ROWS}, **TURNED)
    ),
    "gpt2_table": Case("gpt2", on("wte", "c_attn", **TURNED)),
    "gpt2_table_tying": Case("gpt2", on("wte", "c_attn", **TURNED, **TYING)),
    "gpt2_all_linear": Case("gpt2", qv(target_modules="all-linear")),
    "square": Case("square", on("turned", "plain", "table")),
    "square_other_order": Case("square", on("plain", "turned", **TURNED)),
    "square_plain": Case("square", on("plain", **TURNED), extract=("plain.weight",)),
    "square_turned": Case("square", on("turned"), extract=("turned.weight",)),
    # Llama.
    "llama": Case("llama", CAUSAL, extract=("*q_proj.weight", "*v_proj.weight")),
    "llama_sharded": Case("llama", CAUSAL, store=sharded),
    "llama_tied": Case("tied", CAUSAL),
    "llama_all_linear": Case("llama", qv(target_modules="all-linear")),
    "llama_regex": Case("llama", qv(target_modules=r".*layers\.1\..*_proj")),
    "llama_dora": Case("llama", qv(use_dora=True)),
    "llama_dora_table": Case("llama", on("embed_tokens", "v_proj", use_dora=True)),
    "llama_rslora": Case(
        "llama", on("q_proj", "v_proj", "up_proj", use_rslora=True, **PATTERNS)
    ),
    "llama_patterns": Case("llama", on("q_proj", "v_proj", "up_proj", **PATTERNS)),
    "llama_layers": Case("llama", qv(layers_to_transform=[1])),
    "llama_exclude": Case("llama", qv(exclude_modules=["layers.0.self_attn.q_proj"])),
    "llama_exclude_all_v": Case("llama", qv(exclude_modules=["v_proj"])),
    "llama_layer_and_table": Case(
        "llama", on("q_proj", "embed_tokens", layers_to_transform=0)
    ),
    "llama_dora_patterns": Case(
        "llama",
        on("q_proj", "v_proj", "up_proj", use_dora=True, use_rslora=True, **PATTERNS),
    ),
    "llama_norm": Case("llama", qv(modules_to_save=["input_layernorm"])),
    "llama_lora_bias": Case("llama_bias", qv(lora_bias=True)),
    "llama_score": Case("llama_score", qv(task_type="SEQ_CLS")),
    "llama_score_new": Case(
        "llama", qv(task_type="SEQ_CLS"), model="llama_score", store=body
    ),
    # The embedding table and the head.
    "table": Case("llama", on("embed_tokens", "q_proj")),
    "head": Case("llama", on("lm_head", "q_proj")),
    "table_and_head": Case("llama", on("embed_tokens", "lm_head")),
    "table_saved": Case("llama", qv(**EMBED)),
    "head_saved": Case("llama", qv(**HEAD)),
    "table_tying": Case("llama", on("embed_tokens", "q_proj", **TYING)),
    "tied_table": Case("tied", on("embed_tokens", "q_proj")),
    "tied_head": Case("tied", on("lm_head", "q_proj")),
    "tied_table_and_head": Case("tied", on("embed_tokens", "lm_head")),
    "tied_table_saved": Case("tied", qv(**EMBED)),
    "tied_head_saved": Case("tied", qv(**HEAD)),
    "tied_both_saved": Case("tied", qv(modules_to_save=["embed_tokens", "lm_head"])),
    "tied_table_tying": Case("tied", on("embed_tokens", "q_proj", **TYING)),
    "tied_head_tying": Case("tied", on("lm_head", "q_proj", **TYING)),
    "tied_table_saved_tying": Case("tied", qv(**EMBED, **TYING)),
    "tied_head_saved_tying": Case("tied", qv(**HEAD, **TYING)),
    "tied_table_and_head_tying": Case(
        "tied", on("embed_tokens", "lm_head", "q_proj", **TYING)
    ),
    "tied_both_saved_tying": Case(
        "tied", qv(modules_to_save=["embed_tokens", "lm_head"], **TYING)
    ),
    "rows_list": Case("llama", qv(trainable_token_indices=ROWS)),
    "rows_dict": Case("llama", qv(trainable_token_indices=TABLE_ROWS)),
    "rows_of_both": Case(
        "llama", qv(trainable_token_indices={**TABLE_ROWS, "lm_head": [3, 4]})
    ),
    "rows_alone": Case(
        "llama", {"token_indices": ROWS}, make=peft.TrainableTokensConfig
    ),
    "tied_rows_list": Case("tied", qv(trainable_token_indices=ROWS)),
    "tied_rows_dict": Case("tied", qv(trainable_token_indices=TABLE_ROWS)),
    "tied_rows_tying": Case("tied", qv(trainable_token_indices=ROWS, **TYING)),
    "stored_twice": Case("tied", CAUSAL, store=twice),
    "stored_twice_table": Case("tied", on("embed_tokens", "q_proj"), store=twice),
    "stored_twice_head": Case("tied", on("lm_head", "q_proj"), store=twice),
    "stored_twice_saved": Case("tied", qv(**EMBED), store=twice),
    "stored_twice_saved_tying": Case("tied", qv(**EMBED, **TYING), store=twice),
    "head_by_ending": Case("llama", qv(modules_to_save=["head"])),
    "tables_beside": Case("llama", CAUSAL, save={"save_embedding_layers": True}),
    "tied_tables_beside": Case("tied", CAUSAL, save={"save_embedding_layers": True}),
    # Biases.
    "qwen2": Case("qwen2", CAUSAL),
    "qwen2_bias_all": Case("qwen2", qv(bias="all")),
    "qwen2_bias_lora_only": Case("qwen2", qv(bias="lora_only")),
    "llama_bias_all": Case("llama", qv(bias="all")),
    "gpt2_bias_all": Case("gpt2", on("c_attn", bias="all", **TURNED)),
    "mha_bias_all": Case("mha", on("attn", "head", bias="all")),
    # A text model inside of another: in files under other names than in memory.
    "gemma3_vision": Case("gemma3_vision", on("q_proj", "down_proj")),
    "gemma3_vision_regex": Case(
        "gemma3_vision", qv(target_modules=r".*language_model\..*\.(q|v)_proj")
    ),
    "llava": Case("llava", qv(target_modules="all-linear")),
    "llava_head": Case("llava", on("lm_head", "q_proj")),
    # Other models.
    "bert": Case("bert", on("query", "value", modules_to_save=["classifier"])),
    "bert_new_head": Case("bert_bare", on("query", task_type="SEQ_CLS"), model="bert"),
    "bert_bias_lora_only": Case(
        "bert", on("key", bias="lora_only", task_type="SEQ_CLS")
    ),
    "bert_table": Case("bert", on("word_embeddings", "query")),
    "t5": Case("t5", on("q", "v", "wo", task_type="SEQ_2_SEQ_LM")),
    "t5_dora": Case("t5", on("k", "wi_0", use_dora=True)),
    "t5_table": Case("t5", on("shared", "q")),
    "phi3": Case(
        "phi3", on("qkv_proj", "gate_up_proj", "o_proj"), extract=("*_proj.weight",)
    ),
    "phi3_dora": Case("phi3", on("qkv_proj", use_dora=True)),
    "mha": Case("mha", on("attn")),
    "mha_and_head": Case("mha", on("attn", "head")),
    "mha_out_only": Case("mha", on("head")),
    "conv": Case("convs", on("one", "two", "three"), extract=("two.weight",)),
    "conv_dora": Case("convs", on("one", "two", "three", use_dora=True)),
    "conv_groups": Case("convs", on("groups", "two", r=4)),
    "conv_depthwise": Case("convs", on("deep", "one", r=4)),
    # Experts and bare parameters.
    "mixtral": Case("mixtral", parameters(*EXPERTS)),
    "mixtral_fused": Case("mixtral", parameters(*EXPERTS), store=fused),
    "mixtral_attention": Case("mixtral", CAUSAL),
    "mixtral_one": Case(
        "mixtral", parameters(EXPERTS[1], target_modules=["q_proj"]), store=fused
    ),
    "qwen3_moe": Case("qwen3_moe", parameters(*EXPERTS)),
    "qwen3_moe_fused": Case(
        "qwen3_moe",
        parameters(*EXPERTS, rank_pattern={"experts.down_proj": 2}),
        store=fused,
    ),
    "gpt_oss": Case("gpt_oss", parameters(*EXPERTS)),
    "parameter_2d": Case("llama", parameters("q_proj.weight", "up_proj.weight")),
    "raw_flat": Case("raw", parameters("experts.flat")),
    "raw_experts": Case("raw", parameters("experts.up")),
    "raw_experts_t": Case("raw_t", parameters("experts.up")),
    # Types.
    "bf16": Case("llama", CAUSAL, dtype=torch.bfloat16),
    "bf16_dora": Case("llama", qv(use_dora=True), dtype=torch.bfloat16),
    "bf16_both": Case(
        "llama", CAUSAL, dtype=torch.bfloat16, edit=in_dtype(torch.bfloat16)
    ),
    "fp16": Case("llama", CAUSAL, dtype=torch.float16),
    "fp16_gpt2": Case("gpt2", on("c_attn", **TURNED), dtype=torch.float16),
    "adapter_bf16": Case("llama", CAUSAL, edit=in_dtype(torch.bfloat16)),
    # Initialisations and other methods.
    "pissa": Case("llama", qv(init_lora_weights="pissa")),
    "pissa_as_plain": Case("llama", qv(init_lora_weights="pissa"), plain=True),
    "olora": Case("llama", qv(init_lora_weights="olora")),
    "olora_as_plain": Case("llama", qv(init_lora_weights="olora"), plain=True),
    "mica": Case("llama", qv(init_lora_weights="mica")),
    "orthogonal": Case("llama", qv(r=4, init_lora_weights="orthogonal")),
    "gaussian": Case("llama", qv(init_lora_weights="gaussian")),
    "adalora": Case(
        "llama",
        {"lora_alpha": 5, "target_modules": ["q_proj"], **ADA},
        make=peft.AdaLoraConfig,
    ),
    "vera": Case("llama", {"r": 3, "target_modules": ["q_proj"]}, make=peft.VeraConfig),
    # Fields of tomorrow.
    "unknown_off": Case(
        "llama",
        CAUSAL,
        edit=fields(future_flag=False, other={}, more=[], enable_lora=None),
    ),
    "unknown_null": Case("llama", CAUSAL, edit=fields(future_config=None)),
}
