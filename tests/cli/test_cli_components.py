"""The command reads one model's adapter of a file that is for several."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli
from tests.helpers import normal

pytestmark = pytest.mark.once  # bytes on the host
Q = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The base, and one file with adapters of two text encoders."""
    monkeypatch.chdir(tmp_path)
    save_file({f"{Q}.weight": np.zeros((5, 6), np.float32)}, "base.safetensors")
    tensors = {}
    for i, component in enumerate(("te1", "te2")):
        a, b = normal((6, 2), i), normal((2, 5), i + 2)
        spec = jlora.Spec(rank=2, alpha=3 + i, axes=jlora.Axes((), (1,), (0,)))
        own = jlora.Trainable({f"{Q}.weight": jlora.Factors(a, b, spec)})
        options = {"dialect": "kohya", "component": component}
        jlora.peft.save(component, own, **options)
        tensors |= load_file(f"{component}/lora.safetensors")
        jlora.peft.save(f"peft_{component}", own)
    save_file(tensors, "both.safetensors")


def test_convert_goes_from_component_to_component(capsys):
    options = ["--to", "peft", "--base", "base.safetensors", "--component", "te2"]
    more = ["--dialect", "diffusers", "--to-component", "text_encoder_2"]
    assert cli.run(["convert", "both.safetensors", "out", *options, *more]) == 0
    tensors = load_file("out/pytorch_lora_weights.safetensors")
    assert set(tensors) == {f"text_encoder_2.{Q}.lora_{x}.weight" for x in "AB"}
    capsys.readouterr()
    both = ["diff", "out", "peft_te2", "--base", "base.safetensors"]
    assert cli.run(["validate", "out", *both[3:], "--component", "te2"]) == 1
    assert "but of 'text_encoder_2'" in capsys.readouterr().err
    assert cli.run(both) == 0


def test_convert_adds_a_component_to_a_file(capsys):
    for component in ("te1", "te2"):
        line = f"convert peft_{component} out --to peft --base base.safetensors --add"
        more = ["--dialect", "kohya", "--to-component", component]
        assert cli.run([*line.split(), *more]) == 0
    own, both = load_file("out/lora.safetensors"), load_file("both.safetensors")
    assert own.keys() == both.keys()
    assert all((own[name] == both[name]).all() for name in own)


def test_inspect_says_whose_file_it_is(capsys):
    line = "inspect both.safetensors --base base.safetensors --component te1 --json"
    assert cli.run(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"] == {"tool": "kohya's sd-scripts"}
    assert found["format"] == "peft"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("merge base.safetensors both.safetensors x", 1, "'te1', 'te2'. Say which"),
        ("inspect peft_te1 --component te1", 1, "is read as one of PEFT"),
        ("inspect base.safetensors --component te1", 2, "is not an adapter of PEFT's"),
        ("convert te1 x.safetensors --base base.safetensors --to-component te1", 2,
         "only for PEFT"),
    ],
)  # fmt: skip
def test_what_is_not_a_component(words, code, text, capsys):
    assert cli.run(words.split()) == code
    assert text in capsys.readouterr().err
