"""Adapters of MLX, diffusers, kohya's scripts and llama.cpp, there and back.

Each tool runs in an environment of its own; DIR is handed from one to the next:

    python tests/golden/check_dialects.py diffusers DIR   # torch, peft, diffusers
    python tests/golden/check_dialects.py mlx DIR         # mlx[cpu], mlx-lm
    python -m tests.golden.check_dialects jlora DIR       # reads both, writes its own
    python tests/golden/check_dialects.py diffusers DIR   # reads what jlora wrote
    python tests/golden/check_dialects.py mlx DIR
    python tests/golden/check_dialects.py llama DIR LLAMA_CPP  # torch, transformers

The first time, a tool makes an adapter, and notes what it adds to each weight; the
second time it loads jlora's. Each step exits with 1 where an update differs by more
than a part in 1e6 of its largest entry. LLAMA_CPP is the source of llama.cpp, whose
`convert_lora_to_gguf.py` runs as it is.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.golden.arrays import compare, load, save

LLAMA = pathlib.Path(__file__).parent / "peft" / "llama"
AIMS = ("to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in")


def unet():
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def gains_of(model) -> dict:
    """What PEFT's layers in a model of torch's add to their weights."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.weight": module.get_delta_weight(module.active_adapters[0])
        .detach()
        .numpy()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def diffusers(folder: pathlib.Path) -> int:
    import torch
    from diffusers.loaders import lora_conversion_utils as convert
    from peft import LoraConfig

    if not (folder / "diffusers_gain.safetensors").exists():
        model = unet()
        save(
            {n: x.numpy() for n, x in model.state_dict().items()},
            folder / "unet.safetensors",
        )
        ranks, alphas = {"conv1": 4}, {"conv1": 7}
        model.add_adapter(
            LoraConfig(
                r=3,
                lora_alpha=5,
                target_modules=list(AIMS),
                rank_pattern=ranks,
                alpha_pattern=alphas,
            )
        )
        for name, x in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(x)
        model.save_lora_adapter(str(folder / "diffusers"))
        save(gains_of(model), folder / "diffusers_gain.safetensors")
        return 0
    wanted = load(folder / "diffusers_gain.safetensors")
    model = unet()
    model.load_lora_adapter(
        str(folder / "own_diffusers"), prefix="unet", use_safetensors=True
    )
    bad = compare("diffusers' own format", gains_of(model), wanted)
    model = unet()
    from safetensors.torch import load_file

    state = load_file(folder / "own_kohya" / "lora.safetensors")
    state, alphas = convert._convert_non_diffusers_lora_to_diffusers(state)
    model.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    return bad | compare("kohya's, by diffusers", gains_of(model), wanted)


