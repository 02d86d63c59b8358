"""The peers' runner, with this interpreter in place of environments made for them."""

import doctest
import json
import math

import pytest

from benchmarks.peers import common, runner as peers

pytestmark = pytest.mark.once

ONLY = ("floor", "jlora", "manual", "full")
TINY = ("--here", "--sizes", "64x1", "--length", "16", "--batch", "2", "--steps", "2")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a round wrote, with one peer whose library is missing here."""
    file = tmp_path_factory.mktemp("peers") / "peers.json"
    flags = ("--rounds", "1", "--threads", "1", "--json", str(file))
    status = peers.main([*TINY, *flags, "--only", *ONLY, "penzai"])
    assert status == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_jlora_loses_what_the_hand_written_side_path_loses(record):
    [result] = record["results"]
    figures = result["peers"]
    assert tuple(figures) == ONLY
    assert len(figures["jlora"]["losses"]) == 5
    assert peers.difference(figures["jlora"]["losses"], figures["manual"]["losses"]) < (
        1e-6
    )
    assert figures["jlora"]["loss_difference"] < 1e-6
    # These train something else, and are not compared.
    assert figures["full"]["loss_difference"] is None
    assert figures["full"]["losses"] != figures["floor"]["losses"]


@pytest.mark.slow
def test_figures_are_ratios_within_the_round_and_the_compilers_own(record):
    figures = record["results"][0]["peers"]
    assert figures["floor"]["times_floor"] == 1
    ratio = figures["jlora"]["step_ms"] / figures["floor"]["step_ms"]
    assert math.isclose(figures["jlora"]["times_floor"], ratio)
    assert figures["floor"]["gflop"] < figures["jlora"]["gflop"]
    assert figures["jlora"]["gflop"] < figures["full"]["gflop"]
    assert figures["jlora"]["temp_mib"] > 0


@pytest.mark.slow
def test_a_peer_that_does_not_run_is_a_reason_without_paths(record):
    [result] = record["results"]
    assert result["failed"] == {
        "penzai": "ModuleNotFoundError: No module named 'penzai'"
    }
    text = json.dumps(record)
    assert str(peers.ROOT) not in text
    assert record["threads"] == 1


def test_losses_that_differ_are_marked_and_fail():
    def one(losses):
        return [{"versions": {}, "step_ms": 2.0, "cpu_ms": 2.0, "losses": losses}]

    runs = {"manual": one([4.0, 2.0]), "jlora": one([4.0, 2.1]), "full": one([9.0])}
    summary = peers.summarise(runs, 1e-4)
    assert [name for name in runs if summary[name]["differs"]] == ["jlora"]
    assert math.isclose(summary["jlora"]["loss_difference"], 0.05)
    assert summary["jlora"]["times_floor"] is None
    assert "5e-02 !" in peers.show(summary, {})
    runs["jlora"] = one([4.0, math.nan])
    assert peers.summarise(runs, 1e-4)["jlora"]["differs"]


def test_every_script_has_a_line_in_the_table_and_none_is_missing():
    scripts = {path.stem.removeprefix("peer_") for path in peers.HERE.glob("peer_*.py")}
    assert scripts == set(peers.PEERS)
    packages = [
        own for peer in peers.PEERS.values() for own in peer.packages + peer.alone
    ]
    assert all("==" in own for own in packages)


def test_an_environment_that_cannot_be_made_is_a_reason(monkeypatch, tmp_path, capsys):
    def no_network(command, **_):
        raise peers.PeerError("no route to the index")

    monkeypatch.setattr(peers, "run", no_network)
    flags = ("--cache", str(tmp_path), "--only", "jlora", "manual", "--install")
    assert peers.main(flags) == 0
    told = capsys.readouterr().err
    assert told.count("environment of") == 1  # one attempt for the two
    assert "manual: not installed: no route to the index" in told


def test_each_factor_is_found_under_each_librarys_path():
    factors = {
        f"layer{i}": {
            name: {side: (i, name, side) for side in "ab"} for name in common.MATRICES
        }
        for i in range(12)
    }
    find = common.find_factor
    for path, wanted in {
        "['layer0_q']['kernel_lora_a']": (0, "q", "a"),
        "['layer11']['w1']['lora_b'].value": (11, "w1", "b"),
        "['layer1_w2']['lora']['a']": (1, "w2", "a"),
        "['layer1_o']['kernel']['$lora$']['b']": (1, "o", "b"),
        "['layer2_k/lora_kernel_b']": (2, "k", "b"),
        ".lora['layer3/v'].a": (3, "v", "a"),
        "LoRA:root['layer3']['v']/LoRA_B.weights": (3, "v", "b"),
        "base_model.model.layer3.v.lora_A": (3, "v", "a"),
    }.items():
        assert find(factors, path) == wanted
    with pytest.raises(ValueError, match="is not the path of a factor"):
        find(factors, "['norm']")


@pytest.mark.parametrize("module", [common, peers])
def test_the_docstrings_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
