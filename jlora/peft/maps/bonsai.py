"""Bonsai (`jax-ml/bonsai`): NNX models.

Paths are those of `nnx.state(model, nnx.Param)`.
"""

from ..names import NameMap
from ._rules import ATTENTION, MLP, matrices, table, vectors

#: `bonsai.models.qwen3`, which has a leaf for the head in tied models too.
BONSAI_QWEN3 = NameMap(
    (
        table("embedder/embedding"),
        *matrices(
            "d h k -> (h k) d",
            {
                "layers/{i}/attn/{part:q,k,v}_proj/kernel": (
                    f"{ATTENTION}.{{part}}_proj.weight"
                )
            },
        ),
        *matrices(
            "h k d -> d (h k)",
            {"layers/{i}/attn/o_proj/kernel": f"{ATTENTION}.o_proj.weight"},
        ),
        *matrices(
            "i o -> o i",
            {
                "layers/{i}/mlp/{part:gate,up,down}_proj/kernel": (
                    f"{MLP}.{{part}}_proj.weight"
                ),
                "lm_head/kernel": "lm_head.weight",
            },
        ),
        *vectors(
            {
                "layers/{i}/{part:input,post_attention}_layernorm/scale": (
                    "model.layers.{i}.{part}_layernorm.weight"
                ),
                "layers/{i}/attn/{part:q,k}_norm/scale": (
                    f"{ATTENTION}.{{part}}_norm.weight"
                ),
                "final_norm/scale": "model.norm.weight",
            }
        ),
    ),
    prefix="model.",
)
