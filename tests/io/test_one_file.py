"""One-file adapters: read back bit for bit, or refused; never half, never executed."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jlora
from jlora._io import tensors as _tensors
from jlora._io.disk import replacing
from jlora._io.shards import open_tensors
from jlora._plan.serial import plan_from_dict, plan_to_dict
from jlora.factors import Axes, Factors, FusedParts, Spec
from jlora.methods import METHODS
from tests.helpers import normal, same
from tests.io.helpers import adapter


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path):
    jlora.save(path, adapter())
    return path


def parts(data):
    """The header's fields and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(fields, data):
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


# Save, then load.


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("save", lambda to, base, t: jlora.save(to, t)),
        ("peft.save", lambda to, base, t: jlora.peft.save(to, t)),
        ("peft.save_base", lambda to, base, t: jlora.peft.save_base(to, base)),
        ("checkpoint.save", lambda to, base, t: jlora.checkpoint.save(to, t)),
        (
            "checkpoint.fingerprint",
            lambda to, base, t: jlora.checkpoint.fingerprint(base),
        ),
        ("export.orbax", lambda to, base, t: jlora.export.orbax(to, base)),
        ("export.safetensors", lambda to, base, t: jlora.export.safetensors(to, base)),
        ("report", lambda to, base, t: jlora.report(base, t)),
        ("inspection.inspect", lambda to, base, t: jlora.inspection.inspect(t)),
        ("inspection.diff", lambda to, base, t: jlora.inspection.diff(t, t)),
    ],
)
def test_what_needs_numbers_says_so_under_jit(name, call, tmp_path):
    base = {"w": jnp.ones((4, 2))}
    spec = jlora.Spec(rank=1, alpha=1.0)
    own = jlora.Factors(jnp.ones((4, 1)), jnp.ones((1, 2)), spec)
    wanted = f"jlora.{name} needs numbers.* Return the arrays from the transformed"
    with pytest.raises(jlora.TreeError, match=wanted):
        jax.jit(lambda *trees: call(tmp_path / "out", *trees))(
            base, jlora.Trainable({"w": own})
        )
    assert not (tmp_path / "out").exists()


def test_save_then_load_is_identity(path):
    jlora.save(path, adapter())
    read = jlora.load(path)
    same(read, adapter())
    assert list(read.lora) == list(adapter().lora)
    assert list(read.full) == list(adapter().full)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(read))


def test_a_second_round_gives_the_same_bytes(saved, tmp_path):
    again = tmp_path / "again"
    jlora.save(again, jlora.load(saved))
    assert again.read_bytes() == saved.read_bytes()


def test_the_arguments_may_be_text_and_numpy(path):
    trainable = jax.tree.map(np.asarray, adapter())
    jlora.save(str(path), trainable)
    same(jlora.load(str(path)), adapter())


@pytest.mark.parametrize("method", [*METHODS, "rows", "parts"])
def test_every_method(path, method):
    def fn(params, ids):
        return params["embed"][ids] @ params["qkv"]

    params = {"embed": normal((5, 4)), "qkv": normal((4, 6))}
    rule = jlora.Rule("qkv", parts=jlora.FusedParts(-1, (2, 2, 2), (1, 0, 2)))
    config = {
        "rows": jlora.LoraConfig(rank=2, train=(jlora.TokenRows("embed", (1, 3)),)),
        "parts": jlora.LoraConfig(rank=2, rules=(rule,)),
    }.get(method) or jlora.LoraConfig(rank=2, method=method)
    plan = jlora.plan(fn, params, jnp.arange(3), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    trainable = jax.tree.map(lambda x: normal(x.shape, 3), trainable)
    jlora.save(path, trainable)
    same(jlora.load(path), trainable)
    about = json.loads(json.dumps(plan_to_dict(plan)))
    assert plan_from_dict(about) == plan
    same(jlora.merge(frozen, jlora.load(path)), jlora.merge(frozen, trainable))


def test_an_empty_adapter(path):
    jlora.save(path, jlora.Trainable())
    same(jlora.load(path), jlora.Trainable())


def test_paths_that_look_alike_stay_apart(path):
    spec = Spec(rank=1, alpha=1)
    factors = Factors(normal((2, 1)), normal((1, 3)), spec)
    names = ("w", "w.a", "w.full", ".", "__metadata__", "w\n", "\U0001f642", "../../x")
    trainable = jlora.Trainable(
        dict.fromkeys(names, factors), {f"{name}.a": normal((2,)) for name in names}
    )
    jlora.save(path, trainable)
    same(jlora.load(path), trainable)
    assert os.listdir(path.parent) == [path.name]


def test_wide_numbers_need_wide_jax(path):
    with jax.enable_x64(True):
        big = jlora.Trainable(full={"x": jnp.array([1e300]), "i": jnp.int64(2**53 + 1)})
        jlora.save(path, big)
        same(jlora.load(path), big)
    with pytest.raises(jlora.CheckpointError, match=r"'i\.full' is int64.*enable_x64"):
        jlora.load(path)


def test_sharded_adapters_are_saved_whole(path):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=auto)
    trainable = jlora.Trainable(full={"head": normal((16, 3))})
    jlora.save(path, jax.device_put(trainable, jax.NamedSharding(mesh, jax.P("x"))))
    same(jlora.load(path), trainable)


