"""Flax classes of `transformers` 4, and models whose modules have the same names.

Paths may have `params/` before them.
"""

from ..names import Entry, NameMap
from ._rules import ROTARY, dense, norm, same

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def _decoder(layer: str, axes: str | None, vector: str | None) -> tuple[Entry, ...]:
    """Returns the rules of a Llama-style decoder; `layer` is the path of a layer."""
    torch = "[model.]layers.{i}"
    modules = [
        *(f"self_attn/{name}" for name in _ATTENTION),
        *(f"mlp/{name}" for name in _MLP),
    ]
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "self_attn/q_norm",
        "self_attn/k_norm",
    )
    return (
        Entry(
            "[model/]embed_tokens/embedding",
            "[model.]embed_tokens.weight",
            tied="lm_head.weight",
        ),
        *(
            entry
            for name in modules
            for entry in (
                Entry(
                    f"{layer}/{name}/kernel",
                    f"{torch}.{name.replace('/', '.')}.weight",
                    axes,
                    "linear",
                ),
                Entry(
                    f"{layer}/{name}/bias",
                    f"{torch}.{name.replace('/', '.')}.bias",
                    vector,
                    "other",
                ),
            )
        ),
        *(
            Entry(
                f"{layer}/{name}/{leaf}",
                f"{torch}.{name.replace('/', '.')}.weight",
                vector,
                "other",
            )
            for name in norms
            for leaf in ("weight", "scale")
        ),
        Entry("[model/]norm/weight", "[model.]norm.weight", kind="other"),
        Entry("[model/]norm/scale", "[model.]norm.weight", kind="other"),
        Entry("lm_head/kernel", "lm_head.weight"),
        Entry("score/kernel", "score.weight"),
    )


#: FlaxLlamaForCausalLM; also any decoder whose modules have transformers' own names.
LLAMA = NameMap(
    _decoder("[model/]layers/{i}", None, None), prefix="model.", ignore=ROTARY
)

#: FlaxMistralForCausalLM and FlaxGemmaForCausalLM, which have Llama's names.
MISTRAL = GEMMA = LLAMA

#: Decoders of your own with transformers' names for Qwen 2: transformers has no Flax
#: class of it. For tunix's see `TUNIX_QWEN2`.
QWEN2 = LLAMA

_FUSED = (
    ("self_attn", "{part:q_proj,k_proj,v_proj}", "qkv_proj"),
    ("mlp", "{part:gate_proj,up_proj}", "gate_up_proj"),
)


def phi3(heads: int = 1, kv_heads: int = 1) -> NameMap:
    """Returns the map of a decoder whose q, k, v and gate, up are fused on the Hub.

    In JAX they are leaves of their own, with the names of `LLAMA`.

    Args:
      heads: of queries, `num_attention_heads` of the model's `config.json`.
      kv_heads: of keys and values, `num_key_value_heads`.

    Examples:
      >>> path = "model/layers/0/self_attn/k_proj/kernel"
      >>> (place,) = phi3(40, 10).places(path, (5120, 1280))
      >>> place.name, place.shape((5120, 1280)), place.cut.start
      ('model.layers.0.self_attn.qkv_proj.weight', (7680, 5120), 5120)
    """
    sizes = {"qkv_proj": (heads, kv_heads, kv_heads)}
    rules = (
        Entry(
            f"[model/]layers/{{i}}/{block}/{parts}/kernel",
            f"[model.]layers.{{i}}.{block}.{fused}.weight",
            "i o -> (part o) i",
            "linear",
            sizes=sizes.get(fused, ()),
        )
        for block, parts, fused in _FUSED
    )
    return NameMap((*rules, *LLAMA.entries), prefix="model.", ignore=ROTARY)


#: Phi-3 and Phi-3.5 mini, where q, k and v have equally many heads; see `phi3`.
PHI3 = phi3()

