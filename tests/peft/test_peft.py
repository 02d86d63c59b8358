"""PEFT files: every layout there and back, strict errors, damaged files, kills."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora import Axes, Factors, PeftError, Trainable, peft
from jlora._io.shards import pending, read_header, write_tensors
from jlora.factors import Spec
from jlora.peft import Entry, NameMap, maps
from tests.helpers import normal, same
from tests.peft.models import GOLDEN

pytestmark = pytest.mark.once

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."


def factors(shape, axes=None, rank=2, alpha=3.0, seed=0, **fields):
    """Random factors of a weight of `shape`, by default a dense kernel."""
    axes = axes or Axes()
    spec = Spec(axes=axes, rank=rank, alpha=alpha, **fields)
    a = normal(axes.a_shape(shape, rank), seed)
    return Factors(a, normal(axes.b_shape(shape, rank), seed + 1), spec)


def read(folder):
    return {k: slot.read() for k, slot in read_header(folder / TENSORS)[0].items()}


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def write(folder, tensors, **fields):
    """Writes an adapter as another program might."""
    folder.mkdir(exist_ok=True)
    tensors = {P + k: pending(np.asarray(x)) for k, x in tensors.items()}
    write_tensors(folder, "adapter_model", tensors, metadata={}, max_bytes=None)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **fields}
    (folder / CONFIG).write_text(json.dumps(fields))


def shapes(**leaves):
    return {
        k.replace("__", "/"): jax.ShapeDtypeStruct(s, "float32")
        for k, s in leaves.items()
    }


def up(rank=2, **fields):
    return Trainable({"up/kernel": factors((4, 6), rank=rank, **fields)})


UP = shapes(up__kernel=(4, 6))


# Layouts.

HEADS = Axes((), (0,), (1, 2))
OUT = Axes((), (0, 1), (2,))
CONV = Axes((), (0, 1, 2), (3,))
STACK = Axes((0,), (1,), (2,))
LAYOUTS = {
    "query": ((6, 2, 3), HEADS, "d h k -> (h k) d", "q.weight", {}),
    "query, heads first": (
        (2, 6, 3),
        Axes((), (1,), (0, 2)),
        "h d k -> (h k) d",
        "q.weight",
        {},
    ),
    "output": ((2, 3, 6), OUT, "h k d -> d (h k)", "o.weight", {}),
    "conv1d of GPT-2": (
        (6, 4),
        Axes((), (1,), (0,)),
        "o i -> i o",
        "c.weight",
        {"kind": "conv1d"},
    ),
    "stack": ((3, 4, 5), STACK, "i d o -> o d", "layers.{i}.up.weight", {}),
    "stack of heads": (
        (3, 4, 2, 5),
        Axes((0,), (1,), (2, 3)),
        "i d h k -> (h k) d",
        "l.{i}.q.weight",
        {},
    ),
    "stack of experts": (
        (2, 3, 4, 5),
        Axes((0, 1), (2,), (3,)),
        "i e d o -> e d o",
        "l.{i}.up",
        {"kind": "experts_t"},
    ),
    "parts with an axis": (
        (4, 2, 5),
        HEADS,
        "d part o -> o d",
        "{part:k,v}.weight",
        {},
    ),
    "parts side by side": (
        (4, 10),
        Axes(),
        "d (part o) -> o d",
        "{part:q,k,v}.weight",
        {"sizes": (3, 1, 1)},
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_there_and_back(case, tmp_path):
    """The tensors' product is the update, turned as the base weight is turned."""
    shape, axes, text, torch, fields = LAYOUTS[case]
    names = NameMap((Entry("w/kernel", torch, text, **{"kind": "linear", **fields}),))
    adapter = Trainable({"w/kernel": factors(shape, axes)})
    jlora.peft.save(tmp_path, adapter, names=names)
    params = {"w": {"kernel": jnp.zeros(shape)}}
    same(jlora.peft.load(tmp_path, params, names=names), adapter)
    merged = jlora.merge(params, adapter)
    jlora.peft.save_base(tmp_path / "base", merged, names=names)
    same(jlora.peft.load_base(tmp_path / "base", params, names=names), merged)
    base, found = tmp_path / "base" / "model.safetensors", read(tmp_path)
    for name, slot in read_header(base)[0].items():
        stem = P + name.removesuffix(".weight")
        if case == "stack of experts":
            stem = stem.rpartition(".")[0]
        a, b = found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"]
        if "experts" in case:
            a, b = a.reshape(3, 2, -1), b.reshape(-1, 2, 3)
            update = 1.5 * np.einsum("ore,eri->eio", b, a)
        else:
            update = 1.5 * b @ a
        if "GPT-2" in case:
            update = update.T
        np.testing.assert_allclose(slot.read(), update, atol=1e-5, err_msg=name)


def test_split_file_into_a_fused_leaf_has_the_sum_of_ranks(tmp_path):
    """q and v of different rank and scale, no k: one block-structured adapter."""
    axes = "d (part o) -> o d"
    entry = Entry("qkv/kernel", "attn.{part:q,k,v}.weight", axes, "linear", (2, 1, 1))
    names = NameMap((entry,))
    a_q, b_q = normal((2, 4)), normal((6, 2), 1)
    a_v, b_v = normal((1, 4), 2), normal((3, 1), 3)
    tensors = {
        "attn.q.lora_A.weight": a_q,
        "attn.q.lora_B.weight": b_q,
        "attn.v.lora_A.weight": a_v,
        "attn.v.lora_B.weight": b_v,
    }
    write(tmp_path, tensors, rank_pattern={"v": 1}, target_modules=["q", "v"])
    params = {"qkv": {"kernel": jnp.zeros((4, 12))}}
    adapter = jlora.peft.load(tmp_path, params, names=names)
    assert adapter.lora["qkv/kernel"].rank == 3
    w = jlora.merge(params, adapter)["qkv"]["kernel"]
    np.testing.assert_allclose(w[:, :6], 1.5 * (b_q @ a_q).T, atol=1e-5)
    np.testing.assert_array_equal(w[:, 6:9], np.zeros((4, 3)))
    np.testing.assert_allclose(w[:, 9:], 3.0 * (b_v @ a_v).T, atol=1e-5)
    jlora.peft.save(tmp_path / "2", adapter, names=names)
    back = read(tmp_path / "2")
    assert back.keys() == read(tmp_path).keys()
    np.testing.assert_array_equal(back[P + "attn.q.lora_A.weight"], a_q)
    same(jlora.peft.load(tmp_path / "2", params, names=names), adapter)


