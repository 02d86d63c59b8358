"""Torch tensors that hold several leaves side by side, as the qkv_proj of Phi-3."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import Factors, Spec, Trainable
from jlora.peft import Entry, NameMap, maps
from tests.helpers import normal
from tests.peft import file_cases
from tests.peft.file_cases import PREFIX, delta, pair

MODULE = "h.qkv_proj"
NAMES = NameMap(
    (
        Entry(
            "h/{part:q,k,v}/kernel", f"{MODULE}.weight", "i o -> (part o) i", "linear",
            sizes=(2, 1, 1),
        ),
        Entry("h/{part:q,k,v}/bias", f"{MODULE}.bias", "o -> (part o)", "other",
              sizes=(2, 1, 1)),
    )
)  # fmt: skip
WIDTHS = {"q": 4, "k": 2, "v": 2}
PARAMS = {
    "h": {
        name: {"kernel": normal((6, n), n), "bias": normal((n,), n + 1)}
        for name, n in WIDTHS.items()
    }
}


def joined(tree=PARAMS):
    return np.concatenate([np.asarray(tree["h"][n]["kernel"]).T for n in WIDTHS])


def factors(width, seed=1, **settings):
    spec = Spec(**({"rank": 2, "alpha": 6.0} | settings))
    shape = (6, spec.rank), (spec.rank, width)
    return Factors(normal(shape[0], seed), normal(shape[1], seed + width), spec)


def write(folder, adapter, **config):
    folder.mkdir(exist_ok=True)
    named = {PREFIX + name: x for name, x in adapter.items()}
    file_cases.write_arrays(folder / "adapter_model.safetensors", named)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    fields.setdefault("target_modules", ["qkv_proj"])
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def test_each_leaf_takes_the_shared_a_and_its_rows_of_b(tmp_path):
    own = pair(MODULE, 6, 8)
    write(tmp_path, own)
    adapter = jlora.peft.load(tmp_path, PARAMS, names=NAMES)
    assert sorted(adapter.lora) == ["h/k/kernel", "h/q/kernel", "h/v/kernel"]
    change = joined(jlora.merge(PARAMS, adapter)) - joined()
    np.testing.assert_allclose(change, delta(own, MODULE), atol=2e-6)
    jlora.peft.save(tmp_path / "again", adapter, names=NAMES)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, x in own.items():  # to the bit: the three share A
        np.testing.assert_array_equal(again[PREFIX + name], x)


def test_dora_cuts_the_magnitude(tmp_path):
    own = pair(MODULE, 6, 8) | {f"{MODULE}.lora_magnitude_vector": np.arange(1.0, 9.0)}
    own = {name: x.astype(np.float32) for name, x in own.items()}
    write(tmp_path, own, use_dora=True)
    adapter = jlora.peft.load(tmp_path, PARAMS, names=NAMES)
    w = joined() + delta(own, MODULE)
    w *= np.arange(1.0, 9.0)[:, None] / np.linalg.norm(w, axis=1, keepdims=True)
    np.testing.assert_allclose(joined(jlora.merge(PARAMS, adapter)), w, atol=1e-5)
    jlora.peft.save(tmp_path / "again", adapter, names=NAMES)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, x in own.items():
        np.testing.assert_array_equal(again[PREFIX + name], x)
    some = Trainable({p: f for p, f in adapter.lora.items() if "/v/" not in p})
    with pytest.raises(jlora.PeftError, match="all its parts must be adapted"):
        jlora.peft.save(tmp_path / "some", some, names=NAMES)


@pytest.mark.parametrize("leaves", [("q", "v"), ("v", "k", "q"), ("k",)])
@pytest.mark.parametrize("rslora", [False, True])
def test_leaves_with_factors_of_their_own_stand_beside_each_other(
    tmp_path, leaves, rslora
):
    adapter = Trainable(
        {
            f"h/{name}/kernel": factors(
                WIDTHS[name], seed, rank=1 + seed, alpha=2.0 + seed, rslora=rslora
            )
            for seed, name in enumerate(leaves, 1)
        }
    )
    jlora.peft.save(tmp_path, adapter, names=NAMES)
    back = jlora.peft.load(tmp_path, PARAMS, names=NAMES)
    np.testing.assert_allclose(
        joined(jlora.merge(PARAMS, back)),
        joined(jlora.merge(PARAMS, adapter)),
        atol=3e-6,
    )


def test_a_whole_tensor_and_a_bias_are_cut(tmp_path):
    saved = {f"{MODULE}.weight": normal((8, 6), 3), f"{MODULE}.bias": normal((8,), 4)}
    write(
        tmp_path, {n: np.asarray(x) for n, x in saved.items()},
        modules_to_save=["qkv_proj"], target_modules=[],
    )  # fmt: skip
    adapter = jlora.peft.load(tmp_path, PARAMS, names=NAMES)
    assert len(adapter.full) == 6
    np.testing.assert_array_equal(
        joined(jlora.merge(PARAMS, adapter)), saved[f"{MODULE}.weight"]
    )


def test_a_base_is_cut_and_joined(tmp_path):
    jlora.peft.save_base(tmp_path, PARAMS, names=NAMES)
    (weight, bias) = (
        load_file(tmp_path / "model.safetensors")[f"{MODULE}.{end}"]
        for end in ("weight", "bias")
    )
    np.testing.assert_array_equal(weight, joined())
    assert bias.shape == (8,)
    empty = {"h": {n: {k: jnp.zeros_like(x) for k, x in p.items()}
                   for n, p in PARAMS["h"].items()}}  # fmt: skip
    read = jlora.peft.load_base(tmp_path, empty, names=NAMES)
    for name, leaves in PARAMS["h"].items():
        for key, x in leaves.items():
            np.testing.assert_array_equal(read["h"][name][key], x)
    less = {"h": {n: PARAMS["h"][n] for n in ("q", "v")}}
    with pytest.raises(jlora.PeftError, match=r"no leaf has rows 4 to 6 of h"):
        jlora.peft.save_base(tmp_path / "less", less, names=NAMES)


def test_wrong_proportions_are_told(tmp_path):
    entries = tuple(dataclasses.replace(e, sizes=(3, 1, 1)) for e in NAMES.entries)
    jlora.peft.save_base(tmp_path, PARAMS, names=NAMES)
    with pytest.raises(jlora.PeftError, match="is not a multiple of its share"):
        jlora.peft.load_base(tmp_path, PARAMS, names=NameMap(entries))
    entries = tuple(dataclasses.replace(e, sizes=(1, 1, 1)) for e in NAMES.entries)
    with pytest.raises(jlora.PeftError, match=r"'h/q/kernel' needs \[12, 6\]"):
        jlora.peft.load_base(tmp_path, PARAMS, names=NameMap(entries))
    with pytest.raises(jlora.PeftError, match="begin a group"):
        Entry("h/{part:q,k}/kernel", "h.qk.weight", "i o -> (o part) i")


def test_phi3_has_every_leaf_of_its_layers():
    for path, shape in (("q_proj", (8, 8)), ("v_proj", (8, 8))):
        (place,) = maps.PHI3.places(f"model/layers/2/self_attn/{path}/kernel", shape)
        assert place.name == "model.layers.2.self_attn.qkv_proj.weight"
        assert place.shape(shape) == (24, 8)
    (place,) = maps.PHI3.places("model/layers/2/mlp/up_proj/kernel", (8, 20))
    assert (place.cut.start, place.cut.stop, place.cut.total) == (20, 40, 40)
