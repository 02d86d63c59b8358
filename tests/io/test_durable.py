"""Whole or nothing: whatever kills a writer, and whoever reads meanwhile."""

import contextlib
import functools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import jlora
from jlora._io import beside
from jlora._io.models import open_model
from jlora._io.shards import open_tensors
from jlora.factors import Factors, Spec
from tests.helpers import same
from tests.io.helpers import adapter, orbax_fails, read_flat

pytestmark = pytest.mark.once

SIDE = 6
LIKE = {f"m{i}": {"kernel": np.ones((SIDE, SIDE), np.float32)} for i in range(4)}
SHARDS = 200  # bytes; more than one file


def lora(n, rank=None):
    """An adapter whose numbers, alpha and rank are n."""
    a, b = np.full((SIDE, rank or n), n, "f4"), np.full((rank or n, SIDE), n, "f4")
    own = Factors(a, b, Spec(rank=rank or n, alpha=float(n)))
    return jlora.Trainable(dict.fromkeys((f"m{i}/kernel" for i in range(4)), own))


def model(n):
    return jax.tree.map(lambda x: np.full_like(x, n), LIKE)


def one_number(tree):
    (found,) = {float(x) for leaf in jax.tree.leaves(tree) for x in np.unique(leaf)}
    return int(found)


def read_lora(place):
    read = jlora.peft.load(place, LIKE)
    n = one_number(read)
    assert {f.spec.alpha / f.spec.rank for f in read.lora.values()} in ({1.0}, {n / 4})
    return n


def read_base(place):
    read = one_number(jlora.peft.load_base(place, LIKE))
    assert read == one_number(read_flat(place))
    return read


def save_lora(place, n, **how):
    jlora.peft.save(place, lora(n), **how)


def save_base(place, n, **how):
    jlora.peft.save_base(place, model(n), config={"n": n}, **how)


def in_turn(n):
    """Several files and one, in turn."""
    return SHARDS if n % 2 else None


# How each writer writes state n, and how a state is read.
WRITERS = {
    "save": (lambda p, n: jlora.save(p, lora(n)), lambda p: one_number(jlora.load(p))),
    "peft": (lambda p, n: jlora.peft.save(p, lora(n, 4)), read_lora),
    "peft, other ranks": (save_lora, read_lora),
    "peft, shards": (lambda p, n: save_lora(p, n, max_shard_bytes=SHARDS), read_lora),
    "peft, fewer shards": (
        lambda p, n: save_lora(p, n, max_shard_bytes=SHARDS * n),
        read_lora,
    ),
    "peft, shards and one file": (
        lambda p, n: save_lora(p, n, max_shard_bytes=in_turn(n)),
        read_lora,
    ),
    "peft, one file and shards": (
        lambda p, n: save_lora(p, n, max_shard_bytes=in_turn(n + 1)),
        read_lora,
    ),
    "base": (save_base, read_base),
    "base, shards": (lambda p, n: save_base(p, n, max_shard_bytes=SHARDS), read_base),
    "base, shards and one file": (
        lambda p, n: save_base(p, n, max_shard_bytes=in_turn(n)),
        read_base,
    ),
    "base, one file and shards": (
        lambda p, n: save_base(p, n, max_shard_bytes=in_turn(n + 1)),
        read_base,
    ),
    "export.safetensors": (
        lambda p, n: jlora.export.safetensors(p, model(n)),
        lambda p: one_number(read_flat(p)),
    ),
}
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
listening = []  # what looks at file operations; such a hook cannot be taken away
sys.addaudithook(
    lambda event, args: [look() for look in listening[:1] if event in CHANGES]
)


@contextlib.contextmanager
def at_each_operation(look):
    """Calls `look` before each operation on files, but for its own."""

    def once():
        listening.remove(once)
        try:
            look()
        finally:
            listening.append(once)

    listening.append(once)
    try:
        yield
    finally:
        listening.remove(once)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_operation_leaves_one_of_the_states(tmp_path, writer):
    """What is on the disk before an operation is what a kill there would leave."""
    write, read = WRITERS[writer]
    place = tmp_path / "now" / "x"
    place.parent.mkdir()
    write(place, 1)
    copies = []

    def copy():
        copies.append(tmp_path / str(len(copies)))
        shutil.copytree(place.parent, copies[-1])

    with at_each_operation(copy):
        write(place, 2)
    assert len(copies) > 5
    states = [read(copy / "x") for copy in copies]
    assert states == sorted(states)
    assert {*states} == {1, 2} or {*states} == {1}
    assert read(place) == 2
    for copy in copies:
        write(copy / "x", 3)
        assert read(copy / "x") == 3
        assert left(copy) == left(place.parent), "it swept what the kill had left"