def test_parts_are_written_to_the_modules_they_are(tmp_path):
    def fn(p, x):
        return x @ p["qkv"]["kernel"]

    params = {"qkv": {"kernel": normal((4, 12))}}
    parts = jlora.FusedParts(axis=-1, sizes=(6, 3, 3), ranks=(2, 0, 1))
    config = jlora.LoraConfig(rules=(jlora.Rule("**", parts=parts),))
    plan = jlora.plan(fn, params, jnp.ones((1, 4)), config=config)
    frozen, adapter = jlora.split(jax.random.key(0), params, plan)
    axes = "d (part o) -> o d"
    entry = Entry("qkv/kernel", "{part:q,k,v}.weight", axes, "linear", (2, 1, 1))
    names = NameMap((entry,))
    jlora.peft.save(tmp_path / "fresh", adapter, names=names)
    found = {k: x.shape for k, x in read(tmp_path / "fresh").items()}
    assert found == {
        P + "q.lora_A.weight": (2, 4),
        P + "q.lora_B.weight": (6, 2),
        P + "v.lora_A.weight": (1, 4),
        P + "v.lora_B.weight": (3, 1),
    }
    adapter = jax.tree.map(lambda x: normal(x.shape, 5), adapter)
    jlora.peft.save(tmp_path / "trained", adapter, names=names)
    fused = NameMap((Entry("qkv/kernel", "qkv.weight"),))
    jlora.peft.save(tmp_path / "fused", adapter, names=fused)
    back = jlora.peft.load(tmp_path / "fused", params, names=fused)
    w, w_back = jlora.merge(frozen, adapter), jlora.merge(params, back)
    np.testing.assert_allclose(w["qkv"]["kernel"], w_back["qkv"]["kernel"], atol=1e-5)
    planned = jlora.peft.load(tmp_path / "trained", plan, names=names)
    same(jlora.merge(frozen, planned), jlora.merge(frozen, adapter))
    assert jax.tree.structure(planned) == jax.tree.structure(adapter)
    back = jlora.peft.load(tmp_path / "trained", params, names=names)
    w, w_back = jlora.merge(frozen, adapter), jlora.merge(params, back)
    np.testing.assert_allclose(w["qkv"]["kernel"], w_back["qkv"]["kernel"], atol=1e-5)


