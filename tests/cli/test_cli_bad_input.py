"""Bad paths and bad files: each subcommand ends with one line and its exit code."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import cli, files
from jlora.cli._main import UNEXPECTED
from jlora.cli._output import tell
from jlora.factors import Axes, Factors, Spec
from tests.helpers import normal

pytestmark = pytest.mark.once

PREFIX = "base_model.model.q."


def one(*shape):
    return np.ones(shape, np.float32)


def peft(folder, tensors, **config):
    os.mkdir(folder)
    named = {f"{PREFIX}{end}": x for end, x in tensors.items()}
    safetensors.numpy.save_file(named, f"{folder}/adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump({**fields, **config}, file)


def write_good():
    spec = Spec(rank=2, alpha=4)
    own = Factors(normal((4, 2)), normal((2, 6), 1), spec)
    jlora.save("good.safetensors", jlora.Trainable({"a/kernel": own}))
    params = {"a": {"kernel": normal((4, 6), 2)}, "head": jnp.zeros(3)}
    jlora.export.safetensors("base.safetensors", params)
    safetensors.numpy.save_file({"q.weight": one(6, 4)}, "torch.safetensors")
    pathlib.Path("bad_model.py").write_text("number = 3")


def write_bad():
    """Files and directories that are no adapter, or none that is whole."""
    for name, data in {
        "empty": b"",
        "text": b"hello",
        "huge": (2**60).to_bytes(8, "little") + b"{}",
        "brackets": (9).to_bytes(8, "little") + b"[[[[[[[[[",
    }.items():
        with open(name, "wb") as file:
            file.write(data)
    for name in (
        "folder",
        "config_is_a_folder/adapter_config.json",
        "tensors_are_a_folder/model.safetensors",
        "steps/3/about",
    ):
        os.makedirs(name)
    for name, text in {
        "config_alone/adapter_config.json": "{}",
        "config_is_a_list/adapter_config.json": "[]",
        "metadata/_METADATA": "{}",
        "index/model.safetensors.index.json": '{"weight_map": {"w": "../x"}}',
    }.items():
        os.makedirs(os.path.dirname(name))
        with open(name, "w") as file:
            file.write(text)
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    os.mkfifo("pipe")
    empty, scalar = one(0), np.array(1, np.float32)
    peft("no_rank", {"lora_A.weight": one(0, 4), "lora_B.weight": one(6, 0)})
    peft("empty_factors", {"lora_A.weight": empty, "lora_B.weight": empty})
    peft("scalars", {"lora_A.weight": scalar, "lora_B.weight": scalar})
    peft("vectors", {"lora_A.weight": one(2), "lora_B.weight": one(6)})
    peft(
        "grouped", {"lora_A.weight": one(2, 4, 3, 3), "lora_B.weight": one(8, 1, 1, 1)}
    )
    peft("ranks_differ", {"lora_A.weight": one(2, 4), "lora_B.weight": one(6, 3)})
    peft(
        "no_length",
        {
            "lora_A.weight": one(2, 4),
            "lora_B.weight": one(6, 2),
            "lora_magnitude_vector": empty,
        },
        use_dora=True,
    )


BAD = [
    *("nowhere", "a" * 300, "a/" * 3000, "é" * 200, "folder/nowhere", "empty/below"),
    *("empty", "text", "huge", "brackets", "folder", "config_is_a_folder"),
    *("tensors_are_a_folder", "steps", "config_alone", "config_is_a_list", "metadata"),
    *("index", "loop", "dangling", "pipe", "/dev/null", "no_rank", "empty_factors"),
    *("scalars", "vectors", "grouped", "ranks_differ", "no_length", "half\udcff"),
]
READS = [
    "inspect @",
    "inspect @ --json",
    "inspect good.safetensors --base @",
    "validate @",
    "validate good.safetensors --base @",
    "diff @ good.safetensors",
    "diff good.safetensors @",
    "diff @ base.safetensors",
    "merge @ good.safetensors out",
    "merge base.safetensors @ out",
    "merge torch.safetensors @ out",
    "quantize @ out",
    "convert @ out.safetensors",
    "convert @ out --to orbax",
    "convert @ out --to file --base torch.safetensors",
    "extract @ base.safetensors out --rank 1",
    "extract base.safetensors @ out --rank 1",
    "extract @ @ out --rank 1",
    "plan bad_model:number --config @",
    "inspect good.safetensors --names @",
]
# Names are looked at only for PEFT, and of another base how it is stored.
UNUSED = ("inspect good.safetensors --base @", "inspect good.safetensors --names @")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("bad"))
    write_good()
    write_bad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # of bad_model.py
        yield os.getcwd()
    os.chdir(before)


def told(capfd, command, name):
    """Runs a command; returns exit code and its one line."""
    words = [name if word == "@" else word for word in command.split()]
    code = cli.run(words)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert UNEXPECTED not in err, (words, err)
    assert "[Errno" not in err, (words, err)
    if code:
        assert (out, err.count("\n")) == ("", 1), (words, out, err)
        assert err.startswith("jlora"), (words, err)
    return code, err


@pytest.mark.parametrize("command", READS)
def test_what_cannot_be_read_is_one_line(folder, capfd, command):
    before = sorted(os.listdir())
    for name in BAD:
        code, err = told(capfd, command, name)
        if command not in UNUSED:
            assert code in (1, 2), (command, name)
            assert err
        assert sorted(os.listdir()) == before, (command, name)


WRITES = [
    "merge base.safetensors good.safetensors @ --overwrite",
    "quantize base.safetensors @ --overwrite",
    "convert good.safetensors @ --to file --overwrite",
    "convert good.safetensors @ --to peft --overwrite",
    "convert good.safetensors @ --to orbax --overwrite",
    "extract base.safetensors tuned.safetensors @ --rank 1 --overwrite",
]
NO_FILE = [
    "a" * 300,
    "a/" * 3000,
    "é" * 200,
    "empty/below",
    "folder",
    "pipe",
    "/dev/null",
]
NO_FOLDER = ["empty", "empty/below", "a" * 300, "pipe", "/dev/null", "dangling"]


@pytest.mark.parametrize("command", WRITES)
def test_what_cannot_be_written_is_one_line(folder, capfd, command):
    params = {"a": {"kernel": normal((4, 6), 3)}, "head": jnp.zeros(3)}
    jlora.export.safetensors("tuned.safetensors", params)
    a_file = "peft" not in command and "orbax" not in command
    for name in NO_FILE if a_file else NO_FOLDER:
        before = sorted(os.listdir())
        code, err = told(capfd, command, name)
        assert code == 1, (command, name)
        assert "Not saved" in err or "cannot be opened for checkpoints" in err
        assert sorted(os.listdir()) == before, (command, name)


@pytest.mark.parametrize("command", [*READS, *WRITES])
@pytest.mark.parametrize("name", ["", "\0", "a\0b"])
def test_what_is_no_name_is_a_wrong_call(folder, capfd, command, name):
    code, err = told(capfd, command, name)
    assert code == 2, (command, name)
    assert "is not the name of a file or a directory" in err or "--names" in command


def test_a_long_name_that_the_disk_holds_is_written(folder, capfd):
    for name in ("b" * 240, "é" * 120):
        for to in ("file", "peft"):
            own = f"{name}{to}"
            assert told(capfd, f"convert good.safetensors @ --to {to}", own)[0] == 0
            assert files.detect(own) == to


def test_names_in_the_library_are_told_too(folder, tmp_path):
    adapter = jlora.load("good.safetensors")
    for name in ("", "\0"):
        for form in ("file", "peft", "orbax"):
            with pytest.raises(jlora.JloraError, match="is not the name of a file"):
                files.write(name, adapter, form)
        for write in (
            jlora.export.safetensors,
            jlora.export.orbax,
            jlora.peft.save_base,
        ):
            with pytest.raises(jlora.JloraError, match="is not the name of a file"):
                write(name, {"w": jnp.ones(2)})
        for merged in (name, "out"):
            base = "base.safetensors" if merged == name else name
            with pytest.raises(jlora.CheckpointError):
                jlora.export.merge_files(base, adapter, merged)
        for read in (files.detect, files.read, jlora.load, jlora.checkpoint.restore):
            with pytest.raises(jlora.JloraError):
                read(name)


def test_a_full_disk_is_one_line(folder, capfd, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir())
    for command in WRITES[:3]:
        code, err = told(capfd, command, "new")
        assert code == 1
        assert "No space left on device. What was there before" in err
        assert sorted(os.listdir()) == before


INPUTS = {  # the input is the word in front of @, which is a way to name it
    "merge base.safetensors good.safetensors @ --overwrite": "base.safetensors",
    "merge  base.safetensors good.safetensors @ --overwrite": "good.safetensors",
    "merge whole good.safetensors @": "whole",
    "convert good.safetensors @ --to file --overwrite": "good.safetensors",
    "convert steps_of @ --to file --overwrite": "steps_of",
    "convert steps_of @ --to orbax --overwrite": "steps_of",
    "convert steps_of @ --to peft --overwrite": "steps_of",
    "convert hf @ --to file --base torch.safetensors --overwrite": "torch.safetensors",
    "extract base.safetensors tuned.safetensors @ --overwrite": "base.safetensors",
    "extract  base.safetensors tuned.safetensors @ --overwrite": "tuned.safetensors",
    "extract base.safetensors tuned.safetensors @ --config c.js --overwrite": "c.js",
}


@pytest.mark.parametrize("command", INPUTS)
def test_an_output_is_never_an_input(folder, capfd, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_good()
    params = {"a": {"kernel": normal((4, 6), 3)}, "head": jnp.zeros(3)}
    jlora.export.safetensors("tuned.safetensors", params)
    jlora.checkpoint.save("steps_of", jlora.load("good.safetensors"))
    jlora.peft.save_base("whole", params)
    peft("hf", {"lora_A.weight": one(2, 4), "lora_B.weight": one(6, 2)})
    pathlib.Path("c.js").write_text("{}")
    os.symlink(".", "here")
    os.symlink(INPUTS[command], "link")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    own = INPUTS[command]
    names = [own, "link", f"here/{own}", f"./{own}", str(tmp_path / own), "."]
    if os.path.isdir(own):
        names += [f"{own}/new", "link/a/new.safetensors"]
    for name in names:
        code, err = told(capfd, command, name)
        assert code == 2, (command, name, err)
        assert " the input '" in err
    after = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert after == before


def test_extract_of_a_model_and_itself_is_refused(folder, capfd):
    for tuned in ("base.safetensors", "same.safetensors"):
        params = jlora._io.models.open_model("base.safetensors")
        named = {name: params.read(name) for name in params.shapes}
        safetensors.numpy.save_file(named, "same.safetensors")
        code, err = told(capfd, f"extract {tuned} base.safetensors @ --rank 1", "out")
        assert code == 1
        assert "so the adapter would be zero" in err
        assert not os.path.exists("out")


DENIED = """
import os, sys
from jlora import cli
for i in range(2):  # once to import all that is needed
    codes = [cli.run(line.split()) for line in sys.argv[1:]]
    sys.stderr.write("---\\n")
    if os.geteuid() == 0:
        os.seteuid(65534)
