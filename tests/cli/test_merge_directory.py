"""A merged model as a directory: what it holds, what is refused, whole or nothing."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora import cli, export
from jlora.cli._options import SIZE
from tests.helpers import normal

pytestmark = pytest.mark.once
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.q_proj.weight": (16, 8),
    "model.layers.1.q_proj.weight": (16, 8),
    "lm_head.weight": (12, 8),
}
Q = "model.layers.0.q_proj.weight"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def factors(shape, seed=0):
    axes = jlora.Axes((), (1,), (0,))
    a, b = normal((shape[1], 2), seed), normal((2, shape[0]), seed + 1)
    return jlora.Factors(a, b, jlora.Spec(rank=2, alpha=2, axes=axes))


def adapter(*names):
    return jlora.Trainable({n: factors(SHAPES[n], i) for i, n in enumerate(names)})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with the one of a model; the current one."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    weights = {n: np.array(normal(s, i)) for i, (n, s) in enumerate(SHAPES.items())}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": '{"model_type": "llama",  "tie_word_embeddings": false}',
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer.model": "pieces",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
        "modeling_own.py": "",
        "README.md": "of the base",
        "pytorch_model.bin": "weights",
        "pytorch_model.bin.index.json": "{}",
        ".cache": "",
    }
    for name, text in files.items():
        (base / name).write_text(text)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "onnx").mkdir()
    return base


def run(capsys, *words):
    code = cli.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def tensors(folder):
    return {k: v for x in folder.glob("*.safetensors") for k, v in load_file(x).items()}


def test_a_directory_has_all_that_a_server_reads(folder, tmp_path, capsys):
    jlora.save("a.safetensors", adapter(Q))
    words = "merge", "base", "a.safetensors", "out", "--shard-size", "1kB", "--json"
    code, text, err = run(capsys, *words)
    assert (code, err) == (0, "")
    told, out = json.loads(text), tmp_path / "out"
    assert (told["lora"], told["files"], told["out"]) == (1, 3, "out")
    names = {str(x.relative_to(out)) for x in out.rglob("*") if x.is_file()}
    assert names - {x.name for x in out.glob("*.safetensors")} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "LICENSE",
        "modeling_own.py",
        "model.safetensors.index.json",
    }
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == SHAPES.keys()
    with safe_open(out / index["weight_map"][Q], "numpy") as file:
        assert file.metadata()["format"] == "pt"
    assert max(x.stat().st_size for x in out.glob("*.safetensors")) < 1500
    export.merge_files(folder, adapter(Q), "one.safetensors")
    one, found = load_file("one.safetensors"), tensors(out)
    assert one.keys() == found.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(found[name], x)
    assert not np.array_equal(one[Q], load_file("base/model.safetensors")[Q])


def test_a_base_in_shards_merges_into_one_file(folder, tmp_path):
    export.merge_directory("base", adapter(Q), "shards", max_shard_bytes=600)
    shown = []
    export.merge_directory(
        "shards", jlora.Trainable(), "out", progress=lambda n: shown.extend(n) or n
    )
    assert sorted(shown) == sorted(SHAPES)
    assert [x.name for x in (tmp_path / "out").glob("*.safe*")] == ["model.safetensors"]
    found = tensors(tmp_path / "out")
    for name, x in tensors(tmp_path / "shards").items():
        np.testing.assert_array_equal(found[name], x)


def test_a_file_is_written_for_a_name_of_one_and_for_other_models(folder, capsys):
    jlora.save("a.safetensors", adapter(Q))
    for words in (("base", "one.safetensors"), ("base/model.safetensors", "two")):
        code, _, err = run(capsys, "merge", words[0], "a.safetensors", words[1])
        assert (code, err) == (0, "")
        assert pathlib.Path(words[1]).is_file()
        odd = "merge", words[0], "a.safetensors", "x.safetensors", "--shard-size", "1GB"
        assert "--shard-size is for a directory" in run(capsys, *odd)[2]
    code, _, err = run(capsys, "merge", "base", "a.safetensors", "x", "--requantize")
    assert code == 2
    assert "servers do not read jlora's codes. Write x.safetensors" in err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("1.5 mb", 1.5e6), ("2KiB", 2048), ("7", 7)]
)
def test_a_size_is_a_number_of_bytes(text, size):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 apples", "1e9"])
def test_what_is_not_a_size(folder, capsys, text):
    jlora.save("a.safetensors", adapter(Q))
    words = "merge", "base", "a.safetensors", "out", "--shard-size", text
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "is not a size, such as 5GB" in err


def test_inputs_stay_and_adapters_are_not_models(folder, tmp_path, capsys):
    jlora.save("a.safetensors", adapter(Q))
    before = {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
    (tmp_path / "link").symlink_to(folder)
    for out in ("base", "link", "base/new", "."):
        for flags in ((), ("--overwrite",)):
            code, _, err = run(capsys, "merge", "base", "a.safetensors", out, *flags)
            assert code == 2
            assert "the input 'base'" in err
        with pytest.raises(jlora.CheckpointError, match="the input 'base'"):
            export.merge_directory("base", adapter(Q), out, overwrite=True)
    assert before == {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
    jlora.peft.save("peft", jlora.Trainable({"up/kernel": factors((4, 4))}))
    for model in ("peft", "a.safetensors"):
        code, _, err = run(capsys, "merge", model, "a.safetensors", "out")
        assert code == 1
        assert f"'{model}' is an adapter" in err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_if_it_is_a_model(folder, tmp_path):
    out = tmp_path / "out"
    export.merge_directory("base", adapter(Q), out)
    (out / "tokenizer.old").write_text("stale")
    with pytest.raises(jlora.CheckpointError, match="already there"):
        export.merge_directory("base", jlora.Trainable(), out)
    export.merge_directory("base", jlora.Trainable(), out, overwrite=True)
    assert not (out / "tokenizer.old").exists()
    np.testing.assert_array_equal(tensors(out)[Q], tensors(folder)[Q])
    (out / "runs").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to_out").symlink_to(out)
    for name, text in {
        "out": "has the folders runs",
        "notes": "has no config.json",
        "file": "is not a directory",
        "to_out": "is not a directory",
    }.items():
        with pytest.raises(jlora.CheckpointError, match=text):
            export.merge_directory("base", jlora.Trainable(), name, overwrite=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export.merge_directory("base", adapter(Q), "empty", overwrite=True)


def test_after_an_error_nothing_is_there_or_what_was(folder, tmp_path):
    f = factors(SHAPES[Q])
    far = jlora.Trainable({Q: jlora.Factors(f.a, f.b * 1e6, f.spec)})
    weights = {k: v.astype(np.float16) for k, v in tensors(folder).items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(jlora.MergeError, match="would hold"):
        export.merge_directory("base", far, "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base"]
    export.merge_directory("base", adapter(Q), "out")
    before = tensors(tmp_path / "out")
    with pytest.raises(jlora.MergeError, match="would hold"):
        export.merge_directory("base", far, "out", overwrite=True)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base", "out"]
    np.testing.assert_array_equal(tensors(tmp_path / "out")[Q], before[Q])


def test_a_directory_without_config_is_told(folder):
    (folder / "config.json").unlink()
    with pytest.raises(jlora.CheckpointError, match=r"it has no config\.json"):
        export.merge_directory("base", adapter(Q), "out")


def test_the_file_called_model_counts_among_several(folder):
    shutil.copy("base/model.safetensors", "base/consolidated.safetensors")
    export.merge_directory("base", adapter(Q), "out")
    assert [*pathlib.Path("out").glob("*.safetensors")] == [
        pathlib.Path("out/model.safetensors")
    ]


# --- a head that is stored beside its table ---


def write_tied(folder, fields, table=TABLE):
    weights = tensors(folder)
    weights[table] = weights.pop(TABLE)
    weights[HEAD] = weights[table].copy()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("names", [(TABLE,), (HEAD,), (TABLE, Q, HEAD)])
def test_a_head_that_is_no_longer_the_table_is_not_tied(folder, names):
    inner = {"tie_word_embeddings": True, "n": 1}
    write_tied(folder, {"tie_word_embeddings": True, "text_config": inner})
    export.merge_directory("base", adapter(*names), "out")
    fields = json.loads(pathlib.Path("out/config.json").read_text())
    assert fields["tie_word_embeddings"] is False
    assert fields["text_config"] == {"tie_word_embeddings": False, "n": 1}


def test_a_head_that_is_still_the_table_stays_tied(folder):
    write_tied(folder, {"tie_word_embeddings": True})
    new = np.array(normal(SHAPES[TABLE], 7))
    for changed in ({}, {TABLE: new, HEAD: new}):
        out = f"out{len(changed)}"
        export.merge_directory("base", jlora.Trainable({}, changed), out)
        assert json.loads(pathlib.Path(out, "config.json").read_text()) == {
            "tie_word_embeddings": True
        }


def test_t5_cannot_be_untied(folder):
    write_tied(folder, {"model_type": "t5"}, table="shared.weight")
    own = jlora.Trainable({"shared.weight": factors(SHAPES[TABLE])})
    with pytest.raises(jlora.MergeError, match="ensure_weight_tying"):
        export.merge_directory("base", own, "out")


# --- quantised bases ---


def test_a_base_of_bitsandbytes_is_written_dense(folder, capsys):
    shutil.copy(GOLDEN / "quantised" / "nf4.safetensors", "base/model.safetensors")
    fields = {
        "model_type": "x",
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    own = jlora.Trainable({"rows.weight": factors((16, 128))})
    jlora.save("a.safetensors", own)
    code, _, err = run(capsys, "merge", "base", "a.safetensors", "out")
    assert (code, err) == (0, "")
    assert json.loads(pathlib.Path("out/config.json").read_text()) == {
        "model_type": "x"
    }
    export.merge_files(folder, own, "one.safetensors")
    one, found = load_file("one.safetensors"), tensors(pathlib.Path("out"))
    assert found.keys() == one.keys()
    assert "rows.weight.absmax" not in found
    np.testing.assert_array_equal(found["rows.weight"], one["rows.weight"])


def test_codes_that_are_not_read_pass_as_they_are_or_are_refused(folder):
    weights = tensors(folder)
    weights["up.qweight"] = np.ones((4, 4), np.int32)
    weights["up.scales"] = np.ones((4, 4), np.float16)
    fields = {"quantization_config": {"quant_method": "gptq"}}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    export.merge_directory("base", adapter(Q), "out")  # only dense leaves change
    assert json.loads(pathlib.Path("out/config.json").read_text()) == fields
    np.testing.assert_array_equal(
        tensors(pathlib.Path("out"))["up.qweight"], weights["up.qweight"]
    )
    weights["down.weight"] = np.ones((4, 4), jnp.float8_e4m3fn)
    weights["down.weight_scale"] = np.ones((), np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(jlora.CheckpointError, match=r"up\.weight is quantised as GPTQ"):
        export.merge_directory("base", adapter(Q), "mixed")


# --- names ---


@pytest.mark.parametrize(
    ("model", "peft"),
    [
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q"),
        ("module.model.layers.0.q", "model.layers.0.q"),
        ("_orig_mod.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q", "model.language_model.layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
    ],
)
def test_an_adapter_fits_names_in_other_wrappers(folder, capsys, model, peft):
    w = np.array(normal((4, 6), 0))
    tower = f"tower.{model.split('layers')[-1][1:]}.weight"
    save_file({f"{model}.weight": w, tower: w}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    a, b = (np.array(normal(s, i)) for i, s in enumerate([(2, 6), (4, 2)]))
    pathlib.Path("peft").mkdir()
    begin = f"base_model.model.{peft}.lora_"
    named = {f"{begin}A.weight": a, f"{begin}B.weight": b}
    save_file(named, "peft/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    pathlib.Path("peft/adapter_config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "merge", "base", "peft", "out")
    assert (code, err) == (0, "")
    found = tensors(pathlib.Path("out"))
    np.testing.assert_allclose(found[f"{model}.weight"], w + b @ a, atol=1e-6)
    np.testing.assert_array_equal(found[tower], w)


def test_convert_writes_the_names_of_a_wrapped_text_model_in_memory(folder, capsys):
    name = "language_model.model.layers.0.q.weight"
    save_file({name: np.ones((4, 6), "f4")}, folder / "model.safetensors")
    jlora.save("a.safetensors", jlora.Trainable({name: factors((4, 6))}))
    words = "convert", "a.safetensors", "peft", "--to", "peft", "--base", "base"
    code, _, err = run(capsys, *words, "--untied")
    assert (code, err) == (0, "")
    (found, *_) = sorted(load_file("peft/adapter_model.safetensors"))
    assert found == "base_model.model.model.language_model.layers.0.q.lora_A.weight"
    assert run(capsys, "validate", "peft", "--base", "base")[0] == 0
