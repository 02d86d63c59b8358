"""KerasHub on the JAX backend: backbones of Gemma and Llama.

Paths are those of `backbone.get_state_tree()["trainable_variables"]`, which are the
`path`s of its variables.
"""

from ..names import NameMap
from ._rules import ATTENTION, MLP, ROTARY, matrices, table, vectors

_GEMMA = (
    table("token_embedding/embeddings"),
    *matrices(
        "h d k -> (h k) d",
        {
            "decoder_block_{i}/attention/query/kernel": f"{ATTENTION}.q_proj.weight",
            "decoder_block_{i}/attention/key/kernel": f"{ATTENTION}.k_proj.weight",
            "decoder_block_{i}/attention/value/kernel": f"{ATTENTION}.v_proj.weight",
        },
    ),
    *matrices(
        "h k d -> d (h k)",
        {
            "decoder_block_{i}/attention/attention_output/kernel": (
                f"{ATTENTION}.o_proj.weight"
            )
        },
    ),
    *matrices(
        "i o -> o i",
        {
            "decoder_block_{i}/ffw_gating/kernel": f"{MLP}.gate_proj.weight",
            "decoder_block_{i}/ffw_gating_2/kernel": f"{MLP}.up_proj.weight",
            "decoder_block_{i}/ffw_linear/kernel": f"{MLP}.down_proj.weight",
        },
    ),
    *vectors(
        {
            "decoder_block_{i}/pre_attention_norm/scale": (
                "model.layers.{i}.input_layernorm.weight"
            ),
            "final_normalization/scale": "model.norm.weight",
        }
    ),
)

#: `GemmaBackbone` for Gemma 1, which has two norms a layer.
KERAS_GEMMA = NameMap(
    (
        *_GEMMA,
        *vectors(
            {
                "decoder_block_{i}/pre_ffw_norm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                )
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)

#: `GemmaBackbone` for Gemma 2, and the text model of `Gemma3Backbone`.
KERAS_GEMMA2 = KERAS_GEMMA3 = NameMap(
    (
        *_GEMMA,
        *vectors(
            {
                "decoder_block_{i}/post_attention_norm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                ),
                "decoder_block_{i}/{part:pre,post}_ffw_norm/scale": (
                    "model.layers.{i}.{part}_feedforward_layernorm.weight"
                ),
                "decoder_block_{i}/attention/query_norm/scale": (
                    f"{ATTENTION}.q_norm.weight"
                ),
                "decoder_block_{i}/attention/key_norm/scale": (
                    f"{ATTENTION}.k_norm.weight"
                ),
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)

_LLAMA = "transformer_layer_{i}/self_attention"

#: `LlamaBackbone`, `Llama3Backbone` and `MistralBackbone`.
KERAS_LLAMA = NameMap(
    (
        table("token_embedding/embeddings"),
        *matrices(
            "d h k -> (h k) d",
            {
                f"{_LLAMA}/query/kernel": f"{ATTENTION}.q_proj.weight",
                f"{_LLAMA}/key/kernel": f"{ATTENTION}.k_proj.weight",
                f"{_LLAMA}/value/kernel": f"{ATTENTION}.v_proj.weight",
            },
        ),
        *matrices(
            "h k d -> d (h k)",
            {f"{_LLAMA}/attention_output/kernel": f"{ATTENTION}.o_proj.weight"},
        ),
        *matrices(
            "i o -> o i",
            {
                "transformer_layer_{i}/feedforward_gate_dense/kernel": (
                    f"{MLP}.gate_proj.weight"
                ),
                "transformer_layer_{i}/feedforward_intermediate_dense/kernel": (
                    f"{MLP}.up_proj.weight"
                ),
                "transformer_layer_{i}/feedforward_output_dense/kernel": (
                    f"{MLP}.down_proj.weight"
                ),
                "token_embedding/reverse_embeddings": "lm_head.weight",
            },
        ),
        *vectors(
            {
                f"{_LLAMA}_layernorm/scale": "model.layers.{i}.input_layernorm.weight",
                "transformer_layer_{i}/feedforward_layernorm/scale": (
                    "model.layers.{i}.post_attention_layernorm.weight"
                ),
                "sequence_output_layernorm/scale": "model.norm.weight",
            }
        ),
    ),
    prefix="model.",
    ignore=ROTARY,
)
