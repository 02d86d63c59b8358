"""Adapter files of other tools: MLX, kohya's scripts, diffusers, and unknown ones."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jlora
from jlora.errors import JloraError, PeftError
from jlora.factors import Axes, Factors, Spec, Trainable
from jlora.peft import Entry, NameMap, maps

pytestmark = pytest.mark.once
Q = "model/layers/0/self_attn/q_proj/kernel"
UNET = NameMap(
    (
        Entry("{n:a,b,x}/conv/kernel", "down_blocks.0.{n}.conv.weight", kind="conv"),
        Entry("{n:a,b,x}/to_q/kernel", "down_blocks.0.{n}.to_q.weight"),
    )
)


def factors(seed: int, n_in=6, n_out=5, rank=2, **spec) -> Factors:
    rng = np.random.default_rng(seed)
    sizes = (n_in, rank), (rank, n_out)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes)
    magnitude = jnp.ones(n_out) if spec.get("method") == "dora" else None
    return Factors(a, b, Spec(rank=rank, **{"alpha": 3.0, **spec}), magnitude)


def decoder(**spec) -> Trainable:
    names = ("self_attn/q_proj", "self_attn/v_proj", "mlp/up_proj")
    paths = [f"model/layers/{i}/{name}/kernel" for i in range(2) for name in names]
    return Trainable({path: factors(n, **spec) for n, path in enumerate(paths)})


def unet() -> Trainable:
    rng = np.random.default_rng(9)
    a, b = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 6, 4), (4, 5))
    )
    spec = Spec(op="conv", axes=Axes((), (0, 1, 2), (3,)), rank=4, alpha=2.0)
    kernels = {"a/conv/kernel": Factors(a, b, spec), "a/to_q/kernel": factors(1)}
    return Trainable(kernels | {"b/to_q/kernel": factors(2, rank=3, alpha=1.0)})


def params(trainable: Trainable) -> dict:
    tree: dict = {}
    for path, f in trainable.lora.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jnp.zeros(f.spec.axes.weight_shape(f.a.shape, f.b.shape))
    return tree


def same_update(one: Trainable, other: Trainable, base: float = 0.0) -> None:
    assert one.lora.keys() == other.lora.keys()
    weights = jax.tree.map(lambda x: x + base, params(one))
    merged = [jlora.merge(weights, t) for t in (one, other)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *merged)
    assert all(np.any(x) for x in jax.tree.leaves(merged[0]))


@pytest.mark.parametrize("dialect", ["mlx", "kohya", "diffusers"])
@pytest.mark.parametrize("spec", [{}, {"rslora": True}], ids=["lora", "rslora"])
def test_linear_layers_there_and_back(dialect, spec, tmp_path):
    own = decoder(**spec)
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect=dialect)
    assert jlora.files.detect(tmp_path) == "peft"
    same_update(own, jlora.peft.load(tmp_path, params(own), names=maps.LLAMA))


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_convolutions_ranks_and_alphas_there_and_back(dialect, tmp_path):
    own = unet()
    jlora.peft.save(tmp_path, own, names=UNET, dialect=dialect, component="unet")
    (file,) = tmp_path.glob("*.safetensors")
    for place in (tmp_path, file):
        same_update(own, jlora.peft.load(place, params(own), names=UNET))
    names = safetensors.numpy.load_file(file)
    first = {
        "kohya": "lora_unet_down_blocks_0_a_conv.lora_down.weight",
        "diffusers": "unet.down_blocks.0.a.conv.lora_A.weight",
    }
    assert names[first[dialect]].shape == (4, 6, 3, 3)


def test_mlx_has_one_rank_and_one_scale(tmp_path):
    own = decoder()
    other = factors(7, rank=3, alpha=9.0)
    own = Trainable({**own.lora, Q: other})
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect="mlx")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "dropout": 0.0,
        "keys": ["mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"],
        "rank": 3,
        "scale": 1.5,
    }
    tensors = safetensors.numpy.load_file(tmp_path / "adapters.safetensors")
    assert {x.shape for n, x in tensors.items() if n.endswith("lora_a")} == {(6, 3)}
    same_update(own, jlora.peft.load(tmp_path, params(own), names=maps.LLAMA))


def test_mlx_adapts_the_head_by_its_whole_name(tmp_path):
    own = Trainable({**decoder().lora, "lm_head/kernel": factors(8)})
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect="mlx")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = ["lm_head", "mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert config["lora_parameters"]["keys"] == keys
    same_update(own, jlora.peft.load(tmp_path, params(own), names=maps.LLAMA))


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_has_a_table_that_may_be_the_head_too(tied, tmp_path):
    spec = {"op": "embedding", "axes": Axes((), (0,), (1,))}
    table = {"model.embed_tokens.weight": factors(8, 9, 6, **spec)}
    q = "model.layers.0.self_attn.q_proj.weight"
    own = Trainable({**table, q: factors(1, axes=Axes((), (1,), (0,)))})
    jlora.peft.save(tmp_path / "mlx", own, dialect="mlx", tied=tied)
    held = safetensors.numpy.load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert held["model.embed_tokens.lora_a"].shape == (9, 2)
    assert not any("lm_head" in name for name in held)
    shapes = {name: np.zeros(x.shape, np.float32) for name, x in params(own).items()}
    if not tied:
        shapes["lm_head.weight"] = np.zeros((9, 6), np.float32)
    base = tmp_path / "base"
    base.mkdir()
    safetensors.numpy.save_file(shapes, base / "model.safetensors")
    fields = {"model_type": "qwen3", "tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(fields))
    same_update(own, jlora.files.read(tmp_path / "mlx", base=base))
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    config["fine_tune_type"] = "dora"
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PeftError, match="a length for each row of a table"):
        jlora.files.read(tmp_path / "mlx", base=base)


def test_mlx_dora_there_and_back(tmp_path):
    own = decoder(method="dora")
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect="mlx")
    read = jlora.peft.load(tmp_path, params(own), names=maps.LLAMA)
    assert read.lora[Q].spec.method == "dora"
    np.testing.assert_array_equal(read.lora[Q].magnitude, own.lora[Q].magnitude)


def test_file_with_the_models_own_names(tmp_path):
    """A model of Hugging Face needs no map, whoever wrote the adapter."""
    own = decoder()
    base = {f"model.layers.{i}.{n}.weight" for i in range(2) for n in (
        "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")}  # fmt: skip
    shapes = dict.fromkeys(base, np.zeros((5, 6), np.float32))
    safetensors.numpy.save_file(shapes, tmp_path / "base.safetensors")
    merged = {}
    for dialect in ("peft", "mlx", "kohya", "diffusers"):
        folder = tmp_path / dialect
        jlora.peft.save(folder, own, names=maps.LLAMA, dialect=dialect)
        read = jlora.files.read(folder, base=tmp_path / "base.safetensors")
        merged[dialect] = jlora.merge(shapes, read)
        for name, x in merged["peft"].items():
            np.testing.assert_allclose(merged[dialect][name], x, atol=1e-6)


def test_old_names_of_diffusers(tmp_path):
    """Attention processors, and `lora.down`; without alpha the scale is one."""
    a, b = np.ones((2, 6), np.float32), np.ones((5, 2), np.float32)
    old = "unet.down_blocks.0.x.processor.to_q_lora"
    named = {f"{old}.down.weight": a, f"{old}.up.weight": b}
    safetensors.numpy.save_file(named, tmp_path / "pytorch_lora_weights.safetensors")
    own = Trainable({"x/to_q/kernel": factors(0)})
    read = jlora.peft.load(tmp_path, params(own), names=UNET)
    assert read.lora["x/to_q/kernel"].scale == 1.0
    np.testing.assert_array_equal(read.lora["x/to_q/kernel"].a, a.T)


def test_kohyas_window_of_one_is_a_matrix(tmp_path):
    stem = "lora_unet_down_blocks_0_x_to_q"
    named = {
        f"{stem}.lora_down.weight": np.ones((2, 6, 1, 1), np.float32),
        f"{stem}.lora_up.weight": np.ones((5, 2, 1, 1), np.float32),
        f"{stem}.alpha": np.ones((), np.float16),
    }
    safetensors.numpy.save_file(named, tmp_path / "any.safetensors")
    own = Trainable({"x/to_q/kernel": factors(0)})
    read = jlora.peft.load(tmp_path / "any.safetensors", params(own), names=UNET)
    assert read.lora["x/to_q/kernel"].scale == 0.5
    with pytest.raises(PeftError, match="writes `_` for the dots"):
        jlora.files.read(tmp_path / "any.safetensors")


# Names of SDXL's U-Net, and what diffusers 0.42.1 makes of them.
SDXL = {
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0":
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_proj_out": "mid_block.attentions.0.proj_out",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_0_1_transformer_blocks_3_ff_net_0_proj":
        "up_blocks.0.attentions.0.transformer_blocks.3.ff.net.0.proj",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
    "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
    "time_embed_2": "time_embedding.linear_2",  # kohya's own rules
    "label_emb_0_0": "add_embedding.linear_1",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}  # fmt: skip


def sdxl() -> tuple[Trainable, dict[str, np.ndarray]]:
    """An adapter of such modules, and the weights, both under torch's names."""
    lora, shapes = {}, {}
    for n, module in enumerate(SDXL.values()):
        f = factors(n)
        axes = Axes((), (1,), (0,))
        spec = dataclasses.replace(f.spec, axes=axes)
        lora[f"{module}.weight"] = Factors(f.a, f.b, spec)
        shapes[f"{module}.weight"] = np.zeros((5, 6), np.float32)
    return Trainable(lora), shapes


