"""Pipes, sockets and devices in place of files; damaged and endless JSON."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile

import jax
import numpy as np
import optax
import pytest

import jlora
from jlora._io import disk
from jlora._io.torch_models import facts_of
from jlora._text.json_text import parse_json
from tests.io.helpers import adapter, orbax_fails

pytestmark = pytest.mark.once

SHAPES = {"up/kernel": jax.ShapeDtypeStruct((4, 6), np.float32)}


def peft_adapter(path):
    ones = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
    spec = jlora.Spec(rank=2, alpha=3.0)
    jlora.peft.save(
        path,
        jlora.Trainable(
            {"up/kernel": jlora.Factors(*map(jax.numpy.asarray, ones), spec)}
        ),
    )


def sharded(path):
    jlora.export.safetensors(path / "model.safetensors", {"w": np.ones(2)})
    index = {"weight_map": {"w": "model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def checkpointed(path):
    tx = optax.sgd(0.1, momentum=0.9)
    with jlora.checkpoint.Checkpoints(path) as steps:
        steps.save(adapter(), step=1, opt_state=tx.init(adapter()), metrics={"a": 1.0})


READERS = {
    "file": (
        lambda path: jlora.save(path / "a", adapter()),
        lambda path: jlora.load(path / "a"),
    ),
    "peft": (peft_adapter, lambda path: jlora.peft.load(path, SHAPES)),
    "any": (peft_adapter, jlora.files.read),
    "index": (
        sharded,
        lambda path: jlora.export.merge_files(
            path / "model.safetensors.index.json", path / "x", path / "out"
        ),
    ),
    "steps": (checkpointed, jlora.checkpoint.restore),
    "run": (checkpointed, lambda path: jlora.checkpoint.Checkpoints(path).restore()),
    "orbax": (
        lambda path: jlora.export.orbax(path / "m", {"w": np.ones(2)}),
        lambda path: jlora.export.flat_plan(path / "m", jlora.LoraConfig()),
    ),
    "facts": (lambda path: (path / "config.json").write_text("{}"), facts_of),
}


def odd_files(place):
    """Yields what makes an odd file of each kind."""
    yield os.mkfifo
    yield lambda path: os.symlink("/dev/zero", path)
    yield lambda path: os.symlink(place, path)

    def bind(path):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket is short
            one.bind(path.name)
            os.chdir(here)

    yield bind


@orbax_fails
@pytest.mark.parametrize("name", READERS)
def test_every_reader_wants_regular_files(name, tmp_path):
    write, read = READERS[name]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    good = tmp_path / "good"
    good.mkdir()
    write(good)
    files = [p for p in good.rglob("*") if p.is_file() and not p.is_symlink()]
    metadata = [p for p in files if p.suffix == ".json" or "meta" in p.name.lower()]
    files = {*metadata[:4], *files[:: -(-len(files) // 3)]}
    for number, make in enumerate(odd_files(pipe)):
        for file in files:
            bad = tmp_path / f"{number}"
            shutil.copytree(good, bad)
            damaged = bad / file.relative_to(good)
            damaged.unlink()
            make(damaged)
            with pytest.raises(jlora.JloraError, match="regular file"):
                read(bad)
            shutil.rmtree(bad)


def test_a_config_given_to_the_command_is_a_regular_file(tmp_path):
    pytest.importorskip("click")
    from jlora.cli._inputs import config_of

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(jlora.JloraError, match="pipe' is not a regular file"):
        config_of({"config": str(tmp_path / "pipe")})


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look at the name and the opening it may change."""
    path, other = tmp_path / "a", tmp_path / "b"
    os.mkfifo(path)
    other.write_bytes(b"")
    regular = os.stat(other)
    monkeypatch.setattr(disk.os, "stat", lambda *_, **__: regular)
    with (
        pytest.raises(jlora.CheckpointError, match="regular file"),
        disk.reading(path),
    ):
        raise AssertionError


def test_json_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b" " * 11)
    with pytest.raises(jlora.CheckpointError, match=r"x\.json': it has over 10 bytes"):
        disk.read_bounded(path, 10)


def test_a_step_may_hold_links_to_files_but_not_to_directories(tmp_path):
    checkpointed(tmp_path / "a")
    about = tmp_path / "a" / "1" / "about"
    (about / "metadata").rename(tmp_path / "metadata")
    os.symlink(tmp_path / "metadata", about / "metadata")
    assert jlora.checkpoint.restore(tmp_path / "a").step == 1
    about.rename(tmp_path / "about")
    os.symlink(tmp_path / "about", about)
    with pytest.raises(jlora.CheckpointError, match="about' is a link to a directory"):
        jlora.checkpoint.restore(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "it names 'a' twice"),
        ("{" + ",".join(f'"k{i % 30_000}":{i}' for i in range(60_000)) + "}", "twice"),
        ("[" * 100_000, "nested too deep"),
        ("[" * 101 + "]" * 101, "nested deeper than 100 levels"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff", "it is not text"),
        ('"\\ud800"', "it is not text"),
        ('{"\\ud800": 1}', "it is not text"),
    ],
)
def test_odd_json_is_a_short_value_error(text, why):
    with pytest.raises(ValueError, match=why) as caught:
        parse_json(text)
    assert type(caught.value) is ValueError or "Exceeds" in why
    assert len(str(caught.value)) < 1000


MANY = ["".join(chr(97 + i // 26**k % 26) for k in range(4)) for i in range(40_000)]


@pytest.mark.parametrize(
    "change",
    [
        dict.fromkeys(MANY, 1),
        {"x" * 1_000_000: 1},
        {"target_modules": MANY},
        {"target_modules": ["x" * 1_000_000]},
        {"target_modules": ["x." * 500_000]},
        {"modules_to_save": [*MANY, "x" * 1_000_000]},
        {"rank_pattern": dict.fromkeys(MANY, 2)},
        {"trainable_token_indices": {name: [1] for name in MANY}},
        {"target_parameters": MANY},
        {"peft_type": "x" * 1_000_000},
    ],
    ids=lambda change: "_".join(change)[:20],
)
def test_errors_about_a_config_of_megabytes_are_short(change, tmp_path):
    peft_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(jlora.PeftError) as caught:
        jlora.peft.load(tmp_path, SHAPES)
    assert len(str(caught.value)) < 21_000


def test_errors_about_names_of_megabytes_are_short():
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "a.safetensors")
        jlora.export.safetensors(path, {"x" * 1_000_000: np.ones(1)})
        with pytest.raises(jlora.JloraError) as caught:
            jlora.load(path)
        assert len(str(caught.value)) < 21_000


def test_names_of_a_million_dots_are_refused(tmp_path):
    peft_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model." + "x." * 100_000 + "up"
    jlora.export.safetensors(file, {name: np.ones(1)})
    for read in (jlora.files.read, lambda path: jlora.peft.load(path, SHAPES)):
        with pytest.raises(jlora.PeftError, match="the names of its 1 tensors are too"):
            read(tmp_path)


def test_a_step_with_a_huge_description_is_refused(tmp_path):
    checkpointed(tmp_path / "a")
    with open(tmp_path / "a" / "1" / "about" / "metadata", "ab") as file:
        file.truncate(300_000_000)  # takes no room on the disk
    with pytest.raises(jlora.CheckpointError, match="has over 200000000 bytes"):
        jlora.checkpoint.restore(tmp_path / "a")
