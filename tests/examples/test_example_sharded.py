"""`examples/sharded`: meshes and layouts; the run, its resume and its export."""

import re
import socket
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import jlora
from examples.chat.model import DecoderConfig, shapes
from examples.sharded.config import parse
from examples.sharded.data import batch_at, sequences
from examples.sharded.layout import batch_sharding, layout, parse_mesh
from examples.sharded.loop import State
from examples.sharded.report import digest
from examples.sharded.train import begin, main

pytestmark = pytest.mark.once
SIZES = {"vocab": 32, "width": 16, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2}
RUN = SIZES | {"rank": 2, "batch": 8, "length": 8, "every": 2}


def flags(**options):
    """Flags with values, of a tiny model."""
    named = [(k.replace("_", "-"), v) for k, v in {**RUN, **options}.items()]
    return [f"--{name}={value}" for name, value in named]


def shapes_of(**leaves):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in leaves.items()}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
        (" tensor = 2, data=2 ", {"data": 2, "tensor": 2}),
        ("fsdp=-1,tensor=2", {"fsdp": 4, "tensor": 2}),
        ("fsdp=-1", {"fsdp": 8}),
        ("", {"fsdp": 1}),
    ],
)
def test_a_mesh_is_read_from_text(text, shape):
    mesh = parse_mesh(text)
    assert dict(mesh.shape) == shape
    assert {*mesh.axis_types} == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fsdp=4;tensor=2", r"size of fsdp must be a number from 1.*'4;tensor=2'"),
        ("fsdp", "Got ''"),
        ("fsdp=0", "number from 1"),
        ("model=2", r"with each of data, fsdp, tensor at most once. Got 'model=2'"),
        ("fsdp=2,fsdp=2", "at most once"),
        ("fsdp=-1,tensor=-1", "Only one axis"),
        ("fsdp=16", r"needs 16 devices, and this machine has 8 .*--fake-devices 16"),
    ],
)
def test_a_mesh_that_cannot_be_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        parse_mesh(text)


def test_rows_of_a_batch_lie_over_data_and_fsdp():
    assert batch_sharding(parse_mesh("fsdp=4,tensor=2")).spec == P("fsdp")
    assert batch_sharding(parse_mesh("tensor=2,data=2,fsdp=2")).spec == P(
        ("data", "fsdp")
    )


@pytest.mark.filterwarnings("error")
def test_kernels_are_cut_by_their_names():
    mesh = parse_mesh("fsdp=4,tensor=2")
    tree = {
        "embed": shapes_of(embedding=(64, 16)),
        "layers": {
            "attn": {
                "q_proj": shapes_of(kernel=(3, 16, 4, 8), bias=(3, 4, 8)),
                "o_proj": shapes_of(kernel=(3, 4, 8, 16), bias=(3, 16)),
            },
            "mlp": shapes_of(up=(3, 16, 32), down=(3, 32, 16)),
            "input_norm": shapes_of(scale=(3, 16)),
        },
        "blocks": [{"gate": shapes_of(kernel=(16, 32))}],
        "lm_head": shapes_of(kernel=(16, 64)),
    }
    found = jax.tree.map(lambda s: s.spec, layout(tree, mesh))
    assert found == {
        "embed": {"embedding": P("tensor", "fsdp")},
        "layers": {
            "attn": {
                "q_proj": {
                    "kernel": P(None, "fsdp", "tensor", None),
                    "bias": P(None, "tensor", None),
                },
                "o_proj": {
                    "kernel": P(None, "tensor", None, "fsdp"),
                    "bias": P(None, None),
                },
            },
            "mlp": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
            "input_norm": {"scale": P(None, None)},
        },
        "blocks": [{"gate": {"kernel": P("fsdp", "tensor")}}],
        "lm_head": {"kernel": P("fsdp", "tensor")},
    }


def test_what_lies_whole_is_told():
    tree = {"layers": shapes_of(q=(2, 16, 3, 8), router=(2, 16, 4), norm=(2, 16))}
    with pytest.warns(UserWarning, match="Each device holds these whole") as told:
        found = layout(tree, parse_mesh("fsdp=4,tensor=2"))
    text = str(told[0].message)
    assert "axis 2 of 'layers/q' (tensor=2 and 3 entries)" in text
    assert "'layers/router', which no rule knows" in text
    assert "norm" not in text
    assert found["layers"]["q"].spec == P(None, "fsdp", None, None)
    with warnings.catch_warnings(action="error"):
        layout(tree, parse_mesh(""))


@pytest.mark.filterwarnings("error")
@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("scan", [True, False])
def test_every_leaf_of_the_decoder_has_a_rule(scan):
    like = shapes(DecoderConfig(**SIZES, head=4, qk_norm=True, scan=scan))
    places = layout(like, parse_mesh("fsdp=4,tensor=2"))
    where, _ = jlora.paths.flatten(places)
    for path, x in jlora.paths.flatten(like)[0].items():
        is_cut = where[path].shard_shape(x.shape) != x.shape
        assert is_cut == ("norm" not in path), path