def test_kohyas_names_of_sdxl_there_and_back(tmp_path):
    own, shapes = sdxl()
    jlora.peft.save(tmp_path, own, dialect="kohya-sdxl")
    names = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    assert {n.split(".")[0] for n in names} == {f"lora_unet_{n}" for n in SDXL}
    read = jlora.peft.load(tmp_path, shapes)
    assert read.lora.keys() == own.lora.keys()
    merged = [jlora.merge(shapes, t) for t in (own, read)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *merged)
    first = "lora_unet_input_blocks_4_1_proj_in"
    twice = {n.replace(first, "lora_unet_down_blocks_1_attentions_0_proj_in"): x
             for n, x in names.items()} | names  # fmt: skip
    safetensors.numpy.save_file(twice, tmp_path / "lora.safetensors")
    with pytest.raises(PeftError, match=r"_blocks_4_1_.*' is there twice"):
        jlora.peft.load(tmp_path, shapes)


def test_kohyas_names_that_sdxl_does_not_have(tmp_path):
    own, shapes = sdxl()
    (first, _), (second, _), *_ = own.lora.items()
    other = "down_blocks.3.resnets.0.conv1.weight"
    with pytest.raises(PeftError, match=r"has no 'down_blocks.3.resnets.0.conv1'.*'ko"):
        jlora.peft.save(
            tmp_path, Trainable({other: own.lora[first]}), dialect="kohya-sdxl"
        )
    jlora.peft.save(tmp_path, own, dialect="kohya-sdxl")
    del shapes[second]
    with pytest.raises(PeftError, match=r"extra: .*input_blocks_2_0_emb_layers_1"):
        jlora.peft.load(tmp_path, shapes)
    with pytest.raises(PeftError, match=r"none of its tensors is A .*Give names="):
        jlora.peft.load(tmp_path, {other: shapes[first]})


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_dora_there_and_back(dialect, tmp_path):
    """LyCORIS has the lengths of outputs as `[out, 1, ...]`."""
    own = unet()
    for path, f in own.lora.items():
        spec = dataclasses.replace(f.spec, method="dora")
        lengths = jnp.arange(1.0, 1.0 + f.b.shape[-1])
        own.lora[path] = Factors(f.a, f.b, spec, lengths)
    jlora.peft.save(tmp_path, own, names=UNET, dialect=dialect)
    read = jlora.peft.load(tmp_path, params(own), names=UNET)
    for path, f in own.lora.items():
        assert read.lora[path].spec.method == "dora"
        np.testing.assert_array_equal(read.lora[path].magnitude, f.magnitude)
    same_update(own, read, base=1.0)
    (file,) = tmp_path.glob("*.safetensors")
    sizes = {n: x.shape for n, x in safetensors.numpy.load_file(file).items()}
    end = "lora_magnitude_vector.weight"
    wanted = {
        "kohya": {"lora_unet_down_blocks_0_a_conv.dora_scale": (5, 1, 1, 1),
                  "lora_unet_down_blocks_0_a_to_q.dora_scale": (5, 1)},
        "diffusers": {f"unet.down_blocks.0.a.conv.{end}": (1, 5, 1, 1),
                      f"unet.down_blocks.0.a.to_q.{end}": (5,)},
    }[dialect]  # fmt: skip
    assert wanted.items() <= sizes.items()


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 1), ""),
        ((5,), ""),
        ((1, 6), r"a length for each input \(wd_on_out=False of LyCORIS\)"),
        ((1, 5), "a length for each input"),
        ((6, 1), r"the magnitude is \[6\], not \[5\]"),
        ((), "a length for each input"),
    ],
)
def test_dora_scale_of_the_outputs_and_no_other(shape, text, tmp_path):
    stem = "lora_unet_down_blocks_0_x_to_q"
    named = {
        f"{stem}.lora_down.weight": np.ones((2, 6), np.float32),
        f"{stem}.lora_up.weight": np.ones((5, 2), np.float32),
        f"{stem}.dora_scale": np.ones(shape, np.float32),
    }
    safetensors.numpy.save_file(named, tmp_path / "any.safetensors")
    weights = params(Trainable({"x/to_q/kernel": factors(0)}))
    if text:
        with pytest.raises(PeftError, match=text):
            jlora.peft.load(tmp_path / "any.safetensors", weights, names=UNET)
        return
    read = jlora.peft.load(tmp_path / "any.safetensors", weights, names=UNET)
    assert read.lora["x/to_q/kernel"].magnitude.shape == (5,)