print(*codes)
"""


def test_no_permission_is_one_line(tmp_path):
    os.chmod(tmp_path, 0o755)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").mkdir()
    for name in ("file", "folder"):
        os.chmod(tmp_path / name, 0)
    commands = [
        *("inspect file", "inspect folder", "validate folder/inside", "diff file file"),
        *(
            "merge folder file out",
            "extract folder folder out",
            "convert folder x.safetensors",
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", DENIED, *commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert done.stdout.split() == ["1"] * len(commands)
    lines = done.stderr.split("---\n")[1].splitlines()
    assert len(lines) == len(commands)
    for line, command in zip(lines, commands, strict=True):
        assert line.startswith("jlora"), (command, line)
        assert "Permission denied" in line, (command, line)


def test_a_fault_of_jlora_is_one_line_too(monkeypatch, capfd):
    def broken(path):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(files, "detect", broken)
    assert cli.run(["inspect", "x"]) == 1
    _, err = capfd.readouterr()
    assert err.startswith(f"jlora: {UNEXPECTED}IndexError: tuple index out of range (")
    assert err.count("\n") == 1


def test_output_that_a_terminal_cannot_show(folder):
    program = "from jlora.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "good.safetensors"],
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONIOENCODING": "ascii",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"a/kernel" in done.stdout


def test_tensors_without_numbers_are_read_like_others(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = Spec(rank=2, alpha=4)
    stack = Spec(rank=2, alpha=4, axes=Axes((0,), (1,), (2,)))
    dora = Spec(rank=2, alpha=4, method="dora")
    adapters = {
        "rows": {"w": Factors(one(0, 2), one(2, 6), spec)},
        "columns": {"w": Factors(one(6, 2), one(2, 0), spec)},
        "neither": {"w": Factors(one(0, 2), one(2, 0), spec)},
        "stack": {"w": Factors(one(0, 4, 2), one(0, 2, 6), stack)},
        "dora": {"w": Factors(one(0, 2), one(2, 6), dora, one(6))},
        "whole": {},
    }
    for name, lora in adapters.items():
        full = {} if lora else {"w": one(0)}
        jlora.save(f"{name}.adapter", jlora.Trainable(lora, full))
    peft("hf", {"lora_A.weight": one(2, 6), "lora_B.weight": one(0, 2)})
    shapes = {"rows": (0, 6), "columns": (6, 0), "neither": (0, 0), "stack": (0, 4, 6)}
    for name, shape in {**shapes, "dora": (0, 6), "whole": (0,)}.items():
        jlora.export.safetensors(f"{name}.base", {"w": one(*shape), "k": one(2, 3)})
        jlora.export.safetensors(
            f"{name}.tuned", {"w": one(*shape), "k": one(2, 3) + 1}
        )
        for command in (
            f"inspect {name}.adapter --json",
            f"validate {name}.adapter --base {name}.base",
            f"diff {name}.adapter {name}.adapter",
            f"diff {name}.base {name}.base",
            f"merge {name}.base {name}.adapter {name}.merged",
            f"convert {name}.adapter {name}.again --to file",
            f"extract {name}.tuned {name}.base {name}.new --rank 1 --targets k",
        ):
            assert told(capfd, command, "")[0] == 0, command
    assert told(capfd, "inspect hf", "")[0] == 0


def test_findings_on_one_line_are_parted(capfd):
    """An error that lists its findings on lines of their own."""
    tell("This does not fit:\n  a is too wide\n  b is not there.\nTake c.\n")
    told = "This does not fit: a is too wide; b is not there. Take c.\n"
    assert capfd.readouterr().err == told
