"""Adapters of experts, embeddings and output heads between MLX and jlora.

    python tests/golden/check_mlx_experts.py mlx DIR       # mlx[cpu], mlx-lm
    python -m tests.golden.check_mlx_experts jlora DIR     # reads them, writes its own
    python tests/golden/check_mlx_experts.py mlx DIR       # loads what jlora wrote

The first time, MLX makes adapters of tiny models and notes what they add to each weight
and which logits they give. The second time it loads jlora's, and the models that jlora
merged. Each step exits with 1 where an update differs by more than a part in 1e6 of its
largest entry, or logits by more than a part in 1e5.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.golden.arrays import compare, load, save

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MODELS = {
    "qwen3_moe": {
        **SIZES,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 12,
        "head_dim": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3": {
        **SIZES,
        "head_dim": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    },
}
ROLES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's
TOKENS = [[1, 5, 9, 2, 30]]


def split_experts(kind: str, arrays: dict) -> dict:
    """Returns arrays under Hugging Face's names, which has each expert by itself."""
    out = {}
    for name, x in arrays.items():
        front, found, rest = name.partition(".switch_mlp.")
        if not found:
            out[name] = x
            continue
        role = rest.removesuffix(".weight")
        role = ROLES[role] if kind == "mixtral" else role
        out |= {f"{front}.experts.{e}.{role}.weight": own for e, own in enumerate(x)}
    return out


def model_of(kind: str, weights: dict | None = None):
    """Returns a model of MLX's with random weights, or with Hugging Face's."""
    import importlib

    import mlx.core as mx

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    made = module.Model(
        module.ModelArgs.from_dict({**MODELS[kind], "model_type": kind})
    )
    if weights is not None:
        own = made.sanitize({n: mx.array(x) for n, x in weights.items()})
        made.load_weights(list(own.items()))
    return made


def logits(model) -> dict:
    import mlx.core as mx

    return {"logits": np.array(model(mx.array(TOKENS)))}


def exact(kind: str, model) -> dict:
    """Returns what MLX's layers add to their weights, in float64."""
    out = {}
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        a, b = (np.array(module[x], np.float64) for x in ("lora_a", "lora_b"))
        gain = b @ a if a.ndim == 3 else (a @ b).T
        if "embedding" in module:
            gain = gain.T
        if gain.any():  # a layer that is not adapted has zeros
            out[f"{name}.weight"] = module.scale * gain
    return split_experts(kind, out)


def make(folder: pathlib.Path, kind: str) -> None:
    """Writes a model under Hugging Face's names and an adapter of MLX's."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = model_of(kind)
    weights = {n: np.array(x) for n, x in tree_flatten(model.parameters())}
    save(split_experts(kind, weights), folder / kind / "base" / "model.safetensors")
    fields = {**MODELS[kind], "model_type": kind}
    (folder / kind / "base" / "config.json").write_text(json.dumps(fields))
    layer = "mlp" if kind == "qwen3_moe" else "block_sparse_moe"
    keys = ["self_attn.q_proj", "model.embed_tokens"]
    if kind != "qwen3":  # which has one table for both
        keys += [*(f"{layer}.switch_mlp.{x}" for x in ROLES), "lm_head"]
    about = {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 2, about)
    for _, module in model.named_modules():
        if "lora_a" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape)
    adapted = {n: np.array(x) for n, x in tree_flatten(model.parameters())}
    adapted = {n: x for n, x in adapted.items() if n.endswith(("lora_a", "lora_b"))}
    save(adapted, folder / kind / "adapter" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": about}
    (folder / kind / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save(exact(kind, model), folder / kind / "gain.safetensors")
    save(logits(model), folder / kind / "logits.safetensors")


def mlx(folder: pathlib.Path) -> int:
    from mlx_lm.tuner.utils import load_adapters

    bad = 0
    for kind in MODELS:
        if not (folder / kind / "own").exists():
            make(folder, kind)
            continue
        wanted = load(folder / kind / "logits.safetensors")
        gain = load(folder / kind / "gain.safetensors")
        base = load(folder / kind / "base" / "model.safetensors")
        model = load_adapters(model_of(kind, base), str(folder / kind / "own"))
        bad |= compare(f"MLX loads {kind}", exact(kind, model), gain)
        bad |= compare(f"MLX runs {kind}", logits(model), wanted, 1e-5)
        merged = load(folder / kind / "merged" / "model.safetensors")
        run = logits(model_of(kind, merged))
        bad |= compare(f"MLX runs {kind} merged", run, wanted, 1e-5)
    return bad


def own(folder: pathlib.Path) -> int:
    import jlora

    bad = 0
    for kind in MODELS:
        place = folder / kind
        read = jlora.files.read(place / "adapter", base=place / "base")
        wanted = load(place / "gain.safetensors")
        zeros = {n: np.zeros(x.shape, np.float32) for n, x in wanted.items()}
        found = jlora.merge(zeros, read)
        bad |= compare(f"jlora reads {kind}", found, wanted)
        tied = MODELS[kind].get("tie_word_embeddings", False)
        options = {"layout": None if kind == "qwen3" else "stacked", "tied": tied}
        jlora.peft.save(place / "own", read, dialect="mlx", **options)
        base = load(place / "base" / "model.safetensors")
        save(jlora.merge(base, read), place / "merged" / "model.safetensors")
    return bad


if __name__ == "__main__":
    steps = {"mlx": mlx, "jlora": own}
    sys.exit(steps[sys.argv[1]](pathlib.Path(sys.argv[2])))