def test_big_endian_arrays_are_written_little(path):
    x = np.arange(3, dtype=">f4")
    jlora.save(path, jlora.Trainable(full={"x": x}))
    same(jlora.load(path), jlora.Trainable(full={"x": jnp.arange(3.0)}))


def test_what_is_no_adapter_is_not_saved(path):
    with pytest.raises(jlora.TreeError, match=r"writes a jlora\.Trainable, got dict"):
        jlora.save(path, {"w": jnp.ones(2)})
    keyed = {"w": jnp.ones((2, 2)), "rng": jax.random.key(0)}
    with pytest.raises(jlora.CheckpointError, match=r"'rng' is key.* jax\.random\.ke"):
        jlora.export.safetensors(path, keyed)
    with pytest.raises(jlora.PeftError, match=r"'rng' is key.*, which torch files do"):
        jlora.peft.save_base(path, keyed)
    half = jlora.Trainable(full={"k": jnp.zeros((2,), "int4")})
    with pytest.raises(
        jlora.CheckpointError, match=r"no such dtype: 'k\.full' is int4"
    ):
        jlora.save(path, half)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinity_are_not_saved(saved, value, dtype):
    bad = jlora.Trainable(full={"head": jnp.asarray([1, value], dtype)})
    with pytest.raises(
        jlora.CheckpointError, match=r"Not saved: NaN or infinity in head.full"
    ):
        jlora.save(saved, bad)
    same(jlora.load(saved), adapter())


def test_nan_in_a_file_is_refused(saved, monkeypatch):
    monkeypatch.setattr("jlora._io.adapter_file.not_finite", lambda named: [])
    jlora.save(saved, jlora.Trainable(full={"head": jnp.array([jnp.nan])}))
    monkeypatch.undo()
    with pytest.raises(jlora.CheckpointError, match=r"NaN or infinity in head\.full"):
        jlora.load(saved)


# The file is one that others can read, and the reader one that others can check.


def test_the_reference_implementation_reads_the_same(saved):
    with safetensors.safe_open(saved, "flax") as file:
        names = set(file.keys())
        w = file.get_tensor("params/mlp/~/l_0/w.a")
        metadata = file.metadata()
    assert "b é.%20 {x}.magnitude" in names
    np.testing.assert_array_equal(w, adapter().lora["params/mlp/~/l_0/w"].a)
    assert metadata["format"] == "jlora"
    spec = json.loads(metadata["adapter"])["lora"][0][1]
    assert (spec["rank"], spec["op"]) == (2, "conv")


def test_files_of_the_reference_implementation_are_read(path):
    named = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([True, False]),
        "é": np.zeros((0, 3), np.int64),
        "": np.asarray(1, np.uint8),
    }
    safetensors.numpy.save_file(named, path, {"k": "v"})
    with open(path, "rb") as file:
        header = _tensors.read_header(file)
        read = {name: _tensors.read(file, e) for name, e in header.tensors.items()}
    slots, _ = open_tensors(path)
    raw = b"".join(slots["a"].pieces())
    assert header.metadata == {"k": "v"}
    assert read.keys() == named.keys()
    for name, x in named.items():
        assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(read[name], x)
    assert raw == named["a"].tobytes()