def test_stack_takes_layers_of_different_rank_and_some_without(tmp_path):
    names = NameMap((Entry("up/kernel", "m.l.{i}.up.weight", "i d o -> o d"),))
    tensors = {}
    for i, rank in ((0, 2), (2, 1)):
        tensors[f"m.l.{i}.up.lora_A.weight"] = normal((rank, 4), i)
        tensors[f"m.l.{i}.up.lora_B.weight"] = normal((5, rank), i + 1)
    write(tmp_path, tensors, rank_pattern={"m.l.2.up": 1}, layers_to_transform=[0, 2])
    params = {"up": {"kernel": jnp.zeros((3, 4, 5))}}
    adapter = jlora.peft.load(tmp_path, params, names=names)
    w = jlora.merge(params, adapter)["up"]["kernel"]
    for i, scale in ((0, 1.5), (2, 3.0)):
        a, b = (tensors[f"m.l.{i}.up.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(w[i], scale * (b @ a).T, atol=1e-5)
    np.testing.assert_array_equal(w[1], np.zeros((4, 5)))
    jlora.peft.save(tmp_path / "2", adapter, names=names)
    assert read(tmp_path / "2").keys() == read(tmp_path).keys()


def test_grouped_convolution_is_written_in_blocks(tmp_path):
    names = NameMap((Entry("c/kernel", "c.weight", groups=2),))
    adapter = Trainable({"c/kernel": factors((3, 3, 2, 4), CONV, op="conv")})
    jlora.peft.save(tmp_path, adapter, names=names)
    found = read(tmp_path)
    a, b = found[P + "c.lora_A.weight"].copy(), found[P + "c.lora_B.weight"]
    assert (a.shape, b.shape) == ((4, 4, 3, 3), (4, 2, 1, 1))
    assert config_of(tmp_path)["r"] == 4
    like = shapes(c__kernel=(3, 3, 2, 4))
    back = jlora.peft.load(tmp_path, like, names=names)
    delta = jlora.merge({"c/kernel": jnp.zeros((3, 3, 2, 4))}, adapter)
    again = jlora.merge({"c/kernel": jnp.zeros((3, 3, 2, 4))}, back)
    np.testing.assert_allclose(delta["c/kernel"], again["c/kernel"], atol=1e-6)
    a[:2, 2:] = 1  # the first group's outputs see the second group's inputs
    write(tmp_path / "m", {"c.lora_A.weight": a, "c.lora_B.weight": b}, r=4)
    with pytest.raises(PeftError, match="2 groups whose adapter mixes them"):
        jlora.peft.load(tmp_path / "m", like, names=names)


def test_tied_table_is_one_adapter_and_two_modules(tmp_path):
    names = maps.LLAMA
    axes = Axes((), (0,), (1,))
    fields = {"op": "embedding", "rslora": True}
    table = {"model/embed_tokens/embedding": factors((7, 4), axes, **fields)}
    with pytest.raises(PeftError, match="Say tied=True if the model uses it as both"):
        jlora.peft.save(tmp_path, Trainable(table), names=names)
    jlora.peft.save(tmp_path, Trainable(table), names=names, tied=True)
    found = read(tmp_path)
    assert config_of(tmp_path)["alpha_pattern"] == {}
    head, embed = P + "lm_head.lora_", P + "model.embed_tokens.lora_embedding_"
    np.testing.assert_array_equal(found[head + "A.weight"], found[embed + "B"].T)
    np.testing.assert_array_equal(found[head + "B.weight"], found[embed + "A"].T)
    like = shapes(model__embed_tokens__embedding=(7, 4))
    same(jlora.peft.load(tmp_path, like, names=names, tied=True), Trainable(table))
    jlora.peft.save(tmp_path / "1", Trainable(table), names=names, tied=False)
    with pytest.raises(PeftError, match="may be the output head too"):
        jlora.peft.load(tmp_path / "1", like, names=names)
    with pytest.raises(PeftError, match="jlora has one leaf for both"):
        jlora.peft.load(tmp_path / "1", like, names=names, tied=True)
    back = jlora.peft.load(tmp_path / "1", like, names=names, tied=False)
    same(back, Trainable(table))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes_of_files(dtype, tmp_path):
    adapter = up()
    jlora.peft.save(tmp_path, adapter, dtype=dtype)
    found = read(tmp_path)
    assert {x.dtype for x in found.values()} == {np.dtype(dtype)}
    if dtype == "float64":
        return
    back = jlora.peft.load(tmp_path, UP)
    assert back.lora["up/kernel"].a.dtype == jnp.float32
    jlora.peft.save(tmp_path / "2", back, dtype=dtype)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / name).read_bytes()
    low = jlora.peft.load(tmp_path, UP, dtype="bfloat16").lora["up/kernel"]
    assert low.b.dtype == jnp.bfloat16


def test_a_config_with_a_generic_map_and_every_kind_of_leaf(tmp_path):
    leaves = {
        "params/layers_0/up/kernel": factors((4, 6)),
        "params/layers_1/up/kernel": factors((4, 6), rank=3, alpha=5.0, seed=3),
        "params/conv/kernel": factors((3, 3, 2, 4), CONV, op="conv"),
        "params/embed/embedding": factors((9, 4), op="embedding"),
    }
    full = {
        "params/head/kernel": normal((4, 2)),
        "params/head/bias": normal((2,)),
        "params/layers_0/up/bias": normal((6,)),
        "params/norm/scale": normal((4,)),
    }
    adapter = Trainable(leaves, full)
    jlora.peft.save(tmp_path, adapter, base_model="me/mine", task_type="SEQ_CLS")
    config = config_of(tmp_path)
    assert config["modules_to_save"] == ["head", "norm"]
    assert config["bias"] == "lora_only"
    assert config["rank_pattern"] == {"layers_1.up": 3}
    assert config["alpha_pattern"] == {"layers_1.up": 5}
    assert config["init_lora_weights"] is True
    assert P + "layers_0.up.base_layer.bias" in read(tmp_path)
    like = {
        path: jax.ShapeDtypeStruct(shape, "float32")
        for path, shape in {
            "params/layers_0/up/kernel": (4, 6),
            "params/layers_1/up/kernel": (4, 6),
            "params/conv/kernel": (3, 3, 2, 4),
            "params/embed/embedding": (9, 4),
            **{path: x.shape for path, x in full.items()},
            "params/other/kernel": (4, 4),
        }.items()
    }
    back = jlora.peft.load(tmp_path, like)
    for path, f in leaves.items():
        same(back.lora[path], f)
    same(dict(back.full), full)


def test_shards(tmp_path):
    leaves = {f"l{i}/kernel": factors((4, 6), seed=i) for i in range(5)}
    jlora.peft.save(tmp_path, Trainable(leaves), max_shard_bytes=200)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors*"))
    assert len(names) == 4
    assert names[-1] == "adapter_model.safetensors.index.json"
    like = {path: jax.ShapeDtypeStruct((4, 6), "float32") for path in leaves}
    same(jlora.peft.load(tmp_path, like), Trainable(leaves))
    jlora.peft.save(tmp_path, Trainable(leaves))  # one file again: the shards go
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_files_are_those_of_the_safetensors_library(tmp_path):
    arrays = {
        "b": np.arange(3, dtype=ml_dtypes.bfloat16),
        "a": np.ones((2, 3), np.float16),
        "é": np.zeros((0, 4)),
        "i": np.array(True),
    }
    write_tensors(
        tmp_path,
        "x",
        {k: pending(v) for k, v in arrays.items()},
        metadata={"format": "pt"},
        max_bytes=None,
    )
    theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    safetensors.numpy.save_file(arrays, tmp_path / "y.safetensors")
    ours = {k: s.read() for k, s in read_header(tmp_path / "y.safetensors")[0].items()}
    for name, x in arrays.items():
        for y in (theirs[name], ours[name]):
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(y, x)


# Plans.


def dense(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"] @ p["head"]["kernel"]


DENSE = {
    "up": {"kernel": normal((4, 6))},
    "down": {"kernel": normal((6, 4))},
    "head": {"kernel": normal((4, 2))},
}


def dense_plan(**fields):
    config = jlora.LoraConfig(**{"rank": 2, "train": ("head/*",), **fields})
    return jlora.plan(dense, DENSE, jnp.ones((1, 4)), config=config)


def test_plan_says_what_has_to_be_there(tmp_path):
    plan = dense_plan()
    _, adapter = jlora.split(jax.random.key(0), DENSE, plan)
    jlora.peft.save(tmp_path, adapter)
    same(jlora.peft.load(tmp_path, plan), adapter)
    less = Trainable({"up/kernel": factors((4, 6), rank=3)}, {})
    jlora.peft.save(tmp_path, less)
    with pytest.raises(PeftError) as error:
        jlora.peft.load(tmp_path, plan)
    for text in (
        "missing: factors for 'down/kernel', in torch down.weight",
        "missing: the whole of 'head/kernel', in torch head.weight",
        "config: 'up/kernel' is lora of rank 3 and scale 1, in the plan lora of 2 and",
    ):
        assert text in str(error.value)
    with pytest.raises(PeftError, match="has factors, the plan has it frozen"):
        jlora.peft.load(tmp_path, dense_plan(targets="down/kernel", train=()))


def test_methods_that_peft_lacks_are_written_as_lora(tmp_path):
    for method in ("adalora", "vera"):
        plan = dense_plan(method=method)
        frozen, adapter = jlora.split(jax.random.key(0), DENSE, plan)
        adapter = jax.tree.map(lambda x: normal(x.shape, 1), adapter)
        jlora.peft.save(tmp_path / method, adapter)
        back = jlora.peft.load(tmp_path / method, DENSE)
        assert back.lora["up/kernel"].spec.method == "lora"
        w, w_back = jlora.merge(frozen, adapter), jlora.merge(DENSE, back)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), w, w_back
        )


