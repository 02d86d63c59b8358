"""Makes peft_inits.npz: what PEFT's inits of data or singular vectors make of layers.

Needs torch and PEFT 0.21 (extra `peft`); run from the repository's root:

    python tests/golden/make_peft_inits.py
"""

import pathlib

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

N_IN, N_OUT, RANK, ALPHA = 12, 10, 4, 6


class Two(nn.Module):
    """Two layers, so that the second one's inputs are not the batch itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(N_IN, N_OUT, bias=False)
        self.second = nn.Linear(N_OUT, N_IN, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def fresh() -> Two:
    torch.manual_seed(1)
    model = Two()
    model.first.weight.data[3:] *= 0.1  # so the second layer's inputs vary along few
    return model


def config(init: str, **more) -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        init_lora_weights=init,
        target_modules=["first", "second"],
        **more,
    )


def kept(name: str, model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the factors and bases of an adapted model."""
    out = {}
    for path, p in model.named_parameters():
        layer = "first" if ".first." in path else "second"
        leaf = next(k for k in ("lora_A", "lora_B", "base_layer") if k in path)
        out[f"{name}/{layer}/{leaf}"] = p.detach().numpy()
    return out


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, N_IN) * torch.linspace(3, 0.5, N_IN) + 1
    arrays = {"x": x.numpy()}
    arrays |= {f"w/{k[:-7]}": p.detach().numpy() for k, p in fresh().named_parameters()}

    eva = config("eva", eva_config=EvaConfig(rho=1.0, tau=0.0))
    model = get_peft_model(fresh(), eva)
    initialize_lora_eva_weights(
        model, dataloader=[x, x], forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    arrays |= kept("eva", model)

    eva = config("eva", eva_config=EvaConfig(rho=2.0, tau=0.0))
    model = get_peft_model(fresh(), eva)
    initialize_lora_eva_weights(
        model, dataloader=[x, x], forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    arrays |= kept("eva_rho", model)

    for method in ("ipm", "kpm"):
        model, corda = (
            fresh(),
            config("corda", corda_config=CordaConfig(corda_method=method)),
        )
        preprocess_corda(model, corda, run_model=lambda model=model: model(x))
        arrays |= kept(f"corda_{method}", get_peft_model(model, corda))

    model, lora_ga = fresh(), config("lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        torch.sum(torch.tanh(model(x)) ** 2).backward()

    preprocess_loraga(model, lora_ga, step)
    arrays |= kept("lora_ga", get_peft_model(model, lora_ga))

    model = get_peft_model(fresh(), config("mica"))
    arrays |= kept("mica", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.sum(torch.tanh(model(x)) ** 2).backward()
    optimizer.step()
    arrays |= kept("mica_step", model)

    path = pathlib.Path(__file__).with_name("peft_inits.npz")
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