CLIP = NameMap(
    (Entry("{n:q,v}/kernel", "text_model.encoder.layers.0.self_attn.{n}_proj.weight"),)
)
PIPELINES = {"kohya": ("unet", "te1", "te2"),
             "diffusers": ("unet", "text_encoder", "text_encoder_2")}  # fmt: skip


def pipeline(dialect: str, folder: pathlib.Path) -> dict[str, tuple]:
    """One file for a U-Net and two text encoders that call their modules the same."""
    first, second, third = PIPELINES[dialect]
    own = {
        first: (unet(), UNET),
        second: (Trainable({"q/kernel": factors(4)}), CLIP),
        third: (Trainable({n: factors(5, alpha=7.0) for n in ("q/kernel", "v/kernel")}),
                CLIP),
    }  # fmt: skip
    for component, (trainable, names) in own.items():
        options = {"dialect": dialect, "component": component, "add": True}
        jlora.peft.save(folder, trainable, names=names, **options)
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / "all.safetensors")
    return own


@pytest.mark.parametrize("dialect", PIPELINES)
def test_each_model_of_a_pipeline_reads_its_own_part(dialect, tmp_path):
    file, components = tmp_path / "all.safetensors", sorted(PIPELINES[dialect])
    for component, (own, names) in pipeline(dialect, tmp_path).items():
        options = {"names": names, "component": component}
        read, report = jlora.peft.load_partial(file, params(own), **options)
        assert not report
        same_update(own, read)
    there = ", ".join(map(repr, components))
    for name, text in (
        (None, f"has adapters of 3 models: {there}. Say which one"),
        ("te3", f"has no adapter of component='te3', but of {there}."),
        ("", f"has no adapter of component='', but of {there}."),
    ):
        with pytest.raises(PeftError, match=re.escape(text)):
            jlora.peft.load(file, params(own), names=CLIP, component=name)
    with pytest.raises(PeftError, match=r"none of its tensors is A|extra: .*down_bl"):
        jlora.peft.load(file, params(own), names=CLIP, component="unet")