#: Llama with one leaf for all layers (`nn.scan`), whose first axis is the layer.
LLAMA_STACKED = NameMap(
    _decoder("[model/]layers", "i in out -> out in", "i d -> d"),
    prefix="model.",
    ignore=ROTARY,
)

_H = "[transformer/]h/{i}", "[transformer.]h.{i}"

#: GPT-2, whose Flax kernels are `[out, in]`; torch's Conv1D is `[in, out]`.
GPT2 = NameMap(
    (
        Entry(
            "[transformer/]wte/embedding",
            "[transformer.]wte.weight",
            tied="lm_head.weight",
        ),
        Entry("[transformer/]wpe/embedding", "[transformer.]wpe.weight"),
        *(
            entry
            for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
            for module in (name.replace("/", "."),)
            for entry in (
                Entry(
                    f"{_H[0]}/{name}/kernel",
                    f"{_H[1]}.{module}.weight",
                    "out in -> in out",
                    "conv1d",
                ),
                Entry(f"{_H[0]}/{name}/bias", f"{_H[1]}.{module}.bias"),
            )
        ),
        *norm(f"{_H[0]}/ln_1", f"{_H[1]}.ln_1"),
        *norm(f"{_H[0]}/ln_2", f"{_H[1]}.ln_2"),
        *norm("[transformer/]ln_f", "[transformer.]ln_f"),
        Entry("lm_head/kernel", "lm_head.weight"),
        Entry("score/kernel", "score.weight"),
    ),
    prefix="transformer.",
    ignore=("[transformer.]h.{i}.attn.bias", "[transformer.]h.{i}.attn.masked_bias"),
)


def _encoder(flax: str, torch: str) -> tuple[Entry, ...]:
    """Returns the rules of a BERT encoder, for the prefix on each side."""
    layer, layer_t = f"{flax}encoder/layer/{{i}}", f"{torch}encoder.layer.{{i}}"
    return (
        *(
            Entry(
                f"{flax}embeddings/{name}/embedding", f"{torch}embeddings.{name}.weight"
            )
            for name in (
                "word_embeddings",
                "position_embeddings",
                "token_type_embeddings",
            )
        ),
        *norm(f"{flax}embeddings/LayerNorm", f"{torch}embeddings.LayerNorm"),
        *(
            entry
            for name in (
                "attention/self/query",
                "attention/self/key",
                "attention/self/value",
                "attention/output/dense",
                "intermediate/dense",
                "output/dense",
            )
            for entry in dense(f"{layer}/{name}", f"{layer_t}.{name.replace('/', '.')}")
        ),
        *norm(
            f"{layer}/attention/output/LayerNorm",
            f"{layer_t}.attention.output.LayerNorm",
        ),
        *norm(f"{layer}/output/LayerNorm", f"{layer_t}.output.LayerNorm"),
        *dense(f"{flax}pooler/dense", f"{torch}pooler.dense"),
    )


#: BERT and models built like it (MiniLM, sentence encoders).
BERT = NameMap(
    (
        *_encoder("[bert/]", "[bert.]"),
        *same("classifier", "qa_outputs", "cls/predictions/transform/dense"),
        *norm(
            "cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm"
        ),
        Entry("cls/predictions/bias", "cls.predictions.bias"),
        *same("cls/seq_relationship"),
    ),
    prefix="bert.",
    ignore=(
        "[bert.]embeddings.position_ids",
        "cls.predictions.decoder.{leaf:weight,bias}",
    ),
)

#: RoBERTa, XLM-RoBERTa.
ROBERTA = NameMap(
    (
        *_encoder("[roberta/]", "[roberta.]"),
        *same(
            "classifier",
            "classifier/dense",
            "classifier/out_proj",
            "qa_outputs",
            "lm_head/dense",
        ),
        *norm("lm_head/layer_norm", "lm_head.layer_norm"),
        Entry("lm_head/bias", "lm_head.bias"),
    ),
    prefix="roberta.",
    ignore=(
        "[roberta.]embeddings.position_ids",
        "lm_head.decoder.{leaf:weight,bias}",
    ),
)


