"""Tunix (`google-tunix`): the NNX models of `tunix.models`.

Paths are those of `nnx.state(model, nnx.Param)`.
"""

from ..names import NameMap
from ._rules import ATTENTION, MLP, ROTARY, matrices, table, vectors

_NORMS = {
    "layers/{i}/input_layernorm/w": "model.layers.{i}.input_layernorm.weight",
    "layers/{i}/post_attention_layernorm/w": (
        "model.layers.{i}.post_attention_layernorm.weight"
    ),
    "layers/{i}/attn/{part:q,k}_norm/w": f"{ATTENTION}.{{part}}_norm.weight",
    "final_norm/w": "model.norm.weight",
}
_QKV = {"layers/{i}/attn/{part:q,k,v}_proj/w": f"{ATTENTION}.{{part}}_proj.weight"}
_O = {"layers/{i}/attn/o_proj/w": f"{ATTENTION}.o_proj.weight"}
_MLP = {"layers/{i}/mlp/{part:gate,up,down}_proj/kernel": f"{MLP}.{{part}}_proj.weight"}
_EXPERTS = {
    "layers/{i}/mlp/{part:gate,up,down}_proj": (
        f"{MLP}.experts.{{e}}.{{part}}_proj.weight"
    )
}

#: `tunix.models.llama3`.
TUNIX_LLAMA3 = NameMap(
    (
        table("embedder/input_embedding"),
        *matrices("d h k -> (h k) d", _QKV),
        *matrices("h k d -> d (h k)", _O),
        *matrices("i o -> o i", {**_MLP, "lm_head/w": "lm_head.weight"}),
        *vectors(_NORMS),
    ),
    prefix="model.",
    ignore=ROTARY,
)

#: `tunix.models.qwen2`, whose queries, keys and values have biases.
TUNIX_QWEN2 = NameMap(
    (
        *TUNIX_LLAMA3.entries,
        *vectors(
            {"layers/{i}/attn/{part:q,k,v}_bias": f"{ATTENTION}.{{part}}_proj.bias"}
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)

#: `tunix.models.qwen3`, dense or with experts.
TUNIX_QWEN3 = NameMap(
    (
        *TUNIX_LLAMA3.entries,
        *matrices("e i o -> o i", _EXPERTS),
        *matrices("i o -> o i", {"layers/{i}/mlp/router/kernel": f"{MLP}.gate.weight"}),
    ),
    prefix="model.",
    ignore=ROTARY,
)

_EINSUMS = (
    table("embedder/input_embedding"),
    *matrices(
        "h d k -> (h k) d",
        {"layers/{i}/attn/q_einsum/w": f"{ATTENTION}.q_proj.weight"},
    ),
    *matrices(
        "part h d k -> (h k) d",
        {
            "layers/{i}/attn/kv_einsum/w": f"{ATTENTION}.{{part:k,v}}_proj.weight",
            "layers/{i}/attn/qkv_einsum/w": f"{ATTENTION}.{{part:q,k,v}}_proj.weight",
        },
    ),
    *matrices(
        "h k d -> d (h k)",
        {"layers/{i}/attn/attn_vec_einsum/w": f"{ATTENTION}.o_proj.weight"},
    ),
    *matrices("i o -> o i", _MLP),
    *vectors(
        {
            "layers/{i}/pre_attention_norm/scale": (
                "model.layers.{i}.input_layernorm.weight"
            ),
            "final_norm/scale": "model.norm.weight",
        }
    ),
)

#: `tunix.models.gemma` for Gemma 1, which has two norms a layer.
TUNIX_GEMMA = NameMap(
    (
        *_EINSUMS,
        *vectors(
            {
                "layers/{i}/pre_ffw_norm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                )
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)

#: `tunix.models.gemma` for Gemma 2, which has four norms a layer.
TUNIX_GEMMA2 = NameMap(
    (
        *_EINSUMS,
        *vectors(
            {
                "layers/{i}/post_attn_norm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                ),
                "layers/{i}/{part:pre,post}_ffw_norm/scale": (
                    "model.layers.{i}.{part}_feedforward_layernorm.weight"
                ),
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)

#: `tunix.models.gemma3`, its text model.
TUNIX_GEMMA3 = NameMap(
    (
        *_EINSUMS,
        *vectors(
            {
                "layers/{i}/post_attention_norm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                ),
                "layers/{i}/{part:pre,post}_ffw_norm/scale": (
                    "model.layers.{i}.{part}_feedforward_layernorm.weight"
                ),
                "layers/{i}/attn/_query_norm/scale": f"{ATTENTION}.q_norm.weight",
                "layers/{i}/attn/_key_norm/scale": f"{ATTENTION}.k_norm.weight",
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)
