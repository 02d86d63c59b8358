"""Two seconds of the soak test: threads, swaps and faults, and no wrong row."""

import io
import sys

import pytest

from benchmarks.faults import soak

pytestmark = pytest.mark.once


def test_threads_serve_right_rows_whatever_fails():
    progress = io.StringIO()
    found = soak.under_load(2.0, 8, seed=0, progress=progress)
    assert not soak.failed(found), found["notes"]
    counts = found["counts"]
    assert counts["rows served"] > 20
    assert counts.get("rows with an error, PoolError")
    assert found["waiting"] <= soak.CAPACITY
    assert "rows, 0 wrong" in progress.getvalue()
    alone = soak.swaps(60, 2.0, 8, None)
    assert alone["copies"] == 0
    assert alone["swaps"]
    shown = dict(soak.columns(found, alone)[1])
    assert shown["wrong rows, of all"] == "0"
    assert {"p50", "p99"} <= alone["seconds"].keys()


def test_script_ends_with_an_error_if_a_row_is_wrong(monkeypatch, tmp_path):
    argv = ["soak", "--seconds", "0.8", "--swaps", "5", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(tmp_path / "soak.json")])
    monkeypatch.setattr(soak.World, "load", lambda world, name: soak.adapter(99.0))
    with pytest.raises(SystemExit, match="1"):
        soak.main()
    assert "wrong_rows" in (tmp_path / "soak.json").read_text()