# Damage.


def test_every_flipped_bit_is_found(path):
    jlora.save(path, jlora.Trainable(full={"x": jnp.arange(3.0)}))
    good = jlora.load(path)
    data = path.read_bytes()
    found = 0
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        try:
            same(jlora.load(path), good)
        except jlora.CheckpointError:
            found += 1
    assert found == len(data)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100, -1, -2, -100])
def test_a_cut_file_is_refused(saved, n):
    saved.write_bytes(saved.read_bytes()[:n])
    with pytest.raises(jlora.CheckpointError, match="not a whole safetensors file"):
        jlora.load(saved)


def test_a_longer_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(jlora.CheckpointError, match=r"bytes, its header describes"):
        jlora.load(saved)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 200_000_000])
def test_an_oversized_header_is_refused(saved, length):
    data = saved.read_bytes()
    saved.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(jlora.CheckpointError, match=f"its header would have {length}"):
        jlora.load(saved)


def test_the_wrong_byte_order_is_refused(saved):
    data = saved.read_bytes()
    saved.write_bytes(data[7::-1] + data[8:])
    with pytest.raises(jlora.CheckpointError, match="its header would have"):
        jlora.load(saved)
    fields, tensors = parts(data)
    saved.write_bytes(whole(fields, np.frombuffer(tensors, "u2").byteswap().tobytes()))
    with pytest.raises(jlora.CheckpointError, match="checksum does not match"):
        jlora.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": {}, "a": {}}',
        b'{"\\ud800": {}}',
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": []}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 1e3], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 1000000000000000], '
        b'"data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}}',
    ],
)
def test_a_wrong_header_is_refused(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(jlora.CheckpointError, match="not a whole safetensors file: "):
        jlora.load(path)


def test_a_header_that_would_fill_the_memory_is_refused(path):
    text = b'{"a":[' + b"[]," * 400_000 + b"0]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(jlora.CheckpointError, match="more brackets than"):
        jlora.load(path)


def test_a_deep_or_wrong_description_is_refused(saved):
    fields, data = parts(saved.read_bytes())
    for text in ("[" * 100_000, "nonsense", "{}", "[]", '{"lora": 1, "full": []}'):
        fields["__metadata__"]["adapter"] = text
        saved.write_bytes(whole(fields, data))
        with pytest.raises(jlora.CheckpointError):
            jlora.load(saved)


def test_other_files_and_other_versions_are_named(saved, path):
    fields, data = parts(saved.read_bytes())
    fields["__metadata__"]["version"] = "2"
    saved.write_bytes(whole(fields, data))
    with pytest.raises(jlora.CheckpointError, match=r"of version '2'.*reads version"):
        jlora.load(saved)
    safetensors.numpy.save_file({"w": np.ones(2)}, path, {"format": "pt"})
    with pytest.raises(jlora.CheckpointError, match=r"not an adapter of .*PEFT"):
        jlora.load(path)


SPEC = Spec(rank=2, alpha=1)
FACTORS = Factors(normal((3, 2)), normal((2, 4)), SPEC)


def with_settings(monkeypatch, path, fields):
    """Writes a file whose settings `jlora.save` would not write."""
    with monkeypatch.context() as patch:
        patch.setattr(Spec, "to_dict", lambda self: fields)
        jlora.save(path, jlora.Trainable({"w": FACTORS}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"rank": 3},
            "a of 'w' has shape (3, 2), a weight of shape (3, 4) at rank 3 needs",
        ),
        ({"rank": 0}, "'w': Spec: rank must be a positive integer, got 0"),
        ({"rank": True}, "rank must be a positive integer, got True"),
        ({"rank": "2"}, "rank must be a positive integer, got '2'"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"alpha": float("inf")}, "alpha must be a positive number, got inf"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": -1.5}, "alpha must be a positive number, got -1.5"),
        ({"alpha": "1"}, "alpha must be a positive number, got '1'"),
        ({"alpha": 1e308}, "a scale that float32 holds, got 1e+308 at rank 2"),
        ({"alpha": 10**400}, "a scale that float32 holds, got 1000"),
        ({"alpha": 1e-38}, "a scale that float32 holds, got 1e-38 at rank 2"),
        ({"dropout": 1.0}, "dropout of 'w' is 1.0"),
        ({"rslora": 1}, "rslora of 'w' is 1"),
        ({"op": "x"}, "op of 'w' is 'x'"),
        ({"method": "x"}, "method of 'w' is 'x'"),
        ({"axes": Axes((), (0,), (0,))}, "axes of 'w' is"),
        ({"axes": Axes((), (0,), (1, 2))}, "arrays of 'w' do not fit"),
        ({"axes": Axes((), (0, "1"), (2,))}, "axes of 'w' is"),
        ({"parts": FusedParts(1, (2, 2), (0, 0))}, "rank must be a positive integer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(path, monkeypatch, change, text):
    told = {
        name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x
        for name, x in change.items()
    }
    with_settings(monkeypatch, path, {**SPEC.to_dict(), **told})
    with pytest.raises(jlora.CheckpointError, match=re.escape(text)):
        jlora.load(path)
    # What cannot be loaded cannot be made, or else it cannot be saved.
    with pytest.raises(jlora.JloraError, match=re.escape(text.removeprefix("'w': "))):
        jlora.save(path, jlora.Trainable({"w": with_spec(**change)}))


def with_spec(**change):
    return dataclasses.replace(FACTORS, spec=dataclasses.replace(SPEC, **change))


UNSAVED = {
    "a misshapen B": (
        {"w": Factors(normal((3, 2)), normal((3, 4)), SPEC)},
        "b of 'w' has shape (3, 4), a weight of shape (3, 4) at rank 2 needs (2, 4)",
    ),
    "too few axes": (
        {"w": Factors(normal((3,)), normal((2, 4)), SPEC)},
        "the arrays of 'w' do not fit its settings",
    ),
    "a stack of adapters": (
        {"w": Factors(normal((5, 3, 2)), normal((5, 2, 4)), SPEC)},
        "of a stack, take each of jlora.adapters.unstack(x)",
    ),
    "no B": ({"w": Factors(normal((3, 2)), None, SPEC)}, "the arrays of 'w' do not"),
    "no magnitude": (
        {
            "w": Factors(
                normal((3, 2)), normal((2, 4)), dataclasses.replace(SPEC, method="dora")
            )
        },
        "magnitude of 'w' has shape None",
    ),
    "a magnitude too many": (
        {"w": Factors(normal((3, 2)), normal((2, 4)), SPEC, normal((4,)))},
        "magnitude of 'w' has shape (4,)",
    ),
    "whole numbers": (
        {"w": Factors(jnp.ones((3, 2), "int32"), normal((2, 4)), SPEC)},
        "a of 'w' is int32, it must be a floating-point array",
    ),
    "an alpha of NumPy": (
        {"w": with_spec(alpha=np.int8(4))},
        "alpha of 'w' is",
    ),
    "a list among the settings": (
        {
            "w": Factors(
                normal((3, 2)), normal((2, 4)), dataclasses.replace(SPEC, rows=[1])
            )
        },
        "the settings of 'w' are not readable",
    ),
    "only shapes": (
        jax.eval_shape(lambda: {"w": FACTORS}),
        "'a' of 'w' is a shape, without numbers",
    ),
    "no factors": ({"w": normal((3, 4))}, "'w' holds ArrayImpl, not Factors"),
    "a number as path": ({3: FACTORS}, "the path 3 is not a text"),
    "half a character": ({"\ud83d": FACTORS}, "the path '\\ud83d' is not a text"),
}


def in_a_loop(path, trainable):
    with jlora.checkpoint.Checkpoints(path) as steps:
        steps.save(trainable, step=0)


SAVES = {
    "file": (jlora.save, jlora.CheckpointError),
    "orbax": (jlora.checkpoint.save, jlora.CheckpointError),
    "loop": (in_a_loop, jlora.CheckpointError),
    "peft": (jlora.peft.save, jlora.PeftError),
}


@pytest.mark.parametrize("what", UNSAVED)
@pytest.mark.parametrize("form", SAVES)
def test_an_adapter_that_could_not_be_loaded_is_not_saved(tmp_path, what, form):
    lora, text = UNSAVED[what]
    save, fault = SAVES[form]
    with pytest.raises(fault, match=re.escape(text)):
        save(tmp_path / "x", jlora.Trainable(lora))
    assert form == "loop" or os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("full", "text"), [({"x": 3.0}, "'x' is float, not an"), ({1: FACTORS.a}, "path 1")]
)
def test_a_full_leaf_that_could_not_be_loaded_is_not_saved(path, full, text):
    with pytest.raises(jlora.CheckpointError, match=text):
        jlora.save(path, jlora.Trainable(full=full))


def test_unknown_and_missing_settings_are_refused(path, monkeypatch):
    known = SPEC.to_dict()
    for fields in ({**known, "new": 1}, {"axes": known["axes"]}, {}, {"axes": 3}):
        with_settings(monkeypatch, path, fields)
        with pytest.raises(jlora.CheckpointError, match="settings of 'w' are not"):
            jlora.load(path)


def test_missing_and_left_over_arrays_are_listed(path, monkeypatch):
    f = Factors(normal((3, 2)), normal((2, 4)), SPEC)
    about = {"lora": [["v", SPEC.to_dict()]], "full": ["head"]}
    with monkeypatch.context() as patch:
        patch.setattr("jlora._io.adapter_file.describe", lambda trainable: about)
        jlora.save(path, jlora.Trainable({"w": f}))
    with pytest.raises(jlora.CheckpointError) as caught:
        jlora.load(path)
    for text in (
        "array 'full' of 'head' is missing",
        "array 'a' of 'w' belongs to nothing",
        "arrays of 'v' do not fit",
    ):
        assert text in str(caught.value)


def mutations(data, n, seed):
    """Damage of many kinds: bits, cuts, insertions, JSON tokens, whole headers."""
    draw = random.Random(seed)
    tokens = [b"0", b"-1", b"1e9", b"{}", b"[]", b"null", b'"', b",", b"\0", b"9" * 20]
    length = int.from_bytes(data[:8], "little")
    for _ in range(n):
        out = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 5))):
            end = 8 + length if draw.random() < 0.8 else len(out)
            at = draw.randrange(max(min(end, len(out)), 1))
            match draw.randrange(6):
                case 0:
                    out[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    del out[at : at + draw.choice((1, 4, 50, 5000))]
                case 2:
                    out[at:at] = draw.choice(tokens)
                case 3:
                    token = draw.choice(tokens)
                    out[at : at + len(token)] = token
                case 4:
                    sizes = (0, 1, length - 1, length + 8, 2**31, 2**64 - 1)
                    out[:8] = draw.choice(sizes).to_bytes(8, "little")
                case 5:
                    start = draw.randrange(len(out) + 1)
                    out[at:at] = out[start : start + draw.randrange(64)]
        changed = length + len(out) - len(data)
        if draw.random() < 0.5 and changed > 0:  # a false header of honest length
            out[:8] = changed.to_bytes(8, "little")
        yield bytes(out)


def fuzz(path, n, seed):
    """Loads damaged files; returns how many were refused and how many read."""
    small = jlora.Trainable(
        {"w": Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), SPEC)}, {"h": jnp.ones(2)}
    )
    jlora.save(path, small)
    good, data = jlora.load(path), path.read_bytes()
    refused = read = 0
    for mutant in mutations(data, n, seed):
        path.write_bytes(mutant)
        try:
            same(jlora.load(path), good)
            read += 1
        except jlora.CheckpointError:
            refused += 1
    return refused, read


