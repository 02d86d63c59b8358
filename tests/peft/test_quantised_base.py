"""Quantised models of torch's libraries, read as codes; adapters beside them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import cli, peft
from jlora._io.models import open_model
from jlora._io.torch_quantised import NF4
from jlora.peft import Entry, NameMap
from tests.helpers import normal
from tests.peft import file_cases

pytestmark = pytest.mark.once
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "quantised"
SHAPES = {"rows": (16, 128), "short": (16, 32), "odd": (6, 96), "long": (3, 320)}
FLOAT8 = jnp.float8_e4m3fn


def like(shapes, dtype="float32"):
    """Leaves `[in, out]` for tensors `[out, in]`."""
    return {
        name: {"kernel": jax.ShapeDtypeStruct(shape[::-1], dtype)}
        for name, shape in shapes.items()
    }


def load_golden(name, dtype="float32", **options):
    names = NameMap(
        generic=True, ignore=("dense.{x:rows,short,odd,long}", "norm.weight")
    )
    file = GOLDEN / f"{name}.safetensors"
    return peft.load_base(file, like(SHAPES, dtype), names=names, **options)


def golden(file, name):
    return open_model(GOLDEN / f"{file}.safetensors").read(f"dense.{name}")


# --- what bitsandbytes wrote ---


@pytest.mark.parametrize("file", ["nf4", "nf4_double"])
def test_four_bits_of_bitsandbytes_are_read_as_codes(file):
    dtype = "float32" if file == "nf4" else "bfloat16"
    with pytest.warns(UserWarning, match=r"does not have: odd.weight \(blocks of 64"):
        read = load_golden(file, dtype)
    blocks = {name: x["kernel"].blocks for name, x in read.items() if name != "odd"}
    assert blocks == {"rows": (64, 1), "short": (32, 2), "long": (64, 1)}
    assert isinstance(read["odd"]["kernel"], jax.Array)
    for name, x in read.items():
        w = x["kernel"]
        assert w.dtype == dtype
        dense = w.dense() if name != "odd" else w
        expected = golden(file, name).T.astype(dtype)
        np.testing.assert_array_equal(np.asarray(dense), expected)


def test_fp4_of_bitsandbytes_is_widened_and_may_be_quantised_again():
    with pytest.warns(UserWarning, match=r"rows.weight \(fp4 in \[16, 128\]\)"):
        read = load_golden("fp4")
    for name, x in read.items():
        np.testing.assert_array_equal(x["kernel"], golden("fp4", name).T)
    with pytest.warns(UserWarning, match="fp4"):
        again = load_golden("fp4", quantize="int8")
    assert again["rows"]["kernel"].kind == "int8"


def test_eight_bits_of_bitsandbytes_are_read_as_codes():
    read = load_golden("int8", "float16")
    for name, x in read.items():
        w = x["kernel"]
        assert (w.kind, w.blocks) == ("int8", (SHAPES[name][1], 1))
        expected = golden("int8", name).T
        np.testing.assert_allclose(w.dense(), expected, rtol=2**-11)


def test_codes_compute_as_bitsandbytes_does():
    read = load_golden("int8", "float32")
    x = normal((4, 128), 0)
    fn = jlora.apply_lora(lambda p, x: x @ p["rows"]["kernel"])
    got = fn(read, jlora.Trainable(), x)
    np.testing.assert_allclose(got, x @ golden("int8", "rows").T, rtol=1e-4, atol=1e-5)


def test_an_adapter_merges_into_a_file_of_bitsandbytes(tmp_path):
    a, b = normal((128, 2), 0), normal((2, 16), 1)
    axes = jlora.Axes((), (1,), (0,))
    own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=2, axes=axes))
    out, file = tmp_path / "out.safetensors", GOLDEN / "nf4.safetensors"
    adapter = jlora.Trainable({"rows.weight": own})
    jlora.export.merge_files(file, adapter, out)
    merged = open_model(out)
    assert "rows.weight.absmax" not in merged.shapes
    expected = golden("nf4", "rows") + np.asarray(a @ b).T
    np.testing.assert_allclose(merged.read("rows.weight"), expected, atol=1e-6)
    with pytest.warns(UserWarning, match="of the update lost"):
        jlora.export.merge_files(file, adapter, out, requantize=True)
    codes = open_model(out).read("rows.weight")
    assert (codes.kind, codes.blocks) == ("nf4", (1, 64))


# --- files that are damaged, or of other formats ---


def four_bits(**changes):
    """Tensors of a weight `[4, 128]` as bitsandbytes writes them, but for changes."""
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [4, 128],
    }
    state |= changes.pop("state", {})
    text = changes.pop("text", json.dumps(state)).encode()
    held = {
        "up.weight": np.zeros((256, 1), "uint8"),
        "up.weight.absmax": np.ones(8, "float32"),
        "up.weight.quant_map": np.array(NF4, "float32"),
        "up.weight.quant_state.bitsandbytes__nf4": np.frombuffer(text, "uint8"),
    }
    held |= changes
    return {name: x for name, x in held.items() if x is not None}


UP = {"up": (4, 128)}
BROKEN = {
    "no scales": (four_bits(**{"up.weight.absmax": None}), "absmax is missing"),
    "no table": (four_bits(**{"up.weight.quant_map": None}), "quant_map is missing"),
    "few scales": (
        four_bits(**{"up.weight.absmax": np.ones(7, "float32")}),
        r"absmax is \[7\], blocks of 64 in \[4, 128\] need 8",
    ),
    "few codes": (
        four_bits(**{"up.weight": np.zeros((255, 1), "uint8")}),
        "255 bytes do not hold",
    ),
    "a short table": (
        four_bits(**{"up.weight.quant_map": np.ones(15, "float32")}),
        "does not have 16 numbers",
    ),
    "another table": (
        four_bits(**{"up.weight.quant_map": np.ones(16, "float32")}),
        "is not the table of nf4",
    ),
    "no JSON": (four_bits(text="{"), "quant_state is not JSON"),
    "another JSON": (four_bits(text="[]"), r"quant_state is \[\]"),
    "blocks of nothing": (four_bits(state={"blocksize": 0}), "quant_state is"),
    "a shape of words": (four_bits(state={"shape": ["4", 128]}), "quant_state is"),
    "integers": (four_bits(state={"dtype": "int32"}), "an array of 'int32'"),
    "nested without scales": (
        four_bits(state={"nested_blocksize": 256, "nested_offset": 0.0}),
        "nested_absmax is missing",
    ),
    "an infinite offset": (
        four_bits(state={"nested_blocksize": 256, "nested_offset": 1e999}),
        "nested offset is inf",
    ),
}


def load_up(tmp_path, held, config=None):
    file_cases.write_arrays(tmp_path / "model.safetensors", held)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return peft.load_base(tmp_path, like(UP))["up"]["kernel"]


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_damaged_tensors_of_bitsandbytes_are_refused(case, tmp_path):
    held, told = case
    with pytest.raises(jlora.PeftError, match=told):
        load_up(tmp_path, held)
    with pytest.raises(jlora.CheckpointError, match=told):
        jlora.files.read_params(tmp_path)


OTHERS = {
    "GPTQ": ("up.qweight", "up.qzeros", "up.scales", "up.g_idx"),
    "AWQ": ("up.qweight", "up.qzeros", "up.scales"),
    "compressed-tensors": ("up.weight_packed", "up.weight_scale", "up.weight_shape"),
    "NVFP4": ("up.weight", "up.weight_scale", "up.weight_scale_2"),
    "HQQ": ("up.W_q", "up.scale", "up.zero"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name(name, tmp_path):
    held = {key: np.zeros((4, 16), "int32") for key in OTHERS[name]}
    told = f"up.weight is quantised as {name}, which jlora does not read.*dequantize"
    with pytest.raises(jlora.PeftError, match=told):
        load_up(tmp_path, held)
    with pytest.raises(jlora.CheckpointError, match=told):
        jlora.files.read_params(tmp_path)
    own = jlora.Factors(
        np.ones((128, 1)), np.ones((1, 4)),
        jlora.Spec(rank=1, alpha=1, axes=jlora.Axes((), (1,), (0,))),
    )  # fmt: skip
    adapter = jlora.Trainable({"up.weight": own})
    for write in (
        lambda out: jlora.export.merge_files(tmp_path, adapter, out),
        lambda out: jlora.export.quantize_files(tmp_path, out),
    ):
        with pytest.raises(jlora.CheckpointError, match=told):
            write(tmp_path.parent / "out.safetensors")


def test_the_config_names_the_format_where_tensors_do_not(tmp_path):
    held = {key: np.zeros((4, 16), "int32") for key in OTHERS["AWQ"]}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(jlora.PeftError, match="quantised as GPTQ"):
        load_up(tmp_path, held, config)


# --- float8 ---

SCALES = {
    "blocks": ("weight_scale_inv", (1, 2), (32, 4), {"weight_block_size": [128, 32]}),
    "a block": ("weight_scale_inv", (1, 1), (128, 4), {}),
    "rows": ("weight_scale", (4, 1), (128, 1), {}),
    "one": ("weight_scale", (), (128, 4), {}),
}


@pytest.mark.parametrize("case", SCALES.values(), ids=SCALES)
def test_float8_with_scales_is_read_as_codes(case, tmp_path):
    name, shape, blocks, about = case
    codes = np.asarray(normal((4, 64 if name == "blocks" else 128), 0)).astype(FLOAT8)
    if blocks[0] == 32:
        shape = (1, 4)
    scales = np.abs(np.asarray(normal((4,), 1)))[: int(np.prod(shape))].reshape(shape)
    held = {"up.weight": codes, f"up.{name}": scales.astype("float32")}
    config = {"dtype": "bfloat16", "quantization_config": about}
    read = load_up(tmp_path, held, config)
    assert (read.kind, read.blocks) == ("float8_e4m3", blocks)
    wide = np.broadcast_to(scales, (4, 1)) if shape != (1, 4) else scales.repeat(32, 1)
    np.testing.assert_array_equal(read.dense(), (codes.astype("float32") * wide).T)
    assert open_model(tmp_path).shapes["up.weight"].dtype == jnp.bfloat16


def test_float8_without_a_fitting_scale_is_refused(tmp_path):
    held = {
        "up.weight": np.ones((4, 128)).astype(FLOAT8),
        "up.weight_scale_inv": np.ones((3, 1), "float32"),
    }
    with pytest.raises(jlora.PeftError, match=r"\[3, 1\] scales for \[4, 128\]"):
        load_up(tmp_path, held)


# --- through name maps, and out again ---


def test_codes_of_a_quantised_model_go_where_the_map_says(tmp_path):
    """Heads, stacks and fused weights are moved as codes: nothing is rounded."""
    entries = (
        Entry("layers/o/kernel", "h.{i}.o.weight", "i h k d -> d (h k)"),
        Entry("layers/q/kernel", "h.{i}.q.weight", "i d h k -> (h k) d"),
        Entry("up_{part:a,b}/kernel", "up.weight", "i o -> (part o) i"),
    )
    params = {
        "layers": {
            "o": {"kernel": normal((2, 2, 64, 8), 0)},
            "q": {"kernel": normal((2, 64, 3, 8), 1)},
        },
        "up_a": {"kernel": normal((64, 4), 2)},
        "up_b": {"kernel": normal((64, 4), 3)},
    }
    names = NameMap(entries)
    peft.save_base(tmp_path, params, names=names)
    file = tmp_path / "codes.safetensors"
    jlora.export.quantize_files(tmp_path / "model.safetensors", file)
    held = open_model(file)
    assert held.shapes["up.weight"].blocks == (1, 64)
    read = peft.load_base(file, jax.eval_shape(lambda: params), names=names)
    blocks = jax.tree.map(lambda q: q.blocks, read, is_leaf=_is_coded)
    assert blocks == {
        "layers": {"o": {"kernel": (1, 1, 64, 1)}, "q": {"kernel": (1, 64, 1, 1)}},
        "up_a": {"kernel": (64, 1)},
        "up_b": {"kernel": (64, 1)},
    }
    dense = {name: np.asarray(held.dense(name)) for name in held.shapes}
    peft.save_base(tmp_path / "again", read, names=names)
    again = open_model(tmp_path / "again")
    for name, w in dense.items():
        np.testing.assert_array_equal(again.read(name), w)


def _is_coded(x):
    return isinstance(x, jlora.Quantized)


def test_blocks_that_a_map_would_cut_are_widened_and_told(tmp_path):
    names = NameMap((Entry("o/kernel", "o.weight", "h k d -> d (h k)"),))
    params = {"o": {"kernel": normal((4, 48, 8), 0)}}
    peft.save_base(tmp_path, params, names=names)
    file = tmp_path / "codes.safetensors"
    jlora.export.quantize_files(tmp_path / "model.safetensors", file)
    with pytest.warns(UserWarning, match=r"o.weight \(nf4, blocks \(1, 64\)\)"):
        read = peft.load_base(file, params, names=names)
    expected = open_model(file).dense("o.weight").T.reshape(4, 48, 8)
    np.testing.assert_array_equal(read["o"]["kernel"], expected)
    with pytest.raises(jlora.PeftError, match="quantised already"):
        peft.load_base(file, params, names=names, quantize="int8")


@pytest.mark.parametrize("quantize", ["int8", {"kind": "nf4", "double": True}])
def test_load_base_quantises_as_the_leaves_come(quantize, tmp_path):
    params = {"up": {"kernel": normal((128, 6), 0), "bias": jnp.ones(6)}}
    peft.save_base(tmp_path, params)
    read = peft.load_base(tmp_path, jax.eval_shape(lambda: params), quantize=quantize)
    options = {"kind": quantize} if isinstance(quantize, str) else quantize
    expected = jlora.quantize(params, **options)
    assert jax.tree.structure(read) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_torchs_names_tell_what_is_a_weight(tmp_path):
    """Matrices along fan-in; not tables, heads and vectors."""
    base = {
        "model.embed_tokens.weight": (10, 64),
        "model.layers.0.mlp.up.weight": (8, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (10, 64),
    }
    held = {name: np.asarray(normal(shape, 0)) for name, shape in base.items()}
    file_cases.write_arrays(tmp_path / "model.safetensors", held)
    out = tmp_path / "codes.safetensors"
    jlora.export.quantize_files(tmp_path / "model.safetensors", out)
    shapes = open_model(out).shapes
    assert [name for name, x in shapes.items() if _is_coded(x)] == [
        "model.layers.0.mlp.up.weight"
    ]
    assert shapes["model.layers.0.mlp.up.weight"].blocks == (1, 64)
    jlora.export.quantize_files(
        tmp_path / "model.safetensors", out, targets="lm_head.weight", kind="int8"
    )
    assert open_model(out).shapes["lm_head.weight"].kind == "int8"


def test_an_adapter_over_codes_is_saved_as_any_other(tmp_path):
    """Its config says nothing of the base: PEFT has no word for it there."""
    params = {
        "up": {"kernel": normal((6, 4), 0)},
        "embed": {"embedding": normal((9, 6), 1)},
    }
    codes = jlora.quantize(params, targets="**")
    rows = jlora.TokenRows("embed/embedding", (1, 3))

    def fn(p, ids):
        x = p["embed"]["embedding"][ids]
        return x @ p["up"]["kernel"]

    config = jlora.LoraConfig(rank=2, targets="up/kernel", train=rows)
    ids = jnp.zeros((1, 2), jnp.int32)
    plan = jlora.plan(fn, codes, ids, config=config)
    frozen, adapter = jlora.split(jax.random.key(0), codes, plan)
    peft.save(tmp_path / "adapter", adapter, params=frozen, tied=False)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["init_lora_weights"] is True
    read = peft.load(tmp_path / "adapter", frozen, tied=False)
    assert read.lora.keys() == adapter.lora.keys()
    own = (x.lora["up/kernel"].a for x in (read, adapter))
    np.testing.assert_array_equal(*own)
    rows = (x.lora["embed/embedding"].b for x in (read, adapter))
    np.testing.assert_allclose(*rows, atol=1e-6)


def test_a_peft_adapter_merges_into_a_file_of_bitsandbytes(tmp_path, capsys):
    """By the command: as torch names it, and as long as the weight, not its bytes."""
    a, b = normal((128, 2), 0), normal((2, 16), 1)
    own = jlora.Factors(a, b, jlora.Spec(rank=2, alpha=2))
    peft.save(tmp_path / "adapter", jlora.Trainable({"rows/kernel": own}))
    file, out = GOLDEN / "nf4_double.safetensors", tmp_path / "out.safetensors"
    assert cli.run(["merge", str(file), str(tmp_path / "adapter"), str(out)]) == 0
    expected = golden("nf4_double", "rows") + np.asarray(a @ b).T
    merged = np.asarray(open_model(out).read("rows.weight"), "float32")
    np.testing.assert_allclose(merged, expected, rtol=2**-7, atol=1e-3)
    words = ["validate", str(tmp_path / "adapter"), "--base", str(file)]
    assert cli.run(words) == 0
    assert "3 leaves nf4" in capsys.readouterr().out


def test_a_plan_says_what_load_base_quantises(tmp_path):
    params = {
        "up": {"kernel": normal((64, 6), 0)},
        "mix": {"kernel": normal((6, 6), 1)},
    }

    def fn(p, x):
        return x @ p["up"]["kernel"] @ (p["mix"]["kernel"] * 2)

    config = jlora.LoraConfig(rank=2, targets="up/kernel")
    plan = jlora.plan(fn, params, jnp.ones((1, 64)), config=config)
    peft.save_base(tmp_path, params)
    shapes = jax.eval_shape(lambda: params)
    read = peft.load_base(tmp_path, shapes, quantize="nf4", plan=plan)
    expected = jlora.quantize(params, plan)
    assert jax.tree.structure(read) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, read, expected)