def left(folder):
    """The names in a folder, those of shards without what makes them free."""
    found = {
        p.relative_to(folder) for p in folder.rglob("*") if p.suffix != ".safetensors"
    }
    shards = len([*folder.rglob("*.safetensors")])
    index = [*folder.rglob("*.index.json")]
    if index:
        named = {*json.loads(index[0].read_text())["weight_map"].values()}
        assert len(named) == shards
    return {str(path) for path in found if ".index.json" not in path.name}


KILLS = "peft.save, other ranks", "save_base, shards", "export.orbax"
STEPS = "checkpoint.save, overwrite", "Checkpoints.save"


@pytest.mark.parametrize("writers", [KILLS, STEPS])
def test_processes_that_are_killed_leave_one_of_the_states(writers):
    """A sample of what `benchmarks/faults/kills.py` does by the hundred."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults.kills"]
    done = subprocess.run(
        [*command, "--kills", "2", "--seconds", "25", "--writer", *writers],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, *ends = map(int, done.stdout.split("\n")[-2].split()[1:])
    assert kills >= len(writers)
    assert ends[2:] == [0, 0, 0, 0], done.stdout


# Readers beside writers.


READERS = {
    "peft, other ranks": read_lora,
    "peft, shards and one file": read_lora,
    "base, shards": lambda place: one_number(jlora.peft.load_base(place, LIKE)),
    "base, shards and one file": lambda place: one_number(read_flat(place)),
}


@pytest.mark.parametrize("writer", READERS)
def test_a_reader_beside_two_writers_reads_one_state(tmp_path, writer):
    write, read = WRITERS[writer][0], READERS[writer]
    place, over, faults = tmp_path / "x", threading.Event(), []
    write(place, 1)

    def again_and_again(n):
        while not over.is_set():
            try:
                write(place, n)
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=again_and_again, args=(n,)) for n in (2, 3)]
    for thread in threads:
        thread.start()
    try:
        states = [read(place) for _ in range(20)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not faults
    assert {*states} <= {1, 2, 3}
    assert read(place) in (2, 3)


@pytest.mark.parametrize("shards", [None, SHARDS])
def test_tensors_are_read_from_what_was_opened(tmp_path, shards):
    save_base(tmp_path, 1, max_shard_bytes=shards)
    opened, (slots, _) = open_model(tmp_path), open_tensors(tmp_path)
    for n in (2, 3):
        save_base(tmp_path, n, max_shard_bytes=shards)
    assert one_number([opened.read(name) for name in opened.shapes]) == 1
    assert one_number([slot.read() for slot in slots.values()]) == 1
    pieces = [b"".join(slot.pieces()) for slot in slots.values()]
    assert one_number([np.frombuffer(piece, "f4") for piece in pieces]) == 1


def test_merging_reads_the_base_that_was_opened(tmp_path, monkeypatch):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    jlora.export.safetensors(base, model(1))

    def overwrite(names):
        for name in names:
            yield name
            jlora.export.safetensors(base, model(5))

    jlora.export.merge_files(base, jlora.Trainable(), out, progress=overwrite)
    assert one_number(read_flat(out)) == 1


def test_a_file_that_is_written_to_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    jlora.export.safetensors(file, model(1))
    slots, _ = open_tensors(file)
    with open(file, "r+b") as other:
        other.seek(-4, os.SEEK_END)
        other.write(b"abcd")
    with pytest.raises(jlora.CheckpointError, match="written to while it was read"):
        next(iter(slots.values())).read()


def test_an_orbax_model_that_is_replaced_while_it_is_read(tmp_path):
    place = tmp_path / "model"
    jlora.export.orbax(place, model(1))
    opened = open_model(place)
    jlora.export.orbax(place, model(2), overwrite=True)
    with pytest.raises(jlora.CheckpointError, match="replaced while it was read"):
        opened.read("m0/kernel")
    assert one_number(read_flat(place)) == 2


def test_a_step_that_is_overwritten_while_it_is_read(tmp_path, monkeypatch):
    from jlora._io import read_step

    jlora.checkpoint.save(tmp_path / "run", lora(1), metadata=1)
    check, saves = read_step._check, iter([2])

    def overwrite(*args):
        for n in saves:
            jlora.checkpoint.save(
                tmp_path / "run", lora(n, 1), metadata=n, overwrite=True
            )
        check(*args)

    monkeypatch.setattr(read_step, "_check", overwrite)
    read = jlora.checkpoint.restore(tmp_path / "run")
    assert (read.metadata, one_number(read.trainable)) == (2, 2)


def test_many_shards_need_few_descriptors(tmp_path):
    params = {f"w{i}": np.full(2, i, "f4") for i in range(150)}
    jlora.peft.save_base(tmp_path, params, max_shard_bytes=8)
    assert len([*tmp_path.glob("*.safetensors")]) == 150
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 80, hard))
    try:
        same(jlora.peft.load_base(tmp_path, params), params)
        opened = open_model(tmp_path)
        assert [opened.read(f"w{i}")[0] for i in range(150)] == list(range(150))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    del opened
    assert len(os.listdir("/dev/fd")) <= here, "all are closed"


def test_links_are_read_and_their_targets_stay(tmp_path):
    """The cache of the hub: a snapshot is a folder of links to blobs."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    save_lora(snapshot, 1, max_shard_bytes=SHARDS)
    shutil.copytree(snapshot, blobs)
    for file in snapshot.iterdir():
        file.unlink()
        file.symlink_to(os.path.join("..", "blobs", file.name))
    assert read_lora(snapshot) == 1
    save_lora(snapshot, 2)
    assert read_lora(snapshot) == 2
    assert read_lora(blobs) == 1