def _t5(side: str, parts: tuple[tuple[int, tuple[str, ...]], ...]) -> tuple[Entry, ...]:
    """Returns the rules of T5's encoder or decoder."""
    block = f"{side}/block/{{i}}/layer"
    torch = block.replace("/", ".")
    return (
        *(
            Entry(
                f"{block}/{n}/{name}/kernel",
                f"{torch}.{n}.{name.replace('/', '.')}.weight",
            )
            for n, names in parts
            for name in names
        ),
        Entry(
            f"{block}/0/SelfAttention/relative_attention_bias/embedding",
            f"{torch}.0.SelfAttention.relative_attention_bias.weight",
        ),
        *(
            Entry(
                f"{block}/{n}/layer_norm/weight",
                f"{torch}.{n}.layer_norm.weight",
                kind="other",
            )
            for n, _ in parts
        ),
        Entry(
            f"{side}/final_layer_norm/weight",
            f"{side}.final_layer_norm.weight",
            kind="other",
        ),
    )


_SELF = tuple(f"SelfAttention/{name}" for name in "qkvo")
_CROSS = tuple(f"EncDecAttention/{name}" for name in "qkvo")
_FEED = tuple(f"DenseReluDense/{name}" for name in ("wi", "wi_0", "wi_1", "wo"))

#: T5 and its variants with gated units.
T5 = NameMap(
    (
        Entry("shared/embedding", "shared.weight", tied="lm_head.weight"),
        *_t5("encoder", ((0, _SELF), (1, _FEED))),
        *_t5("decoder", ((0, _SELF), (1, _CROSS), (2, _FEED))),
        Entry("lm_head/kernel", "lm_head.weight"),
    ),
    ignore=(
        "{side:encoder,decoder}.embed_tokens.weight",
        "decoder.block.{i}.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
)


def _vit(layers: str, modules: dict[str, str]) -> NameMap:
    """Returns the rules of a vision transformer whose layers torch calls `layers`."""
    layer, torch = "[vit/]encoder/layer/{i}", f"[vit.]{layers}.{{i}}"
    patches = "embeddings.patch_embeddings.projection"
    return NameMap(
        (
            Entry("[vit/]embeddings/cls_token", "[vit.]embeddings.cls_token"),
            Entry(
                "[vit/]embeddings/position_embeddings",
                "[vit.]embeddings.position_embeddings",
            ),
            *dense(f"[vit/]{patches.replace('.', '/')}", f"[vit.]{patches}"),
            *(
                entry
                for flax, name in modules.items()
                for entry in dense(f"{layer}/{flax}", f"{torch}.{name}")
            ),
            *norm(f"{layer}/layernorm_before", f"{torch}.layernorm_before"),
            *norm(f"{layer}/layernorm_after", f"{torch}.layernorm_after"),
            *norm("[vit/]layernorm", "[vit.]layernorm"),
            *dense("[vit/]pooler/dense", "[vit.]pooler.dense"),
            *same("classifier"),
        ),
        prefix="vit.",
    )


#: Vision transformers with the names of transformers 4 and of files of whole models.
VIT = _vit(
    "encoder.layer",
    {
        name: name.replace("/", ".")
        for name in (
            "attention/attention/query",
            "attention/attention/key",
            "attention/attention/value",
            "attention/output/dense",
            "intermediate/dense",
            "output/dense",
        )
    },
)

#: The same with the names of transformers 5, also of adapters made for its modules.
VIT_V5 = _vit(
    "layers",
    {
        "attention/attention/query": "attention.q_proj",
        "attention/attention/key": "attention.k_proj",
        "attention/attention/value": "attention.v_proj",
        "attention/output/dense": "attention.o_proj",
        "intermediate/dense": "mlp.fc1",
        "output/dense": "mlp.fc2",
    },
)
