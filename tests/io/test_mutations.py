"""A sample of what `benchmarks/faults/mutations.py` does by the hundred thousand."""

import json
import random

import pytest

from benchmarks.faults import change, mutations
from tests.io.helpers import orbax_fails

COUNTS = {"Orbax checkpoint": 12, "plan": 12, "quantised models": 60}


@pytest.mark.once
@orbax_fails
@pytest.mark.parametrize("name", mutations.FORMATS)
def test_damaged_files_are_refused_or_read_as_something_valid(name, tmp_path, capfd):
    ends = mutations.fuzz(name, tmp_path, COUNTS.get(name, 200), seed=0)
    assert not ends["fault"], capfd.readouterr().out
    assert ends["refused"]


def test_an_input_is_made_again_from_its_number():
    form = mutations.FORMATS["config"]
    files = {"c": mutations.config().to_json().encode()}
    every = list(mutations.inputs(form, files, "config", 3, 5, None))
    assert list(mutations.inputs(form, files, "config", 3, 5, 4)) == every[4:]


def test_a_checksum_is_made_again(tmp_path):
    mutations.write_file(tmp_path)
    header, body = change.parted((tmp_path / "a").read_bytes())
    about = header["__metadata__"]
    assert mutations.checksum(header, body) == about["sha256"]
    assert json.loads(about["adapter"])["full"]


def test_another_error_is_a_fault(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("torn")

    form = mutations.FORMATS["config"]
    readers = iter([form.read, broken, broken])

    def read(folder):
        return next(readers)(folder)

    new = mutations.dataclasses.replace(form, read=read)
    monkeypatch.setitem(mutations.FORMATS, "config", new)
    assert mutations.fuzz("config", tmp_path, 2, seed=0) == {"fault": 2}
    assert "FAULT config 1: OSError('torn') at" in capsys.readouterr().out


def test_damage_keeps_the_length_of_the_numbers():
    rng = random.Random(0)
    assert {len(change.numbers(b"abc" * 9, rng)) for _ in range(99)} == {27}
