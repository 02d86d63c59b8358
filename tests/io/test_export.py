"""Merged models for others: what they read is what `merge` gives."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import jlora
from jlora import export
from jlora._io import models as _models
from jlora._io.models import open_model
from jlora.factors import Axes, Factors, Spec
from tests.helpers import normal, same
from tests.io.helpers import orbax_fails, read_flat

PARAMS = {
    "embed": normal((7, 4), 1),
    "dense": {"kernel": normal((4, 2, 3), 2, "bfloat16"), "bias": jnp.zeros(3)},
    "experts": normal((2, 4, 5), 3, "float16"),
    "head": normal((4, 2), 4),
    "steps": jnp.int32(7),
}
ADAPTER = jlora.Trainable(
    {
        "dense/kernel": Factors(
            normal((4, 2), 5),
            normal((2, 2, 3), 6),
            Spec(rank=2, alpha=1, axes=Axes((), (0,), (1, 2))),
        ),
        "experts": Factors(
            normal((2, 4, 1), 7),
            normal((2, 1, 5), 8),
            Spec(rank=1, alpha=3, axes=Axes((0,), (1,), (2,))),
        ),
        "embed": Factors(
            normal((7, 2), 9),
            normal((2, 4), 1),
            Spec(rank=2, alpha=2, method="dora", op="embedding"),
            normal((4,), 2),
        ),
    },
    {"head": normal((4, 2), 5, "bfloat16")},
)


def flat(tree):
    return jlora.paths.flatten(tree)[0]


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "base.safetensors"
    export.safetensors(file, PARAMS)
    return file


# Whole models.


def test_safetensors_holds_every_leaf_under_its_path(base):
    same(read_flat(base), flat(PARAMS))
    theirs = safetensors.safe_open(base, "flax")
    same(theirs.get_tensor("dense/kernel"), PARAMS["dense"]["kernel"])


def test_sharded_parameters_are_written_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w = normal((16, 2))
    placed = jax.device_put(w, jax.NamedSharding(mesh, jax.P("x")))
    export.safetensors(tmp_path / "m", {"w": placed})
    same(read_flat(tmp_path / "m"), {"w": w})


def test_what_is_no_array_is_named(tmp_path):
    with pytest.raises(jlora.CheckpointError, match="not arrays: 'act'"):
        export.safetensors(tmp_path / "m", {"w": jnp.ones(2), "act": "gelu"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "half\ud83d"])
def test_a_name_that_safetensors_cannot_hold_is_refused(tmp_path, name):
    with pytest.raises(jlora.CheckpointError, match="cannot be called"):
        export.safetensors(tmp_path / "x", {name: jnp.ones(2), "w": jnp.ones(2)})
    assert os.listdir(tmp_path) == []


def test_orbax_reads_what_was_written(tmp_path):
    place = tmp_path / "model"
    export.orbax(place, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(place, PARAMS), PARAMS)
    same(read_flat(place), flat(PARAMS))
    with pytest.raises(jlora.CheckpointError, match=r"already there.*overwrite=True"):
        export.orbax(place, PARAMS)
    export.orbax(place, {"w": jnp.ones(1)}, overwrite=True)
    same(read_flat(place), {"w": jnp.ones(1)})


# From disk to disk.


def test_merging_files_is_merging_trees(base, tmp_path):
    out = tmp_path / "merged.safetensors"
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    export.merge_files(base, ADAPTER, out, progress=progress)
    same(read_flat(out), flat(jlora.merge(PARAMS, ADAPTER)))
    assert sorted(seen) == sorted(flat(PARAMS))


def test_a_merge_never_replaces_its_base(base, tmp_path):
    before = base.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(base)
    (tmp_path / "folder").symlink_to(tmp_path)
    for out in (
        base,
        os.path.relpath(base),
        tmp_path / "link.safetensors",
        tmp_path / "folder" / base.name,
    ):
        with pytest.raises(
            jlora.CheckpointError, match=r"is the input .* another name"
        ):
            export.merge_files(base, ADAPTER, out)
    with pytest.raises(jlora.CheckpointError, match="is the input"):
        export.merge_files(tmp_path / "link.safetensors", ADAPTER, base)
    assert base.read_bytes() == before
    lone = tmp_path / "model"
    lone.mkdir()
    base.rename(lone / "model.safetensors")
    for out in (lone / "merged.safetensors", lone / "a" / "b", lone):
        with pytest.raises(jlora.CheckpointError, match=r"(lies in|is) the input"):
            export.merge_files(lone, ADAPTER, out)
    with pytest.raises(jlora.CheckpointError, match="contains the input"):
        export.merge_files(lone, ADAPTER, tmp_path)
    export.merge_files(lone, ADAPTER, tmp_path / "modelled")  # begins alike, no more


def test_a_merge_never_replaces_a_shard_or_what_a_link_leads_to(tmp_path):
    shards = tmp_path / "shards"
    named = {name: np.ones(2, np.float32) for name in "ab"}
    jlora.peft.save_base(shards, named, max_shard_bytes=8)
    index = shards / "model.safetensors.index.json"
    shard = shards / "model-00001-of-00002.safetensors"
    adapter = jlora.Trainable()
    for base in (index, shards):
        with pytest.raises(jlora.CheckpointError, match=r"(is|lies in) the input"):
            export.merge_files(base, adapter, shard)
    blob, snapshot = tmp_path / "blob", tmp_path / "snapshot"
    export.safetensors(blob, named)
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(blob)
    with pytest.raises(jlora.CheckpointError, match="is the input"):
        export.merge_files(snapshot, adapter, blob)


@pytest.mark.parametrize("part", ["factors", "full"])
def test_a_merge_that_overflows_is_refused_and_leaves_nothing(base, tmp_path, part):
    out, own = tmp_path / "merged.safetensors", ADAPTER.lora["experts"]
    far = jlora.Trainable({"experts": dataclasses.replace(own, b=own.b * 1e6)})
    text = r"'experts' would hold .*, but float16 holds at most 65504: convert the base"
    if part == "full":
        far, text = jlora.Trainable(full={"head": jnp.full((4, 2), jnp.nan)}), "head"
    with pytest.raises(jlora.MergeError, match=text):
        export.merge_files(base, far, out)
    assert os.listdir(tmp_path) == [base.name]


@pytest.mark.parametrize("bound", [0, 80])
def test_a_base_of_orbax_is_read_a_few_leaves_at_once(tmp_path, monkeypatch, bound):
    at_once = []
    restore = ocp.PyTreeCheckpointer.restore

    def spy(*args, **kwargs):
        tree = restore(*args, **kwargs)
        at_once.append(
            [x.nbytes for x in jax.tree.leaves(tree) if x is not ocp.PLACEHOLDER]
        )
        return tree

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", spy)
    monkeypatch.setattr(_models, "_GROUP", bound)
    listed = {"trees": [PARAMS, {"w": jnp.ones(2), "none": None}]}
    export.orbax(tmp_path / "base", listed)
    lora = {f"trees/0/{path}": f for path, f in ADAPTER.lora.items()}
    adapter = jlora.Trainable(lora, {"trees/0/head": ADAPTER.full["head"]})
    export.merge_files(tmp_path / "base", adapter, tmp_path / "out")
    same(read_flat(tmp_path / "out"), flat(jlora.merge(listed, adapter)))
    largest = PARAMS["embed"].nbytes
    assert all(sum(sizes) <= largest for sizes in at_once)
    assert [len(sizes) for sizes in at_once] == ([1, 1, 3, 1, 1] if bound else [1] * 6)


@orbax_fails
def test_a_damaged_base_of_orbax_leaves_nothing_behind(tmp_path):
    place = tmp_path / "base"
    export.orbax(place, PARAMS)
    opened = open_model(place)
    for file in place.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(jlora.CheckpointError, match="base' cannot be read: ValueError"):
        opened.read("embed")
    with pytest.raises(jlora.CheckpointError, match=r"base' .* missing or damaged"):
        export.merge_files(place, ADAPTER, tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


def test_an_orbax_checkpoint_of_more_than_arrays_is_no_model(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "words", {"act": "gelu", "w": np.ones(1)})
    with pytest.raises(jlora.CheckpointError, match="not arrays: 'act'"):
        open_model(tmp_path / "words")


def test_wide_weights_keep_their_width(tmp_path):
    w = np.random.default_rng(0).normal(size=(3, 4))
    f = Factors(normal((3, 1)), normal((1, 4)), Spec(rank=1, alpha=1))
    export.safetensors(tmp_path / "base", {"w": w})
    export.merge_files(tmp_path / "base", jlora.Trainable({"w": f}), tmp_path / "out")
    merged = read_flat(tmp_path / "out")["w"]
    assert merged.dtype == np.float64
    wide = np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64)
    np.testing.assert_allclose(merged, w + wide, rtol=1e-12)


def shard(folder, weight_map, **files):
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_base(tmp_path):
    w, v = np.ones((3, 4), np.float32), np.ones(2, np.float32)
    places = {"w": "one.safetensors", "v": "two.safetensors"}
    shard(tmp_path, places, one={"w": w}, two={"v": v})
    f = Factors(normal((3, 1)), normal((1, 4)), Spec(rank=1, alpha=1))
    out = tmp_path.with_name("merged")
    export.merge_files(tmp_path, jlora.Trainable({"w": f}), out)
    same(read_flat(out), jlora.merge({"v": v, "w": w}, jlora.Trainable({"w": f})))
    index = tmp_path / "model.safetensors.index.json"
    for part in ("one", "two"):
        with pytest.raises(jlora.CheckpointError, match="is the input"):
            export.merge_files(
                index, jlora.Trainable(), tmp_path / f"{part}.safetensors"
            )


def test_a_file_beside_an_index_of_its_name_counts(tmp_path):
    shard(tmp_path, {"w": "one.safetensors"}, one={"w": np.ones(2)})
    safetensors.numpy.save_file({"v": np.ones(3)}, tmp_path / "model.safetensors")
    assert list(open_model(tmp_path).shapes) == ["v"]
    assert list(open_model(tmp_path / "model.safetensors.index.json").shapes) == ["w"]


def test_a_model_to_unpickle_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(jlora.CheckpointError, match="would have to be unpickled"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({"w": "../secret.safetensors"}, "is a safetensors file beside its index"),
        ({"w": "/etc/passwd"}, "is a safetensors file beside its index"),
        ({"w": ".."}, "is a safetensors file beside its index"),
        ({"w": "one.bin"}, "is a safetensors file beside its index"),
        ({"w": "two.safetensors"}, "No such file"),
        (
            {"w": "one.safetensors", "v": "one.safetensors"},
            "differ: 'v' is in no shard",
        ),
        ({"v": "one.safetensors"}, "differ: 'w' is in one.safetensors, where"),
        ([], "is not an index"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, places, text):
    safetensors.numpy.save_file(
        {"w": np.ones(2)}, tmp_path.parent / "secret.safetensors"
    )
    shard(tmp_path, places, one={"w": np.ones(2)})
    with pytest.raises(jlora.CheckpointError, match=text):
        open_model(tmp_path)


def test_an_adapter_of_another_model_is_refused_before_writing(base, tmp_path):
    f = Factors(normal((3, 1)), normal((1, 4)), Spec(rank=1, alpha=1))
    wrong = jlora.Trainable({"embed": f, "embed2": f})
    with pytest.raises(jlora.TreeError, match=r"a of 'embed'.*'emb?ed2'|emb.d2"):
        export.merge_files(base, wrong, tmp_path / "out")
    assert os.listdir(tmp_path) == ["base.safetensors"]


def test_a_directory_without_a_model_is_told(tmp_path):
    with pytest.raises(jlora.CheckpointError, match="holds neither one"):
        open_model(tmp_path)


MERGE = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp, numpy as np, jlora
from jlora.factors import Factors, Spec
spec = Spec(rank=2, alpha=1)
factors = Factors(jnp.ones((1024, 2)), jnp.ones((2, 1024)), spec)
lora = {f"{i}": factors for i in range(4)}
small = {"0": Factors(jnp.ones((8, 2)), jnp.ones((2, 8)), spec)}
jlora.export.safetensors("small", {"0": np.ones((8, 8), np.float32)})
jlora.export.merge_files("small", jlora.Trainable(small), "small_out")
def merge(own):
    if sys.argv[1] == "file":
        return jlora.export.merge_files("base", own, "out")
    jlora.export.merge_directory("base", own, "out", max_shard_bytes=60_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(jlora.Trainable(lora))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.once
@pytest.mark.parametrize("out", ["file", "directory"])
def test_memory_is_bounded_by_a_few_leaves(tmp_path, out):
    leaf = np.ones((1024, 1024), np.float32)  # 4 MiB
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    base = tmp_path / "base" / "model.safetensors"
    export.safetensors(base, {f"{i}": leaf for i in range(40)})
    done = subprocess.run(
        [sys.executable, "-c", MERGE, out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        check=True,
    )
    assert int(done.stdout) < 15 * 4 * 1024, "kB, of 160 MiB"


def test_a_full_disk_leaves_nothing_behind(base, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(jlora.CheckpointError, match="File too large"):
            export.merge_files(base, ADAPTER, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["base.safetensors"]


# From a fine-tune.


def tuned_pair(tmp_path):
    base = {
        "a": {"kernel": normal((4, 6))},
        "embedding": normal((9, 4)),
        "b": jnp.ones(2),
        "stack": jnp.ones((2, 3, 3)),
    }
    change = normal((4, 1), 3) @ normal((1, 6), 4)
    tuned = {**base, "a": {"kernel": base["a"]["kernel"] + change}, "b": jnp.zeros(2)}
    export.safetensors(tmp_path / "base", base)
    export.safetensors(tmp_path / "tuned", tuned)
    return base, tuned


def test_extracting_from_files(tmp_path):
    base, tuned = tuned_pair(tmp_path)
    config = jlora.LoraConfig(rank=1, train=("b",))
    plan = export.flat_plan(tmp_path / "base", config)
    assert (plan.adapted, plan.full) == (("a/kernel",), ("b",))
    found = export.extract_files(tmp_path / "tuned", tmp_path / "base", plan)
    merged = jlora.merge(base, found)
    np.testing.assert_allclose(merged["a"]["kernel"], tuned["a"]["kernel"], atol=1e-5)
    same(found, jlora.extract(tuned, base, plan))
    left = export.flat_plan(tmp_path / "base", jlora.LoraConfig(rank=1))
    with pytest.warns(UserWarning, match="leaves them frozen.*: b"):
        export.extract_files(tmp_path / "tuned", tmp_path / "base", left)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"rank": 9}, r"rank 9 is above min\(in, out\) = min\(4, 6\) of 'a/kernel'"),
        ({"targets": "c/*"}, r"targets: 'c/\*' matched none of 4 leaves, nearest"),
        ({"exclude": "a/*"}, "exclude= and train= take every weight"),
        ({"targets": lambda row: True}, "takes only globs"),
        ({"targets": "b"}, r"'b' \(float32\[2\]\) is not a weight of a linear"),
        ({"targets": "stack"}, r"the roles of the axes.*: 'stack'\. Say with Rule"),
        ({"rules": jlora.Rule("c/*", rank=1)}, r"rules: 'c/\*' matched none"),
        ({"rules": jlora.Rule("b", rank=1)}, "no adapted leaf, so it has no effect"),
        ({"init": "orthogonal"}, "needs an even rank"),
    ],
)
def test_a_plan_without_a_function_is_strict(tmp_path, config, text):
    tuned_pair(tmp_path)
    with pytest.raises((jlora.ConfigError, jlora.TargetError), match=text):
        export.flat_plan(tmp_path / "base", jlora.LoraConfig(**{"rank": 1, **config}))


def test_a_plan_without_a_function_keeps_every_setting(tmp_path):
    tuned_pair(tmp_path)
    parts = jlora.FusedParts(axis=-1, sizes=(2, 4), ranks=(1, 2))
    rules = (
        jlora.Rule("a/*", dropout=0.25, parts=parts),
        jlora.Rule("embedding", method="dora", init="gaussian", alpha=3),
        jlora.Rule("stack", axes=jlora.Axes((0,), (1,), (2,))),
    )
    targets = ("a/*", "embedding", "stack")
    config = jlora.LoraConfig(rank=1, targets=targets, rules=rules, dropout=0.5)
    plan = export.flat_plan(tmp_path / "base", config)
    specs = {row.path: row.spec for row in plan.rows() if row.spec is not None}
    assert (specs["a/kernel"].parts.ranks, specs["a/kernel"].dropout) == ((1, 2), 0.25)
    own = specs["embedding"]
    assert (own.op, own.method, own.init) == ("embedding", "dora", "gaussian")
    assert (own.alpha, own.dropout) == (3, 0.5)
    assert specs["stack"].axes == jlora.Axes((0,), (1,), (2,))


WHOLE = {  # each setting, with what the plan then says of a leaf
    "rank": ({"rank": 3}, "a/kernel", ("rank", 3)),
    "alpha": ({"alpha": 7}, "a/kernel", ("alpha", 7)),
    "rslora": ({"rslora": True}, "a/kernel", ("rslora", True)),
    "dropout": ({"dropout": 0.5}, "a/kernel", ("dropout", 0.5)),
    "method": ({"method": "vera"}, "a/kernel", ("method", "vera")),
    "init": ({"init": "pissa"}, "a/kernel", ("init", "pissa")),
    "the init of a rule": (
        {"rules": jlora.Rule("a/*", init="olora")},
        "a/kernel",
        ("init", "olora"),
    ),
    "the method of a rule": (
        {"rules": jlora.Rule("a/*", method="adalora")},
        "a/kernel",
        ("method", "adalora"),
    ),
    "the axes of a rule": (
        {"rules": jlora.Rule("a/*", axes=jlora.Axes((), (1,), (0,)))},
        "a/kernel",
        ("axes", jlora.Axes((), (1,), (0,))),
    ),
    "the last of several axes": (
        {
            "rules": [
                jlora.Rule("stack", axes=jlora.Axes((0,), (1,), (2,))),
                jlora.Rule("st*", axes=jlora.Axes((0,), (2,), (1,))),
            ],
            "targets": "stack",
        },
        "stack",
        ("axes", jlora.Axes((0,), (2,), (1,))),
    ),
    "rows of a table": (
        {"train": jlora.TokenRows("embedding", (1, 8))},
        "embedding",
        ("rows", (1, 8)),
    ),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_plan_without_a_function_drops_no_setting(tmp_path, what):
    tuned_pair(tmp_path)
    config, path, (field, value) = WHOLE[what]
    plan = export.flat_plan(
        tmp_path / "base", jlora.LoraConfig(**{"rank": 1, **config})
    )
    specs = {row.path: row.spec for row in plan.rows() if row.spec}
    assert getattr(specs[path], field) == value
    assert plan.config == jlora.LoraConfig(**{"rank": 1, **config})


IDLE = {
    "exclude": ({"exclude": "c"}, "exclude: 'c' matched none of 4 leaves"),
    "train": ({"train": "c"}, "train: 'c' matched none of 4 leaves"),
    "rows": ({"train": jlora.TokenRows("c", (1,))}, "train: 'c' matched none"),
    "rows of a kernel": (
        {"train": jlora.TokenRows("a/*", (1,)), "targets": "embedding"},
        "'a/kernel' is not an embedding table",
    ),
    "rows beyond the table": (
        {"train": jlora.TokenRows("embedding", (9,))},
        "has 9 rows, but no row 9",
    ),
    "a glob among others": (
        {"targets": ("a/*", "d/*")},
        r"targets: 'd/\*' matched none of 4 leaves",
    ),
    "an exclusion of all": (
        {"targets": "a/*", "exclude": "a/kernel"},
        r"exclude= removes every match of 'a/\*'",
    ),
    "axes that are not the leaf's": (
        {"rules": jlora.Rule("a/*", axes=jlora.Axes((0,), (1,), (2,)))},
        "must name each of its 2 axes",
    ),
    "parts that do not add up": (
        {"rules": jlora.Rule("a/*", parts=jlora.FusedParts(1, (2, 2), (1, 1)))},
        "must add up to 6",
    ),
    "an init that needs a trace": (
        {"init": "pissa", "method": "vera"},
        "init",
    ),
}


@pytest.mark.parametrize("what", IDLE)
def test_a_plan_without_a_function_refuses_what_would_have_no_effect(tmp_path, what):
    tuned_pair(tmp_path)
    config, text = IDLE[what]
    with pytest.raises((jlora.ConfigError, jlora.TargetError), match=text):
        export.flat_plan(tmp_path / "base", jlora.LoraConfig(**{"rank": 1, **config}))


@pytest.mark.parametrize("what", ["method", "the method of a rule", "rows of a table"])
def test_what_cannot_be_extracted_is_refused_and_not_dropped(tmp_path, what):
    tuned_pair(tmp_path)
    config = jlora.LoraConfig(**{"rank": 1, **WHOLE[what][0]})
    plan = export.flat_plan(tmp_path / "base", config)
    with pytest.raises(jlora.ConfigError, match="for the methods lora and dora, not"):
        export.extract_files(tmp_path / "tuned", tmp_path / "base", plan)


def test_models_that_differ_are_refused(tmp_path):
    tuned_pair(tmp_path)
    export.safetensors(tmp_path / "other", {"c": jnp.ones(2)})
    plan = export.flat_plan(tmp_path / "base", jlora.LoraConfig(rank=1))
    with pytest.raises(jlora.TreeError, match="Only one of the models has"):
        export.extract_files(tmp_path / "other", tmp_path / "base", plan)


# StableHLO.


def model(params, x, mask):
    return {"y": jnp.tanh(x @ params["w"]) * mask["m"][:, None]}


@pytest.mark.parametrize("embed", [True, False])
def test_an_exported_function_takes_any_batch(tmp_path, embed):
    params = {"w": normal((4, 3))}
    mask = {"m": jnp.ones(2)}
    file = tmp_path / "fn"
    data = export.stablehlo(model, params, normal((2, 4)), mask, embed=embed, path=file)
    assert file.read_bytes() == data
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    for n in (1, 5):
        x, mask = normal((n, 4), n), {"m": jnp.arange(n, dtype=jnp.float32)}
        args = (x, mask) if embed else (params, x, mask)
        got = exported.call(*args)["y"]
        np.testing.assert_allclose(got, model(params, x, mask)["y"], rtol=1e-6)


def test_a_fixed_batch_and_sharded_parameters():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(normal((8, 3)), jax.NamedSharding(mesh, jax.P("x")))
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    data = export.stablehlo(lambda p, x: x @ p, w, x, batch=None)
    exported = jax.export.deserialize(bytearray(data))
    assert exported.nr_devices == 1
    assert exported.in_avals[0].shape == (2, 8)


def test_parameters_that_cannot_be_embedded(monkeypatch):
    monkeypatch.setattr("jlora.export._whole._EMBED_LIMIT", 10)
    with pytest.raises(jlora.TreeError, match=r"take 48 bytes.*embed=False"):
        export.stablehlo(model, {"w": normal((4, 3))}, normal((2, 4)), {})


def a_step(frozen, trainable, x):
    """A gradient of everything that is trained, over codes and a stack of adapters."""

    def loss(trainable, x):
        return (jlora.apply_lora(layers)(frozen, trainable, x) ** 2).sum()

    return jax.grad(loss)(trainable, x), frozen


def layers(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] * p["bias"][None]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_jax_export_writes_down_jloras_records(kind, method):
    """A program's arguments and results are `frozen` and `Trainable`, as in a loop."""
    params = {**normal({"up": (8, 6), "down": (6, 8)}), "bias": jnp.ones(8)}
    x = normal((3, 8), 5)
    config = jlora.LoraConfig(rank=2, targets="{up,down}", train="bias", method=method)
    plan = jlora.plan(layers, params, x, config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    if kind is not None:
        frozen = jlora.quantize(frozen, plan, kind=kind)
    program = jax.export.export(jax.jit(a_step))(frozen, trainable, x)
    read = jax.export.deserialize(program.serialize())
    assert read.in_tree == program.in_tree
    found, kept = read.call(frozen, trainable, x)
    wanted, _ = jax.jit(a_step)(frozen, trainable, x)
    same(found, wanted)
    same(kept, frozen)


def test_jax_export_takes_a_pool_and_every_field_of_a_spec():
    a, b = normal((8, 2)), normal((2, 6))
    own = jlora.Trainable({"up": Factors(a, b, Spec(rank=2, alpha=2))})
    parts = jlora.FusedParts(axis=-1, sizes=(2, 4), ranks=(1, 1))
    spec = Spec(rank=2, alpha=4, parts=parts, rows=(1, 2), axes=Axes((), (0,), (1,)))
    tree = {"pool": jlora.pool.create(own, 3), "fused": Factors(a, b, spec)}
    program = jax.export.export(jax.jit(lambda tree: tree))(tree)
    read = jax.export.deserialize(program.serialize())
    assert (read.in_tree, read.out_tree) == (program.in_tree, program.out_tree)
    same(read.call(tree), tree)
