"""Writes `peft.npz` and `peft.json`: what Hugging Face PEFT computes, for the tests.

Run it in an environment of its own (the CPU build of torch will do); the tests read the
files with numpy alone, so that CI needs neither torch nor PEFT:

    pip install -e '.[golden]'
    python tests/golden/make_peft_golden.py

Every case is one layer with one adapter of random numbers. Its arrays are named
`case/name`: `weight`, `x`, `y` (the output), `dy` (the loss is `sum(y * dy)`), each
factor under PEFT's own name and in PEFT's own layout, its gradient (`grad.NAME`), its
value after one step of AdamW (`step.NAME`) and the merged weight (`merged`).
"""

import json
import pathlib
import warnings

import numpy as np
import peft
import torch
import transformers
from peft import (
    AdaLoraConfig,
    LoraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    lorafa,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

FOLDER = pathlib.Path(__file__).parent
LEARNING_RATE = 1e-2
FACTORS = ("lora_", "vera_lambda", "trainable_tokens_delta")

rng = np.random.default_rng(0)
arrays: dict[str, np.ndarray] = {}
cases: dict[str, dict] = {}


class Holder(nn.Module):
    """One layer, so that PEFT has a name to adapt."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


class Attention(nn.MultiheadAttention):
    """Self-attention of one argument."""

    def forward(self, x, *_, **__):
        return super().forward(x, x, x, need_weights=False)


class Experts(nn.Module):
    """Stacked expert matrices `[E, in, out]` or `[E, out, in]`, each with its rows."""

    def __init__(self, shape: tuple[int, ...], is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(normal(*shape))

    def forward(self, x):
        equation = "eti,eio->eto" if self.is_transposed else "eti,eoi->eto"
        return torch.einsum(equation, x, self.weight)


def normal(*shape: int) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


def numpy(tensor) -> np.ndarray:
    return tensor.detach().float().numpy().copy()


def short(name: str) -> str:
    """Returns `out_proj.lora_A` of `base_model...out_proj.lora_A.default.weight`."""
    parts = [p for p in name.split(".") if p not in ("default", "weight")]
    start = next(i for i, p in enumerate(parts) if p.startswith(FACTORS))
    outer = ["out_proj"] if "out_proj" in parts else []
    return ".".join(outer + parts[start:])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {short(name): p for name, p in model.named_parameters() if p.requires_grad}


def randomize(model: nn.Module) -> None:
    """Gives every factor random numbers; magnitudes stay near the norms they are."""
    with torch.no_grad():
        for name, p in trained(model).items():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * normal(*p.shape))
            else:
                p.copy_(0.3 * normal(*p.shape))


def write(case: str, **values) -> None:
    for name, value in values.items():
        arrays[f"{case}/{name}"] = np.asarray(value)


def record(case: str, model: nn.Module, x: torch.Tensor, weight: str, **about) -> None:
    """Runs one case and keeps everything the test compares."""
    cases[case] = about
    randomize(model)
    for name, p in trained(model).items():
        write(case, **{name: numpy(p)})
    y = model(x)
    dy = normal(*y.shape)
    (y * dy).sum().backward()
    write(case, x=x.numpy(), y=numpy(y), dy=dy.numpy())
    for name, p in trained(model).items():
        write(case, **{f"grad.{name}": numpy(p.grad)})
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    torch.optim.AdamW(trained(model).values(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        for name, p in trained(model).items():
            write(case, **{f"step.{name}": numpy(p)})
            p.copy_(before[name])
    if about.get("groups", 1) == 1:
        merged = dict(model.merge_and_unload().named_parameters())
        write(case, merged=numpy(merged[weight]))
        if "layer.out_proj.weight" in merged:
            write(case, **{"out_proj.merged": numpy(merged["layer.out_proj.weight"])})


def fresh(layer: nn.Module, case: str) -> Holder:
    """Returns a holder of `layer` with new weights, kept under `case`."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * normal(*p.shape))
    for name, p in layer.named_parameters():
        write(case, **{name: numpy(p)})
    return Holder(layer)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), lambda: normal(2, 5, 12)),
    "conv1d_hf": (lambda: Conv1D(10, 12), lambda: normal(2, 5, 12)),
    "embedding": (
        lambda: nn.Embedding(20, 8),
        lambda: torch.tensor(rng.integers(0, 20, (3, 6))),
    ),
    "conv1d": (
        lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
        lambda: normal(2, 6, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: normal(2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, (1, 2, 3)), lambda: normal(2, 2, 3, 4, 5)),
    "mha": (
        lambda: Attention(8, 2, batch_first=True),
        lambda: normal(2, 5, 8),
    ),
}
METHODS = {
    "lora": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


def lora_cases() -> None:
    for kind, (layer, inputs) in LAYERS.items():
        for method, options in METHODS.items():
            if (kind, method) == ("mha", "dora"):
                continue  # PEFT has none
            case = f"{method}-{kind}"
            config = LoraConfig(
                target_modules=["layer"],
                fan_in_fan_out=kind == "conv1d_hf",
                **options,
            )
            model = get_peft_model(fresh(layer(), case), config)
            name = "layer.in_proj_weight" if kind == "mha" else "layer.weight"
            about = {"kind": kind, "method": method, **options}
            record(case, model, inputs(), name, **about)
    for kind, shape, is_transposed in (
        ("experts_in_out", (3, 6, 5), True),
        ("experts_out_in", (3, 5, 6), False),
    ):
        for method in ("lora", "rslora"):
            case = f"{method}-{kind}"
            holder = fresh(Experts(shape, is_transposed), case)
            options = METHODS[method]
            config = LoraConfig(
                target_modules=[], target_parameters=["layer.weight"], **options
            )
            about = {"kind": kind, "method": method, **options}
            model = get_peft_model(holder, config)
            record(case, model, normal(3, 4, 6), "layer.weight", **about)


def other_methods() -> None:
    for kind in ("linear", "conv1d_hf"):
        layer, inputs = LAYERS[kind]
        case = f"vera-{kind}"
        config = VeraConfig(
            r=4, target_modules=["layer"], fan_in_fan_out=kind == "conv1d_hf"
        )
        model = get_peft_model(fresh(layer(), case), config)
        wrapped = model.base_model.model.layer
        write(
            case,
            vera_A=numpy(wrapped.vera_A["default"]),
            vera_B=numpy(wrapped.vera_B["default"]),
        )
        record(case, model, inputs(), "layer.weight", kind=kind, method="vera", r=4)
    for kind in ("linear", "conv1d_hf", "conv2d"):
        layer, inputs = LAYERS[kind]
        case = f"adalora-{kind}"
        config = AdaLoraConfig(
            init_r=4,
            target_r=2,
            lora_alpha=6,
            total_step=10,
            tinit=2,
            tfinal=2,
            target_modules=["layer"],
            fan_in_fan_out=kind == "conv1d_hf",
        )
        model = get_peft_model(fresh(layer(), case), config)
        about = {"kind": kind, "method": "adalora", "r": 4, "lora_alpha": 6}
        record(case, model, inputs(), "layer.weight", **about)
    layer, inputs = LAYERS["embedding"]
    case = "rows-embedding"
    rows = [3, 7, 1]
    config = TrainableTokensConfig(target_modules=["layer"], token_indices=rows)
    model = get_peft_model(fresh(layer(), case), config)
    about = {"kind": "embedding", "method": "rows", "rows": rows}
    record(case, model, inputs(), "layer.weight", **about)


def adalora_schedule() -> None:
    """Keeps the ranks that AdaLoRA's allocator leaves, step by step."""
    case = "adalora-schedule"

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    options = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}
    betas = {"beta1": 0.85, "beta2": 0.8}
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=4,
        target_modules=["first", "second"],
        orth_reg_weight=0.5,
        **options,
        **betas,
    )
    model = get_peft_model(Two(), config)
    randomize(model)
    names = {
        name: f"{name.split('.')[2]}.{short(name)}"
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    params = dict(model.named_parameters())
    write(case, **{names[name]: numpy(params[name]) for name in names})
    cases[case] = {"r": 4, "target_r": 2, "lora_alpha": 4, **options, **betas}
    covariances = [
        p @ p.T if "lora_A" in name else p.T @ p
        for name, p in params.items()
        if "lora_A" in name or "lora_B" in name
    ]
    penalty = sum(torch.norm(c - torch.eye(len(c)), p="fro") for c in covariances)
    write(case, orthogonality=numpy(penalty / len(covariances)))
    for step in range(1, options["total_step"] + 1):
        with torch.no_grad():
            for name in names:
                params[name].grad = normal(*params[name].shape)
                write(case, **{f"grad{step}.{names[name]}": numpy(params[name].grad)})
                params[name].sub_(0.05 * params[name].grad)
        if step < options["total_step"]:
            model.base_model.update_and_allocate(step)
        for name in names:
            write(case, **{f"after{step}.{names[name]}": numpy(params[name])})


def starts() -> None:
    """Keeps what the inits make of one weight, and the statistics of random ones."""
    for init in ("pissa", "olora"):
        for kind in ("linear", "conv1d_hf"):
            if (init, kind) == ("olora", "conv1d_hf"):
                continue  # PEFT's OLoRA forgets the transposition
            case = f"init-{init}-{kind}"
            config = LoraConfig(
                r=4,
                lora_alpha=6,
                init_lora_weights=init,
                target_modules=["layer"],
                fan_in_fan_out=kind == "conv1d_hf",
            )
            model = get_peft_model(fresh(LAYERS[kind][0](), case), config)
            base = dict(model.named_parameters())
            residual = base["base_model.model.layer.base_layer.weight"]
            write(case, residual=numpy(residual))
            write(case, **{name: numpy(p) for name, p in trained(model).items()})
            cases[case] = {"kind": kind, "init": init, "r": 4, "lora_alpha": 6}
    torch.manual_seed(0)
    holder = Holder(nn.Linear(400, 300))
    config = LoraConfig(r=8, init_lora_weights="orthogonal", target_modules=["layer"])
    factors = trained(get_peft_model(holder, config))
    cases["init-orthogonal"] = {
        "r": 8,
        "fan_in": 400,
        "fan_out": 300,
        "rms": {
            n: float(p.detach().square().mean().sqrt()) for n, p in factors.items()
        },
        "largest_product": float(
            (factors["lora_B"] @ factors["lora_A"]).detach().abs().max()
        ),
    }


def optimizers() -> None:
    """Keeps three steps of each of PEFT's optimizers on a linear layer."""
    makers = {
        "lora_fa": lambda m: create_lorafa_optimizer(m, 3, 7, lr=LEARNING_RATE),
        "lora_fa_bfloat16": lambda m: create_lorafa_optimizer(
            m, 3, 7, lr=LEARNING_RATE
        ),
        "riemannian": lambda m: create_riemannian_optimizer(
            m, torch.optim.AdamW, lr=LEARNING_RATE
        ),
        "riemannian_sgd": lambda m: create_riemannian_optimizer(
            m, torch.optim.SGD, lr=LEARNING_RATE
        ),
        "lora_plus": lambda m: create_loraplus_optimizer(
            m, torch.optim.AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=16.0
        ),
    }
    is_bf16_available = lorafa.is_bf16_available
    for optimizer_name, make in makers.items():
        case = f"optimizer-{optimizer_name}"
        lorafa.is_bf16_available = (
            is_bf16_available if optimizer_name.endswith("bfloat16") else lambda: False
        )
        config = LoraConfig(r=3, lora_alpha=7, target_modules=["layer"])
        model = get_peft_model(fresh(nn.Linear(12, 10), case), config)
        randomize(model)
        factors = trained(model)
        write(case, **{name: numpy(p) for name, p in factors.items()})
        optimizer = make(model)
        x, target = normal(6, 12), normal(6, 10)
        write(case, x=x.numpy(), target=target.numpy())
        for step in (1, 2, 3):
            optimizer.zero_grad()
            (0.5 * (model(x) - target).square().sum()).backward()
            gradient = factors["lora_B"].grad.clone()
            optimizer.step()
            write(case, **{f"step{step}.{n}": numpy(p) for n, p in factors.items()})
            if step == 1:
                write(case, **{"grad.lora_B": numpy(gradient)})
            if step == 1 and optimizer_name.startswith("lora_fa"):
                (state,) = [s for s in optimizer.state.values() if s]
                corrected = state["exp_avg_B"] / (1 - 0.9)
                write(case, **{"corrected.lora_B": numpy(corrected)})
        cases[case] = {"r": 3, "lora_alpha": 7, "learning_rate": LEARNING_RATE}
    lorafa.is_bf16_available = is_bf16_available


def differences() -> None:
    """Keeps PEFT's side of every place where jlora differs on purpose."""
    tied_weights()
    convolutions()
    dropout()
    packed_biases()
    combinations()
    low_precision()


def tied_weights() -> None:
    case = "differs-tied"
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config)
    model = get_peft_model(
        base,
        LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    )
    table = base.model.embed_tokens
    with torch.no_grad():
        table.lora_embedding_A["default"].copy_(0.3 * normal(3, 16))
        table.lora_embedding_B["default"].copy_(0.3 * normal(8, 3))
    write(
        case,
        weight=numpy(table.base_layer.weight),
        lora_embedding_A=numpy(table.lora_embedding_A["default"]),
        lora_embedding_B=numpy(table.lora_embedding_B["default"]),
    )
    merged = model.merge_and_unload()
    write(case, merged=numpy(merged.model.embed_tokens.weight))
    cases[case] = {"r": 3, "lora_alpha": 7}


