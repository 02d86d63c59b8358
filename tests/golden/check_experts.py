"""Experts in every layout beside PEFT and transformers.

    python tests/golden/check_experts.py [--vllm VLLM] [--unsloth ZOO]

Run it where PEFT 0.21.2, torch and transformers 5.24 are installed, with jlora. For
tiny models of Mixtral, Qwen 3 MoE and gpt-oss, PEFT adapts both parameters of the
experts with random factors (`target_parameters`), saves, and merges. jlora reads the
files, and writes and reads them in every layout. Each time the update of every expert
is compared with the one that PEFT merged. PEFT reads what jlora wrote in its own
layout, and the logits are compared. The tensors of the other layouts are multiplied out
as their tools do. VLLM is the folder where a wheel of vLLM is unpacked (0.33 was): its
own classes load and pack three layouts, and what they hold is compared too. ZOO is the
folder where a wheel of unsloth_zoo is unpacked (2026.10.9 was): the functions that run
and merge its experts are taken from its files, and run on both of its orders. The exit
code is 1 if something differs by more than 1e-6 (logits: 1e-5).
"""

import argparse
import ast
import functools
import json
import logging
import os
import pathlib
import re
import sys
import tempfile
import types

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file

import jlora
from jlora.peft import Entry, ExpertLayout, NameMap

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")
LAYOUTS = ("peft", "unsloth", "per-expert", "stacked")
STEM = "model.layers.{i}.mlp.experts."


def torch_model(kind: str) -> torch.nn.Module:
    """Returns a tiny model with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def names(kind: str) -> NameMap:
    """Returns the names of the experts' parameters."""
    turned = kind == "gpt_oss"
    axes, role = (
        ("e i o -> e i o", "experts_t") if turned else ("e o i -> e o i", "experts")
    )
    leaves = ("gate_up_proj", "down_proj")
    return NameMap(
        tuple(Entry(f"layers/{{i}}/{x}", f"{STEM}{x}", axes, role) for x in leaves)
    )


def experts_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns the experts' parameters by jlora's paths."""
    found = {}
    for name, x in model.state_dict().items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\w+_proj)", name)
        if match is not None:
            found[f"layers/{match[1]}/{match[2]}"] = x.detach().numpy().copy()
    return found


def tree(leaves: dict[str, np.ndarray]) -> dict:
    out: dict = {}
    for path, x in leaves.items():
        _, layer, name = path.split("/")
        out.setdefault("layers", {}).setdefault(layer, {})[name] = x
    return out


def changes(params: dict, trainable: jlora.Trainable) -> dict[str, np.ndarray]:
    """Returns the update of each parameter."""
    merged, _ = jlora.paths.flatten(jlora.merge(params, trainable))
    base, _ = jlora.paths.flatten(params)
    return {path: np.asarray(merged[path]) - x for path, x in base.items()}


def multiplied(folder: pathlib.Path, kind: str, form: str) -> dict[str, np.ndarray]:
    """Returns the update of each parameter from the tensors, as the form's tools do."""
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    scale = fields["lora_alpha"] / fields["r"]
    number = SIZES["num_experts"]
    found: dict[str, np.ndarray] = {}
    for layer in range(SIZES["num_hidden_layers"]):
        stem = f"base_model.model.{STEM.format(i=layer)}"

        def update(name: str, stem: str = stem) -> np.ndarray:
            if form == "per-expert":
                own = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}[name]
                pairs = [[tensors[f"{stem}{e}.{own}.lora_{h}.weight"] for h in "AB"]
                         for e in range(number)]  # fmt: skip
                return np.stack([scale * b @ a for a, b in pairs])
            a, b = (tensors[f"{stem}{name}.lora_{h}.weight"] for h in "AB")
            return scale * np.einsum("eor,eri->eoi", b, a)

        gate, up, down = map(update, ("w1", "w3", "w2"))
        found |= as_parameters(kind, layer, gate, up, down)
    return found