def test_shards_of_two_saves_are_refused(tmp_path):
    for n in (1, 2):
        save_base(tmp_path / str(n), n, max_shard_bytes=SHARDS)
        save_lora(tmp_path / f"lora{n}", 2, max_shard_bytes=SHARDS)
    jlora.peft.save(tmp_path / "lora1", lora(1, 2), max_shard_bytes=SHARDS)
    for one, other in (("1", "2"), ("lora1", "lora2")):
        shard = sorted((tmp_path / one).glob("*-00001-of-*.safetensors"))[0]
        shutil.copy(next((tmp_path / other).glob("*-00001-of-*.safetensors")), shard)
    match = "shards differ: .*is of another save"
    with pytest.raises(jlora.PeftError, match=match):
        jlora.peft.load_base(tmp_path / "1", LIKE)
    with pytest.raises(jlora.CheckpointError, match=match):
        open_model(tmp_path / "1")
    with pytest.raises(jlora.PeftError, match=match):
        jlora.peft.load(tmp_path / "lora1", LIKE)


def test_the_same_tensors_make_the_same_files(tmp_path):
    for name in "ab":
        save_lora(tmp_path / name, 2, max_shard_bytes=SHARDS)
    a, b = (sorted(p for p in (tmp_path / n).iterdir()) for n in "ab")
    assert [p.name for p in a] == [p.name for p in b]
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_what_a_kill_leaves_is_no_data(tmp_path):
    begun = tmp_path / ".model.safetensors.0123456789abcdef.part"
    begun.write_bytes(b"half")
    with pytest.raises(jlora.CheckpointError, match="holds neither an adapter nor"):
        jlora.files.detect(tmp_path)
    stray = tmp_path / "model-00001-of-00002.safetensors"
    jlora.export.safetensors(stray, model(1))
    with pytest.raises(jlora.CheckpointError, match="holds neither one"):
        open_model(tmp_path)
    jlora.export.safetensors(tmp_path / "model.safetensors", model(2))
    assert one_number(read_flat(tmp_path)) == 2
    assert not begun.exists()


def test_what_a_living_writer_has_begun_stays(tmp_path):
    file = tmp_path / "x.safetensors"
    with beside.unfinished(file, folder=False) as begun:
        jlora.save(file, lora(1))
        assert begun.exists()
    assert os.listdir(tmp_path) == ["x.safetensors"]


# Folders of Orbax.


@pytest.fixture(params=["in one step", "in two"])
def swapping(request, monkeypatch):
    """A disk that can exchange two names, and one that cannot."""
    if request.param == "in two":
        monkeypatch.setattr(beside, "_exchanged", lambda a, b: False)
    return request.param


def test_overwriting_swaps_and_leaves_nothing(tmp_path, swapping):
    for n in (1, 2):
        jlora.export.orbax(tmp_path / "model", model(n), overwrite=True)
        jlora.checkpoint.save(tmp_path / "run", lora(n), metadata=n, overwrite=True)
    assert one_number(read_flat(tmp_path / "model")) == 2
    read = jlora.checkpoint.restore(tmp_path / "run")
    assert (read.metadata, one_number(read.trainable)) == (2, 2)
    assert sorted(os.listdir(tmp_path)) == ["model", "run"]
    assert os.listdir(tmp_path / "run") == ["0"]


@pytest.mark.parametrize("what", ["model", "run/0"])
def test_a_kill_between_two_renames_is_put_back(tmp_path, what):
    """On a disk that cannot exchange names."""
    jlora.export.orbax(tmp_path / "model", model(1))
    jlora.checkpoint.save(tmp_path / "run", lora(1), metadata=1)
    place = tmp_path / what
    begun = place.with_name(f".{place.name}.0123456789abcdef")
    begun.mkdir()
    place.rename(begun / "former")
    if what == "model":
        assert one_number(read_flat(place)) == 1
        jlora.export.orbax(place, model(2), overwrite=True)
    else:
        assert jlora.checkpoint.restore(tmp_path / "run").metadata == 1
        jlora.checkpoint.save(tmp_path / "run", lora(2), step=1)
    assert not begun.exists()