def convolutions() -> None:
    options = {
        # With this stride the undilated branch has the base's shape: no error.
        "dilation": ({"stride": 4, "dilation": 2}, 9),
        "padding_mode": ({"padding": 1, "padding_mode": "circular"}, 7),
        "groups": ({"groups": 2}, 7),
    }
    for name, (own, length) in options.items():
        case = f"differs-{name}"
        layer = nn.Conv1d(6, 8, 3, **own)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"])
        model = get_peft_model(fresh(layer, case), config)
        randomize(model)
        write(case, **{n: numpy(p) for n, p in trained(model).items()})
        x = normal(2, 6, length)
        write(case, x=x.numpy(), y=numpy(model(x)))
        if name != "groups":
            write(case, merged_y=numpy(model.merge_and_unload()(x)))
        cases[case] = {"r": 4, "lora_alpha": 6, **own}


def dropout() -> None:
    case = "differs-embedding_dropout"
    model = get_peft_model(
        fresh(nn.Embedding(20, 8), case),
        LoraConfig(r=3, lora_alpha=7, lora_dropout=0.9, target_modules=["layer"]),
    )
    randomize(model)
    write(case, **{name: numpy(p) for name, p in trained(model).items()})
    x = torch.tensor(rng.integers(0, 20, (3, 6)))
    model.train()
    write(case, x=x.numpy(), y_train=numpy(model(x)), y_again=numpy(model(x)))
    model.eval()
    write(case, y_eval=numpy(model(x)))
    cases[case] = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.9}