def packed_by_vllm(folder: pathlib.Path, kind: str, form: str) -> dict[str, np.ndarray]:
    """Returns the update of each parameter that vLLM holds, by its own code."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper

    number = SIZES["num_experts"]
    called = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    expected = {"experts", *(f"experts.{name}" for name in called)}
    expected |= {f"experts.{e}.{x}" for e in range(number) for x in called.values()}
    helper = PEFTHelper.from_local_dir(str(folder), None)
    model = LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, device="cpu", dtype=torch.float32
    )
    found: dict[str, np.ndarray] = {}
    for layer in range(SIZES["num_hidden_layers"]):
        stem = STEM.format(i=layer).rstrip(".")
        if form == "peft":
            manager = object.__new__(LoRAModelManager)
            manager._is_3d_moe_model, manager.is_pooling_model = True, False
            module = types.SimpleNamespace(
                w13_lora_a_stacked=[torch.zeros(1, number)],
                global_num_experts=number,
                ep_rank=0,
            )
            manager._stack_moe_lora_weights(model, module, stem)
            held = model.get_lora(stem)
            updates = [
                held.scaling * torch.einsum("eor,eri->eoi", b, a).numpy()
                for a, b in zip(held.lora_a, held.lora_b, strict=True)
            ]
            turned = kind == "gpt_oss"
            both, down = (x.transpose(0, 2, 1) if turned else x for x in updates)
            found[f"layers/{layer}/gate_up_proj"] = both
            found[f"layers/{layer}/down_proj"] = down
            continue
        if form == "per-expert":
            loras = [model.get_lora(f"{stem}.{e}.{called[w]}")
                     for e in range(number) for w in called]  # fmt: skip
            held = PackedLoRALayerWeights.pack_moe(loras, stem)
        else:
            loras = [model.get_lora(f"{stem}.{name}") for name in called]
            held = PackedLoRALayerWeights.pack_moe_stacked(loras, stem)
        gate, down, up = (
            scale * torch.einsum("eor,eri->eoi", b, a).numpy()
            for a, b, scale in zip(held.lora_a, held.lora_b, held.scaling, strict=True)
        )
        found |= as_parameters(kind, layer, gate, up, down)
    return found


# What unsloth_zoo calls the orders of B in a process.
ORDERS = {"peft": "rank_major", "unsloth": "grouped_by_expert"}
UNSLOTHS = {
    "temporary_patches/moe_utils.py": r"(_?\w*moe_lora_b\w*|MoELoRAB\w+|_?LORA_B_\w+"
    r"|_MOE_LORA_B_LAYOUT|_ExpertMajor\w+|\w+_lora_weights_for_grouped_mm"
    r"|extract_moe_lora\w+)",
    "saving_utils.py": r"(_MOE_MERGE_STATE|_record_moe\w+|_resolve_num_experts\w+"
    r"|_detect_moe_lora\w+|_refuse_dora\w+|_merge_moe_(gate|up|down|gate_or_up)\w*"
    r"|_active_merge_device|_peft_paramwrapper\w+|_PEFT_AMBIGUOUS\w+)",
}


def unsloth(root: pathlib.Path) -> dict:
    """Returns unsloth_zoo's functions of experts, without importing the rest."""
    found = {
        "torch": torch, "os": os, "logger": logging,
        "Optional": object, "functools": functools, "Tuple": tuple,
    }  # fmt: skip
    for file, names in UNSLOTHS.items():
        for node in ast.parse((root / "unsloth_zoo" / file).read_text()).body:
            name = getattr(node, "name", None)
            if isinstance(node, ast.Assign):
                name = ast.unparse(node.targets[0])
            if name and re.fullmatch(names, name):
                node = ast.Module([node], [])
                exec(compile(node, file, "exec"), found)
        for name in [n for n in found if "moe_lora_b" in n or n.startswith("MoELoRAB")]:
            found[f"_{name}"] = found[name]  # as saving_utils.py imports them
    return found


