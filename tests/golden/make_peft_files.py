"""Writes the golden files of tests/peft/test_peft_files.py, with torch and PEFT.

Run once, in an environment with `torch`, `peft` and `transformers` 5:

    python tests/golden/make_peft_files.py tests/golden/peft

For each model: its weights, an input and the outputs; for each kind of adapter the
directory that PEFT wrote, its numbers drawn at random.
"""

import pathlib
import shutil
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 24}
LLAMA = {**TEXT, **HEADS, "num_key_value_heads": 2, "max_position_embeddings": 16}


class Experts(nn.Module):
    """Two stacks of matrices that every token goes through, weighted by a router."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        up, down = ((3, 8, 12), (3, 12, 8)) if transposed else ((3, 12, 8), (3, 8, 12))
        self.up = nn.Parameter(torch.randn(up))
        self.down = nn.Parameter(torch.randn(down))

    def forward(self, x, weights):
        weight = "eio->teo" if self.is_transposed else "eoi->teo"
        x = torch.einsum(f"ti,{weight}", x, self.up)
        x = torch.einsum(f"tei,{weight}", torch.tanh(x), self.down)
        return (x * weights[:, :, None]).sum(1)


class Moe(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x, torch.softmax(self.router(x), -1))


class Convs(nn.Module):
    """Convolutions over one, two and three dimensions, one of them in groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3)
        self.two = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0))
        self.three = nn.Conv3d(3, 4, 2)
        self.groups = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        one = self.one(x[:, :, 0, 0])
        two = self.two(x[:, :, 0])
        three = self.three(x)
        four = self.groups(torch.cat([x[:, :, 0], x[:, :1, 1]], 1))
        return torch.cat([y.flatten(1) for y in (one, two, three, four)], 1)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(2, 40, (2, 7), generator=torch.manual_seed(seed))


def spread(model: nn.Module) -> None:
    """Makes weights so large that each layer shows in the output."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.1)


def randomise(model: nn.Module, dtype: torch.dtype) -> None:
    """Draws what is trained; a dtype rounds it as a file of that type does."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not p.requires_grad:
                continue
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.add_(0.1 * torch.randn_like(p))
            p.copy_(p.to(dtype).to(p.dtype))


