"""Maps of other libraries' models: what was checked beside them still holds.

`tests/golden/check_maps.py` ran the libraries, and stored what their leaves are.
"""

import json
import pathlib
import re
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.peft import NameMap, maps
from tests.golden import map_cases

pytestmark = pytest.mark.once
ROOT = pathlib.Path(__file__).parents[2]
STORED = json.loads((ROOT / "tests" / "golden" / "maps.json").read_text())
CHECKED = STORED["checked"]
LIBRARIES = (
    "GEMMA_EINSUM",
    "GEMMA1_",
    "GEMMA2_",
    "GEMMA3_",
    "TUNIX_",
    "KERAS_",
    "BONSAI_",
)


def label(found):
    return f"{found['map']}-{found['class'].replace(' ', '-')}-{found['case']}"


def names_of(found):
    if found["map"] == "phi3":
        sizes = map_cases.SIZES
        return maps.phi3(sizes["num_attention_heads"], sizes["num_key_value_heads"])
    return getattr(maps, found["map"])


def write(case, folder):
    drawn = {
        name: map_cases.weight(case, name, tuple(shape))
        for name, shape in STORED["models"][case].items()
    }
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return drawn


@pytest.mark.parametrize("found", CHECKED, ids=label)
def test_a_library_gets_the_leaves_that_it_was_checked_with(found, tmp_path):
    drawn, names = write(found["case"], tmp_path), names_of(found)
    like = {
        path: jax.ShapeDtypeStruct(tuple(shape), "float32")
        for path, (shape, _) in found["leaves"].items()
    }
    read = jlora.peft.load_base(tmp_path, like, names=names)
    for path, (_, crc) in found["leaves"].items():
        assert zlib.crc32(np.asarray(read[path], "<f4").tobytes()) == crc, path
    (tmp_path / "again").mkdir()
    tied = {"lm_head.weight"} - drawn.keys()
    read = {p: x for p, x in read.items() if not (tied and p == "lm_head/kernel")}
    jlora.peft.save_base(tmp_path / "again", read, names=names)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == drawn.keys()
    for name, x in drawn.items():
        np.testing.assert_array_equal(again[name], x)


@pytest.mark.parametrize("found", CHECKED, ids=label)
def test_what_was_measured_is_within_its_bounds(found):
    assert found["logits"] < 1e-4
    assert found.get("own loader", 0.0) == 0.0
    assert found["read back"] < 1e-6
    assert found.get("peft", 0.0) < 1e-4
    assert found["effect"] > 0.1


def test_every_map_of_a_library_was_checked_and_is_documented():
    page = (ROOT / "docs" / "maps.md").read_text()
    checked = {found["map"] for found in CHECKED}
    for name, value in vars(maps).items():
        if isinstance(value, NameMap):
            assert f"`{name}`" in page, name
            assert name in checked or not name.startswith(LIBRARIES), name
    for found in CHECKED:
        words, version = re.findall(r"\w+", found["class"])[-2:], found["version"]
        rows = [line for line in page.splitlines() if f"`{found['map']}" in line]
        assert any(word in row for row in rows for word in words), found["class"]
        assert any(version in row for row in rows), (found["map"], version)


@pytest.mark.parametrize("name", sorted({f["map"] for f in CHECKED} - {"phi3"}))
def test_a_leaf_or_a_tensor_without_a_rule_is_named(name, tmp_path):
    found = next(f for f in CHECKED if f["map"] == name)
    drawn, names = write(found["case"], tmp_path), names_of(found)
    like = {
        path: jax.ShapeDtypeStruct(tuple(shape), "float32")
        for path, (shape, _) in found["leaves"].items()
    }
    more = {**like, "layers/0/attn/sink": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(jlora.PeftError, match="'layers/0/attn/sink' has no name"):
        jlora.peft.load_base(tmp_path, more, names=names)
    new = {**drawn, "model.layers.0.self_attn.sinks": np.zeros(3, np.float32)}
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(jlora.PeftError, match=re.escape("self_attn.sinks")):
        jlora.peft.load_base(tmp_path, like, names=names)


def test_gate_and_up_in_the_other_order_is_an_error_that_shows_both(tmp_path):
    found = next(f for f in CHECKED if f["map"] == "GEMMA2_2B_EINSUM")
    write(found["case"], tmp_path)
    like = {
        path: jax.ShapeDtypeStruct(tuple(shape), "float32")
        for path, (shape, _) in found["leaves"].items()
    }
    text = r"gate_proj.weight is \[48, 32\], 'layer_0/mlp/gating_einsum' needs \[32, 48"
    with pytest.raises(jlora.PeftError, match=text):
        jlora.peft.load_base(tmp_path, like, names=maps.GEMMA2_EINSUM)