def held_by_unsloth(
    folder: pathlib.Path, kind: str, form: str, code: dict
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the updates that unsloth_zoo runs, and those that it merges."""
    os.environ["UNSLOTH_MOE_LORA_B_LAYOUT"] = ORDERS[form]
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    number, hidden = SIZES["num_experts"], SIZES["hidden_size"]
    scale = fields["lora_alpha"] / fields["r"]
    run: dict[str, np.ndarray] = {}
    merged: dict[str, np.ndarray] = {}
    for layer in range(SIZES["num_hidden_layers"]):
        stem = f"base_model.model.{STEM.format(i=layer)}".rstrip(".")
        for name in (stem, f"{stem}.base_layer"):
            a, b = (torch.tensor(tensors[f"{name}.lora_{h}.weight"]) for h in "AB")
            n_in, n_out = a.shape[1], b.shape[0]
            down = n_in != hidden
            path = f"layers/{layer}/{'down' if down else 'gate_up'}_proj"
            first, second, _, _ = code["extract_moe_lora_weights_for_grouped_mm"](
                None, a, b, scale, number, input_dim=n_in, output_dim=n_out
            )
            update = scale * (first @ second).numpy()
            run[path] = update if kind == "gpt_oss" else update.transpose(0, 2, 1)
            stats = types.SimpleNamespace(
                lora_A=a, lora_B=b, alpha=scale, module=None, magnitude=None
            )
            parts = ("down_proj",) if down else ("gate", "up")
            merged[path] = np.stack([
                np.concatenate([
                    code[f"_merge_moe_{part}_expert"](
                        torch.zeros(n_out // len(parts), n_in), stats, e, number,
                        torch.float32,
                    ).numpy()
                    for part in parts
                ])
                for e in range(number)
            ])  # fmt: skip
    if kind == "gpt_oss":  # it has a function of its own for these
        return {"run by unsloth": run}
    return {"run by unsloth": run, "merged by unsloth": merged}


def as_parameters(
    kind: str, layer: int, gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns updates `[E, out, in]` of the projections as those of the parameters."""
    both = np.concatenate([gate, up], 1)
    if kind == "gpt_oss":
        both = np.stack([gate, up], 2).reshape(len(gate), -1, gate.shape[2])
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
    return {f"layers/{layer}/gate_up_proj": both, f"layers/{layer}/down_proj": down}


def apart(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> float:
    assert x.keys() == y.keys(), x.keys() ^ y.keys()
    return max(float(np.abs(x[k] - y[k]).max()) for k in x)


def check(
    kind: str, root: pathlib.Path
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the largest differences of a model, and the updates that PEFT merged."""
    model = torch_model(kind)
    base = experts_of(model)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, x in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.3)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        logits = adapted(tokens).logits.numpy()
    adapted.save_pretrained(root / "theirs")
    merged = experts_of(adapted.merge_and_unload())
    wanted = {path: merged[path] - x for path, x in base.items()}
    zeros, own = tree({path: np.zeros_like(x) for path, x in base.items()}), names(kind)
    read = jlora.peft.load(root / "theirs", zeros, names=own)
    found = {"PEFT to jlora": apart(changes(zeros, read), wanted)}
    for form in LAYOUTS:
        folder = root / form
        layout = ExpertLayout(form, interleaved=kind == "gpt_oss")
        jlora.peft.save(folder, read, names=own, layout=layout, task_type="CAUSAL_LM")
        again = jlora.peft.load(folder, zeros, names=own, layout=layout)
        found[f"{form}, read again"] = apart(changes(zeros, again), wanted)
        if form in ("per-expert", "stacked"):
            found[f"{form}, multiplied out"] = apart(
                multiplied(folder, kind, form), wanted
            )
    back = PeftModel.from_pretrained(torch_model(kind), root / "peft").eval()
    with torch.no_grad():
        found["jlora to PEFT, logits"] = (
            float(np.abs(back(tokens).logits.numpy() - logits).max()) / 10
        )  # one limit for all
    other = PeftModel.from_pretrained(torch_model(kind), root / "unsloth").eval()
    with torch.no_grad():
        wrong = float(np.abs(other(tokens).logits.numpy() - logits).max())
    assert wrong > 1e-3, "the order of unsloth is the one of PEFT"
    return found, wanted


def main() -> int:
    """Checks the models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", type=pathlib.Path)
    parser.add_argument("--unsloth", type=pathlib.Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {kind: pathlib.Path(folder) / kind for kind in MODELS}
        results = {kind: check(kind, root) for kind, root in roots.items()}
        code = unsloth(given.unsloth) if given.unsloth else {}
        for kind, root in roots.items() if code else ():
            found, wanted = results[kind]
            for form in ORDERS:
                held = held_by_unsloth(root / form, kind, form, code)
                for how, own in held.items():
                    found[f"{form}, {how}"] = apart(own, wanted)
        if given.vllm:  # its stubs take the place of transformers, so it comes last
            import check_vllm

            check_vllm.set_up(given.vllm)
            for kind, root in roots.items():
                found, wanted = results[kind]
                for form in ("peft", "per-expert", "stacked"):
                    held = packed_by_vllm(root / form, kind, form)
                    found[f"{form}, held by vLLM"] = apart(held, wanted)
    for kind, (found, _) in results.items():
        print(kind, json.dumps(found, indent=1))
    worst = max(max(found.values()) for found, _ in results.values())
    return int(not worst < 1e-6)


if __name__ == "__main__":
    sys.exit(main())