def cast_file(file: pathlib.Path, dtype: torch.dtype) -> None:
    tensors = {k: v.to(dtype) for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def write(folder, name, build, inputs, output, kinds):
    """Writes one model and its adapters."""
    torch.manual_seed(0)
    base = build()
    spread(base)
    base.eval()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    here = folder / name
    here.mkdir(parents=True)
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(here)
        for file in here.glob("generation_config.json"):
            file.unlink()
    else:
        save_file(state, here / "model.safetensors", metadata={"format": "pt"})
    io = {f"input_{k}": v for k, v in inputs.items()}
    with torch.no_grad():
        io["base"] = output(base(**inputs))
    for n, (kind, settings) in enumerate(kinds.items()):
        settings = dict(settings)
        dtype = settings.pop("dtype", torch.float32)
        model = build()
        model.load_state_dict(state)
        tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
        torch.manual_seed(n + 1)
        randomise(tuned, dtype)
        tuned.eval()
        with torch.no_grad():
            io[kind] = output(tuned(**inputs))
        tuned.save_pretrained(here / kind)
        (here / kind / "README.md").unlink(missing_ok=True)
        if dtype != torch.float32:
            cast_file(here / kind / "adapter_model.safetensors", dtype)
        error = (io[kind] - io["base"]).abs().max().item()
        assert error > 1e-2, (name, kind, error)
        print(f"{name:8} {kind:12} changes the output by {error:.3f}")
    io = {k: v.contiguous() for k, v in io.items()}
    save_file(io, here / "io.safetensors")


def logits(out):
    return out.logits


def main(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    ids = {"input_ids": tokens(0)}
    every = "all-linear"
    seen = tokens(0)[:, 2].tolist()
    r = {"r": 3, "lora_alpha": 5}
    write(
        folder,
        "llama",
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
        ),
        ids,
        logits,
        {
            "linear": {**r, "target_modules": every, "task_type": "CAUSAL_LM"},
            "rslora": {**r, "target_modules": ["q_proj"], "use_rslora": True},
            "patterns": {
                **r,
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "rank_pattern": {"v_proj": 2, r"layers\.1.*up_proj": 4},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
            },
            "dora": {**r, "target_modules": every, "use_dora": True},
            "head": {
                **r,
                "target_modules": ["o_proj"],
                "modules_to_save": ["lm_head"],
            },
            "embedding": {**r, "target_modules": ["embed_tokens", "lm_head"]},
            "layers": {
                **r,
                "target_modules": ["k_proj", "down_proj"],
                "layers_to_transform": [1],
            },
            "tokens": {
                **r,
                "target_modules": ["v_proj"],
                "trainable_token_indices": {"embed_tokens": seen},
            },
            "bfloat16": {**r, "target_modules": ["v_proj"], "dtype": torch.bfloat16},
            "float16": {**r, "target_modules": ["v_proj"], "dtype": torch.float16},
            "alora": {
                **r,
                "target_modules": every,
                "task_type": "CAUSAL_LM",
                "alora_invocation_tokens": tokens(0)[1, 3:5].tolist(),
            },
        },
    )
    write(
        folder,
        "tied",
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
        ),
        ids,
        logits,
        {
            "tied": {
                **r,
                "target_modules": ["embed_tokens", "q_proj"],
                "ensure_weight_tying": True,
            },
        },
    )
    write(
        folder,
        "gpt2",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16
            )
        ),
        ids,
        logits,
        {
            "linear": {
                **r,
                "target_modules": ["c_attn", "c_proj", "c_fc"],
                "fan_in_fan_out": True,
            },
            "dora": {
                **r,
                "target_modules": ["c_attn"],
                "fan_in_fan_out": True,
                "use_dora": True,
            },
            "untied": {
                **r,
                "target_modules": ["wte", "c_proj"],
                "fan_in_fan_out": True,
                "ensure_weight_tying": True,
            },
            "tokens": {
                **r,
                "target_modules": ["c_attn"],
                "fan_in_fan_out": True,
                "trainable_token_indices": seen,
            },
            "position": {**r, "target_modules": ["wpe"]},
        },
    )
    labels = {"num_labels": 3}
    write(
        folder,
        "bert",
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(
                **TEXT, **HEADS, **labels, max_position_embeddings=16
            )
        ),
        ids,
        logits,
        {
            "linear": {
                **r,
                "target_modules": ["query", "value"],
                "modules_to_save": ["classifier"],
                "task_type": "SEQ_CLS",
            },
            "lora_only": {**r, "target_modules": ["key"], "bias": "lora_only"},
            "bias": {**r, "target_modules": ["intermediate.dense"], "bias": "all"},
            "embedding": {**r, "target_modules": ["word_embeddings"]},
            "dora": {
                **r,
                "target_modules": ["word_embeddings", "query"],
                "use_dora": True,
            },
        },
    )
    image = torch.randn((2, 3, 8, 8), generator=torch.manual_seed(0))
    write(
        folder,
        "vit",
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                **HEADS,
                **labels,
                image_size=8,
                patch_size=4,
            )
        ),
        {"pixel_values": image},
        logits,
        {
            "linear": {
                **r,
                "target_modules": ["q_proj", "v_proj", "fc1"],
                "modules_to_save": ["classifier"],
            },
            "conv": {**r, "target_modules": ["projection"]},
            "dora": {
                **r,
                "target_modules": ["projection", "fc2"],
                "use_dora": True,
            },
        },
    )
    t5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
    write(
        folder,
        "t5",
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **t5,
                num_heads=4,
                decoder_start_token_id=0,
                relative_attention_num_buckets=8,
                feed_forward_proj="gated-gelu",
            )
        ),
        {**ids, "decoder_input_ids": tokens(1)},
        logits,
        {
            "linear": {**r, "target_modules": ["q", "v", "wo"]},
            "dora": {**r, "target_modules": ["k", "wi_0"], "use_dora": True},
        },
    )
    x = {"x": torch.randn((5, 8), generator=torch.manual_seed(0))}
    both = {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
    for name, transposed in (("moe", False), ("moe_t", True)):
        write(
            folder,
            name,
            lambda transposed=transposed: Moe(transposed),
            x,
            lambda out: out,
            {
                "both": {**r, **both},
                "one": {
                    **r,
                    "target_modules": ["router"],
                    "target_parameters": ["experts.up"],
                },
                "patterns": {**r, **both, "rank_pattern": {"experts.down": 2}},
            },
        )
    x = {"x": torch.randn((2, 3, 4, 5, 6), generator=torch.manual_seed(0))}
    write(
        folder,
        "convs",
        Convs,
        x,
        lambda out: out,
        {
            "plain": {**r, "target_modules": ["one", "two", "three"]},
            "dora": {**r, "target_modules": ["one", "two", "three"], "use_dora": True},
        },
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
