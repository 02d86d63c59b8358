"""Writes models quantised by bitsandbytes itself, and what it widens them to.

In an environment of its own (`pip install -e '.[golden]'`):

    python tests/golden/make_bitsandbytes.py

Each file of `tests/golden/quantised` holds tensors as `transformers` saves them, and
under `dense.` the numbers that bitsandbytes gives for each weight.
"""

import pathlib

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent / "quantised"
SHAPES = {  # name: fan-out, fan-in
    "rows": (16, 128),  # a block lies in a row
    "short": (16, 32),  # a block is two rows
    "odd": (6, 96),  # a block ends within a row
    "long": (3, 320),
}


def weight(shape: tuple[int, int], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * 0.02


def four_bits(kind: str, nested: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        layer = bnb.nn.Linear4bit(
            shape[1],
            shape[0],
            bias=False,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=kind,
        )
        layer.weight.data = weight(shape, seed).to(dtype)
        layer = layer.to("cpu")
        own = layer.state_dict()
        found |= {f"{name}.{key}": x.detach().clone() for key, x in own.items()}
        # Its kernel for CPUs lets blocks begin with each row, which neither what it
        # writes nor its kernels for GPUs do: all is one row here.
        state = layer.weight.quant_state
        state.shape = torch.Size([1, shape[0] * shape[1]])
        wide = bnb.functional.dequantize_4bit(layer.weight.data, state)
        found[f"dense.{name}"] = wide.reshape(shape).float()
    found["norm.weight"] = torch.ones(8, dtype=dtype)
    return {key: x.contiguous() for key, x in found.items()}


def eight_bits() -> dict[str, torch.Tensor]:
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        w = weight(shape, seed).half()
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(w)
        found[f"{name}.weight"] = codes
        found[f"{name}.SCB"] = scales
        found[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        wide = bnb.functional.int8_vectorwise_dequant(codes, scales)
        found[f"dense.{name}"] = wide.float()
    found["norm.weight"] = torch.ones(8, dtype=torch.float16)
    return {key: x.contiguous() for key, x in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    files = {
        "nf4": four_bits("nf4", False, torch.float32),
        "nf4_double": four_bits("nf4", True, torch.bfloat16),
        "fp4": four_bits("fp4", False, torch.float32),
        "int8": eight_bits(),
    }
    for name, tensors in files.items():
        save_file(tensors, FOLDER / f"{name}.safetensors", metadata={"format": "pt"})
        print(name, sum(x.numel() * x.element_size() for x in tensors.values()))
