"""Adapters broken on purpose: every tensor is applied, or the file is refused."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.faults import drops
from jlora.errors import PeftError

pytestmark = pytest.mark.once


@pytest.mark.parametrize("form", drops.FORMATS)
def test_no_tensor_is_dropped_in_silence(form):
    """Of each format the changes that it takes most often; the campaign has more."""
    for name in ("left out", "added", "twice", "experts renumbered"):
        change = drops.CHANGES[name]
        end, idle = drops.once(form, change, random.Random(f"{form}{name}"))
        assert (end in ("refused", "applied"), idle) == (True, [])


@pytest.mark.parametrize("form", drops.FORMATS)
def test_every_tensor_of_a_whole_file_counts(form):
    whole = drops.once(form, lambda tensors, config, rng: None, random.Random(0))
    assert whole == ("applied", [])


def experts(change):
    return lambda tensors: {k: change(k, x) for k, x in tensors.items()}


def also(pattern, new):
    """The tensors, and some of them under a second name."""
    return lambda ts: {**{k.replace(pattern, new): x + 1 for k, x in ts.items()}, **ts}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("diffusers", lambda t: {**t, "unet.x.alpha": np.float32(1)}, "and no A, of"),
        ("kohya", lambda t: {**t, f"{drops.STEM}self_attn.q_proj.lora_A.weight":
            np.ones((2, 6), np.float32)}, "is there twice"),
        ("per-expert", also("gate_proj", "w1"), r"'gate' twice, under two names"),
        ("per-expert", also("experts.0.", "experts.00."), "expert 0 is twice"),
        ("per-expert", also("mlp.", "block_sparse_moe."), "Two modules of the file"),
        ("stacked", also("w2", "down_proj"), r"'down' twice"),
        ("stacked", experts(lambda k, x: x[..., :1] if "w1.lora_A" in k else x),
         "gate and up differ in their sizes, 1 to 4 and 6 to 4"),
        ("per-expert", experts(lambda k, x: x.astype(bool)), "not a float type"),
        ("per-expert", experts(
            lambda k, x: x[:, :1] if ".1.up_proj.lora_A" in k else x), "their sizes"),
    ],
)  # fmt: skip
def test_what_was_dropped_once_is_refused(form, change, message, tmp_path):
    file = drops.write(form, tmp_path)
    new = {k: np.ascontiguousarray(x) for k, x in change(load_file(file)).items()}
    save_file(new, file)
    if form not in drops.DIALECTS:
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    with pytest.raises(PeftError, match=message):
        drops.read(form, tmp_path)
