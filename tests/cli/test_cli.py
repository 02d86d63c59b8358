"""The command: what people and scripts see, exit codes, one line for bad input."""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import cli, files, inspection
from jlora.factors import Axes, Factors, Spec
from tests.helpers import normal, same
from tests.io.helpers import read_flat

SPEC = Spec(rank=2, alpha=4, axes=Axes())
PARAMS = {"a": {"kernel": normal((4, 6), 1)}, "b": {"kernel": normal((6, 3), 2)}}


def adapter(seed=0):
    return jlora.Trainable(
        {
            "a/kernel": Factors(normal((4, 2), seed), normal((2, 6), seed + 1), SPEC),
            "b/kernel": Factors(normal((6, 2), seed + 2), jnp.zeros((2, 3)), SPEC),
        },
        {"head": normal((3,), seed)},
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with an adapter in two formats and its base; the current one."""
    monkeypatch.chdir(tmp_path)
    jlora.save("one.safetensors", adapter())
    jlora.checkpoint.save(
        "orbax", adapter(), step=3, config=jlora.LoraConfig(rank=2), metadata={"n": 1}
    )
    jlora.export.safetensors("base.safetensors", {**PARAMS, "head": jnp.zeros(3)})
    return tmp_path


@pytest.fixture
def call(capsys):
    """Runs the command; gives exit code, stdout and stderr."""

    def call(*arguments):
        code = cli.run(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def fine(result):
    code, out, err = result
    assert (code, err) == (0, "")
    return out


def fails(result, code, *texts):
    """One line on stderr, nothing on stdout."""
    assert result[0] == code
    assert result[1] == ""
    assert result[2].count("\n") == 1
    for text in texts:
        assert text in result[2]


# inspect


def test_inspect_shows_the_adapter(folder, call):
    out = fine(call("inspect", "one.safetensors"))
    for text in (
        "one.safetensors: file",
        "a/kernel  lora    4×2 · 2×6     2      2",
        "head      full    3",
        "warning: no update yet (A or B is zero) in 1 of 3 leaves: b/kernel",
    ):
        assert text in out
    out = fine(call("inspect", "orbax"))
    assert 'metadata: {"n": 1}' in out
    assert "step: 3" in out


def test_inspect_in_json(folder, call):
    for name in ("one.safetensors", "orbax"):
        told = json.loads(fine(call("inspect", name, "--json")))
        leaf = told["leaves"][0]
        f = adapter().lora["a/kernel"]
        wide = np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64) * 2
        assert leaf["norm"] == pytest.approx(np.linalg.norm(wide))
        assert 1 < leaf["effective_rank"] <= 2
        assert told["leaves"][1]["effective_rank"] is None
        assert told["trained_count"] == 4 * 2 + 2 * 6 + 6 * 2 + 2 * 3 + 3
    assert told["about"]["config"]["rank"] == 2


def test_singular_values_are_those_of_the_update():
    spec = Spec(rank=3, alpha=1.5, axes=Axes((0,), (2,), (1,)))
    f = Factors(normal((2, 5, 3)), normal((2, 3, 4), 1), spec)
    wide = np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64) * f.scale
    expected = np.linalg.svd(wide, compute_uv=False)[:, :3]
    np.testing.assert_allclose(inspection.singular_values(f), expected, rtol=1e-6)


def test_inspect_knows_a_poor_rank():
    f = Factors(jnp.ones((8, 8)), jnp.ones((8, 8)), Spec(rank=8, alpha=1))
    g = Factors(normal((8, 8), 0, "bfloat16"), jnp.eye(8), Spec(rank=8, alpha=1))
    told = inspection.inspect(jlora.Trainable({"w": f, "v": g})).warnings
    assert any("below a quarter of the rank in 1 of 2 leaves: w" in t for t in told)
    assert any("several dtypes: bfloat16" in t for t in told)


# plan

MODEL = """
import jax, jax.numpy as jnp, jlora
def fn(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
shape = jax.ShapeDtypeStruct
first, second = shape((4, 6), "float32"), shape((6, 3), "float32")
params = {"a": {"kernel": first}, "b": {"kernel": second}}
model = fn, params, shape((1, 4), "float32")
def build():
    return model
def broken():
    raise RuntimeError("no\\nweights")
def other():
    return (lambda p, x: x @ p["a"]["kernel"] @ x), params, shape((1, 4), "float32")
config = jlora.LoraConfig(rank=2)
ready = jlora.plan(*model, config=config)
number = 3
"""


@pytest.fixture
def module(folder):
    (folder / "my_model.py").write_text(MODEL)
    (folder / "elsewhere.py").write_text("import os; os.chdir('orbax')")
    yield "my_model"
    sys.modules.pop("my_model", None)
    sys.modules.pop("elsewhere", None)


def test_plan_shows_a_table(module, call):
    out = fine(call("plan", "my_model:model", "--rank", 2, "--targets", "**/kernel"))
    assert "a/kernel" in out
    assert "trains 38" in out or "38" in out
    told = json.loads(fine(call("plan", "my_model:build", "--rank", 2, "--json")))
    assert told["config"]["rank"] == 2
    assert told["leaves"][0]["status"] == "adapted"
    assert told["trained_count"] == 20
    assert fine(call("plan", "my_model:ready")) == fine(
        call("plan", "my_model:build", "--rank", 2)
    )


def test_plan_reads_a_config(module, call, folder):
    config = jlora.LoraConfig(rank=3, train=("b/kernel",))
    (folder / "c.json").write_text(config.to_json())
    arguments = ("plan", "my_model:model", "--config", "c.json", "--json")
    told = json.loads(fine(call(*arguments, "--alpha", 5)))
    assert told["config"]["alpha"] == 5
    assert told["leaves"][1]["status"] == "full"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["my_model"], 2, "not of the form package.module:attribute"),
        (["my_model:nothing"], 2, "AttributeError"),
        (["no_such_module:x"], 2, "ModuleNotFoundError"),
        (["my_model:broken"], 2, "RuntimeError: no weights"),
        (["my_model:other"], 2, "cannot be traced"),
        (["my_model:number"], 2, "is int, neither"),
        (["elsewhere:x"], 2, "AttributeError"),
        (["my_model:ready", "--rank", "3"], 2, "is a plan, with a config of its own"),
        (["my_model:model", "--rank", "9"], 1, "rank 9"),
        (["my_model:model", "--targets", "x"], 1, "matched none of 2 leaves"),
        (["my_model:model", "--config", "missing"], 1, "No such file"),
        (["my_model:model", "--config", "my_model.py"], 1, "not a LoraConfig in JSON"),
        (["my_model:model", "--method", "x"], 1, "method must be one of"),
    ],
)
def test_plan_of_something_else(module, call, arguments, code, text):
    fails(call("plan", *arguments), code, text)


# merge


@pytest.mark.parametrize("name", ["one.safetensors", "orbax"])
def test_merge_writes_what_merge_gives(folder, call, name):
    out = fine(call("merge", "base.safetensors", name, "out.safetensors"))
    assert out.startswith("out.safetensors: lora 2, full 1, bytes ")
    written = read_flat("out.safetensors")
    merged = jlora.merge({**PARAMS, "head": jnp.zeros(3)}, adapter())
    for path, x in jlora.paths.flatten(merged)[0].items():
        same(written[path], x)
    fails(
        call("merge", "base.safetensors", name, "out.safetensors"), 2, "already there"
    )
    told = fine(
        call(
            "merge",
            "base.safetensors",
            name,
            "out.safetensors",
            "--overwrite",
            "--json",
        )
    )
    assert json.loads(told)["lora"] == 2


def test_merge_of_what_does_not_fit(folder, call):
    safetensors.numpy.save_file({"a/kernel": np.ones((3, 3))}, "other.safetensors")
    result = call("merge", "other.safetensors", "one.safetensors", "out.safetensors")
    fails(result, 1, "a of 'a/kernel'", "b/kernel")
    assert not os.path.exists("out.safetensors")
    fails(call("merge", "base.safetensors", "base.safetensors", "x"), 1, "is a model")


def test_merge_that_overflows_is_one_line(folder, call):
    half = {
        **PARAMS,
        "head": jnp.zeros(3),
        "a": {"kernel": jnp.ones((4, 6), "float16")},
    }
    jlora.export.safetensors("half.safetensors", half)
    f = adapter().lora["a/kernel"]
    far = dataclasses.replace(f, b=f.b * 1e6)
    jlora.save("far.safetensors", jlora.Trainable({"a/kernel": far}))
    result = call("merge", "half.safetensors", "far.safetensors", "out.safetensors")
    fails(result, 1, "'a/kernel' would hold", "float16 holds at most 65504")
    assert not os.path.exists("out.safetensors")


# convert


def test_convert_there_and_back(folder, call):
    assert "from file, to orbax" in fine(
        call("convert", "one.safetensors", "dir", "--to", "orbax")
    )
    told = fine(call("convert", "dir", "back.safetensors", "--json"))
    assert json.loads(told) == {
        "out": "back.safetensors",
        "from": "orbax",
        "to": "file",
        "lora": 2,
        "full": 1,
    }
    same(jlora.load("back.safetensors"), adapter())
    same(jlora.checkpoint.restore("dir").trainable, adapter())


def test_convert_asked_for_too_little(folder, call):
    fails(call("convert", "orbax", "out"), 2, "Say --to file, orbax or peft")
    fails(call("convert", "orbax", "one.safetensors"), 2, "--overwrite")
    fails(call("convert", "orbax", "o", "--to", "zip"), 2, "'zip' is not one of")
    fails(call("convert", "orbax", "a.safetensors", "--step", "9"), 1, "No step 9 in")
    fails(call("convert", "orbax", "a.safetensors", "--names", "x"), 2, "only for PEFT")
    os.mkdir("p")
    with open("p/adapter_config.json", "w") as file:
        file.write("{}")
    fails(call("convert", "p", "a.safetensors"), 2, "From PEFT, give --base")


# diff


def test_diff_of_equal_and_of_changed_adapters(folder, call):
    assert fine(call("diff", "one.safetensors", "orbax")) == "equal\n"
    changed = adapter()
    a = changed.lora["a/kernel"]
    changed = jlora.Trainable(
        {"a/kernel": Factors(a.a, 2 * a.b, a.spec)}, {"head": changed.full["head"] + 1}
    )
    jlora.save("two.safetensors", changed)
    code, out, err = call("diff", "one.safetensors", "two.safetensors")
    assert (code, err) == (1, "")
    assert "a/kernel  update differs by 5.00e-01" in out
    assert "b/kernel  factors → absent" in out
    assert "head      differs by" in out
    code, out, _ = call("diff", "one.safetensors", "two.safetensors", "--json")
    assert code == 1
    assert json.loads(out)["differences"][0]["relative"] == pytest.approx(0.5)


def test_diff_sees_through_other_factors():
    f = adapter().lora["a/kernel"]
    turned = Factors(2 * f.a[:, ::-1], f.b[::-1] / 2, f.spec)
    other = Factors(f.a / 2, f.b, Spec(rank=2, alpha=8, axes=Axes()))
    (found,) = inspection.diff(
        jlora.Trainable({"w": f}), jlora.Trainable({"w": turned})
    )
    assert found.relative < 1e-6
    what = inspection.diff(jlora.Trainable({"w": f}), jlora.Trainable({"w": other}))
    assert what[0].what == "alpha: 4 → 8"
    assert what[1].relative < 1e-6


def test_diff_of_models(folder, call):
    assert fine(call("diff", "base.safetensors", "base.safetensors")) == "equal\n"
    changed = {**PARAMS, "b": {"kernel": PARAMS["b"]["kernel"].T}, "c": jnp.ones(1)}
    changed["a"] = {"kernel": PARAMS["a"]["kernel"] + 1}
    jlora.export.safetensors("other.safetensors", changed)
    code, out, _ = call("diff", "base.safetensors", "other.safetensors")
    assert code == 1
    assert "b/kernel  float32[6, 3] → float32[3, 6]" in out
    assert "c         only in the second" in out
    assert "at most 1.00e+00 in one number" in out
    fails(call("diff", "base.safetensors", "one.safetensors"), 2, "One is a model")


# extract


@pytest.mark.parametrize("with_plan", [False, True])
def test_extract_finds_the_adapter(module, call, with_plan):
    jlora.export.safetensors("base", PARAMS)
    tuned = {**PARAMS, "a": {"kernel": PARAMS["a"]["kernel"] + 0.5}}
    jlora.export.safetensors("tuned", tuned)
    plan = ["--plan", "my_model:model"] if with_plan else []
    arguments = ("tuned", "base", "out.safetensors", "--rank", "1", *plan)
    assert "lora" in fine(call("extract", *arguments))
    merged = jlora.merge(PARAMS, jlora.load("out.safetensors"))
    np.testing.assert_allclose(merged["a"]["kernel"], tuned["a"]["kernel"], atol=1e-5)
    result = call("extract", *arguments[:2], "o2", "--rank", "1", "--targets", "b/*")
    assert result[0] == 0
    assert result[2].startswith("jlora: warning: These leaves changed")
    assert result[2].count("\n") == 1


# validate


def test_validate_a_good_adapter(folder, call):
    out = fine(call("validate", "one.safetensors", "--base", "base.safetensors"))
    assert out == "one.safetensors: file, fine\n"
    assert fine(call("validate", "orbax")) == "orbax: orbax, fine\n"


def test_validate_tells_what_is_wrong(folder, call):
    with open("one.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    fails(call("validate", "one.safetensors"), 1, "checksum does not match")
    code, out, _ = call("validate", "one.safetensors", "--json")
    assert code == 1
    assert "checksum" in json.loads(out)["problems"][0]
    fails(call("validate", "nowhere"), 1, "No such file")
    with open("empty", "w"):
        pass
    fails(call("validate", "empty"), 1, "0 bytes")
    os.mkdir("nothing")
    fails(call("validate", "nothing"), 1, "holds neither an adapter nor a model")


def test_validate_compares_with_the_base(folder, call):
    jlora.checkpoint.save("mine", adapter(), params=PARAMS)
    jlora.export.safetensors("same", {**PARAMS, "head": jnp.zeros(3)})
    assert "fine" in fine(call("validate", "mine", "--base", "same"))
    other = {**PARAMS, "a": {"kernel": PARAMS["a"]["kernel"] + 1}}
    jlora.export.safetensors("changed", {**other, "head": jnp.zeros(3)})
    fails(
        call("validate", "mine", "--base", "changed"), 1, "'a/kernel' has other numbers"
    )
    jlora.export.safetensors("small", {"a": {"kernel": jnp.ones((2, 2))}})
    fails(call("validate", "mine", "--base", "small"), 1, "do not fit together")


# Hugging Face PEFT.


def write_peft(folder, **config):
    """An adapter of two torch modules and its base, as torch names them."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    prefix, named = "base_model.model.", {}
    for module, n_in, n_out in (("h.0.q", 4, 6), ("h.0.o", 6, 4)):
        a = rng.normal(size=(2, n_in)).astype(np.float32)
        b = rng.normal(size=(n_out, 2)).astype(np.float32)
        named |= {
            f"{prefix}{module}.lora_A.weight": a,
            f"{prefix}{module}.lora_B.weight": b,
        }
    safetensors.numpy.save_file(named, f"{folder}/adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q", "o"],
    }
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump({**fields, **config}, file)
    return named


def test_peft_merges_into_a_base_of_torch(folder, call):
    named = write_peft("peft")
    w = np.ones((6, 4), np.float32)
    base = {"h.0.q.weight": w, "h.0.o.weight": w.T.copy()}
    safetensors.numpy.save_file(base, "torch.safetensors")
    assert "h.0.q.weight" in fine(call("inspect", "peft"))
    told = json.loads(fine(call("inspect", "peft", "--json")))
    assert told["about"]["lora_alpha"] == 6
    assert told["leaves"][0]["scale"] == 3
    fine(call("merge", "torch.safetensors", "peft", "out.safetensors"))
    fine(call("validate", "peft", "--base", "torch.safetensors"))
    merged = safetensors.numpy.load_file("out.safetensors")
    for module in ("h.0.q", "h.0.o"):
        a, b = (named[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        expected = base[f"{module}.weight"] + 3 * b @ a
        np.testing.assert_allclose(merged[f"{module}.weight"], expected, rtol=1e-5)


def test_peft_converts_both_ways(folder, call):
    jlora.export.safetensors("flax", PARAMS)
    lora = jlora.Trainable(dict(adapter().lora))
    jlora.save("lora.safetensors", lora)
    fine(
        call("convert", "lora.safetensors", "p", "--to", "peft", "--base-model", "x/y")
    )
    assert files.detect("p") == "peft"
    fine(call("convert", "p", "back.safetensors", "--base", "flax"))
    back = jlora.load("back.safetensors")
    for path, f in lora.lora.items():
        same((back.lora[path].a, back.lora[path].b), (f.a, f.b))
    assert fine(call("diff", "p", "p", "--base", "flax")) == "equal\n"
    fails(call("inspect", "p", "--base", "flax", "--names", "no"), 2, "neither one of")


def test_peft_of_a_tied_table_and_of_trained_rows(folder, call):
    table = {"model": {"embed_tokens": {"embedding": normal((9, 4))}}}
    path = "model/embed_tokens/embedding"
    jlora.export.safetensors("flax", table)
    spec = Spec(op="embedding", rank=2, alpha=4)
    factors = Factors(normal((9, 2), 1), normal((2, 4), 2), spec)
    jlora.save("whole", jlora.Trainable({path: factors}))
    llama = "--names", "llama"
    to_peft = "--to", "peft", *llama
    fails(call("convert", "whole", "p", *to_peft), 1, "Say tied=True")
    fine(call("convert", "whole", "p", *to_peft, "--tied"))
    fails(call("inspect", "p", *llama, "--base", "flax", "--untied"), 1, "lm_head")
    for option in (["--tied"], []):  # the file has both
        to_file = "--to", "file", "--overwrite", *llama, "--base", "flax"
        fine(call("convert", "p", "back", *to_file, *option))
        assert fine(call("diff", "whole", "back")) == "equal\n"
    rows = dataclasses.replace(
        spec, method="rows", init="zeros", rows=(2, 5), shape=(9, 4), alpha=2.0
    )
    jlora.save("rows", jlora.Trainable({path: Factors(None, normal((2, 4)), rows)}))
    fails(call("convert", "rows", "r", *to_peft), 1, "as params=")
    fine(call("convert", "rows", "r", *to_peft, "--base", "flax"))
    fine(call("convert", "r", "again", *to_file))
    for name in ("rows", "again"):
        fine(call("merge", "flax", name, f"{name}.safetensors"))
    merged = [read_flat(f"{name}.safetensors")[path] for name in ("rows", "again")]
    np.testing.assert_allclose(*merged, atol=1e-6)
    (folder / "no_map.py").write_text("number = 3")
    fails(call("inspect", "p", "--names", "no_map:number"), 2, "int, not a jlora.peft")
    fails(call("convert", "rows", "x", "--to", "file", *llama, "--portable"), 2,
          "--names, --portable: only for PEFT")  # fmt: skip


def test_peft_that_is_not_understood_is_refused(folder, call):
    write_peft("wrong", r=3)
    fails(call("inspect", "wrong"), 1, "rank 3 (from the config) needs")
    write_peft("other", use_qalora=True)
    fails(call("inspect", "other"), 1, "use_qalora")


# quantize


def test_quantize_writes_what_the_library_would(folder, call):
    out = fine(call("quantize", "base.safetensors", "q.safetensors", "--kind", "int8"))
    assert re.fullmatch(r"q.safetensors: quantised \d+, dense \d+, bytes [\d,]+\n", out)
    codes = jlora.quantize({**PARAMS, "head": jnp.zeros(3)}, kind="int8")
    read = jlora.files.read_params("q.safetensors")
    ours, theirs = (jlora.paths.flatten(tree)[0] for tree in (read, codes))
    for path, q in theirs.items():
        for x, y in zip(*map(jax.tree.leaves, (ours[path], q)), strict=True):
            np.testing.assert_array_equal(x, y)
    shown = json.loads(fine(call("inspect", "one.safetensors", "--base",
                                 "q.safetensors", "--json")))  # fmt: skip
    assert shown["base"]["int8"] > 0
    options = "--kind", "nf4", "--block", "32", "--double", "--scale-dtype", "bfloat16"
    fine(call("quantize", "base.safetensors", "d.safetensors", *options))
    found = jlora.paths.flatten(jlora.files.read_params("d.safetensors"))[0]
    q = next(x for x in found.values() if isinstance(x, jlora.Quantized))
    assert q.scales.kind == "int8"


def test_quantize_refuses(folder, call):
    base = "base.safetensors"
    fails(call("quantize", base, "q", "--kind", "nf5"), 2, "'nf5' is not one of")
    fails(call("quantize", base, base, "--overwrite"), 2, "is the input")
    fails(call("quantize", base, "one.safetensors"), 2, "Say --overwrite")
    fails(call("quantize", base, "q", "--targets", "nowhere/*"), 1, "matched none of")
    fails(call("quantize", base, "q", "--scale-dtype", "int8"), 1, "scale_dtype must")
    assert not (folder / "q").exists()


# The page of the command.

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "cli.md").read_text()


@pytest.mark.once
def test_the_page_shows_what_the_command_prints(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    name = "my_model"
    code = re.search(rf'```python title="{name}.py"\n(.*?)```', PAGE, re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module(name).write()
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command, shown in re.findall(r"\$ jlora (.*)\n([^$]*)", "".join(blocks)):
        _, out, err = call(*command.split())
        rounding = re.compile(r"\d\.\d\de-\d\d")
        assert rounding.sub("#", out + err) == rounding.sub("#", shown), command
    sys.modules.pop(name)


# The program.


def test_wrong_calls_are_one_line(folder, call):
    fails(call("merge", "a", "b"), 2, "jlora merge: Missing argument 'OUT'")
    fails(call("inspect", "x", "--nonsense"), 2, "No such option")
    fails(call("nonsense"), 2, "No such command 'nonsense'")
    code, out, err = call()
    assert (code, out) == (2, "")
    assert "Usage: jlora" in err


@pytest.mark.parametrize(
    "name",
    [
        "inspect",
        "plan",
        "quantize",
        "merge",
        "convert",
        "diff",
        "extract",
        "validate",
    ],
)
def test_each_command_has_help_and_json(call, name):
    out = fine(call(name, "--help"))
    assert "--json" in out
    assert out.startswith(f"Usage: jlora {name} ")
    assert f"\n  Example: jlora {name} " in out


def test_bad_input_never_gives_a_traceback(folder, call):
    damaged = {
        "zero": b"",
        "text": b"hello world, this is no adapter",
        "cut": (folder / "one.safetensors").read_bytes()[:100],
        "huge": (2**60).to_bytes(8, "little") + b"{}",
    }
    for name, data in damaged.items():
        with open(name, "wb") as file:
            file.write(data)
        for arguments in (
            ["inspect", name],
            ["validate", name],
            ["diff", name, "one.safetensors"],
            ["merge", "base.safetensors", name, "out"],
            ["merge", name, "one.safetensors", "out"],
            ["convert", name, "out.safetensors"],
            ["extract", name, "base.safetensors", "out", "--rank", "1"],
        ):
            fails(call(*arguments), 1, name)
    config = ["extract", "base.safetensors", "base.safetensors", "out", "--config"]
    fails(call(*config, "zero"), 1, "not a LoraConfig in JSON")
    fails(call(*config, "nowhere"), 1, "'nowhere' cannot be read")
    (folder / "latin").write_bytes(b"\xff")
    fails(
        call(*config, "latin"),
        1,
        "'latin': This is not a LoraConfig in JSON: it is not text",
    )
    (folder / "list").write_text("[]")
    fails(call(*config, "list"), 1, "a list, not an object")
    fails(call("inspect", "one.safetensors", "--step", "1"), 2, "not an Orbax")
    fine(call("convert", "one.safetensors", "new", "--to", "orbax"))
    again = "convert", "one.safetensors", "new", "--to", "orbax", "--overwrite"
    fine(call(*again))
    fails(call(*again[:2], "orbax", *again[3:]), 2, "holds steps 3, which would be")
    os.remove("orbax/3/about/metadata")
    fails(call("inspect", "orbax"), 1, "Step 3 in")


def test_the_script_is_installed_and_quiet(folder):
    """As users call it: stdout is the result alone, stderr empty."""
    program = "from jlora.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "orbax", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert json.loads(done.stdout)["format"] == "orbax"
    assert done.stderr == ""


def test_jax_is_what_it_was(call, folder):
    before = jax.config.jax_platforms
    fine(call("inspect", "one.safetensors"))
    assert jax.config.jax_platforms == before


def test_python_runs_the_package_as_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "jlora", "validate", "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == "jlora: 'nowhere' cannot be read: No such file or directory.\n"
    )