def test_a_batch_depends_on_seed_and_step_only():
    words = {"rows": 8, "length": 6, "vocab": 32, "seed": 3}
    one = batch_at(5, **words, sharding=batch_sharding(parse_mesh("")))
    more = batch_at(5, **words, sharding=batch_sharding(parse_mesh("data=4,tensor=2")))
    assert more.sharding.shard_shape(more.shape) == (2, 6)
    np.testing.assert_array_equal(one, more)
    np.testing.assert_array_equal(one[:, 1:], (5 * one[:, :-1] + 3) % 32)
    part = sequences(range(2, 4), 5, length=6, vocab=32, seed=3)
    np.testing.assert_array_equal(one[2:4], part)
    assert (one != batch_at(6, **words, sharding=one.sharding)).any()


def run(capsys, *more, **options):
    """What a run prints."""
    main([*flags(**options), *more])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("standard_dtypes")
@jax.numpy_rank_promotion("allow")
def test_a_run_goes_on_bit_equal_on_another_mesh(tmp_path, capsys):
    out = run(capsys, out=tmp_path, mesh="fsdp=4,tensor=2", steps=2)
    assert "8 × cpu, fsdp=4,tensor=2" in out
    row = r"gate_proj/kernel +2×16×32 +512 B +- fsdp tensor +- fsdp - +- - tensor\n"
    assert re.search(row, out)
    saved = re.search(r"step 2, state (\w{12})", out)[1]

    out = run(capsys, "--resume", out=tmp_path, mesh="data=2,tensor=2", steps=20)
    assert f"step 2, saved on fsdp=4,tensor=2: state {saved}" in out
    before, after = map(float, re.findall(r"held-out loss.* ([\d.]+)\n", out)[-2:])
    assert after < before - 0.5

    found = jlora.checkpoint.restore(tmp_path / "checkpoints")
    assert found.step == 20
    adapter = jlora.load(tmp_path / "adapter.safetensors")
    assert jlora.checkpoint.fingerprint(adapter) == jlora.checkpoint.fingerprint(
        found.trainable
    )
    like = shapes(DecoderConfig(**SIZES, head=4))
    where = layout(like, parse_mesh("fsdp=2"))
    like = jax.tree.map(lambda x, s: x.update(sharding=s), like, where)
    merged = jlora.files.read_params(tmp_path / "merged", like)
    head = merged["lm_head"]["kernel"]
    assert head.sharding.spec == P("fsdp", None)
    np.testing.assert_array_equal(head, adapter.full["lm_head/kernel"])


@pytest.mark.usefixtures("standard_dtypes")
@jax.numpy_rank_promotion("allow")
def test_a_quantised_base_with_dropout_and_spread_factors(tmp_path, capsys):
    words = {"quantize": "nf4", "dropout": 0.2, "dtype": "bfloat16", "steps": 1}
    out = run(capsys, "--spread", out=tmp_path, mesh="fsdp=2,tensor=2", **words)
    assert "nf4 of bfloat16[2,16,32]" in out
    assert re.search(r"gate_proj/kernel .* - fsdp\+tensor - +- - tensor\+fsdp\n", out)


def test_an_earlier_run_is_not_overwritten(capsys):
    def begin_with(newest, *words):
        options = parse(["--steps", "40", *words])
        saved = types.SimpleNamespace(newest=newest)
        return begin(options, saved, None, "state", None)

    assert begin_with(None) == ("state", 0)
    assert begin_with(None, "--resume") == ("state", 0)
    assert "nothing is saved in runs/sharded yet" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"holds step 10 .* Give --resume"):
        begin_with(10)
    with pytest.raises(SystemExit, match=r"step 40 already\. Give more --steps"):
        begin_with(40, "--resume")


def test_sizes_that_do_not_fit_are_told(capsys):
    for words in (["--heads", "6"], ["--kv-heads", "3"]):
        with pytest.raises(SystemExit):
            parse(words)
        assert "each head needs an even part of the width" in capsys.readouterr().err


def test_a_batch_that_the_mesh_does_not_divide_is_told(tmp_path):
    with pytest.raises(SystemExit, match="Give a multiple of 4"):
        main(["--mesh", "fsdp=4", "--batch", "6", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs 16 devices"):
        main(["--mesh", "fsdp=16", "--out", str(tmp_path)])


PROGRAM = """
import sys, jax
me, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
from examples.sharded.train import begin, main
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_two_processes_save_what_one_reads(tmp_path, standard_dtypes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = flags(steps=2, out=tmp_path, mesh="fsdp=2,tensor=2")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), port, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=200) for process in both]
    for process, (_, errors) in zip(both, ends, strict=True):
        assert process.returncode == 0, errors[-3000:]
    saved = re.search(r"step 2, state (\w{12})", ends[0][0])[1]
    assert "── " not in ends[1][0]
    found = jlora.checkpoint.restore(tmp_path / "checkpoints")
    like = jax.eval_shape(optax.adamw(0.1).init, found.trainable)
    found = jlora.checkpoint.restore(tmp_path / "checkpoints", opt_state=like)
    assert digest(State(found.trainable, found.opt_state)) == saved