# What cannot be written.


def wrong_adapters():
    lora, dora = factors((4, 6)), factors((4, 6), method="dora")
    dora = dataclasses.replace(dora, magnitude=jnp.ones(6))
    nan = dataclasses.replace(lora, a=lora.a.at[0, 0].set(jnp.nan))
    stack = factors((3, 4, 6), STACK)
    return {
        "jlora.rebase first": (up(init="pissa"), {}),
        "all adapted modules or none": (
            Trainable({"a/kernel": lora, "b/kernel": dora}),
            {},
        ),
        "dropout differs between leaves": (
            Trainable({"a/kernel": lora, "b/kernel": factors((4, 6), dropout=0.5)}),
            {},
        ),
        "holds NaN": (Trainable({"a/kernel": nan}), {}),
        "'a/kernel' holds 1e.06, but float16 holds at most 65504": (
            Trainable({}, {"a/kernel": jnp.full((2, 2), 1e6)}),
            {"dtype": "float16"},
        ),
        "has no name in torch .nearest rule: 'wte/embedding'.": (
            Trainable({}, {"wt/embedding": jnp.ones((2, 2))}),
            {"names": NameMap((Entry("wte/embedding", "wte.weight"),))},
        ),
        "is a stack with 1 batch axes": (Trainable({"a/kernel": stack}), {}),
        "torch's layer .linear. has": (
            Trainable({"a/kernel": stack}),
            {
                "names": NameMap(
                    (Entry("a/kernel", "a.weight", "b i o -> (b o) i", "linear"),)
                )
            },
        ),
        "its weight trained in full": (
            Trainable({"a/kernel": lora}, {"a/scale": jnp.ones(4)}),
            {},
        ),
        "a jlora.Trainable, got dict": ({}, {}),
        "must be a float type": (up(), {"dtype": "int8"}),
        "give the frozen parameters as params=": (
            Trainable(
                {
                    "e/embedding": Factors(
                        None,
                        jnp.ones((1, 4)),
                        Spec(
                            op="embedding",
                            rank=1,
                            alpha=1.0,
                            method="rows",
                            rows=(2,),
                            shape=(9, 4),
                        ),
                    )
                }
            ),
            {},
        ),
        "kind 'other', which takes no adapter": (
            up(),
            {"names": NameMap((Entry("up/kernel", "up.weight", kind="other"),))},
        ),
    }


@pytest.mark.parametrize("text", wrong_adapters())
def test_save_refuses(text, tmp_path):
    adapter, options = wrong_adapters()[text]
    with pytest.raises(PeftError, match=text):
        jlora.peft.save(tmp_path / "a", adapter, **options)
    assert not list(tmp_path.iterdir())


AS_IS = NameMap(generic=True)  # torch's names are those of the leaves
PORTABLE = {
    "vLLM has no DoRA .use_dora=True.: merge it": lambda f: Trainable(
        {
            "up/kernel": dataclasses.replace(
                f,
                magnitude=jnp.ones(6),
                spec=dataclasses.replace(f.spec, method="dora"),
            )
        }
    ),
    "vLLM has no trained biases .bias='lora_only'.": lambda f: Trainable(
        {"up/kernel": f}, {"up/bias": jnp.ones(6)}
    ),
    "only `classifier` and `score` whole .modules_to_save=..lm_head": lambda f: (
        Trainable({"up/kernel": f}, {"lm_head/kernel": jnp.ones((4, 2))})
    ),
    "only `classifier` and `score` whole .modules_to_save=..x.score": lambda f: (
        Trainable({"up/kernel": f}, {"x/score/kernel": jnp.ones((4, 2))})
    ),
    "there is no A and no B": lambda _: Trainable(
        full={"score/kernel": jnp.ones((4, 2))}
    ),
    "words.lora_embedding_A.*only a table that is called embed_tokens": lambda f: (
        Trainable({"up/kernel": f, "words/embedding": factors((9, 4), op="embedding")})
    ),
    "c.lora_A.weight: its shape is .2, 2, 3, 3., not a matrix": lambda _: Trainable(
        {"c/kernel": factors((3, 3, 2, 4), CONV, op="conv")}
    ),
}


@pytest.mark.parametrize("text", PORTABLE)
def test_portable_says_what_vllm_would_reject(text, tmp_path):
    with pytest.raises(PeftError, match=f"vLLM would reject: .*{text}"):
        jlora.peft.save(
            tmp_path / "a", PORTABLE[text](factors((4, 6))), portable=True, names=AS_IS
        )


def vllm_accepts(config, names):
    """The checks of vLLM 0.33; `golden/check_vllm.py` runs vLLM's own."""
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert not config.get("lora_bias")
    assert config["init_lora_weights"] in (True, False, "gaussian", "eva", "orthogonal")
    saved = config["modules_to_save"] or []
    assert len(saved) <= 1
    assert set(saved) <= {"classifier", "score"}
    for field in ("alora_invocation_tokens", "layer_replication", "use_bdlora"):
        assert not config.get(field)
    for name in names:
        parts = name.removeprefix(P).split(".")
        ok = parts[-2:] in (["lora_A", "weight"], ["lora_B", "weight"])
        ok |= parts[-1] in ("lora_embedding_A", "lora_embedding_B")
        ok |= parts[0] in ("classifier", "score") and len(parts) == 2
        assert ok, name