@pytest.mark.once
def test_two_thousand_damaged_files_are_refused_in_words(path):
    refused, read = fuzz(path, 2_000, seed=0)
    assert refused + read == 2_000
    assert refused > 1_850


@pytest.mark.once
def test_what_the_reader_takes_the_reference_implementation_takes(path):
    named = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 1), np.int8)}
    safetensors.numpy.save_file(named, path)
    taken = 0
    for mutant in mutations(path.read_bytes(), 1_000, seed=1):
        path.write_bytes(mutant)
        try:
            with open(path, "rb") as file:
                header = _tensors.read_header(file)
                ours = {k: _tensors.read(file, e) for k, e in header.tensors.items()}
        except jlora.CheckpointError:
            continue
        taken += 1
        theirs = dict(safetensors.deserialize(mutant))
        assert theirs.keys() == ours.keys()
        for name, x in ours.items():
            assert bytes(theirs[name]["data"]) == x.tobytes()
    assert taken


# The system refuses.


def test_a_missing_file_and_a_directory_are_named(path, tmp_path):
    with pytest.raises(jlora.CheckpointError, match=r"adapter.*No such file"):
        jlora.load(path)
    with pytest.raises(jlora.CheckpointError, match="is a directory"):
        jlora.load(tmp_path)
    with pytest.raises(jlora.CheckpointError, match=r"Not saved: .* is a directory"):
        jlora.save(tmp_path, adapter())
    with pytest.raises(jlora.CheckpointError, match=r"Not saved.*No such file"):
        jlora.save(tmp_path / "no" / "where", adapter())
    with pytest.raises(jlora.CheckpointError, match="cannot be read"):
        jlora.load("a\0b")
    assert os.listdir(tmp_path) == []