@pytest.mark.parametrize("dialect", PIPELINES)
def test_a_part_is_replaced_and_the_others_keep_their_bits(dialect, tmp_path):
    own = pipeline(dialect, tmp_path)
    (other, (_, names)), (component, (_, clip)), _ = own.items()
    (stem,) = {"kohya": ["lora"], "diffusers": ["pytorch_lora_weights"]}[dialect]
    file = (tmp_path / "all.safetensors").rename(tmp_path / f"{stem}.safetensors")
    old = safetensors.numpy.load_file(file)
    new = Trainable({"v/kernel": factors(6, alpha=9.0)})
    options = {"names": clip, "dialect": dialect, "component": component}
    jlora.peft.save(tmp_path, new, **options, add=True)
    now = safetensors.numpy.load_file(file)
    begins = (f"{component}.", f"lora_{component}_")
    kept = {name for name in old if not name.startswith(begins)}
    assert {name for name in now if not name.startswith(begins)} == kept
    for name in kept:
        np.testing.assert_array_equal(now[name], old[name])
    read = jlora.peft.load(file, params(new), names=clip, component=component)
    same_update(new, read)
    first = own[other][0]
    same_update(
        first, jlora.peft.load(file, params(first), names=names, component=other)
    )
    jlora.peft.save(tmp_path, new, **options)  # without add, only this model's
    assert all(n.startswith(begins) for n in safetensors.numpy.load_file(file))


