"""Files that Hugging Face PEFT wrote, read here: the same outputs as PEFT's own."""

import json
from typing import Any

import jax
import numpy as np
import pytest

import jlora
from tests.peft.models import FLAX, GOLDEN, OWN, as_users, call, model, tensors

pytestmark = pytest.mark.once

CASES = [
    (folder.parent.name, folder.name)
    for folder in sorted(GOLDEN.glob("*/*/"))
    if folder.name != "untied"
]


def tied(name: str) -> dict[str, Any]:
    """The option for a model whose embedding may be its head, as far as names tell."""
    return {"tied": name == "gpt2"} if name in ("llama", "tied", "gpt2", "t5") else {}


def test_there_are_golden_files():
    assert len(CASES) > 30


@pytest.mark.parametrize("name", [*FLAX, *OWN])
def test_base_model_gives_the_outputs_of_torch(name):
    m = model(name)
    np.testing.assert_allclose(call(m, m.params), m.outputs["base"], atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_adapter_gives_the_outputs_of_peft(name, kind):
    m = model(name)
    adapter = jlora.peft.load(m.folder / kind, m.params, names=m.names, **tied(name))
    if kind == "alora":
        gate = jlora.adapters.invocation_gate(adapter, m.inputs["input_ids"])
        lora_fn = jlora.apply_lora(lambda p: m.fn(p, **m.inputs), on_merge="error")
        with as_users():
            out = lora_fn(m.params, adapter, lora_gate=gate)
    else:
        out = call(m, jlora.merge(m.params, adapter))
    np.testing.assert_allclose(out, m.outputs[kind], atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_second_round_trip_is_bit_stable(name, kind, tmp_path):
    m = model(name)
    options = {"names": m.names, **tied(name)}
    first = jlora.peft.load(m.folder / kind, m.params, **options)
    jlora.peft.save(tmp_path / "1", first, **options, params=m.params)
    second = jlora.peft.load(tmp_path / "1", m.params, **options)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    jlora.peft.save(tmp_path / "2", second, **options, params=m.params)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tensors_are_those_that_peft_wrote(name, kind, tmp_path):
    m = model(name)
    options = {"names": m.names, **tied(name)}
    adapter = jlora.peft.load(m.folder / kind, m.params, **options)
    jlora.peft.save(tmp_path, adapter, **options, params=m.params)
    ours = tensors(tmp_path / "adapter_model.safetensors")
    theirs = tensors(m.folder / kind / "adapter_model.safetensors")
    copies = {k for k in theirs if k.endswith("base_layer.weight")}
    assert ours.keys() == theirs.keys() - copies
    fields, held = jlora.peft.tensors(adapter, **options, params=m.params)
    assert fields == json.loads((tmp_path / "adapter_config.json").read_text())
    assert held.keys() == ours.keys()
    for key, x in held.items():
        assert isinstance(x, jax.Array)
        np.testing.assert_array_equal(x, ours[key])
    back = jlora.peft.from_tensors(fields, held, m.params, **options)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    for key, x in ours.items():
        np.testing.assert_array_equal(x, theirs[key].astype(x.dtype), err_msg=key)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((m.folder / kind / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_dropout"):
        if kind != "patterns":
            assert config[key] == theirs[key], key