def mlx(folder: pathlib.Path) -> int:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    fields = json.loads((LLAMA / "config.json").read_text())
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    mx.set_default_device(mx.cpu)

    def model():
        made = llama.Model(llama.ModelArgs.from_dict(fields))
        made.load_weights(list(mx.load(str(LLAMA / "model.safetensors")).items()))
        return made

    def gains(adapted) -> dict:
        before = dict(tree_flatten(model().parameters()))
        out = {}
        for name, module in adapted.named_modules():
            if "lora_a" in module:
                after = np.array(module.fuse().weight, np.float64)
                out[f"{name}.weight"] = after - np.array(
                    before[f"{name}.weight"], np.float64
                )
        return out

    def exact(adapted) -> dict:
        """In float64, as a difference of weights is rounded."""
        return {
            f"{name}.weight": module.scale
            * (
                np.array(module.lora_a, np.float64)
                @ np.array(module.lora_b, np.float64)
            ).T
            for name, module in adapted.named_modules()
            if "lora_a" in module
        }

    def fused(adapted) -> dict:
        return {
            f"{name}.weight": np.array(module.fuse().weight)
            for name, module in adapted.named_modules()
            if "lora_a" in module
        }

    if not (folder / "mlx_gain.safetensors").exists():
        own = model()
        about = {"rank": 3, "scale": 2.5, "dropout": 0.0}
        about["keys"] = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
        linear_to_lora_layers(own, 1, about)
        for _, module in own.named_modules():
            if "lora_a" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape)
        (folder / "mlx").mkdir()
        adapted = dict(tree_flatten(own.parameters()))
        adapted = {n: x for n, x in adapted.items() if n.endswith(("lora_a", "lora_b"))}
        mx.save_safetensors(str(folder / "mlx" / "adapters.safetensors"), adapted)
        config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": about}
        (folder / "mlx" / "adapter_config.json").write_text(json.dumps(config))
        compare("MLX's own fused weights", gains(own), exact(own))
        save(exact(own), folder / "mlx_gain.safetensors")
        dora = model()
        linear_to_lora_layers(dora, 2, about, use_dora=True)
        for _, module in dora.named_modules():
            if "lora_a" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape)
                module.m = module.m * 1.3
        (folder / "mlx_dora").mkdir()
        adapted = dict(tree_flatten(dora.parameters()))
        ends = ("lora_a", "lora_b", ".m")
        adapted = {n: x for n, x in adapted.items() if n.endswith(ends)}
        mx.save_safetensors(str(folder / "mlx_dora" / "adapters.safetensors"), adapted)
        config = {**config, "fine_tune_type": "dora"}
        (folder / "mlx_dora" / "adapter_config.json").write_text(json.dumps(config))
        save(fused(dora), folder / "mlx_dora_fused.safetensors")
        return 0
    dora = load_adapters(model(), str(folder / "own_mlx_dora"))
    wanted = load(folder / "mlx_dora_fused.safetensors")
    bad = compare("MLX loads DoRA", fused(dora), wanted)
    wanted = load(folder / "mlx_gain.safetensors")
    found = exact(load_adapters(model(), str(folder / "own_mlx")))
    idle = {name for name, x in found.items() if name not in wanted and not x.any()}
    found = {name: x for name, x in found.items() if name not in idle}  # of layer 0
    return bad | compare("MLX", found, wanted)


def own(folder: pathlib.Path) -> int:
    import jlora

    bad = 0
    for tool, base in (("diffusers", folder / "unet.safetensors"), ("mlx", LLAMA)):
        read = jlora.files.read(folder / tool, base=base)
        wanted = load(folder / f"{tool}_gain.safetensors")
        zeros = {n: np.zeros(x.shape, np.float32) for n, x in wanted.items()}
        merged = {n: np.asarray(x) for n, x in jlora.merge(zeros, read).items()}
        bad |= compare(f"jlora reads {tool}", merged, wanted)
        for dialect in (
            ("kohya", "diffusers") if tool == "diffusers" else ("mlx", "peft")
        ):
            jlora.peft.save(folder / f"own_{dialect}", read, dialect=dialect)
    read = jlora.files.read(folder / "mlx_dora", base=LLAMA)
    jlora.peft.save(folder / "own_mlx_dora", read, dialect="mlx")
    wanted = load(folder / "mlx_dora_fused.safetensors")
    base = load(LLAMA / "model.safetensors")
    merged = jlora.merge({n: base[n] for n in wanted}, read)
    merged = {n: np.asarray(x) for n, x in merged.items()}
    return bad | compare("jlora merges MLX's DoRA", merged, wanted)


def llama(folder: pathlib.Path, source: pathlib.Path) -> int:
    """The converter permutes rows of q and k, as the base's are: B of them here too."""
    import gguf

    out = folder / "lora.gguf"
    command = [sys.executable, str(source / "convert_lora_to_gguf.py")]
    command += ["--base", str(LLAMA), "--outfile", str(out), str(folder / "own_peft")]
    subprocess.run(command, check=True)
    reader = gguf.GGUFReader(out)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
    heads = json.loads((LLAMA / "config.json").read_text())["num_attention_heads"]
    names = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj"}
    names["ffn_down"] = "mlp.down_proj"
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        stem = name.removesuffix(".weight.lora_a")
        _, layer, part = stem.split(".")
        b = tensors[f"{stem}.weight.lora_b"]
        if part == "attn_q":  # undo LlamaModel.permute
            b = b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        module = f"model.layers.{layer}.{names[part]}.weight"
        found[module] = alpha / b.shape[1] * (b @ a)
    return compare("llama.cpp", found, load(folder / "mlx_gain.safetensors"))


if __name__ == "__main__":
    steps = {"diffusers": diffusers, "mlx": mlx, "jlora": own, "llama": llama}
    sys.exit(steps[sys.argv[1]](*map(pathlib.Path, sys.argv[2:])))
