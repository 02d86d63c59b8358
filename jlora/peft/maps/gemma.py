"""DeepMind's `gemma`: einsum weights with head axes, gate and up in one leaf.

Paths are those of `model.init(...)["params"]`; with `gm.nn.LoRA` around the model, of
the first tree that `gemma.peft.split_params` returns.
"""

from ..names import Entry, NameMap
from ._rules import ATTENTION, MLP, ROTARY, matrices, table, vectors

_LAYER = "[transformer/]layer_{i}"
_GATING = {f"{_LAYER}/mlp/gating_einsum[/w]": f"{MLP}.{{part:gate,up}}_proj.weight"}
# What the package calls `transpose_gating_einsum`, and what it has without it.
_TRANSPOSED = matrices("part f d -> f d", _GATING)
_PLAIN = matrices("part d f -> f d", _GATING)
_WEIGHTS = (
    table("[transformer/]embedder/input_embedding"),
    *matrices(
        "n d h -> (n h) d", {f"{_LAYER}/attn/q_einsum/w": f"{ATTENTION}.q_proj.weight"}
    ),
    *matrices(
        "part n d h -> (n h) d",
        {
            f"{_LAYER}/attn/kv_einsum/w": f"{ATTENTION}.{{part:k,v}}_proj.weight",
            f"{_LAYER}/attn/qkv_einsum/w": f"{ATTENTION}.{{part:q,k,v}}_proj.weight",
        },
    ),
    *matrices(
        "n h d -> d (n h)",
        {f"{_LAYER}/attn/attn_vec_einsum/w": f"{ATTENTION}.o_proj.weight"},
    ),
    *matrices("f d -> d f", {f"{_LAYER}/mlp/linear[/w]": f"{MLP}.down_proj.weight"}),
    *vectors(
        {
            f"{_LAYER}/pre_attention_norm/scale": (
                "model.layers.{i}.input_layernorm.weight"
            ),
            "[transformer/]final_norm/scale": "model.norm.weight",
        }
    ),
)
_TWO_NORMS = vectors(
    {
        f"{_LAYER}/pre_ffw_norm/scale": (
            "model.layers.{i}.post_attention_layernorm.weight"
        )
    }
)
_FOUR_NORMS = vectors(
    {
        f"{_LAYER}/post_attention_norm/scale": (
            "model.layers.{i}.post_attention_layernorm.weight"
        ),
        f"{_LAYER}/{{part:pre,post}}_ffw_norm/scale": (
            "model.layers.{i}.{part}_feedforward_layernorm.weight"
        ),
    }
)
_QK_NORMS = vectors(
    {
        f"{_LAYER}/attn/_query_norm/scale": f"{ATTENTION}.q_norm.weight",
        f"{_LAYER}/attn/_key_norm/scale": f"{ATTENTION}.k_norm.weight",
    }
)


def _map(*rules: tuple[Entry, ...]) -> NameMap:
    entries = tuple(entry for group in rules for entry in group)
    return NameMap((*_WEIGHTS, *entries), prefix="model.", ignore=ROTARY)


#: Gemma 1 with `transpose_gating_einsum`: gate and up are `[2, hidden, features]`.
GEMMA_EINSUM = _map(_TRANSPOSED, _TWO_NORMS)

#: Gemma 1 as `gm.nn.Transformer` has it by default: `[2, features, hidden]`.
GEMMA1_EINSUM = _map(_PLAIN, _TWO_NORMS)

#: `gm.nn.Gemma2_9B` and `Gemma2_27B`.
GEMMA2_EINSUM = _map(_TRANSPOSED, _FOUR_NORMS)

#: `gm.nn.Gemma2_2B`, whose gate and up are `[2, features, hidden]`.
GEMMA2_2B_EINSUM = _map(_PLAIN, _FOUR_NORMS)

#: `gm.nn.Gemma3_270M` to `Gemma3_27B`, the text model.
GEMMA3_EINSUM = _map(_TRANSPOSED, _FOUR_NORMS, _QK_NORMS)