def test_overwriting_keeps_the_newest_steps(tmp_path):
    for step in range(3):
        jlora.checkpoint.save(tmp_path, lora(1), step=step)
    jlora.checkpoint.save(tmp_path, lora(2), step=2, overwrite=True, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_second_writer_of_checkpoints_is_told(tmp_path):
    match = rf"has a writer already: process {os.getpid()} on .*directory of its own"
    with jlora.checkpoint.Checkpoints(tmp_path) as ckpts:
        for write in (
            lambda: jlora.checkpoint.save(tmp_path, lora(1)),
            lambda: jlora.checkpoint.Checkpoints(tmp_path),
        ):
            with pytest.raises(jlora.CheckpointError, match=match):
                write()
        ckpts.save(lora(2), step=1)
        ckpts.wait()
        assert jlora.checkpoint.restore(tmp_path).step == 1
    jlora.checkpoint.save(tmp_path, lora(1), step=2)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_writer_that_was_killed_does_not_stand_in_the_way(tmp_path):
    (tmp_path / ".writer").write_text("process 1 on a machine")
    jlora.checkpoint.save(tmp_path, lora(1))
    assert os.listdir(tmp_path) == ["0"]


# Settings that are signed.


def about(folder):
    return folder / "0" / "about" / "metadata"


@orbax_fails
@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('"alpha": 2.0', '"alpha": 200.0'),
        ('"metadata": 7', '"metadata": 8'),
        ('"alpha": 2.0', '"alpha": 2.0, "alpha": 2.0'),
        ('"metadata": 7', '"metadata": 7, "metadata": 7'),
    ],
)
def test_edited_settings_of_a_checkpoint_are_refused(tmp_path, was, now):
    jlora.checkpoint.save(tmp_path, lora(2), metadata=7)
    text = about(tmp_path).read_text()
    assert was in text
    about(tmp_path).write_text(text.replace(was, now))
    doubled = "," in now
    match = "names .* twice" if doubled else "their checksum does not match"
    with pytest.raises(jlora.CheckpointError, match=match):
        jlora.checkpoint.restore(tmp_path)


@orbax_fails
def test_a_checkpoint_without_a_checksum_is_refused(tmp_path):
    jlora.checkpoint.save(tmp_path, lora(2))
    fields = json.loads(about(tmp_path).read_text())
    for text in (
        {**fields, "format": 1},
        {k: v for k, v in fields.items() if k != "sha256"},
    ):
        about(tmp_path).write_text(json.dumps(text))
        with pytest.raises(
            jlora.CheckpointError, match=r"of format 2|checksum does not"
        ):
            jlora.checkpoint.restore(tmp_path)


def test_odd_json_values_keep_their_checksum(tmp_path):
    odd = {1: [float("nan"), 1e-320, "é\U0001f600"], "a": ("x", None)}
    jlora.checkpoint.save(tmp_path, adapter(), metadata=odd, position=2**70)
    read = jlora.checkpoint.restore(tmp_path)
    assert read.metadata["1"][2] == "é\U0001f600"
    assert read.position == 2**70
    with pytest.raises(jlora.CheckpointError, match="metadata is not a JSON value"):
        jlora.checkpoint.save(tmp_path, adapter(), step=1, metadata="half: \ud800")


@pytest.mark.parametrize(
    "odd", ["\ud800", functools.reduce(lambda x, _: [x], range(200))]
)
def test_metadata_that_could_not_be_read_is_not_saved(tmp_path, odd):
    with pytest.raises(jlora.CheckpointError, match="metadata is not a JSON value"):
        jlora.checkpoint.save(tmp_path, adapter(), metadata=odd)


def test_a_doubled_key_in_signed_settings_is_refused(tmp_path):
    """In one file, whose checksum is over the text."""
    from jlora._io import adapter_file, tensors

    named = {"head.full": np.ones(2, "f4")}
    text = '{"lora": [], "full": ["x"], "full": ["head"]}'
    metadata = {
        "format": "jlora",
        "version": "1",
        "adapter": text,
        "sha256": adapter_file._checksum(text, named.items()),
    }
    file = tmp_path / "x.safetensors"
    tensors.write(file, named, lambda name: [tensors.raw(named[name])], metadata)
    with pytest.raises(jlora.CheckpointError, match="names 'full' twice"):
        jlora.load(file)