def packed_biases() -> None:
    model = get_peft_model(
        Holder(Attention(8, 2, batch_first=True)),
        LoraConfig(r=3, target_modules=["layer"], bias="all"),
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    cases["differs-bias_all"] = {"trained": sorted(names)}


def combinations() -> None:
    case = "differs-linear_combination"
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["layer"])
    model = get_peft_model(fresh(nn.Linear(12, 10), case), config)
    model.add_adapter("other", config)
    layer = model.base_model.model.layer
    for name in ("default", "other"):
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(0.3 * normal(3, 12))
            layer.lora_B[name].weight.copy_(0.3 * normal(10, 3))
        write(
            case,
            **{
                f"{name}.lora_A": numpy(layer.lora_A[name].weight),
                f"{name}.lora_B": numpy(layer.lora_B[name].weight),
            },
        )
    for kind in ("linear", "cat", "svd"):
        model.add_weighted_adapter(
            ["default", "other"], [0.7, 0.4], kind, combination_type=kind, svd_rank=6
        )
        write(case, **{f"{kind}.delta": numpy(layer.get_delta_weight(kind))})
    cases[case] = {"r": 3, "lora_alpha": 7, "weights": [0.7, 0.4]}
    case = "differs-one_rslora_adapter"
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["layer"])
    model = get_peft_model(fresh(nn.Linear(12, 10), case), config)
    randomize(model)
    layer = model.base_model.model.layer
    write(case, **{name: numpy(p) for name, p in trained(model).items()})
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    write(
        case,
        delta=numpy(layer.get_delta_weight("default")),
        same=numpy(layer.get_delta_weight("same")),
    )
    cases[case] = {"r": 4, "lora_alpha": 8}


