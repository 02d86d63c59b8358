"""Writers on a full disk, without permission, and beside another writer."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once


def run(*words):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


def test_a_save_that_fails_leaves_what_was_there():
    writers = "jlora.save", "peft.save, shards"
    words = "-m", "benchmarks.faults.refusals", "--times", "3", "--writer", *writers
    done = run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 6


FULL = """
import pathlib, sys
from benchmarks.faults import kills, refusals
write, read = kills.WRITERS["Checkpoints.save"]
place = pathlib.Path(sys.argv[1])
kills.child(lambda: kills.saved(write, place, 1))
full = lambda: refusals.tried(write, place, 2, lambda: refusals.limit(100))
print(kills.child(full), kills.child(lambda: read(place)))
again = kills.child(lambda: kills.saved(write, place, 3))
print(again, kills.child(lambda: read(place)))
"""


def test_a_background_save_on_a_full_disk_is_told_and_ends(tmp_path):
    """The disk is full while the step is written; closing fails too."""
    done = run("-c", FULL, tmp_path / "run")
    assert done.stdout.split() == ["1", "1", "0", "3"], done.stderr
