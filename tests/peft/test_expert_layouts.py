"""Experts in every layout: each is read as the others, with the same update."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.peft import ExpertLayout
from tests.peft.expert_cases import (
    FORMS,
    MODELS,
    SHAPES,
    E,
    H,
    N,
    R,
    adapter,
    rand,
    updates,
)

pytestmark = pytest.mark.once  # bytes on the host


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_reads_what_every_other_wrote(model, form, tmp_path):
    trainable, params, names = adapter(model)
    wanted = updates(model, trainable, params)
    own = ExpertLayout(form, interleaved=bool(MODELS[model][1]))
    jlora.peft.save(tmp_path, trainable, names=names, layout=own)
    for other in MODELS:
        if form in ("peft", "unsloth") and "gpt-oss" in {model, other} != {"gpt-oss"}:
            continue  # one file cannot have gate and up in both ways
        _, base, theirs = adapter(other)
        fused_by = model if form in ("peft", "unsloth") else other
        said = ExpertLayout(form, interleaved=bool(MODELS[fused_by][1]))
        read = jlora.peft.load(tmp_path, base, names=theirs, layout=said)
        for key, x in updates(other, read, base).items():
            np.testing.assert_allclose(x, wanted[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(FORMS, 2)])
def test_layouts_convert_into_each_other(first, second, tmp_path):
    trainable, params, names = adapter("mixtral")
    for step, form in enumerate((first, second, first)):
        folder = tmp_path / str(step)
        jlora.peft.save(folder, trainable, names=names, layout=form)
        trainable = jlora.peft.load(folder, params, names=names, layout=form)
    start, _, _ = adapter("mixtral")
    for key, x in updates("mixtral", trainable, params).items():
        np.testing.assert_allclose(
            x, updates("mixtral", start, params)[key], rtol=1e-6, atol=1e-6
        )
    one, two = (load_file(tmp_path / f"{i}/adapter_model.safetensors") for i in (0, 2))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[k], two[k]) for k in one)


def test_names_and_shapes_are_those_of_each_tool(tmp_path):
    trainable, _, names = adapter("mixtral")
    stem = "base_model.model.model.layers.0.mlp.experts"
    a, b = "lora_A.weight", "lora_B.weight"
    wanted = {
        "peft": {f"{stem}.base_layer.{a}": (E * R, H), f"{stem}.{b}": (H, R * E)},
        "per-expert": {f"{stem}.2.up_proj.{a}": (R, H),
                       f"{stem}.0.down_proj.{b}": (H, R)},
        "stacked": {f"{stem}.w1.{a}": (E, R, H), f"{stem}.w2.{b}": (E, H, R)},
        "shared": {f"{stem}.w3.{a}": (1, R, H), f"{stem}.w3.{b}": (E, N, R),
                   f"{stem}.w2.{a}": (E, R, N), f"{stem}.w2.{b}": (1, H, R)},
    }  # fmt: skip
    wanted["unsloth"] = wanted["peft"]
    tensors = {}
    for form, shapes in wanted.items():
        jlora.peft.save(tmp_path / form, trainable, names=names, layout=form)
        tensors[form] = load_file(tmp_path / form / "adapter_model.safetensors")
        assert shapes.items() <= {k: x.shape for k, x in tensors[form].items()}.items()
    peft, own, each, stack = (
        tensors[form] for form in ("peft", "unsloth", "per-expert", "stacked")
    )
    for e in range(E):
        down = each[f"{stem}.{e}.down_proj.{b}"]
        assert np.array_equal(peft[f"{stem}.{b}"].reshape(H, R, E)[..., e], down)
        assert np.array_equal(own[f"{stem}.{b}"].reshape(H, E, R)[:, e], down)
        down = each[f"{stem}.{e}.down_proj.{a}"]
        assert np.array_equal(peft[f"{stem}.{a}"].reshape(E, R, N)[e], down)
        assert np.array_equal(stack[f"{stem}.w2.{a}"][e], down)
        up = each[f"{stem}.{e}.up_proj.{b}"]
        assert np.array_equal(stack[f"{stem}.w3.{b}"][e], up)
        whole = peft[f"{stem}.base_layer.{b}"].reshape(2 * N, R, E)
        assert np.array_equal(whole[N:, :, e], up)


def test_unequal_experts_cannot_be_shared(tmp_path):
    trainable, _, names = adapter("mixtral")
    lora = dict(trainable.lora)
    first = lora["layers/0/gate_up_proj"]
    a = first.a.copy()
    a[1] += 1
    lora["layers/0/gate_up_proj"] = jlora.Factors(a, first.b, first.spec)
    with pytest.raises(
        jlora.PeftError, match=r"w1: A differs between experts.*stacked"
    ):
        jlora.peft.save(tmp_path, jlora.Trainable(lora), names=names, layout="shared")


def test_different_gate_and_up_stand_side_by_side(tmp_path):
    trainable, params, names = adapter("qwen3-moe")
    path = "layers/0/up_proj"
    own = trainable.lora[path]
    lora = {**trainable.lora, path: jlora.Factors(own.a + 1, own.b, own.spec)}
    jlora.peft.save(
        tmp_path,
        jlora.Trainable(lora),
        names=names,
        layout=ExpertLayout("peft", interleaved=False),
    )
    _, base, other = adapter("mixtral")
    read = jlora.peft.load(tmp_path, base, names=other)
    assert read.lora["layers/0/gate_up_proj"].rank == 2 * R
    wanted = updates("qwen3-moe", jlora.Trainable(lora), params)
    for key, x in updates("mixtral", read, base).items():
        np.testing.assert_allclose(x, wanted[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "said", "message"),
    [
        ("per-expert", "stacked", r"are not 'stacked': .* is 'per-expert'"),
        ("stacked", "per-expert", r"are not 'per-expert': .* is 'stacked'"),
        ("stacked", "shared", r"are not 'shared': .* is 'stacked'"),
        ("shared", "unsloth", r"are not 'unsloth': .* is 'shared'"),
        ("per-expert", "peft", r"are not 'peft': .* is 'per-expert'"),
        ("peft", "gguf", r"layout must be one of 'peft', .* got 'gguf'"),
    ],
)
def test_wrong_layout_is_an_error(written, said, message, tmp_path):
    trainable, params, names = adapter("mixtral")
    jlora.peft.save(tmp_path, trainable, names=names, layout=written)
    with pytest.raises(jlora.PeftError, match=message):
        jlora.peft.load(tmp_path, params, names=names, layout=said)


def test_file_of_unsloth_is_a_question(tmp_path):
    trainable, params, names = adapter("mixtral")
    jlora.peft.save(tmp_path, trainable, names=names, layout="unsloth")
    place = tmp_path / "adapter_config.json"
    fields = json.loads(place.read_text()) | {"auto_mapping": {"unsloth_fixed": True}}
    place.write_text(json.dumps(fields))
    with pytest.raises(jlora.PeftError, match=r"unsloth wrote .* say layout='unsloth'"):
        jlora.peft.load(tmp_path, params, names=names)
    read = jlora.peft.load(tmp_path, params, names=names, layout="unsloth")
    for key, x in updates("mixtral", read, params).items():
        np.testing.assert_allclose(x, updates("mixtral", trainable, params)[key])
    wrong = jlora.peft.load(tmp_path, params, names=names, layout="peft")
    key = "0", "down_proj"
    apart = (
        updates("mixtral", wrong, params)[key] - updates("mixtral", read, params)[key]
    )
    assert np.abs(apart).max() > 0.1


def test_fused_parameter_needs_to_know_its_rows(tmp_path):
    trainable, _, names = adapter("gpt-oss")
    with pytest.raises(jlora.PeftError, match=r"'per-expert:interleaved'.* as in gpt"):
        jlora.peft.save(tmp_path, trainable, names=names, layout="per-expert")


def test_missing_expert_and_wrong_rank_are_named(tmp_path):
    trainable, params, names = adapter("mixtral")
    jlora.peft.save(tmp_path, trainable, names=names, layout="per-expert")
    place = tmp_path / "adapter_model.safetensors"
    tensors = load_file(place)
    few = {k: x for k, x in tensors.items() if ".1.mlp.experts.2.up_proj." not in k}
    save_file(few, place)
    with pytest.raises(jlora.PeftError, match=r"3 experts, the file lacks 2 and has 2"):
        jlora.peft.load(tmp_path, params, names=names)
    key = next(k for k in tensors if "lora_A" in k)
    save_file({**tensors, key: tensors[key][:1]}, place)
    with pytest.raises(jlora.PeftError, match=r"A is \[1, \d\] and B .*rank 2"):
        jlora.peft.load(tmp_path, params, names=names)


def test_layout_without_experts_is_an_error(tmp_path):
    own = jlora.Factors(rand(4, 2), rand(2, 6), jlora.Spec(rank=2, alpha=4))
    with pytest.raises(jlora.PeftError, match="the adapter has none"):
        jlora.peft.save(tmp_path, jlora.Trainable({"up/kernel": own}), layout="stacked")


@pytest.mark.parametrize(
    ("model", "form"),
    [("gpt-oss", "per-expert"), ("gpt-oss", "stacked"), ("qwen3-moe", "peft")],
)
def test_tensors_on_a_device_have_the_layout(model, form):
    trainable, params, names = adapter(model)
    own = ExpertLayout(form, interleaved=model == "gpt-oss")
    placed = jax.tree.map(jnp.asarray, trainable)
    made = jax.jit(lambda t: jlora.peft.tensors(t, names=names, layout=own)[1])(placed)
    config, _ = jlora.peft.tensors(placed, names=names, layout=own)
    read = jlora.peft.from_tensors(config, made, params, names=names, layout=own)
    wanted = updates(model, trainable, params)
    for key, x in updates(model, read, params).items():
        np.testing.assert_allclose(x, wanted[key], rtol=1e-6, atol=1e-6)
    shared = ExpertLayout("shared", interleaved=model == "gpt-oss")
    with pytest.raises(jlora.PeftError, match=r"'shared' needs [AB] on the host"):
        jlora.peft.tensors(placed, names=names, layout=shared)


def test_directory_of_the_hub_takes_fused_experts(tmp_path):
    """A base with a tensor for each expert: its type tells how gate and up lie."""
    trainable, params, names = adapter("mixtral")
    jlora.peft.save(tmp_path / "adapter", trainable, names=names, layout="peft")
    stem = "model.layers.{}.mlp.experts.{}.{}.weight"
    base = {
        stem.format(layer, e, name): np.zeros(SHAPES[name][::-1], np.float32)
        for layer, e, name in itertools.product(
            (0, 1), range(E), ("gate_proj", "up_proj", "down_proj")
        )
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    message = "nothing tells how: say layout='peft:interleaved' .--layout"
    with pytest.raises(jlora.PeftError, match=message):
        jlora.files.read(tmp_path / "adapter", base=tmp_path / "base")
    place = tmp_path / "adapter"
    told = jlora.files.read(place, base=tmp_path / "base", layout="peft:concatenated")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({"model_type": "qwen3_moe"}))
    read = jlora.files.read(place, base=tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, told.lora, read.lora)
    merged = jlora.merge(base, read)
    for (layer, name), x in updates("mixtral", trainable, params).items():
        for e in range(E):
            np.testing.assert_allclose(
                merged[stem.format(layer, e, name)], x[e].T, rtol=1e-6, atol=1e-6
            )


def test_mlx_has_one_tensor_for_all_experts(tmp_path):
    """As `LoRASwitchLinear`: `lora_a` is `[E, rank, in]`, `lora_b` `[E, out, rank]`."""
    trainable, params, names = adapter("mixtral")
    options = {"names": names, "dialect": "mlx"}
    with pytest.raises(jlora.PeftError, match="layout='stacked' has a form"):
        jlora.peft.save(tmp_path, trainable, **options)
    jlora.peft.save(tmp_path, trainable, **options, layout="stacked")
    tensors = load_file(tmp_path / "adapters.safetensors")
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    assert tensors[f"{stem}.lora_a"].shape == (E, R, H)
    assert tensors[f"{stem}.lora_b"].shape == (E, N, R)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "mlp.switch_mlp.up_proj" in config["lora_parameters"]["keys"]
    scale = config["lora_parameters"]["scale"]
    for model in MODELS:
        _, base, own = adapter(model)
        rows = "interleaved" if model == "gpt-oss" else "concatenated"
        read = jlora.peft.load(tmp_path, base, names=own, layout=f"stacked:{rows}")
        found = updates(model, read, base)
        for key, x in updates("mixtral", trainable, params).items():
            np.testing.assert_allclose(found[key], x, rtol=1e-6, atol=4e-6)
            a, b = (
                tensors[f"model.layers.{key[0]}.mlp.switch_mlp.{key[1]}.lora_{h}"]
                for h in "ab"
            )
            np.testing.assert_allclose((scale * b @ a).mT, x, rtol=1e-6, atol=4e-6)