def test_portable_export_passes_the_checks_of_vllm(tmp_path):
    leaves = {
        "model/layers/0/self_attn/q_proj/kernel": factors((4, 6), rslora=True),
        "model/layers/1/self_attn/q_proj/kernel": factors((4, 6), rank=3, rslora=True),
        "model/embed_tokens/embedding": factors((9, 4), op="embedding", rslora=True),
    }
    adapter = Trainable(leaves, {"score/kernel": jnp.ones((4, 2))})
    jlora.peft.save(tmp_path, adapter, names=maps.LLAMA, tied=False, portable=True)
    vllm_accepts(config_of(tmp_path), read(tmp_path))
    assert config_of(tmp_path)["use_rslora"]
    with pytest.raises(PeftError, match="reads only adapter_model"):
        jlora.peft.save(
            tmp_path / "b", adapter, names=maps.LLAMA, tied=True, portable=True,
            max_shard_bytes=40,
        )  # fmt: skip


# What cannot be read.


def changed_config(fields):
    return lambda folder: (folder / CONFIG).write_text(
        json.dumps({**config_of(folder), **fields})
    )


CONFIGS = {
    "rank 3 .from the config. needs": {"r": 3},
    "rank, alpha or their patterns are not those": {"lora_alpha": 16},
    "use_dora|unknown field 'use_dorra'": {"use_dorra": True},
    "alora_invocation_tokens is .-1.: it must be a list of token ids": {
        "alora_invocation_tokens": [-1]
    },
    "kasa_config": {"kasa_config": {}},
    "layer_replication": {"layer_replication": [[0, 4]]},
    "lora_bias": {"lora_bias": True},
    "use_qalora": {"use_qalora": True},
    "such an init changes the base weights": {"init_lora_weights": "pissa_niter_4"},
    "peft_type is 'VERA'": {"peft_type": "VERA"},
    "r is 0": {"r": 0},
    "r is '8'": {"r": "8"},
    "lora_alpha is -1": {"lora_alpha": -1},
    "The config has no lora_alpha": {"lora_alpha": None},
    "a drop rate": {"lora_dropout": 1.5},
    "it must be none, all or lora_only": {"bias": "some"},
    "for which there are no tensors": {"target_modules": ["up", "gate"]},
    "target_modules does not name it": {"target_modules": []},
    "has an adapter, target_modules does not": {"target_modules": "^(down|u)"},
    "up has an adapter, exclude_modules takes it out": {"exclude_modules": ["up"]},
    "up has an adapter, exclude_modules takes it": {"exclude_modules": r"\bu.*"},
    "layers_to_transform does not have its layer": {
        "layers_to_transform": 0,
        "target_modules": "u.",
    },
    "it must be a number or a list of numbers": {"layers_to_transform": "0"},
    "which names no adapted module": {"rank_pattern": {"down": 3}},
    "repeats too much": {"alpha_pattern": {"((a{50}){50}){50}": 3}},
    "is not a plain pattern": {"rank_pattern": {"(?=up)up": 3}},
    "repeat too much together": {
        "rank_pattern": {f"{i}(a{{2400}})?": 3 for i in range(10)}
    },
    "is broken": {"alpha_pattern": {"[": 3}},
    "target_parameters names 'w'": {"target_parameters": ["w"]},
    "the file has no rows for it": {"trainable_token_indices": {"e": [1]}},
    "missing: up.lora_magnitude_vector": {"use_dora": True},
}


@pytest.mark.parametrize("text", CONFIGS)
def test_config_is_refused(text, tmp_path):
    jlora.peft.save(tmp_path, up())
    changed_config(CONFIGS[text])(tmp_path)
    with pytest.raises(PeftError, match=text):
        jlora.peft.load(tmp_path, UP)


def test_harmless_fields_of_a_config_are_read(tmp_path):
    jlora.peft.save(tmp_path, up())
    fields = {
        "revision": "main",
        "peft_version": "0.21.2",
        "exclude_modules": ["x"],
        "init_lora_weights": "gaussian",
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "use_qalora": False,
        "layers_to_transform": [],
        "target_modules": "(?=up).*",  # not in one pass: it decides nothing
        "alora_invocation_tokens": None,
    }
    changed_config(fields)(tmp_path)
    same(jlora.peft.load(tmp_path, UP), up())


def test_every_misfit_is_listed(tmp_path):
    a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
    tensors = {
        "up.lora_A.weight": a,
        "up.lora_B.weight": b,
        "gone.lora_A.weight": a,
        "down.lora_A.weight": np.ones((2, 7), np.float32),
        "down.lora_B.weight": np.ones((4, 2), np.float32),
        "half.lora_A.weight": a,
        "whole.weight": np.ones((3, 4), np.float32),
        "count.lora_A.weight": np.ones((2, 4), np.int32),
        "count.lora_B.weight": b,
    }
    write(tmp_path, tensors)
    like = shapes(
        up__kernel=(4, 6),
        down__kernel=(6, 4),
        half__kernel=(4, 6),
        whole__kernel=(4, 3),
        count__kernel=(4, 6),
    )
    with pytest.raises(PeftError) as error:
        jlora.peft.load(tmp_path, like)
    for text in (
        "5 findings",
        "extra: base_model.model.gone.lora_A.weight",
        "missing: half.lora_B.weight",
        "wrong: down: A is [2, 7] and B [4, 2], rank 2 (from the config) needs [2, 6]",
        "wrong: count.lora_A.weight is int32, not a floating-point type",
        "config: the file has whole.weight whole, but modules_to_save is []",
    ):
        assert text in str(error.value)
    adapter, report = jlora.peft.load_partial(tmp_path, like)
    assert set(adapter.lora) == {"up/kernel"}
    assert set(adapter.full) == {"whole/kernel"}
    assert len(report) == 5
    assert report.extra == ("base_model.model.gone.lora_A.weight",)


