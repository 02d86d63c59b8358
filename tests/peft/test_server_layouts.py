"""What servers make of experts in each layout, and which one they are told to have.

`tests/golden/check_layouts.py` compares the verdicts of PEFT and transformers with what
they load; those of vLLM and SGLang are read from their sources.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli
from jlora.peft import ExpertLayout, validate
from tests.peft.expert_cases import FORMS, SHAPES, E, adapter

pytestmark = pytest.mark.once
EACH = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = dict(zip(EACH, ("w1", "w3", "w2"), strict=True))
CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
# By model and layout: what vLLM, SGLang and PEFT do, and the layout that they name.
A, D, R = "applied", "dropped", "refused"
WANTED = {
    "qwen3_moe": {
        "peft": (f"{D} per-expert", f"{R} per-expert", A),
        "per-expert": (A, A, A),
        "stacked": (f"{R} per-expert", R, f"{R} peft"),
        "shared": (f"{R} per-expert", R, f"{R} peft"),
    },
    "mixtral": {
        "peft": (f"{D} per-expert", f"{R} per-expert", A),
        "per-expert": (A, R, A),
        "stacked": (f"{R} per-expert", R, f"{D} peft"),
        "shared": (f"{R} per-expert", R, f"{D} peft"),
    },
    "gpt_oss": {
        "peft": (A, f"{R} per-expert", A),
        "per-expert": (f"{R} peft", A, f"{R} peft"),
        "stacked": (f"{R} peft", R, f"{R} peft"),
        "shared": (f"{R} peft", R, f"{R} peft"),
    },
}


def base(folder: pathlib.Path, model: str) -> pathlib.Path:
    """A model's files, as they lie on the Hub."""
    stem = "model.layers.{}.mlp.experts."
    if model == "gpt_oss":
        shapes = {
            f"{stem.format(layer)}{name}": (E, *SHAPES[name])
            for layer in (0, 1)
            for name in ("gate_up_proj", "down_proj")
        }
    else:
        is_qwen = model == "qwen3_moe"
        stem = stem if is_qwen else "model.layers.{}.block_sparse_moe.experts."
        shapes = {
            f"{stem.format(layer)}{e}.{name if is_qwen else MIXTRAL[name]}.weight": (
                SHAPES[name][::-1]
            )
            for layer in (0, 1)
            for e in range(E)
            for name in EACH
        }
    place = folder / model
    place.mkdir()
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, place / "model.safetensors")
    fields = {"model_type": model, "architectures": [CLASSES[model]]}
    (place / "config.json").write_text(json.dumps(fields))
    return place


def written(folder: pathlib.Path, model: str, form: str, where: str) -> pathlib.Path:
    """An adapter in a layout, with one alpha, by the command from another layout."""
    trainable, _, names = adapter("gpt-oss" if model == "gpt_oss" else "mixtral")
    lora = {
        path: dataclasses.replace(f, spec=dataclasses.replace(f.spec, alpha=4.0))
        for path, f in trainable.lora.items()
    }
    rows = ExpertLayout("peft", interleaved=model == "gpt_oss")
    jlora.peft.save(folder / "peft", jlora.Trainable(lora), names=names, layout=rows)
    options = ["--to", "peft", "--base", where, "--to-layout", form]
    assert cli.run(["convert", f"{folder}/peft", f"{folder}/out", *options]) == 0
    return folder / "out"


@pytest.mark.parametrize("form", [form for form in FORMS if form != "unsloth"])
@pytest.mark.parametrize("model", WANTED)
def test_verdict_says_which_layout_to_save(model, form, tmp_path):
    where = base(tmp_path, model)
    place = written(tmp_path, model, form, str(where))
    said = []
    for server in ("vllm", "sglang", "peft"):
        report = validate(place, where, server=server)
        outcomes = {v.outcome for v in report.verdicts}
        first = next((v.instead for v in report.verdicts if v.instead), "")
        told = first.partition("layout='")[2].partition("'")[0]
        said.append(f"{'/'.join(sorted(outcomes))} {told}".strip())
        assert not told or f"--to-layout {told}`" in first
    assert tuple(said) == WANTED[model][form]
    same = validate(place, where, server="transformers")
    assert {v.outcome for v in same.verdicts} == {said[2].partition(" ")[0]}


def test_file_of_unsloth_is_altered_until_it_is_written_again(tmp_path):
    where = base(tmp_path, "gpt_oss")
    place = written(tmp_path, "gpt_oss", "peft", str(where))
    config = place / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"auto_mapping": {"unsloth_fixed": True}}
    config.write_text(json.dumps(fields))
    for server in ("vllm", "peft", "transformers"):
        (first, *_) = validate(place, where, server=server).verdicts
        assert first.outcome == "altered"
        assert "--to-layout peft --layout unsloth" in first.instead


@pytest.mark.parametrize(
    ("server", "form", "change", "outcome", "why"),
    [
        ("peft", "peft", lambda k, x: x[..., :-1], R, r"experts of rank 2"),
        ("peft", "per-expert", lambda k, x: None if ".1.w" in k else x, R, "2 of 3"),
        ("peft", "per-expert", lambda k, x: None if "w3" in k else x, R, "of w1 and"),
        ("sglang", "stacked", lambda k, x: np.repeat(x, 2, 0), R, "6 experts, the la"),
        ("vllm", "per-expert", lambda k, x: None if ".1.w2" in k else x, R, "too"),
    ],
)
def test_broken_experts(server, form, change, outcome, why, tmp_path):
    where = base(tmp_path, "mixtral")
    place = written(tmp_path, "mixtral", form, str(where))
    file = place / "adapter_model.safetensors"
    tensors = {k: change(k, x) for k, x in load_file(file).items()}
    left = {k: np.ascontiguousarray(x) for k, x in tensors.items() if x is not None}
    save_file(left, file)
    config = place / "adapter_config.json"
    fields = json.loads(config.read_text())
    named = fields["target_modules"] or []
    fields["target_modules"] = [m for m in named if any(m in k for k in left)] or None
    if server == "sglang":  # which does not take `w1`
        fields["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    config.write_text(json.dumps(fields))
    verdicts = validate(place, where, server=server).verdicts
    assert any(v.outcome == outcome and why in v.why for v in verdicts)