def low_precision() -> None:
    case = "differs-bfloat16_merge"
    weight, a, b = normal(24, 32), 0.1 * normal(4, 32), 0.1 * normal(24, 4)
    write(case, lora_A=a.numpy(), lora_B=b.numpy())
    for name, safe in (("merged", False), ("safe_merged", True)):
        holder = Holder(nn.Linear(32, 24, bias=False)).to(torch.bfloat16)
        with torch.no_grad():
            holder.layer.weight.copy_(weight)
        write(case, weight=numpy(holder.layer.weight))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"])
        model = get_peft_model(holder, config)
        with torch.no_grad():
            trained(model)["lora_A"].copy_(a)
            trained(model)["lora_B"].copy_(b)
        out = model.merge_and_unload(safe_merge=safe)
        write(case, **{name: numpy(out.layer.weight)})
    cases[case] = {"r": 4, "lora_alpha": 8}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    lora_cases()
    other_methods()
    adalora_schedule()
    starts()
    optimizers()
    differences()
    np.savez_compressed(FOLDER / "peft.npz", **arrays)
    made_with = {
        "peft": peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps({"made_with": made_with, "cases": cases}, indent=1)
    (FOLDER / "peft.json").write_text(text + "\n")
    print(f"{len(cases)} cases, {len(arrays)} arrays, {made_with}")


if __name__ == "__main__":
    main()
