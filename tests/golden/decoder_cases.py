"""Tiny decoders of each family, with numbers that torch and JAX draw alike.

numpy and nothing else: `make_decoders.py` runs it beside torch, the tests beside JAX.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    # Defaults of some families lie outside of the vocabulary.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}

# As `config.json` of older checkpoints says it; `decoders.json` also has the form that
# transformers 5 writes.
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama_grouped_tied": {
        **SIZES,
        **GROUPED,
        "model_type": "llama",
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "llama_biases": {
        **SIZES,
        "model_type": "llama",
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
    "llama_llama3": {**SIZES, "model_type": "llama", "rope_scaling": LLAMA_3},
    "llama_linear": {
        **SIZES,
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_dynamic": {
        **SIZES,
        "model_type": "llama",
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "mistral": {**SIZES, **GROUPED, "model_type": "mistral", "sliding_window": 5},
    "mistral_wide": {
        **SIZES,
        **GROUPED,
        "model_type": "mistral",
        "head_dim": 8,
        "sliding_window": None,
    },
    "qwen2": {
        **SIZES,
        **GROUPED,
        "model_type": "qwen2",
        "sliding_window": 5,
        "use_sliding_window": False,
        "max_window_layers": 1,
        "rope_theta": 1_000_000.0,
    },
    "qwen2_sliding": {
        **SIZES,
        **GROUPED,
        "model_type": "qwen2",
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**SIZES, **GROUPED, "model_type": "qwen3", "head_dim": 8},
    "qwen3_sliding": {
        **SIZES,
        **GROUPED,
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
    "smollm3": {
        **SIZES,
        **GROUPED,
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
    },
    "smollm3_sliding": {
        **SIZES,
        **GROUPED,
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
    "gemma": {**GEMMA, "model_type": "gemma", "hidden_act": "gelu"},
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        "sliding_window": 5,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        **GEMMA,
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
LENGTH = 24


def tokens() -> np.ndarray:
    """Returns `[1, LENGTH]` int64."""
    raw = np.random.PCG64(0).random_raw(LENGTH)
    return (raw % SIZES["vocab_size"]).astype(np.int64)[None]


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a float32 tensor of the Hub: uniform, and around 1 for most norms.

    Raw bits of a generator are the same in each version of numpy.
    """
    seed = zlib.crc32(f"{case} {name}".encode())
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> 40
    x = (raw.astype(np.float32) / 2**23 - 1).reshape(shape)
    if len(shape) == 2:
        return x * np.float32(1.5 / shape[1] ** 0.5)
    if "norm" in name and not case.startswith("gemma"):
        return 1 + x / 2
    return x / 2