def test_nothing_is_added_to_files_of_one_model_or_of_another_tool(tmp_path):
    own = Trainable({"q/kernel": factors(4)})
    with pytest.raises(PeftError, match="A file of 'mlx' has one: leave add out"):
        jlora.peft.save(tmp_path, own, names=CLIP, dialect="mlx", add=True)
    file = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file({"x.weight": np.ones(2)}, file)
    before = file.read_bytes()
    with pytest.raises(PeftError, match=r"'x.weight', whose name is of no model"):
        jlora.peft.save(tmp_path, own, names=CLIP, dialect="kohya", add=True)
    assert file.read_bytes() == before


def test_a_part_is_read_strictly_and_the_others_are_left_alone(tmp_path):
    own = pipeline("kohya", tmp_path)["te1"][0]
    file = tmp_path / "all.safetensors"
    named = safetensors.numpy.load_file(file)
    more = {
        "lora_te2_x.hada_w1_a": "",
        "lora_te1_y.lora_up.weight": "te1_y",
        "z": "'z'",
    }
    for name, extra in more.items():
        safetensors.numpy.save_file(named | {name: np.ones((2, 2), np.float32)}, file)
        options = {"names": CLIP, "component": "te1"}
        read, report = jlora.peft.load_partial(file, params(own), **options)
        same_update(own, read)
        assert len(report.extra) == bool(extra), name
        assert extra.strip("'") in "".join(report.extra)


@pytest.mark.parametrize(
    ("dialect", "component"), [("kohya", "te1"), ("diffusers", "text_encoder")]
)
def test_a_text_model_of_clip_has_its_modules_in_another_or_not(
    dialect, component, tmp_path
):
    """transformers 5 has left `text_model` out; the tools' files have it."""
    written = []
    for start in ("text_model.", ""):
        own = {}
        for i in (1, 2):
            f = factors(i, alpha=float(i))
            spec = dataclasses.replace(f.spec, axes=Axes((), (1,), (0,)))
            own[f"{start}encoder.layers.0.mlp.fc{i}.weight"] = Factors(f.a, f.b, spec)
        folder = tmp_path / f"{start}x"
        options = {"dialect": dialect, "component": component}
        jlora.peft.save(folder, Trainable(own), **options)
        (file,) = folder.glob("*.safetensors")
        written.append(set(safetensors.numpy.load_file(file)))
        for other in ("text_model.", ""):
            names = [f"{other}{name.removeprefix(start)}" for name in own]
            read = jlora.peft.load(file, dict.fromkeys(names, np.zeros((5, 6))))
            assert list(read.lora) == names
            assert [f.scale for f in read.lora.values()] == [0.5, 1.0]
        with safetensors.safe_open(file, "np") as opened:
            about = json.loads(opened.metadata().get("lora_adapter_metadata", "{}"))
        fc = [f"encoder.layers.0.mlp.fc{i}" for i in (1, 2)]  # at the end of both
        assert about.get("text_encoder.target_modules", fc) == fc
    assert written[0] == written[1]
    assert all(name.count("text_model") == 1 for name in written[0])


