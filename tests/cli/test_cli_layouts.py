"""The command takes and gives a mixture's experts in every layout."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli
from tests.peft.expert_cases import FORMS, SHAPES, E, adapter, updates

pytestmark = pytest.mark.once  # bytes on the host


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base with a tensor for each expert, and one adapter in every layout."""
    monkeypatch.chdir(tmp_path)
    trainable, _, names = adapter("mixtral")
    for form in FORMS:
        jlora.peft.save(form, trainable, names=names, layout=form)
    place = tmp_path / "unsloth" / "adapter_config.json"
    fields = json.loads(place.read_text()) | {"auto_mapping": {"unsloth_fixed": True}}
    place.write_text(json.dumps(fields))
    (tmp_path / "base").mkdir()
    shapes = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": SHAPES[name][::-1]
        for layer in (0, 1)
        for e in range(E)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(base, "base/model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return tmp_path


def test_merge_of_an_ambiguous_file_takes_the_answer(folder, capsys):
    assert cli.run(["merge", "base", "unsloth", "merged.safetensors"]) == 1
    assert "layout='unsloth' (--layout)" in capsys.readouterr().err
    answer = ["--layout", "unsloth"]
    assert cli.run(["merge", "base", "unsloth", "merged.safetensors", *answer]) == 0
    merged = load_file("merged.safetensors")
    trainable, params, _ = adapter("mixtral")
    for (layer, name), x in updates("mixtral", trainable, params).items():
        for e in range(E):
            own = merged[f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"]
            np.testing.assert_allclose(own, x[e].T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_convert_goes_from_layout_to_layout(form, folder):
    source = "unsloth" if form != "unsloth" else "per-expert"
    options = ["--to", "peft", "--base", "base", "--layout", source]
    assert cli.run(["convert", source, "out", *options, "--to-layout", form]) == 0
    one, two = (
        load_file(f"{place}/adapter_model.safetensors") for place in ("out", form)
    )
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, two[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("inspect stacked --base base --layout peft", 1, "experts of the file are not"),
        ("diff stacked shared --base base --layout gguf", 2, "--layout: layout must"),
        ("diff stacked shared --base base", 0, "equal"),
        ("validate unsloth --base base --layout peft:rows", 2, "interleaved or concat"),
        ("validate unsloth --base base --layout unsloth", 0, "fine"),
        ("convert peft x --to orbax --base base --to-layout peft", 2, "only for PEFT"),
        ("convert orbax x --to peft --layout peft", 2, "is not an adapter of PEFT's"),
        ("validate peft --for peft --base base --layout peft", 2, "not with --for"),
    ],
)
def test_every_command_says_what_to_write(words, code, text, folder, capsys):
    trainable, _, _ = adapter("mixtral")
    jlora.checkpoint.save("orbax", trainable, step=0)
    assert cli.run(words.split()) == code
    said = capsys.readouterr()
    assert text in said.out + said.err
