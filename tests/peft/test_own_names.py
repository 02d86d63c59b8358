"""PEFT adapters for models with torch's own names, by every way that reads them."""

import contextlib
import io
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import cli
from jlora._io.models import open_model
from jlora.peft import maps
from tests.peft import file_cases
from tests.peft.file_cases import CASES, HEAD, TABLE, Case

pytestmark = pytest.mark.once

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "peft.md"


def call(*words: object) -> tuple[int, str]:
    """Returns the exit code of the command and all that it printed, on one line."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.run([str(word) for word in words])
    return code, " ".join(text.getvalue().split())


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a model on disk."""
    model = open_model(path)
    return {name: model.read(name) for name in model.shapes}


def same(found: dict, expected: dict) -> None:
    """Asserts that two models have the same names, shapes and numbers."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape
        np.testing.assert_allclose(found[name], x, atol=2e-6, rtol=2e-6, err_msg=name)


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """Writes the case, and goes to its folder."""
    file_cases.write(request.param, tmp_path)
    monkeypatch.chdir(tmp_path)
    return request.param


def by_case(test):
    """Runs the test with each case."""
    return pytest.mark.parametrize("place", CASES.values(), ids=CASES, indirect=True)(
        test
    )


@by_case
def test_with_the_model_all_ways_read_or_all_refuse(place: Case, tmp_path):
    base = "--base", "base"
    ways = {
        "merge": ("merge", "base", "adapter", "merged.safetensors"),
        "validate": ("validate", "adapter", *base),
        "inspect": ("inspect", "adapter", *base),
        "diff": ("diff", "adapter", "adapter", *base),
        "convert": ("convert", "adapter", "file.safetensors", *base),
    }
    if place.text.startswith("a quantised base"):  # its reason is not in the adapter
        ways = {"merge": ways["merge"]}
    for words in ways.values():
        code, text = call(*words)
        if place.refused:
            assert code == 1, text
            assert re.search(place.refused, text), text
        else:
            assert code == 0, text
    if place.refused:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
        return
    expected = file_cases.merged(place)
    same(arrays(tmp_path / "merged.safetensors"), expected)
    assert call("merge", "base", "file.safetensors", "again.safetensors")[0] == 0
    same(arrays(tmp_path / "again.safetensors"), expected)


@by_case
def test_without_the_model_all_ways_read_or_all_refuse(place: Case, tmp_path):
    for words in (
        ("validate", "adapter"),
        ("inspect", "adapter"),
        ("diff", *["adapter"] * 2),
    ):
        code, text = call(*words)
        if place.alone:
            assert code == 1, text
            assert re.search(place.alone, text), text
        else:
            assert code == 0, text
    if place.alone:
        with pytest.raises(jlora.PeftError, match=place.alone):
            jlora.files.read("adapter")
    elif not place.refused and "without its prefix" not in place.text:
        adapter = jlora.files.read("adapter")
        params = {name: jnp.asarray(x) for name, x in place.base.items()}
        found = jlora.merge(params, adapter)
        same(found, file_cases.merged(place))


@by_case
def test_in_memory_a_flat_tree_is_read_as_the_files_are(place: Case, tmp_path):
    del tmp_path
    if place.refused or place.model is not None:
        return  # what the model's config.json says is known to the command only
    params = {name: jnp.asarray(x) for name, x in place.base.items()}
    adapter = jlora.peft.load("adapter", params)
    same(jlora.merge(params, adapter), file_cases.merged(place))


@by_case
def test_there_and_back_is_the_same_adapter(place: Case, tmp_path):
    if place.refused or "rows" in place.text or "experts, by" in place.text:
        return
    call("convert", "adapter", "file.safetensors", "--base", "base")
    code, text = call(
        "convert", "file.safetensors", "back", "--to", "peft", "--base", "base"
    )
    assert code == 0, text
    code, text = call("merge", "base", "back", "merged.safetensors")
    assert code == 0, text
    same(arrays(tmp_path / "merged.safetensors"), file_cases.merged(place))


def test_the_table_in_the_docs_is_of_these_cases():
    assert file_cases.docs_table() in DOCS.read_text()


@pytest.fixture
def square(tmp_path, monkeypatch):
    file_cases.write(CASES["square"], tmp_path)
    monkeypatch.chdir(tmp_path)
    return CASES["square"]


def test_a_map_tells_the_side_of_square_weights(square, tmp_path):
    entries = (
        jlora.peft.Entry("turned/kernel", "a.turned.weight", kind="conv1d"),
        jlora.peft.Entry("plain/kernel", "a.plain.weight"),
    )
    params = {name: jnp.asarray(x) for name, x in square.base.items()}
    names = jlora.peft.NameMap(entries)
    merged = jlora.merge(params, jlora.peft.load("adapter", params, names=names))
    own = square.adapter
    np.testing.assert_allclose(
        merged["a.turned.weight"],
        square.base["a.turned.weight"] + file_cases.delta(own, "a.turned").T,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        merged["a.plain.weight"],
        square.base["a.plain.weight"] + file_cases.delta(own, "a.plain"),
        atol=1e-6,
    )


def test_a_map_of_the_command_tells_the_side(tmp_path, monkeypatch):
    case = CASES["gpt2_head"]
    file_cases.write(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    done = call("merge", "base", "adapter", "out.safetensors", "--names", "gpt2")
    assert done[0] == 0, done[1]
    same(arrays(tmp_path / "out.safetensors"), file_cases.merged(case))


def test_a_plan_of_a_function_over_torchs_names_tells_the_side(square):
    def fn(params, x):
        x = x @ params["a.turned.weight"] + params["a.turned.bias"][None]
        return x @ params["a.plain.weight"].T + params["a.plain.bias"][None]

    params = {name: jnp.asarray(x) for name, x in square.base.items()}
    config = jlora.LoraConfig(rank=2, alpha=6, targets="*.weight")
    plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
    adapter = jlora.peft.load("adapter", plan)
    turned = jlora.merge(params, adapter)["a.turned.weight"] - params["a.turned.weight"]
    expected = file_cases.delta(square.adapter, "a.turned").T
    np.testing.assert_allclose(turned, expected, atol=1e-6)


@pytest.mark.parametrize("flag", ["--tied", "--untied"])
def test_a_tie_that_the_model_contradicts_is_refused(tmp_path, monkeypatch, flag):
    case = CASES["tying" if flag == "--untied" else "table"]
    file_cases.write(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, text = call("merge", "base", "adapter", "out.safetensors", flag)
    assert code == 1
    assert "is not what the model and its config.json say" in text


def test_a_tie_is_said_where_the_model_leaves_it_open(tmp_path, monkeypatch):
    case = CASES["tied_table"]
    file_cases.write(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    words = "merge", "base", "adapter", "out.safetensors"
    assert "may be the output head too" in call(*words)[1]
    assert "is the output head too" in call(*words, "--tied")[1]
    assert call(*words, "--untied")[0] == 0


def test_a_trained_table_of_a_tied_model_is_written_with_its_head(tmp_path):
    table = np.ones((7, 4), np.float32)
    adapter = jlora.Trainable(full={"model/embed_tokens/embedding": table})
    out = tmp_path / "a"
    with pytest.raises(jlora.PeftError, match="Say tied=True"):
        jlora.peft.save(out, adapter, names=maps.LLAMA)
    jlora.peft.save(out, adapter, names=maps.LLAMA, tied=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    assert config["modules_to_save"] == [HEAD, TABLE]
    like = {"model": {"embed_tokens": {"embedding": table}}}
    back = jlora.peft.load(out, like, names=maps.LLAMA, tied=True)
    assert list(back.full) == ["model/embed_tokens/embedding"]
    jlora.peft.save(tmp_path / "b", adapter, names=maps.LLAMA, tied=False)
    with pytest.raises(jlora.PeftError, match="has no numbers for lm_head"):
        jlora.peft.load(tmp_path / "b", like, names=maps.LLAMA, tied=True)
    with pytest.raises(jlora.PeftError, match="may be the output head too"):
        jlora.peft.load(tmp_path / "b", like, names=maps.LLAMA)


def test_portable_needs_names(tmp_path):
    f = jlora.Factors(np.ones((4, 2)), np.ones((2, 6)), jlora.Spec(rank=2, alpha=2))
    with pytest.raises(jlora.PeftError, match="portable=True needs names="):
        jlora.peft.save(
            tmp_path / "a", jlora.Trainable({"up/kernel": f}), portable=True
        )
    own = jlora.Trainable({"model.layers.0.up.weight": f})
    jlora.peft.save(tmp_path / "b", own, portable=True)


@pytest.mark.parametrize(
    ("architecture", "saved", "task"),
    [
        ("LlamaForCausalLM", {}, "CAUSAL_LM"),
        ("BertForSequenceClassification", {}, None),
        ("BertForSequenceClassification", {"classifier/kernel": (4, 2)}, "SEQ_CLS"),
        ("LlamaModel", {}, None),
    ],
)
def test_the_task_is_that_of_the_base(tmp_path, architecture, saved, task):
    (tmp_path / "base").mkdir()
    about = {"model_type": "x", "architectures": [architecture]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    f = jlora.Factors(np.ones((4, 2)), np.ones((2, 6)), jlora.Spec(rank=2, alpha=2))
    full = {path: np.ones(shape, np.float32) for path, shape in saved.items()}
    adapter = jlora.Trainable({"up/kernel": f}, full)
    out, model = tmp_path / "a", str(tmp_path / "base")
    jlora.peft.save(out, adapter, base_model=model)
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == task
    jlora.peft.save(out, adapter, base_model=model, task_type="X")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "X"


def test_extracted_from_a_torch_model_it_goes_to_peft_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("linear", "gpt2"):
        folder = tmp_path / name
        folder.mkdir()
        file_cases.write(CASES[name], folder)
        monkeypatch.chdir(folder)
        assert call("merge", "base", "adapter", "tuned.safetensors")[0] == 0
        targets = [f"--targets={n}" for n in CASES[name].change]
        done = call("extract", "tuned.safetensors", "base", "found.safetensors",
                    "--rank", 2, *targets)  # fmt: skip
        assert done[0] == 0, done[1]
        done = call("convert", "found.safetensors", "back", "--to", "peft")
        assert done[0] == 0, done[1]
        assert call("merge", "base", "back", "merged.safetensors")[0] == 0
        same(arrays(folder / "merged.safetensors"), file_cases.merged(CASES[name]))


def test_without_a_trace_the_side_of_a_torch_weight_is_no_guess(tmp_path):
    base = CASES["square"].base
    file_cases.write_arrays(tmp_path / "m.safetensors", base)
    with pytest.raises(jlora.TargetError, match="Say with Rule"):
        jlora.export.flat_plan(
            tmp_path / "m.safetensors", jlora.LoraConfig(rank=2, targets="*.weight")
        )


def test_files_read_and_written_again_are_the_same_adapter(tmp_path):
    for name in ("gpt2", "linear", "conv", "dora", "packed"):
        folder = tmp_path / name
        folder.mkdir()
        file_cases.write(CASES[name], folder)
        adapter = jlora.files.read(folder / "adapter")
        jlora.files.write(folder / "again", adapter, "peft")
        again = jlora.files.read(folder / "again", base=folder / "base")
        params = {n: jnp.asarray(x) for n, x in CASES[name].base.items()}
        same(jlora.merge(params, again), file_cases.merged(CASES[name]))


def test_a_quantised_model_is_not_loaded_as_a_plain_one(tmp_path):
    base = {"up.weight": np.ones((4, 2), "float32")}
    for name in (
        "up.weight_scale_inv",
        "up.weight_scale",
        "up.SCB",
        "up.weight.absmax",
    ):
        held = base | {name: np.ones((1,), "float32")}
        file_cases.write_arrays(tmp_path / "model.safetensors", held)
        with pytest.raises(jlora.PeftError, match=f"quantised, its scale is {name}"):
            jlora.peft.load_base(tmp_path, {"up": {"kernel": np.ones((2, 4))}})


def test_a_flat_tree_of_another_library_is_not_taken_for_torchs(tmp_path):
    """Its weights are `[in, out]`, under names with dots."""
    params = {
        "up.w": jnp.ones((4, 4)),
        "up.b": jnp.ones(4),
        "down.kernel": jnp.ones((4, 2)),
    }
    own = {
        path: jlora.Factors(
            np.asarray(file_cases.normal(1, 4, 2)),
            np.asarray(file_cases.normal(2, 2, params[path].shape[1])),
            jlora.Spec(rank=2, alpha=2),
        )
        for path in ("up.w", "down.kernel")
    }
    jlora.peft.save(tmp_path, jlora.Trainable(own))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down", "up"]
    back = jlora.peft.load(tmp_path, params)
    same(jlora.merge(params, back), jlora.merge(params, jlora.Trainable(own)))
