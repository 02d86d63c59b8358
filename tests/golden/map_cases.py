"""Tiny models of the Hub for which the maps of `jlora.peft.maps` are checked.

numpy and nothing else: `make_maps.py` runs it beside torch, `check_maps.py` beside each
library, and the tests beside JAX.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# No two sizes of a weight are equal, so that axes cannot be confused.
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
THETA = {"rope_theta": 1_000_000.0}  # which tunix and bonsai take whatever is asked
WIDE = {**SIZES, "head_dim": 16}
SLIDING = {
    "sliding_window": 64,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "sliding_attention"],
}

CASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama", "tie_word_embeddings": False},
    "llama3": {**SIZES, **THETA, "model_type": "llama", "tie_word_embeddings": False},
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": 64},
    "qwen2": {**SIZES, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {**WIDE, **THETA, "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": {
        **WIDE,
        **THETA,
        "model_type": "qwen3_moe",
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gemma": {**WIDE, "model_type": "gemma"},
    "gemma_mha": {**WIDE, "model_type": "gemma", "num_key_value_heads": 4},
    "gemma2": {
        **WIDE,
        **SLIDING,
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {**WIDE, **SLIDING, "model_type": "gemma3_text"},
    "phi3": {**SIZES, "model_type": "phi3", "tie_word_embeddings": False},
}
LENGTH = 12


def tokens() -> np.ndarray:
    """Returns `[1, LENGTH]` int32, without the padding token."""
    raw = np.random.PCG64(0).random_raw(LENGTH)
    return (raw % (SIZES["vocab_size"] - 3) + 3).astype(np.int32)[None]


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a float32 tensor of the Hub: uniform, and around 1 for most norms.

    Raw bits of a generator are the same in each version of numpy.
    """
    seed = zlib.crc32(f"{case} {name}".encode())
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> 40
    x = (raw.astype(np.float32) / 2**23 - 1).reshape(shape)
    if len(shape) > 1:
        return x * np.float32(1.5 / shape[-1] ** 0.5)
    if "norm" in name and not case.startswith("gemma"):
        return 1 + x / 2
    return x / 2
