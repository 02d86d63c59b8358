"""The models of check_merge.py, tiny and random; needs torch and transformers 5."""

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 24}
LLAMA = {**TEXT, **HEADS, "num_key_value_heads": 2, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
VISION = {**HEADS, "hidden_size": 16, "num_hidden_layers": 1}
VISION |= {"image_size": 16, "patch_size": 8}
MOE = {"num_experts_per_tok": 2}


class Mixed(nn.Module):
    """An attention with q, k and v packed, beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class Convs(nn.Module):
    """Convolutions over one and two dimensions, one of them in groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=(2, 1))
        self.three = nn.Conv3d(4, 3, 2)
        self.groups = nn.Conv2d(4, 6, 3, groups=2)
        self.deep = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, x):
        flat = x[:, :, 0]
        both = self.one(flat[:, :, 0]), self.two(flat), self.three(x)
        more = self.groups(flat), self.deep(flat[:, :, 0])
        return torch.cat([y.flatten(1) for y in (*both, *more)], 1)


class Square(nn.Module):
    """Square layers, of which no shape says how they lie."""

    def __init__(self):
        super().__init__()
        self.turned = transformers.pytorch_utils.Conv1D(6, 6)
        self.plain = nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6)

    def forward(self, x):
        x = torch.tanh(self.plain(x)) + self.turned(x)
        return x + self.table(torch.tensor([1, 5])).sum(0)


class Experts(nn.Module):
    """A matrix, and a stack of matrices that every row goes through."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.flat = nn.Parameter(torch.randn(5, 8))
        self.up = nn.Parameter(torch.randn(3, 8 if transposed else 12, 8))

    def forward(self, x):
        spec = "ti,eio->teo" if self.is_transposed else "ti,eoi->teo"
        return torch.cat([torch.einsum(spec, x, self.up).sum(1), x @ self.flat.T], 1)


class Raw(nn.Module):
    """Weights that are bare parameters, of two and of three axes."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


def _hf(name: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return build


def _llama(**fields: Any) -> Callable[[], nn.Module]:
    return _hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, **fields})


def _vision(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Returns what makes a text model with a vision tower beside it."""

    def build() -> nn.Module:
        text = dict(LLAMA) if name == "Gemma3" else {"model_type": "llama", **LLAMA}
        vision = (
            {**VISION}
            if name == "Gemma3"
            else {"model_type": "clip_vision_model", **VISION}
        )
        config = getattr(transformers, f"{name}Config")(
            text_config=text, vision_config=vision, **fields
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


def _gpt2(head: str, **fields: Any) -> Callable[[], nn.Module]:
    return _hf(f"GPT2{head}", "GPT2Config", **{**GPT2, **ENDS, **fields})


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama(tie_word_embeddings=False),
    "tied": _llama(tie_word_embeddings=True),
    "llama_bias": _llama(tie_word_embeddings=False, attention_bias=True),
    "gpt2": _gpt2("LMHeadModel"),
    "gpt2_bare": _gpt2("Model"),
    "gpt2_untied": _gpt2("LMHeadModel", tie_word_embeddings=False),
    "gpt2_square": _gpt2("LMHeadModel", vocab_size=16, tie_word_embeddings=False),
    "qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "phi3": _hf("Phi3ForCausalLM", "Phi3Config", **LLAMA, **ENDS),
    "mixtral": _hf(
        "MixtralForCausalLM", "MixtralConfig", **LLAMA, **MOE, num_local_experts=3
    ),
    "qwen3_moe": _hf(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **LLAMA,
        **MOE,
        num_experts=3,
        moe_intermediate_size=8,
        head_dim=4,
    ),
    "gpt_oss": _hf(
        "GptOssForCausalLM",
        "GptOssConfig",
        **LLAMA,
        **MOE,
        num_local_experts=3,
        head_dim=4,
    ),
    "bert": _hf(
        "BertForSequenceClassification",
        "BertConfig",
        **TEXT,
        **HEADS,
        num_labels=3,
        max_position_embeddings=16,
    ),
    "bert_bare": _hf(
        "BertModel", "BertConfig", **TEXT, **HEADS, max_position_embeddings=16
    ),
    "llama_score": _hf(
        "LlamaForSequenceClassification", "LlamaConfig", **LLAMA, **ENDS, num_labels=3
    ),
    "t5": _hf(
        "T5ForConditionalGeneration",
        "T5Config",
        **T5,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
    "gemma3_vision": _vision("Gemma3", mm_tokens_per_image=4),
    "llava": _vision("Llava"),
    "mha": Mixed,
    "convs": Convs,
    "square": Square,
    "raw": lambda: Raw(False),
    "raw_t": lambda: Raw(True),
}


def inputs(base: str) -> dict[str, torch.Tensor]:
    """Returns what the model is called with."""
    seed = torch.Generator().manual_seed(0)
    shapes = {"mha": (2, 5, 16), "convs": (2, 4, 3, 6, 5), "square": (5, 6)}
    shapes |= {"raw": (5, 8), "raw_t": (5, 8)}
    if base in shapes:
        return {"x": torch.randn(shapes[base], generator=seed)}
    top = 16 if base == "gpt2_square" else 40
    ids = torch.randint(3, top, (2, 7), generator=seed)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if base == "t5" else {})}


def fused(model: nn.Module, folder: pathlib.Path) -> None:
    """Writes the base with the names that it has in memory: experts in one tensor."""
    model.save_pretrained(folder, save_original_format=False)


def body(model: nn.Module, folder: pathlib.Path) -> None:
    """Writes the base without its head and the prefix of its names, as gpt2 is."""
    model.base_model.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def sharded(model: nn.Module, folder: pathlib.Path) -> None:
    """Writes the base in several files with an index."""
    model.save_pretrained(folder, max_shard_size="8KB")


def twice(model: nn.Module, folder: pathlib.Path) -> None:
    """Writes a tied model with its table stored a second time, as the head."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, file, metadata={"format": "pt"})
