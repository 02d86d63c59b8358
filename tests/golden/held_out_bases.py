"""Models for `held_out.py` whose architectures are not those of `server_cases.py`.

Each is `config.json` and the shapes of its files, as the Hub has them; and a name that
transformers 5 has for a part of them in memory, where it has another one.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.golden.server_cases import Case, P

HIDDEN, INNER, TOKENS, LAYERS, EXPERTS = 8, 12, 20, 2, 3
Shapes = dict[str, tuple[int, ...]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = {
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


@dataclasses.dataclass(frozen=True)
class Base:
    """A model of a few small layers.

    Attributes:
      config: the fields of `config.json`.
      shapes: of its tensors, as files name them.
      memory: what files put before the names of the body, and the class in memory.
    """

    config: dict[str, Any]
    shapes: Shapes
    memory: tuple[str, str] = ("", "")

    def in_memory(self, name: str) -> str:
        """Returns what the class calls a tensor of its files."""
        old, new = self.memory
        return new + name.removeprefix(old) if old and name.startswith(old) else name


def _layer(attention: str, inner: Shapes, heads: Shapes | None = None) -> Shapes:
    own = heads or dict.fromkeys(ATTENTION, (HIDDEN, HIDDEN))
    found = {f"{attention}.{name}.weight": shape for name, shape in own.items()}
    found |= {f"{name}.weight": shape for name, shape in inner.items()}
    return found | {"input_layernorm.weight": (HIDDEN,)}


def _body(prefix: str, layer: Shapes, *, layers: str = "layers") -> Shapes:
    found = {f"{prefix}embed_tokens.weight": (TOKENS, HIDDEN)}
    for i in range(LAYERS):
        found |= {f"{prefix}{layers}.{i}.{name}": s for name, s in layer.items()}
    return found | {f"{prefix}norm.weight": (HIDDEN,)}


def _mlp(block: str = "mlp") -> Shapes:
    return {f"{block}.{name}": shape for name, shape in GATED.items()}


def _experts(*more: str) -> Shapes:
    found = {
        f"mlp.experts.{e}.{name}": shape
        for e in range(EXPERTS)
        for name, shape in GATED.items()
    }
    found |= {f"{block}.{name}": s for block in more for name, s in GATED.items()}
    return found | {"mlp.gate": (EXPERTS, HIDDEN)}


def _tower(prefix: str, *names: str) -> Shapes:
    return {
        f"{prefix}.{i}.{name}.weight": (HIDDEN, HIDDEN)
        for i in range(LAYERS)
        for name in names
    }


def _base(
    architecture: str, shapes: Shapes, memory: tuple[str, str] = ("", ""), **more: Any
) -> Base:
    config = {"architectures": [architecture], "model_type": "any"}
    sizes = {"vocab_size": TOKENS, "hidden_size": HIDDEN}
    return Base(config | sizes | more, shapes, memory)


def bases() -> dict[str, Base]:
    """Returns the models by name."""
    dense, head = _layer("self_attn", _mlp()), {"lm_head.weight": (TOKENS, HIDDEN)}
    wide = {"q_proj": (16, HIDDEN), "k_proj": (4, HIDDEN)}
    wide |= {"v_proj": (4, HIDDEN), "o_proj": (HIDDEN, 16)}
    grouped = _layer("self_attn", _mlp(), wide)
    biased = grouped | {
        f"self_attn.{name}_proj.bias": (wide[f"{name}_proj"][0],) for name in "qkv"
    }
    mla = {"q_proj": (16, HIDDEN), "kv_a_proj_with_mqa": (6, HIDDEN)}
    mla |= {"kv_b_proj": (16, 4), "o_proj": (HIDDEN, 8)}
    llava = _body("language_model.model.", grouped)
    llava |= {f"language_model.{n}": s for n, s in head.items()}
    projector = {f"multi_modal_projector.linear_{i}.weight": (8, 8) for i in (1, 2)}
    vision = _tower(
        "vision_tower.vision_model.encoder.layers", "self_attn.q_proj", "mlp.fc1"
    )
    opt = _layer("self_attn", {"fc1": (INNER, HIDDEN), "fc2": (HIDDEN, INNER)})
    opt = {name.replace("o_proj", "out_proj"): s for name, s in opt.items()}
    bert = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INNER, HIDDEN),
        "output.dense": (HIDDEN, INNER),
    }
    encoder = {
        f"bert.encoder.layer.{i}.{n}.weight": s
        for i in range(LAYERS)
        for n, s in bert.items()
    }
    neox = {"attention.query_key_value": (24, HIDDEN), "attention.dense": (8, HIDDEN)}
    neox |= {"mlp.dense_h_to_4h": (INNER, HIDDEN), "mlp.dense_4h_to_h": (8, INNER)}
    gpt_neox = {
        f"gpt_neox.layers.{i}.{n}.weight": s
        for i in range(LAYERS)
        for n, s in neox.items()
    }
    gpt_neox |= {"gpt_neox.embed_in.weight": (TOKENS, HIDDEN)}
    intern = {"attention.wqkv": (24, HIDDEN), "attention.wo": (HIDDEN, HIDDEN)}
    intern |= {"feed_forward.w1": (INNER, HIDDEN), "feed_forward.w3": (INNER, HIDDEN)}
    intern |= {"feed_forward.w2": (HIDDEN, INNER)}
    internlm = {
        f"model.layers.{i}.{n}.weight": s
        for i in range(LAYERS)
        for n, s in intern.items()
    }
    visual = _tower("visual.blocks", "attn.qkv", "mlp.fc1")
    return {
        "qwen2": _base("Qwen2ForCausalLM", _body("model.", biased) | head),
        "qwen2 tied": _base(
            "Qwen2ForCausalLM", _body("model.", biased), tie_word_embeddings=True
        ),
        "qwen3": _base("Qwen3ForCausalLM", _body("model.", grouped) | head),
        "qwen3 tied": _base(
            "Qwen3ForCausalLM", _body("model.", grouped), tie_word_embeddings=True
        ),
        "mistral": _base("MistralForCausalLM", _body("model.", grouped) | head),
        "granite tied": _base(
            "GraniteForCausalLM", _body("model.", dense), tie_word_embeddings=True
        ),
        "minicpm": _base("MiniCPMForCausalLM", _body("model.", dense) | head),
        "gemma3 text": _base("Gemma3ForCausalLM", _body("model.", grouped)),
        "llava": _base(
            "LlavaForConditionalGeneration",
            llava | projector | vision,
            ("language_model.model.", "model.language_model."),
        ),
        "mistral3": _base(
            "Mistral3ForConditionalGeneration",
            llava | projector | vision,
            ("language_model.model.", "model.language_model."),
        ),
        "qwen2vl": _base(
            "Qwen2VLForConditionalGeneration",
            _body("model.", biased) | head | visual,
            ("model.", "model.language_model."),
        ),
        "olmoe": _base(
            "OlmoeForCausalLM",
            _body("model.", _layer("self_attn", _experts())) | head,
        ),
        "qwen2moe": _base(
            "Qwen2MoeForCausalLM",
            _body("model.", _layer("self_attn", _experts("mlp.shared_expert"))) | head,
        ),
        "deepseek": _base(
            "DeepseekV2ForCausalLM",
            _body("model.", _layer("self_attn", _experts("mlp.shared_experts"), mla))
            | head,
        ),
        "opt": _base("OPTForCausalLM", _body("model.decoder.", opt)),
        "bert": _base(
            "BertForSequenceClassification",
            encoder | {"classifier.weight": (3, HIDDEN), "classifier.bias": (3,)},
        ),
        "gpt neox": _base(
            "GPTNeoXForCausalLM", gpt_neox | {"embed_out.weight": (TOKENS, HIDDEN)}
        ),
        "internlm2": _base("InternLM2ForCausalLM", internlm),
        "score": _base(
            "Qwen3ForSequenceClassification",
            _body("model.", grouped) | {"score.weight": (3, HIDDEN)},
        ),
        "glm4": _base("Glm4ForCausalLM", _body("model.", _packed_mlp()) | head),
    }


def _packed_mlp() -> Shapes:
    inner = {"mlp.gate_up_proj": (2 * INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    return _layer("self_attn", inner)


def whole(name: str, base: Base, rng: random.Random) -> Case:
    """Returns an adapter of random modules of a model, as PEFT writes it."""
    matrices = {n: s for n, s in base.shapes.items() if len(s) == 2}
    tables = {n for n in matrices if "embed" in n or n.endswith("lm_head.weight")}
    matrices.pop("embed_out.weight", None)  # vLLM's name of it is not known
    lasts = sorted({n.split(".")[-2] for n in matrices if n not in tables})
    wanted = rng.sample(lasts, rng.randint(1, len(lasts)))
    if rng.random() < 0.3 and tables:
        wanted.append(sorted(tables)[0].split(".")[-2])
    rank, memory = rng.choice((1, 2, 8, 16)), rng.random() < 0.5
    tensors: dict[str, np.ndarray] = {}
    for key, (rows, columns) in matrices.items():
        if key.split(".")[-2] not in wanted:
            continue
        own = base.in_memory(key) if memory else key
        module = P + own.removesuffix(".weight")
        pairs = _factors(rows, columns, rank, table=key in tables and "embed" in key)
        tensors |= {f"{module}.{n}": np.ones(s, np.float32) for n, s in pairs.items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rng.choice((4, 16)),
        "target_modules": wanted,
        "bias": "none",
    }
    if rng.random() < 0.3:
        config["use_rslora"] = True
    return Case(f"{name}, {', '.join(wanted)}", name, config, tensors)


def _factors(rows: int, columns: int, rank: int, *, table: bool) -> Shapes:
    if table:
        return {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
    return {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}


def names() -> Iterator[str]:
    """Yields the names of the models."""
    yield from bases()
