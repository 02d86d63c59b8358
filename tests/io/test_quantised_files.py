"""Quantised models in files: written, read, merged, hashed, and refused if damaged."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import export, files
from jlora._io import coded, tensors
from jlora._io.models import open_model
from tests.helpers import normal

KINDS = {
    "nf4": {"kind": "nf4"},
    "double": {"kind": "nf4", "double": True},
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "block": 32, "scale_dtype": "bfloat16"},
}
by_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def params():
    return {
        "up": {"kernel": normal((130, 6), 0, "bfloat16"), "bias": jnp.zeros(6)},
        "down": {"kernel": normal((3, 128, 8), 1)},
        "odd": {"kernel": normal((5, 7), 2)},
    }


def same(a, b):
    (ours, tree), (theirs, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert tree == other
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def adapter(seed=3):
    spec = jlora.Spec(rank=2, alpha=4)
    own = jlora.Factors(normal((130, 2), seed), normal((2, 6), seed + 1), spec)
    return jlora.Trainable({"up/kernel": own}, {"up/bias": normal((6,), seed)})


@by_kind
def test_what_is_saved_is_read(options, tmp_path):
    codes = jlora.quantize(params(), **options)
    export.safetensors(tmp_path / "a.safetensors", codes)
    export.orbax(tmp_path / "orbax", codes)
    same(files.read_params(tmp_path / "a.safetensors"), codes)
    same(files.read_params(tmp_path / "orbax"), codes)
    export.safetensors(tmp_path / "b.safetensors", codes)
    first, again = (tmp_path / f"{n}.safetensors" for n in "ab")
    assert first.read_bytes() == again.read_bytes()


def test_files_hold_two_codes_of_native_four_bits_in_a_byte(tmp_path):
    native = jlora.quantize(params(), storage="native")
    packed = jlora.quantize(params(), storage="packed")
    export.safetensors(tmp_path / "a.safetensors", native)
    export.orbax(tmp_path / "orbax", native)
    for name in ("a.safetensors", "orbax"):
        same(files.read_params(tmp_path / name), packed)


@by_kind
def test_quantised_as_it_is_read_or_from_file_to_file(options, tmp_path):
    """Both are what `jlora.quantize` gives in memory, bit for bit."""
    codes = jlora.quantize(params(), **options)
    export.safetensors(tmp_path / "dense.safetensors", params())
    export.orbax(tmp_path / "orbax", params())
    export.quantize_files(
        tmp_path / "dense.safetensors", tmp_path / "codes.safetensors", **options
    )
    same(files.read_params(tmp_path / "codes.safetensors"), codes)
    for name in ("dense.safetensors", "orbax"):
        like = jax.eval_shape(params)
        same(files.read_params(tmp_path / name, like, quantize=options), codes)


@by_kind
def test_slices_of_a_large_leaf_are_the_same_codes(options, tmp_path, monkeypatch):
    monkeypatch.setattr("jlora._io.placing._SLICE", 512)
    monkeypatch.setattr("jlora._io.placing._PAGES", 1)
    export.safetensors(tmp_path / "dense.safetensors", params())
    read = files.read_params(tmp_path / "dense.safetensors", quantize=options)
    same(read, jlora.quantize(params(), **options))


def test_a_plan_says_which_leaves_and_axes(tmp_path):
    own = {"up": normal((128, 64), 0), "head": normal((64, 3), 1)}

    def fn(p, x):
        return jnp.tanh(x @ p["up"].T) @ p["head"]

    export.safetensors(tmp_path / "dense.safetensors", own | {"up": own["up"].T})
    own["up"] = own["up"].T
    plan = jlora.plan(fn, own, jnp.ones((1, 128)), config=jlora.LoraConfig(rank=2))
    codes = jlora.quantize(own, plan)
    assert codes["up"].blocks == (1, 64)
    same(
        files.read_params(tmp_path / "dense.safetensors", quantize="nf4", plan=plan),
        codes,
    )
    with pytest.raises(jlora.ConfigError, match="give quantize= with it"):
        files.read_params(tmp_path / "dense.safetensors", plan=plan)


def test_a_quantised_template_says_how(tmp_path):
    like = jax.eval_shape(lambda: jlora.quantize(params(), kind="int8"))
    export.safetensors(tmp_path / "dense.safetensors", params())
    read = files.read_params(tmp_path / "dense.safetensors", like)
    same(read, jlora.quantize(params(), kind="int8"))


def test_shards_of_a_mesh_hold_whole_blocks(tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    codes = {"w": normal((512, 6), 0)}
    export.safetensors(tmp_path / "codes.safetensors", jlora.quantize(codes))
    where = jax.NamedSharding(mesh, jax.P("x", None))
    like = {"w": jax.ShapeDtypeStruct((512, 6), "float32", sharding=where)}
    read = files.read_params(tmp_path / "codes.safetensors", like)["w"]
    assert read.codes.sharding.spec == jax.P("x", None)
    assert read.scales.sharding.spec == jax.P("x", None)
    held = jax.device_get(read)
    np.testing.assert_array_equal(held.dense(), jlora.quantize(codes)["w"].dense())
    odd = jax.NamedSharding(mesh, jax.P(None, "x"))
    like = {"w": jax.ShapeDtypeStruct((512, 6), "float32", sharding=odd)}
    with pytest.raises(jlora.TreeError, match="'w' cannot lie as its sharding says"):
        files.read_params(tmp_path / "codes.safetensors", like)


@pytest.mark.parametrize("quantised", [True, False])
def test_merged_from_file_to_file_as_in_memory(quantised, tmp_path):
    codes = jlora.quantize(params(), kind="int8")
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    export.safetensors(base, codes)
    if not quantised:
        export.merge_files(base, adapter(), out)
        same(files.read_params(out), jlora.merge(codes, adapter()))
        return
    with pytest.warns(UserWarning, match=r"'up/kernel' \(int8, \d+% of the update"):
        export.merge_files(base, adapter(), out, requantize=True)
    with pytest.warns(UserWarning, match="quantised again"):
        same(files.read_params(out), jlora.merge(codes, adapter(), requantize=True))


def test_fingerprint_tells_codes_from_other_codes_and_from_dense(tmp_path):
    base = params()
    codes = jlora.quantize(base)
    own = jlora.checkpoint.fingerprint(codes)
    assert own == jlora.checkpoint.fingerprint(jlora.quantize(base, storage="native"))
    export.safetensors(tmp_path / "base.safetensors", codes)
    read = files.read_params(tmp_path / "base.safetensors")
    assert own == jlora.checkpoint.fingerprint(read)
    jlora.checkpoint.save(tmp_path / "run", adapter(), params=codes)
    jlora.checkpoint.restore(tmp_path / "run", params=read)
    others = {
        r"'down/kernel' is float32\[3, 128, 8\], was nf4 of .*kind='nf4'": base,
        r"int8 of float32.*was nf4 of": jlora.quantize(base, kind="int8"),
        "'odd/kernel' has other numbers": {
            **codes,
            "odd": jlora.quantize({"kernel": -base["odd"]["kernel"]}),
        },
    }
    for told, other in others.items():
        with pytest.raises(jlora.CheckpointError, match=told):
            jlora.checkpoint.restore(tmp_path / "run", params=other)
    jlora.checkpoint.save(tmp_path / "dense", adapter(), params=base)
    with pytest.raises(jlora.CheckpointError, match="give the dense weights"):
        jlora.checkpoint.restore(tmp_path / "dense", params=codes)


def test_codes_and_dense_weights_are_compared_as_what_they_mean(tmp_path):
    codes = jlora.quantize(params(), kind="int8")
    export.safetensors(tmp_path / "a.safetensors", codes)
    export.safetensors(
        tmp_path / "b.safetensors", jlora.merge(codes, jlora.Trainable())
    )
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert not jlora.inspection.diff_files(a, a)
    told = jlora.inspection.diff_files(a, b)
    assert {d.what for d in told} == {"int8 → dense"}


# --- damaged files ---


def _file(folder, change=lambda named, about: None, key="up/kernel"):
    """Writes a small quantised model, with a change to its tensors or description."""
    codes = jlora.quantize({"up": {"kernel": normal((128, 6), 0)}}, double=True)
    good = folder / "good.safetensors"
    export.safetensors(good, codes)
    with open(good, "rb") as file:
        header = tensors.read_header(file)
        named = {k: tensors.read(file, x) for k, x in header.tensors.items()}
    about = json.loads(header.metadata[coded.KEY])
    change(named, about.get(key, about))
    bad = folder / "bad.safetensors"
    metadata = {coded.KEY: json.dumps(about)}
    tensors.write(bad, named, lambda name: [tensors.raw(named[name])], metadata)
    return bad


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(_, about):
        for key in path:
            about = about[key]
        about[last] = value

    return change


CODES, SCALES = "up/kernel.codes", "up/kernel.scales.codes"
DAMAGES = {
    "a missing tensor": (lambda named, _: named.pop(SCALES), f"'{SCALES}' is missing"),
    "scales of other shape": (
        lambda named, _: named.update({SCALES: named[SCALES][:1]}),
        r"scales: scales|its scales|need \[2, 6\]",
    ),
    "codes of other shape": (
        lambda named, _: named.update({CODES: named[CODES][:7]}),
        "need|packed",
    ),
    "codes of other dtype": (
        lambda named, _: named.update({CODES: named[CODES].astype("int8")}),
        "codes of int8, nf4 has uint8",
    ),
    "scales of integers": (
        lambda named, _: named.update(
            {"up/kernel.scales.scales": np.ones((2, 1), "int32")}
        ),
        "scales of int32",
    ),
    "an unknown kind": (_set("kind", "nf5"), "unknown kind 'nf5'"),
    "blocks of none": (_set("blocks", [0, 1]), r"blocks \(0, 1\) for 2 axes"),
    "blocks of words": (_set("blocks", ["64", 1]), "is described by"),
    "large blocks": (_set("blocks", [10**12, 1]), "is described by"),
    "too few blocks": (_set("blocks", [64]), r"blocks \(64,\) for 2 axes"),
    "no dtype": (_set("dtype", "int8"), "stands for an array of 'int8'"),
    "packed elsewhere": (_set("packing", [-9, 64, 0]), "packed as"),
    "packed in pieces": (_set("packing", [-2, 63, 0]), "packed as"),
    "packed by nothing": (_set("packing", [-2, 0, 0]), "packed as"),
    "packed oddly": (_set("packing", "yes"), "packed as 'yes'"),
    "more fields": (_set("more", 1), "is described by"),
    "scales thrice": (
        _set("scales", "scales", {"kind": "int8", "blocks": [1, 1], "dtype": "float32",
                                  "packing": None, "scales": None}),
        "more than twice",
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_description_is_refused(damage, tmp_path):
    change, told = damage
    bad = _file(tmp_path, change)
    for read in (open_model, files.read_params):
        with pytest.raises(jlora.CheckpointError, match=told) as error:
            read(bad)
        assert "bad.safetensors" in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "told"),
    [("[1]", r"it is \[1\]"), ("{", "it is not JSON"), ('{"w": 1}', "described by 1")],
)
def test_a_description_of_something_else_is_refused(text, told, tmp_path):
    file = tmp_path / "bad.safetensors"
    x = np.ones(2, np.float32)
    tensors.write(file, {"x": x}, lambda _: [tensors.raw(x)], {coded.KEY: text})
    with pytest.raises(jlora.CheckpointError, match=told):
        open_model(file)


@pytest.mark.once
def test_any_cut_description_is_refused_or_read(tmp_path):
    """Whatever a description is, what comes is a CheckpointError or a model."""
    random = np.random.default_rng(0)
    good = _file(tmp_path)
    with open(good, "rb") as file:
        header = tensors.read_header(file)
        named = {k: tensors.read(file, x) for k, x in header.tensors.items()}
    text = header.metadata[coded.KEY]
    refused = 0
    for _ in range(200):
        at = random.integers(len(text))
        new = text[:at] + chr(random.integers(32, 127)) + text[at + 1 :]
        try:
            found = coded.described_in(new, named)
        except jlora.CheckpointError:
            refused += 1
        else:
            for q in found.values():
                jax.tree.map(lambda name: named[name], q).dense()
    assert refused > 150


@pytest.mark.once
def test_a_damaged_description_beside_orbax_is_refused(tmp_path):
    export.orbax(tmp_path / "model", jlora.quantize({"w": normal((128, 6), 0)}))
    file = tmp_path / "model" / f"{coded.KEY}.json"
    file.write_text(file.read_text().replace("64", "32"))
    with pytest.raises(jlora.CheckpointError, match=r"need \[4, 6\]"):
        files.read_params(tmp_path / "model")


def test_what_cannot_be_quantised_from_a_file(tmp_path):
    file, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    export.safetensors(file, {"w": normal((128, 6), 0).at[0, 0].set(jnp.nan)})
    with pytest.raises(jlora.TreeError, match="'w' holds NaN or infinity"):
        files.read_params(file, quantize="nf4")
    with pytest.raises(jlora.TreeError, match="'w' holds NaN or infinity"):
        export.quantize_files(file, out)
    with pytest.raises(jlora.ConfigError, match="kind must be one of"):
        files.read_params(file, quantize="nf5")
    with pytest.raises(jlora.ConfigError, match=r"options of jlora\.quantize, got"):
        files.read_params(file, quantize={"bits": 4})
    export.safetensors(file, jlora.quantize({"w": normal((128, 6), 0)}))
    with pytest.raises(
        jlora.TreeError, match=r"quantised already|nothing was quantised"
    ):
        export.quantize_files(file, out)
    assert not os.path.lexists(out)
    with pytest.raises(jlora.CheckpointError, match="'v' is missing"):
        files.read_params(file, {"v": jnp.ones((128, 6))})


# --- memory ---


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
def test_reading_holds_the_codes_and_a_few_leaves(tmp_path):
    """Of 64 leaves of 2 MiB, quantised one by one; in memory together they are 128."""
    script = f"""
    import resource
    import jax, numpy as np
    import jlora
    from jlora._io import tensors
    from jlora._io.models import Model, write

    n, names = 1024, [f"w{{i}}" for i in range(64)]
    w = np.random.default_rng(0).standard_normal((n, n)).astype("float16")
    like = {{name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name in names}}
    file = {str(tmp_path / "model.safetensors")!r}
    write(file, Model(like, lambda _: w, lambda _: [tensors.raw(w)], {{}}))
    jlora.quantize({{"w": w}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = jlora.files.read_params(file, quantize="nf4")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(sum(x.nbytes for x in jax.tree.leaves(read)))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    grown, codes = (int(n) / 2**20 for n in run.stdout.split())
    grown *= 1024
    assert codes == pytest.approx(36, abs=1)
    assert grown < codes + 50, run.stdout