def test_adapter_of_the_bare_model_fits_the_one_with_a_head_and_back(tmp_path):
    stem = "encoder.layer.0.attention.self.query"
    a, b = normal((2, 4)), normal((4, 2), 1)
    for file, model in (("", "bert/"), ("bert.", "")):
        folder = tmp_path / (file + "x")
        tensors = {f"{file}{stem}.lora_A.weight": a, f"{file}{stem}.lora_B.weight": b}
        write(folder, tensors, alpha_pattern={f"{file}{stem}": 8})
        path = f"{model}encoder/layer/0/attention/self/query/kernel"
        like = {path: jax.ShapeDtypeStruct((4, 4), "float32")}
        f = jlora.peft.load(folder, like, names=maps.BERT).lora[path]
        np.testing.assert_array_equal(f.a, a.T)
        assert f.scale == 4.0


def test_leaf_that_no_rule_can_name_is_told_beside_what_is_left_over(tmp_path):
    tensors = {"q.lora_A.weight": normal((2, 4)), "q.lora_B.weight": normal((6, 2))}
    write(tmp_path, tensors)
    with pytest.raises(PeftError, match="Give the plan instead of the parameters"):
        jlora.peft.load(tmp_path, shapes(q__kernel=(4, 2, 3)))


def test_names_without_the_prefix_are_refused(tmp_path):
    jlora.peft.save(tmp_path, up())
    arrays = {k.removeprefix(P): x for k, x in read(tmp_path).items()}
    safetensors.numpy.save_file(arrays, tmp_path / TENSORS)
    with pytest.raises(PeftError, match=r"does not begin with 'base_model.model.'"):
        jlora.peft.load(tmp_path, UP)


def test_table_beside_its_factors_must_be_the_models(tmp_path):
    axes = Axes()
    table = normal((9, 4))
    f = factors((9, 4), axes, op="embedding")
    jlora.peft.save(tmp_path, Trainable({"e/embedding": f}))
    arrays = {**read(tmp_path), P + "e.base_layer.weight": np.asarray(table)}
    safetensors.numpy.save_file(arrays, tmp_path / TENSORS)
    jlora.peft.load(tmp_path, {"e": {"embedding": table}})
    with pytest.raises(PeftError, match="is not the model's"):
        jlora.peft.load(tmp_path, {"e": {"embedding": table + 1}})
    with pytest.raises(PeftError, match="resize the model's vocabulary"):
        jlora.peft.load(tmp_path, {"e": {"embedding": jnp.ones((8, 4))}})


def damaged(data):
    """Files that are none, by what is wrong with them."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]

    def swap(old, new):
        text = header.replace(old, new)
        assert text != header
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return {
        "empty": b"",
        "seven bytes": data[:7],
        "header alone": data[: 8 + length],
        "no last byte": data[:-1],
        "one more byte": data + b"\0",
        "big-endian length": data[:8][::-1] + data[8:],
        "huge length": (1 << 62).to_bytes(8, "little") + data[8:],
        "no JSON": data[:8] + b"x" * length + data[8 + length :],
        "a list": (2).to_bytes(8, "little") + b"[]",
        "deep JSON": (90_000).to_bytes(8, "little") + b"[" * 90_000,
        "other dtype": swap(b'"F32"', b'"F99"'),
        "wider dtype": swap(b'"F32"', b'"F64"'),
        "other shape": swap(b"[2,4]", b"[3,4]"),
        "negative size": swap(b"[2,4]", b"[-2,-4]"),
        "huge size": swap(b"[2,4]", b"[2,999999999999999999999999]"),
        "shape is text": swap(b"[2,4]", b'"no"'),
        "overlap": swap(b"[32,80]", b"[0,48]"),
        "gap": swap(b"[0,32]", b"[1,33]"),
        "twice": swap(b"lora_B", b"lora_A"),
        "metadata": swap(b'"format":"pt"', b'"format":1'),
        "pickle": b"\x80\x04\x95" + b"\0" * 200,
    }


def test_damaged_tensors_are_refused(tmp_path):
    jlora.peft.save(tmp_path, up())
    good = (tmp_path / TENSORS).read_bytes()
    for what, data in damaged(good).items():
        (tmp_path / TENSORS).write_bytes(data)
        with pytest.raises(PeftError, match=re.escape(TENSORS)):
            pytest.fail(f"{what}: {jlora.peft.load(tmp_path, UP)}")


def test_damaged_config_is_refused(tmp_path):
    jlora.peft.save(tmp_path, up())
    for data in (b"", b"[]", b"{", b"\xff\xfe", b'{"r": 1, "r": 2}', b"[" * 99_999):
        (tmp_path / CONFIG).write_bytes(data)
        with pytest.raises(PeftError, match=CONFIG):
            jlora.peft.load(tmp_path, UP)


def test_missing_files_and_directories_in_their_place(tmp_path):
    with pytest.raises(PeftError, match="There is no directory"):
        jlora.peft.load(tmp_path / "none", UP)
    with pytest.raises(PeftError, match=r"adapter_config.json' cannot be read"):
        jlora.peft.load(tmp_path, UP)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(PeftError, match=r"model.bin would have to be unpickled"):
        jlora.peft.load(tmp_path, UP)
    (tmp_path / TENSORS).mkdir()
    with pytest.raises(PeftError, match=r"adapter_model.safetensors' is a directory"):
        jlora.peft.load(tmp_path, UP)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x"]
)
def test_shards_stay_in_their_directory(name, tmp_path):
    jlora.peft.save(tmp_path / "a", up(), max_shard_bytes=40)
    (tmp_path / "x.safetensors").write_bytes(b"")
    index = tmp_path / "a" / f"{TENSORS}.index.json"
    weights = dict.fromkeys(json.loads(index.read_text())["weight_map"], name)
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(PeftError, match=r"A shard is a safetensors file beside"):
        jlora.peft.load(tmp_path / "a", UP)


@pytest.mark.parametrize("path", ["b", "bias", "x/b"])
def test_a_bias_of_the_model_itself_comes_back(path, tmp_path):
    trainable = jlora.Trainable(up().lora, {path: jnp.arange(3.0)})
    jlora.peft.save(tmp_path, trainable)
    again = jlora.peft.load(tmp_path, {**UP, path: jnp.zeros(3)})
    assert again.full[path].tolist() == [0, 1, 2]


# Writing is whole or not at all.


def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    jlora.peft.save(tmp_path / "a", up())
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PeftError, match="No space left on device"):
        jlora.peft.save(tmp_path / "a", up(rank=3))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(PeftError, match="it is a file, not a directory"):
        jlora.peft.save(tmp_path / "a", up())


def test_other_files_of_the_directory_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    jlora.peft.save(tmp_path, up())
    assert (tmp_path / "README.md").read_text() == "mine"


# Forks and kills a hundred children that save again and again; JAX starts no thread.
KILLS = """
import os, pathlib, random, signal, sys, time
import numpy as np
import jlora
from jlora.factors import Factors, Spec
from jlora._io.disk import read_json
from jlora._io.shards import open_tensors