@pytest.mark.parametrize("dialect", ["peft", "mlx"])
def test_component_is_only_for_files_of_several_models(dialect, tmp_path):
    own = decoder()
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect=dialect)
    with pytest.raises(PeftError, match=rf"component='unet' is for.*{dialect.upper()}"):
        jlora.peft.load(tmp_path, params(own), names=maps.LLAMA, component="unet")


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "x-flux"),
        ("model.layers.0.q_proj.lora_A", "loralib"),
        ("base_model.model.q_proj.lora_A.weight", "without its adapter_config.json"),
        ("base_model.model.q_proj.lora_A.default.weight", "not its `save_pretrained`"),
        ("layers.0.ia3_l", "IA3"),
    ],
)
def test_file_of_an_unknown_tool_is_named(name, tool, tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({name: np.ones((2, 2), np.float32)}, file)
    for place in (file, tmp_path):
        for read in (jlora.files.detect, jlora.files.read):
            with pytest.raises(JloraError, match="looks like an adapter of") as error:
                read(place)
            assert tool in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": {"rank": 2}}, "scale is None"),
        ({"lora_parameters": {"scale": math.nan}}, "scale is nan"),
        ({"lora_parameters": {"scale": True}}, "scale is True"),
        ({"lora_parameters": {"scale": 1.0, "dropout": 1}}, "dropout 1"),
        ({"lora_parameters": []}, "lora_parameters"),
    ],
)
def test_mlx_config_that_says_too_little(change, text, tmp_path):
    own = decoder()
    jlora.peft.save(tmp_path, own, names=maps.LLAMA, dialect="mlx")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PeftError, match=text):
        jlora.peft.load(tmp_path, params(own), names=maps.LLAMA)


def test_numbers_that_no_scale_has(tmp_path):
    own = unet()
    jlora.peft.save(tmp_path, own, names=UNET, dialect="kohya")
    file = tmp_path / "lora.safetensors"
    named = safetensors.numpy.load_file(file)
    for value in (
        np.float32(np.nan),
        np.float32(-1),
        np.ones(2, np.float32),
        np.int32(1),
    ):
        named["lora_unet_down_blocks_0_a_to_q.alpha"] = np.asarray(value)
        safetensors.numpy.save_file(named, file)
        with pytest.raises(PeftError, match="is not one positive number"):
            jlora.peft.load(tmp_path, params(own), names=UNET)
    del named["lora_unet_down_blocks_0_a_to_q.alpha"]
    del named["lora_unet_down_blocks_0_a_to_q.lora_up.weight"]
    safetensors.numpy.save_file(named, file)
    with pytest.raises(PeftError, match=r"missing: .*to_q\.lora_B\.weight"):
        jlora.peft.load(tmp_path, params(own), names=UNET)


def test_what_a_tool_has_no_form_for(tmp_path):
    def refuses(trainable, text, **options):
        options = {"names": maps.LLAMA, **options}
        with pytest.raises(PeftError, match=text):
            jlora.peft.save(tmp_path / "out", trainable, **options)

    own = decoder()
    other = Trainable({**own.lora, "score/kernel": factors(8)})
    text = "MLX adapts only modules in `layers.N.`, tables and lm_head: score"
    refuses(other, text, dialect="mlx", names=None)
    refuses(unet(), "a convolution", dialect="mlx", names=UNET)
    refuses(own, "dialect must be one of peft, mlx, kohya", dialect="nemo")
    refuses(own, "only for PEFT's files", dialect="mlx", portable=True)
    full = Trainable(own.lora, {"lm_head/kernel": jnp.ones((6, 5))})
    refuses(full, "no form for lm_head.weight", dialect="diffusers")
    for tool in ("mlx", "kohya", "diffusers"):
        refuses(decoder(invocation=(3,)), "no form for activated LoRA", dialect=tool)
    assert not (tmp_path / "out").exists()