def test_pipes_and_devices_are_not_waited_for(path):
    os.mkfifo(path)
    for other in (path, "/dev/null"):
        with pytest.raises(jlora.CheckpointError, match="is not a regular file"):
            jlora.load(other)
        with pytest.raises(jlora.CheckpointError, match="is not a regular file"):
            jlora.save(other, adapter())


def test_a_link_is_followed(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    jlora.save(link, adapter())
    assert link.is_symlink()
    same(jlora.load(path), adapter())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do all")
def test_no_permission(saved, tmp_path):
    saved.chmod(0)
    with pytest.raises(jlora.CheckpointError, match="Permission denied"):
        jlora.load(saved)
    tmp_path.chmod(0o500)
    with pytest.raises(jlora.CheckpointError, match=r"Not saved.*Permission denied"):
        jlora.save(tmp_path / "new", adapter())
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC])
def test_what_the_system_refuses_is_told(saved, code, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{name}", refuse)
            with pytest.raises(
                jlora.CheckpointError,
                match=rf"Not saved.*{os.strerror(code)}.*still there",
            ):
                jlora.save(saved, jlora.Trainable())
        same(jlora.load(saved), adapter())
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(jlora.CheckpointError, match=os.strerror(code)):
            jlora.load(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_leaves_the_file_that_was_there(saved):
    large = jlora.Trainable(full={"x": np.ones(100_000, np.float32)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(jlora.CheckpointError, match=r"Not saved.*File too large"):
            jlora.save(saved, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    same(jlora.load(saved), adapter())
    assert os.listdir(saved.parent) == [saved.name]


def test_an_error_of_the_program_leaves_the_file_that_was_there(saved):
    with contextlib.suppress(KeyboardInterrupt), replacing(saved) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    same(jlora.load(saved), adapter())
    assert os.listdir(saved.parent) == [saved.name]


# A program that saves for ever, in processes that are killed at random moments.
KILLED = """
import os, random, signal, sys, time, warnings
import numpy as np
import jlora
warnings.simplefilter("ignore")  # the children start no device
path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)

def save(n):
    x = np.full(50_000, n, np.float32)
    jlora.save(path, jlora.Trainable(full={"x": x, "n": np.int32(n)}))

save(0)
began = time.perf_counter()
save(1)
one = time.perf_counter() - began  # on a busy machine a save takes longer
for _ in range(kills):
    child = os.fork()
    if not child:
        n = 1
        while True:
            n += 1
            save(n)
    time.sleep(draw.uniform(0.5, 6) * one)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if os.path.exists(path):
        print(path + f".{_}", flush=True)
        with open(path, "rb") as a, open(path + f".{_}", "wb") as b:
            b.write(a.read())
"""


def kill_savers(path, kills, seed=0):
    """Returns what was to be read after each kill."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(kills), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    return done.stdout.split("\n")[:-1]


@pytest.mark.once
def test_a_killed_save_leaves_a_whole_file(path):
    left = kill_savers(path, kills=10)
    assert len(left) == 10
    for file in left:
        full = jlora.load(file).full
        assert bool((full["x"] == full["n"].astype(jnp.float32)).all())