folder = pathlib.Path(sys.argv[1])
spec = Spec(rank=2, alpha=3.0)
rng = random.Random(0)

def save(n):
    a, b = np.full((256, 2), n, "float32"), np.full((2, 256), n, "float32")
    jlora.peft.save(folder, jlora.Trainable({"up/kernel": Factors(a, b, spec)}))

save(0)
for kill in range(100):
    child = os.fork()
    if not child:
        while True:
            save(rng.randrange(10**6))
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    slots, _ = open_tensors(folder, "adapter_model")
    values = {float(x) for slot in slots.values() for x in np.unique(slot.read())}
    assert len(slots) == 2 and len(values) == 1, (kill, values)
    assert read_json(folder / "adapter_config.json")["r"] == 2
print("whole", values)
"""


def test_a_hundred_killed_saves_leave_a_whole_adapter(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("whole"), done.stderr
    assert jlora.peft.load(tmp_path / "a", shapes(up__kernel=(256, 256)))


# Names and whole models.


def test_every_map_names_each_leaf_once():
    for name, value in vars(maps).items():
        if not isinstance(value, NameMap):
            continue
        flax = [(e.flax, e.torch) for e in value.entries]
        assert len(set(flax)) == len(flax), name
        hash(value)


def test_maps_of_the_two_spellings_agree_with_the_example():
    from examples.sentiment.model import BertConfig, SentenceClassifier
    from examples.sentiment.weights import to_hf

    sizes = BertConfig(20, 4, 2, 2, 6, 8)
    ids = jnp.ones((1, 3), jnp.int32)
    params = SentenceClassifier(sizes).init(jax.random.key(0), ids, ids > 0)["params"]
    flat, _ = jlora.paths.flatten(params)
    found = {}
    for path, x in flat.items():
        for place in maps.SENTIMENT.places(path, x.shape):
            found[place.name.removeprefix("bert.")] = place.shape(x.shape)
    assert found == {name: x.shape for name, x in to_hf(params).items()}


def test_gemma_einsum_weights_and_stacked_layers(tmp_path):
    w = {
        "layer_0": {
            "attn": {
                "q_einsum": {"w": normal((2, 6, 3))},
                "kv_einsum": {"w": normal((2, 1, 6, 3), 1)},
                "attn_vec_einsum": {"w": normal((2, 3, 6), 2)},
            },
            "mlp": {"gating_einsum": normal((2, 8, 6), 3), "linear": normal((8, 6), 4)},
        }
    }
    jlora.peft.save_base(tmp_path, w, names=maps.GEMMA_EINSUM)
    stem = "model.layers.0."
    slots = read_header(tmp_path / "model.safetensors")[0]
    assert {k.removeprefix(stem): s.shape for k, s in slots.items()} == {
        "self_attn.q_proj.weight": (6, 6),
        "self_attn.k_proj.weight": (3, 6),
        "self_attn.v_proj.weight": (3, 6),
        "self_attn.o_proj.weight": (6, 6),
        "mlp.gate_proj.weight": (8, 6),
        "mlp.up_proj.weight": (8, 6),
        "mlp.down_proj.weight": (6, 8),
    }
    x = normal((6,))
    q = slots[stem + "self_attn.q_proj.weight"].read() @ x
    by_head = jnp.einsum("d,ndh->nh", x, w["layer_0"]["attn"]["q_einsum"]["w"])
    np.testing.assert_allclose(q, by_head.reshape(-1), atol=1e-5)
    same(jlora.peft.load_base(tmp_path, w, names=maps.GEMMA_EINSUM), w)
    stacked = {
        "model": {
            "layers": {
                "mlp": {"up_proj": {"kernel": normal((3, 4, 8))}},
                "input_layernorm": {"scale": normal((3, 4))},
            }
        }
    }
    jlora.peft.save_base(tmp_path / "s", stacked, names=maps.LLAMA_STACKED)
    same(
        jlora.peft.load_base(tmp_path / "s", stacked, names=maps.LLAMA_STACKED), stacked
    )
    assert len(read_header(tmp_path / "s" / "model.safetensors")[0]) == 6


def test_base_model_misfits_are_listed(tmp_path):
    jlora.peft.save_base(tmp_path, DENSE, config={"model_type": "mine"})
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "mine"}
    like = {
        "up": {"kernel": jnp.ones((4, 7))},
        "more": {"bias": jnp.ones(2)},
        "down": {"kernel": jnp.ones((6, 4))},
    }
    with pytest.raises(PeftError) as error:
        jlora.peft.load_base(tmp_path, like)
    for text in (
        "up.weight is [6, 4], 'up/kernel' needs [7, 4]",
        "missing: more.bias for 'more/bias'",
        "extra: head.weight",
    ):
        assert text in str(error.value)
    params, report = jlora.peft.load_base_partial(tmp_path, like)
    assert len(report) == 3
    np.testing.assert_array_equal(params["down"]["kernel"], DENSE["down"]["kernel"])
    with pytest.raises(
        PeftError, match="one-dimensional convolution, or a weight with heads"
    ):
        jlora.peft.save_base(tmp_path, {"q": {"kernel": jnp.ones((2, 3, 4))}})


def test_base_model_in_shards_and_in_bfloat16(tmp_path):
    jlora.peft.save_base(tmp_path, DENSE, max_shard_bytes=100, dtype="bfloat16")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    back = jlora.peft.load_base(tmp_path, jax.eval_shape(lambda: DENSE))
    low = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), DENSE)
    same(back, low)


def test_tied_base_model_has_one_tensor_or_two(tmp_path):
    params = {"model": {"embed_tokens": {"embedding": normal((7, 4))}}}
    jlora.peft.save_base(tmp_path, params, names=maps.LLAMA, tied=True)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(arrays) == {"model.embed_tokens.weight", "lm_head.weight"}
    same(jlora.peft.load_base(tmp_path, params, names=maps.LLAMA), params)
    both = {**params, "lm_head": {"kernel": jnp.zeros((4, 7))}}
    del arrays["lm_head.weight"]
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    read_both = jlora.peft.load_base(tmp_path, both, names=maps.LLAMA)
    table = params["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(read_both["lm_head"]["kernel"], table.T)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(PeftError, match="are one leaf, their numbers differ"):
        jlora.peft.load_base(tmp_path, params, names=maps.LLAMA)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Entry("a", "b", kind="dense"), "kind must be one of"),
        (lambda: Entry("a[b", "b"), "without its partner"),
        (lambda: Entry("a", "b", "i o"), "needs one arrow"),
        (lambda: Entry("a", "b", "i o -> o x"), "must also be on the left"),
        (
            lambda: NameMap((Entry("a", "b.{i}", "x y -> y x"),)).places("a", (2, 2)),
            "nothing says which axis",
        ),
        (
            lambda: NameMap((Entry("a", "b", "x y -> y x"),)).places("a", (2,)),
            "is for 2 axes",
        ),
        (
            lambda: NameMap((Entry("a", "{p:q,k}", "(p o) -> o"),)).places("a", (3,)),
            "does not divide",
        ),
        (
            lambda: NameMap((Entry("a", "{p:q,k}", "p o -> o"),)).places("a", (3, 2)),
            "the rule names 2 parts",
        ),
    ],
)
def test_broken_rules_are_refused(make, text):
    with pytest.raises(PeftError, match=text):
        make()


def test_untied_head_of_gpt2_that_peft_left_out_is_refused():
    like = shapes(transformer__wte__embedding=(40, 16))
    folder = GOLDEN / "gpt2" / "untied"
    _, report = jlora.peft.load_partial(folder, like, names=maps.GPT2, tied=True)
    assert any("jlora has one leaf for both" in text for text in report.config)


# Casts.


def one_leaf(value, dtype="float32"):
    return {"up": {"kernel": np.full((4, 6), value, dtype)}}


def wide_adapter(value, dtype="float32"):
    a = np.ones((4, 2), dtype)
    own = Factors(a, np.full((2, 6), value, dtype), Spec(rank=2, alpha=2))
    return Trainable({"up/kernel": own}, {"head/kernel": np.full((2, 3), 1, dtype)})


CASTS = {
    "save_base": lambda d: peft.save_base(d / "x", one_leaf(1e5), dtype="float16"),
    "save_base in shards": lambda d: peft.save_base(
        d / "x", one_leaf(1e5), dtype="float16", max_shard_bytes=1
    ),
    "load_base": lambda d: peft.load_base(d / "base", one_leaf(0), dtype="float16"),
    "load_base as params are": lambda d: peft.load_base(
        d / "base", one_leaf(0, "float16")
    ),
    "load_base_partial": lambda d: peft.load_base_partial(
        d / "base", one_leaf(0), dtype="float16"
    ),
    "save": lambda d: peft.save(d / "x", wide_adapter(1e5), dtype="float16"),
    "load": lambda d: peft.load(d / "own", LIKE, dtype="float16"),
    "load in float32": lambda d: peft.load(d / "wide", LIKE),
    "load_base in float32": lambda d: peft.load_base(
        d / "wide_base", one_leaf(0, "float64")
    ),
}
LIKE = {**one_leaf(0), "head": {"kernel": np.zeros((2, 3), "float32")}}


@pytest.mark.parametrize("way", CASTS)
def test_a_cast_that_overflows_is_an_error(tmp_path, way):
    peft.save_base(tmp_path / "base", one_leaf(1e5))
    peft.save_base(tmp_path / "wide_base", one_leaf(1e300, "float64"))
    peft.save(tmp_path / "own", wide_adapter(1e5))
    peft.save(tmp_path / "wide", wide_adapter(1e300, "float64"))
    wide = "float32" in way
    largest, most = ("1e.300", "3.40282e.38") if wide else ("100000", "65504")
    text = rf"up.* holds {largest}, but float\d\d holds at most {most}. Choose"
    with pytest.raises(PeftError, match=text):
        CASTS[way](tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["base", "own", "wide", "wide_base"]


def test_a_cast_that_fits_is_what_it_was(tmp_path):
    peft.save_base(tmp_path, one_leaf(1e4), dtype="float16")
    read = peft.load_base(tmp_path, one_leaf(0), dtype="bfloat16")
    assert read["up"]["kernel"].dtype == jnp.bfloat16
    assert (read["up"]["kernel"] == jnp.bfloat16(1e4)).all()


def test_a_layer_without_its_prefix_beside_a_head_is_refused(tmp_path):
    adapter = Trainable(lora={"layers/0/mlp/up_proj/kernel": factors((4, 6))})
    peft.save(tmp_path / "bare", adapter, names=maps.LLAMA)
    for extra in (
        {"task_type": "CAUSAL_LM"},
        {"params": {"lm_head": {"kernel": jnp.ones((4, 6))}}},
    ):
        with pytest.raises(PeftError, match=r"calls its layers model\.\*.*'model'"):
            peft.save(tmp_path / "head", adapter, names=maps.LLAMA, **extra)
    whole = Trainable(lora={f"model/{k}": v for k, v in adapter.lora.items()})
    peft.save(tmp_path / "head", whole, names=maps.LLAMA, task_type="CAUSAL_LM")
