"""`adopt` takes factors as each library means them, `hand_back` returns them."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.libraries import Library, Place

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "adopt.json"


def rand(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def tree(weight, w, names, a, b):
    """The leaves of one weight and its factors, in a nested mapping."""
    out: dict = {}
    for path, shape in zip((weight, *names), (w, a, b), strict=True):
        *parts, last = path.split("/")
        node = out
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = rand(*shape)
    return out


# What the library's code computes: weight, factors, and the update of the weight as
# an einsum over A and B. `tests/golden/check_adopt.py` ran the libraries themselves.
CASES = {
    "qwix dense": ("qwix", "d/kernel", (6, 5), "d/kernel_lora_{}", (6, 2), (2, 5),
                   "ir,ro->io", 3.0),
    "qwix heads": ("qwix", "q/kernel", (6, 2, 4), "q/kernel_lora_{}", (6, 2), (2, 8),
                   "ir,ro->io", 3.0),
    "qwix join": ("qwix", "o/kernel", (2, 4, 6), "o/kernel_lora_{}", (8, 2), (2, 6),
                  "ir,ro->io", 3.0),
    "qwix conv": ("qwix", "conv/kernel", (3, 4, 6), "conv/kernel_lora_{}", (3, 4, 2),
                  (2, 6), "kir,ro->kio", 3.0),
    "qwix experts": ("qwix", "e/w", (3, 4, 6), "e/w_lora_{}", (3, 4, 2), (2, 6),
                     "eir,ro->eio", 3.0),
    "qwix stack": ("qwix", "s/w", (3, 4, 6), "s/w_lora_{}", (3, 4, 2), (3, 2, 6),
                   "eir,ero->eio", 3.0),
    "maxtext": ("maxtext", "d/layers/q/kernel", (4, 3, 2, 5),
                "d/layers/q/kernel_lora_{}", (4, 3, 7), (7, 3, 10), "ilr,rlo->ilo",
                6 / 7),
    "maxtext not scanned": ("maxtext", "d/layers/0/q/kernel", (4, 2, 5),
                            "d/layers/0/q/kernel_lora_{}", (4, 7), (7, 10), "ir,ro->io",
                            6 / 7),
    "nnx": ("nnx", "m/base_module/kernel", (6, 6), "m/lora_{}", (6, 2), (2, 6),
            "ir,ro->io", 1.0),
    "nnx layers": ("nnx", "m/base_module/kernel", (3, 6, 6), "m/lora_{}", (3, 6, 2),
                   (3, 2, 6), "lir,lro->lio", 1.0),
    "nnx linear": ("nnx", "m/kernel", (6, 6), "m/lora/lora_{}", (6, 2), (2, 6),
                   "ir,ro->io", 1.0),
    "easydel": ("easydel", "m/base_module/kernel", (6, 6), "m/lora_{}", (6, 2), (2, 6),
                "ir,ro->io", 1.0),
    "gemma q": ("gemma", "q/w", (2, 6, 4), "q/_LoRAEinsum_0/lora/{}", (6, 3), (3, 2, 4),
                "dr,rnh->ndh", 1.0),
    "gemma join": ("gemma", "o/w", (2, 4, 6), "o/_LoRAEinsum_0/lora/{}", (2, 4, 3),
                   (3, 6), "nhr,rd->nhd", 1.0),
    "gemma mlp": ("gemma", "mlp/linear", (5, 6), "mlp/_LoRAEinsum_linear/lora/{}",
                  (5, 2), (2, 6), "ir,ro->io", 1.0),
    "gemma dense": ("gemma", "d/kernel", (5, 6), "d/lora/{}", (5, 2), (2, 6),
                    "ir,ro->io", 1.0),
    "keras heads": ("keras", "query/kernel", (6, 2, 6), "query/lora_kernel_{}",
                    (6, 2, 2), (2, 6), "dnr,rh->dnh", 3.0),
    "keras conv": ("keras", "conv2d/kernel", (3, 3, 4, 5), "conv2d/lora_kernel_{}",
                   (3, 3, 4, 2), (2, 5), "hwir,ro->hwio", 3.0),
    "keras table": ("keras", "t/embeddings", (6, 6), "t/lora_embeddings_{}", (6, 2),
                    (2, 6), "ir,ro->io", 3.0),
    "openpi q": ("openpi", "q_einsum/w", (2, 4, 4), "q_einsum/lora_{}", (2, 4, 2),
                 (2, 2, 4), "ndr,nrh->ndh", 3.0),
    "openpi join": ("openpi", "attn_vec_einsum/w", (2, 4, 4),
                    "attn_vec_einsum/lora_{}", (2, 4, 2), (2, 2, 4), "nhr,mrd->nhd",
                    3.0),
    "openpi mlp": ("openpi", "mlp/linear", (3, 4, 4), "mlp/linear_lora_{}", (3, 4, 2),
                   (3, 2, 4), "lir,lro->lio", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_update_is_that_of_the_library_and_goes_back(case):
    library, weight, w, name, a, b, einsum, scale = CASES[case]
    names = [name.format(half) for half in "ab"]
    params = tree(weight, w, names, a, b)
    leaves, _ = jlora.paths.flatten(params)
    settings = {} if scale == 1 and library != "openpi" else {"alpha": 6.0}
    if case == "openpi mlp":
        settings = {}
    frozen, trainable = jlora.adopt(params, library, **settings)
    (path,) = trainable.lora
    assert list(jlora.paths.flatten(frozen)[0]) == [path]
    assert "base_module" not in path
    change = scale * np.einsum(einsum, leaves[names[0]], leaves[names[1]])
    merged = jlora.paths.flatten(jlora.merge(frozen, trainable))[0][path]
    np.testing.assert_allclose(
        merged, leaves[weight] + change.reshape(w), rtol=1e-6, atol=1e-5
    )
    back = jlora.hand_back(params, trainable, library, **settings)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    _, again = jlora.adopt(back, library, **settings)
    twice = jlora.paths.flatten(jlora.merge(frozen, again))[0][path]
    np.testing.assert_allclose(twice, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", ["kernel", "embedding", "weight"])
def test_slot_of_skyrl(weight):
    lead = (3,) if weight == "weight" else ()  # of experts
    own = {weight: rand(*lead, 6, 5)}
    own |= {"lora_A": rand(*lead, 6, 2), "lora_B": rand(*lead, 2, 5)}
    frozen, trainable = jlora.adopt({"q": own}, "skyrl", alpha=6.0)
    wanted = own[weight] + 3.0 * own["lora_A"] @ own["lora_B"]
    merged = jlora.merge(frozen, trainable)["q"][weight]
    np.testing.assert_allclose(merged, wanted, rtol=1e-6, atol=1e-5)
    assert (trainable.lora[f"q/{weight}"].spec.op == "embedding") is (
        weight == "embedding"
    )
    whole = {**own, "lora_A": rand(4, *lead, 6, 2), "lora_B": rand(4, *lead, 2, 5)}
    with pytest.raises(jlora.errors.JloraError):
        jlora.adopt({"q": whole}, "skyrl", alpha=6.0)


@pytest.mark.once
def test_libraries_themselves_agree():
    """What `check_adopt.py` found when it ran them."""
    stored = json.loads(GOLDEN.read_text())
    assert stored.keys() >= {
        "qwix",
        "tunix",
        "nnx",
        "easydel",
        "gemma",
        "keras",
        "openpi",
        "maxtext",
        "skyrl",
    }
    for run in stored.values():
        for found in run["models"].values():
            apart = [x for x in found.values() if isinstance(x, float)]
            assert len(apart) >= 3
            assert max(apart) < 1e-5, found
            assert found["leaves"] > 0


def test_nnx_lora_runs_as_in_flax():
    def model(wrap):
        return nnx.Sequential(wrap(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), nnx.relu)

    def wrap(linear):
        rngs = nnx.Rngs(1)
        return nnx.LoRA(
            4, 2, 4, base_module=linear, b_initializer=nnx.initializers.ones, rngs=rngs
        )

    graph, base = nnx.split(model(lambda linear: linear), nnx.Param)
    theirs = model(wrap)
    frozen, trainable = jlora.adopt(nnx.state(theirs, nnx.Param), "nnx")
    assert jax.tree.structure(frozen) == jax.tree.structure(base)
    x = rand(3, 4)
    apply = jlora.apply_lora(lambda params, x: nnx.merge(graph, params)(x))
    np.testing.assert_allclose(apply(frozen, trainable, x), theirs(x), atol=1e-6)
    half = jlora.adapters.scale(trainable, 0.5)
    nnx.update(theirs, jlora.hand_back(nnx.state(theirs, nnx.Param), half, "nnx"))
    np.testing.assert_allclose(apply(frozen, half, x), theirs(x), atol=1e-6)


def planned(params, fn, *args):
    config = jlora.LoraConfig(rank=1)
    return jlora.plan(fn, params, *args, config=config)


def test_plan_tells_the_axes_of_a_square_kernel():
    params = tree("w", (6, 6), ("w_lora_a", "w_lora_b"), (6, 2), (2, 6))
    with pytest.raises(jlora.TreeError, match=r"fit the weight 'w' .* in 2 ways: give"):
        jlora.adopt(params, "qwix", alpha=2.0)
    x, base = rand(3, 6), {"w": params["w"]}
    change = params["w_lora_a"] @ params["w_lora_b"]
    for fn, wanted in (
        (lambda p, x: x @ p["w"], change),
        (lambda p, x: x @ p["w"].T, change.T),
    ):
        plan = planned(base, fn, x)
        frozen, trainable = jlora.adopt(params, "qwix", alpha=2.0, plan=plan)
        merged = jlora.merge(frozen, trainable)["w"]
        np.testing.assert_allclose(merged - base["w"], wanted, atol=1e-5)
        back = jlora.hand_back(params, trainable, "qwix", alpha=2.0)
        np.testing.assert_allclose(back["w_lora_a"], params["w_lora_a"])


def test_plan_gives_the_axes_of_the_operation():
    library, weight, w, name, a, b, *_ = CASES["keras heads"]
    params = tree(weight, w, [name.format(half) for half in "ab"], a, b)
    x = rand(3, 6)
    base, plain = jlora.adopt(params, library, alpha=6.0)
    fn = lambda p, x: jnp.einsum("td,dnh->tnh", x, p["query"]["kernel"])  # noqa: E731
    frozen, trainable = jlora.adopt(
        params, library, alpha=6.0, plan=planned(base, fn, x)
    )
    spec = trainable.lora["query/kernel"].spec
    assert (spec.axes.fan_in, spec.axes.fan_out, spec.rank) == ((0,), (1, 2), 4)
    merged = [jlora.merge(frozen, t)["query"]["kernel"] for t in (plain, trainable)]
    np.testing.assert_allclose(*merged, rtol=1e-6, atol=1e-6)
    activated = jlora.plan(
        fn, base, x, config=jlora.LoraConfig(rank=1, invocation=(3,))
    )
    _, trainable = jlora.adopt(params, library, alpha=6.0, plan=activated)
    assert trainable.lora["query/kernel"].spec.invocation == (3,)
    for config, message in (
        ({"targets": (), "train": ("**",)}, r"leaves 'query/kernel' frozen: name them"),
        ({"method": "dora"}, r"plain LoRA, but .*'query/kernel': dora"),
    ):
        plan = jlora.plan(fn, base, x, config=jlora.LoraConfig(rank=1, **config))
        with pytest.raises(jlora.ConfigError, match=message):
            jlora.adopt(params, library, alpha=6.0, plan=plan)


CONV = (3, 3, 4, 5), (2, 4, 3, 3), (5, 2, 1, 1)  # the weight, and A and B in PEFT
CONV_1D = (3, 4, 5), (2, 4, 3), (5, 2, 1)
EINSUM = (3, 4, 5), (2, 12), (5, 2)
KERNELS = {"keras": "{}/lora_kernel_{}", "qwix": "{}/kernel_lora_{}"}


@pytest.mark.parametrize(
    ("library", "layer", "sizes"),
    [
        ("keras", "block1_conv2", CONV),
        ("keras", "conv1d", CONV_1D),
        ("keras", "conv_head", ((4, 5), (2, 4), (5, 2))),  # a Dense, whatever its name
        ("keras", "einsum_dense_1", EINSUM),
        ("keras", "key_dense", EINSUM),
        ("keras", "attention_output", EINSUM),
        ("qwix", "params/Conv_0", CONV),
        ("qwix", "layers/3/conv1", CONV_1D),
        ("qwix", "params/Einsum_0", EINSUM),
        ("qwix", "experts", EINSUM),
        ("maxtext", "conv1d", CONV_1D),
    ],
)
def test_kernel_of_a_convolution_is_told_by_its_layer(library, layer, sizes):
    w, *wanted = sizes
    names = [KERNELS.get(library, KERNELS["qwix"]).format(layer, half) for half in "ab"]
    params = tree(f"{layer}/kernel", w, names, (*w[:-1], 2), (2, w[-1]))
    _, own = jlora.adopt(params, library, alpha=6.0)
    _, arrays = jlora.peft.tensors(own)
    assert [x.shape for x in arrays.values()] == wanted


@pytest.mark.parametrize("library", KERNELS)
def test_kernel_of_a_convolution_is_told_by_the_plan(library):
    names = [KERNELS[library].format("conv/mix", half) for half in "ab"]
    mix = tree("conv/mix/kernel", (3, 4, 5), names, (3, 4, 2), (2, 5))
    with pytest.raises(
        jlora.TreeError, match=r"'conv/mix/kernel' \[3, 4, 5\] may be of a con.*plan="
    ):
        jlora.adopt(mix, library, alpha=6.0)
    base = {"conv": {"mix": {"kernel": mix["conv"]["mix"]["kernel"]}}}

    def fn(p, x):
        sides = ("NWC", "WIO", "NWC")
        kernel = p["conv"]["mix"]["kernel"]
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=sides
        )

    config = jlora.LoraConfig(rank=1, targets=("**/kernel",))
    plan = jlora.plan(fn, base, rand(1, 6, 4), config=config)
    _, own = jlora.adopt(mix, library, alpha=6.0, plan=plan)
    assert own.lora["conv/mix/kernel"].spec.op == "conv"


def test_qwix_keeps_the_axes_of_a_only_of_convolutions_and_einsums():
    """A product over several axes has one axis for them in A, so no name is needed."""
    for name, w, a, b in (
        ("mix/kernel", (3, 4, 6), (12, 2), (2, 6)),
        ("mix/kernel", (3, 4, 6), (3, 2), (2, 24)),
        ("o_proj/w", (3, 4, 6), (3, 4, 2), (2, 6)),  # Flax's layers have a kernel
    ):
        params = tree(name, w, (f"{name}_lora_a", f"{name}_lora_b"), a, b)
        _, own = jlora.adopt(params, "qwix", alpha=6.0)
        assert own.lora[name].spec.op == "linear"


def test_shared_factor_of_experts_is_repeated_and_goes_back():
    _, weight, w, name, a, b, *_ = CASES["qwix experts"]
    params = tree(weight, w, [name.format(half) for half in "ab"], a, b)
    fn = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["e"]["w"])  # noqa: E731
    plan = planned({"e": {"w": params["e"]["w"]}}, fn, rand(3, 2, 4))
    _, trainable = jlora.adopt(params, "qwix", alpha=6.0, plan=plan)
    assert trainable.lora["e/w"].b.shape == (3, 2, 6)
    back = jlora.hand_back(params, trainable, "qwix", alpha=6.0)
    np.testing.assert_allclose(back["e"]["w_lora_b"], params["e"]["w_lora_b"])
    own = trainable.lora["e/w"]
    apart = dataclasses.replace(own, b=own.b * jnp.arange(3.0)[:, None, None])
    with pytest.raises(jlora.TreeError, match="'e/w' needs rank 6, the tree has 2"):
        jlora.hand_back(params, jlora.Trainable({"e/w": apart}), "qwix", alpha=6.0)


def dense(**changes):
    leaves = {"kernel": rand(6, 5), "kernel_lora_a": rand(6, 2)}
    leaves |= {"kernel_lora_b": rand(2, 5)}
    return {"d": {k: x for k, x in {**leaves, **changes}.items() if x is not None}}


@pytest.mark.parametrize(
    ("params", "library", "settings", "message"),
    [
        (dense(kernel_lora_b=None), "qwix", {"alpha": 1.0},
         r"'d/kernel_lora_a' is there without 'd/kernel_lora_b'"),
        (dense(kernel_lora_a=None), "qwix", {"alpha": 1.0},
         r"'d/kernel_lora_b' is there without 'd/kernel_lora_a'"),
        (dense(kernel=None), "qwix", {"alpha": 1.0},
         r"without its weight 'd/kernel' .*Give the whole parameters"),
        (dense(kernel={"array": {"qvalue": rand(6, 5), "scale": rand(1, 5)}}), "qwix",
         {"alpha": 1.0}, r"'d/kernel_lora_a': its weight 'd/kernel' is not an "
         r"array, but holds 'd/kernel/array/qvalue', 'd/kernel/array/scale' .*dense"),
        (dense(lora_magnitude=rand(5)), "qwix", {"alpha": 1.0},
         r"no rule is for 'd/lora_magnitude'"),
        (dense(kernel_lora_b=rand(2, 7)), "qwix", {"alpha": 1.0},
         r"'d/kernel_lora_a' \[6, 2\] and 'd/kernel_lora_b' \[2, 7\] do not fit"),
        (dense(kernel_lora_b=rand(3, 5)), "qwix", {"alpha": 1.0}, r"do not fit"),
        (dense(), "nnx", {}, r"no rule is for .* are those of 'qwix' or 'maxtext'"),
        ({"d": {"kernel": rand(6, 5)}}, "qwix", {"alpha": 1.0},
         r"has no factors of 'qwix': none of its 1 leaves is named like .*'\*_lora_a'"),
        (dense(), "qwix", {}, r"alpha is not in the tree: give alpha=, for 'd/kernel'"),
        (dense(), "qwix", {"alpha": {"x/*": 1.0}}, r"'x/\*' matches no weight"),
        (dense(), "qwix", {"alpha": {"d/*": 1.0, "**": 2.0}}, r"'d/kernel' gets 2 val"),
        (dense(), "qwix", {"alpha": -1.0}, r"alpha must be a positive number, got -1"),
        ({"m": {"kernel": rand(6, 5), "lora": {"lora_a": rand(6, 2),
          "lora_b": rand(2, 5)}}}, "nnx", {"alpha": 1.0}, r"not scaled .*leave alpha="),
        (dense(), "quix", {}, r"library must be one of 'qwix', .* got 'quix'"),
        (rand(3), "qwix", {}, r"must be a tree of mappings, .* got ndarray"),
        (dense(kernel_lora_a="a"), "qwix", {"alpha": 1.0}, r"an array, got 'a'"),
        (dense(kernel=jax.ShapeDtypeStruct((6, 5), np.float32)), "qwix",
         {"alpha": 1.0}, r"'d/kernel' is a shape. Write jax.eval_shape"),
        (nnx.LoRA(2, 1, 2, rngs=nnx.Rngs(0)), "nnx", {}, r"nnx.state.* got LoRA"),
    ],
)  # fmt: skip
def test_bad_input_is_named(params, library, settings, message):
    with pytest.raises(jlora.JloraError, match=message):
        jlora.adopt(params, library, **settings)


def test_scale_is_read_from_the_tree():
    place = Place("*/w", "*/down", "*/up", "i o -> i r, r o", scale="*/scale")
    own = Library("own", (place,))
    leaves = {"w": rand(4, 4), "down": rand(4, 2), "up": rand(2, 4)}
    params = {"d": {**leaves, "scale": np.float32(0.25)}}
    frozen, trainable = jlora.adopt(params, own)
    assert frozen.keys() == {"d"}
    assert frozen["d"].keys() == {"w"}
    assert trainable.lora["d/w"].scale == 0.25
    for scale, message in (
        (np.float32(0), "'d/scale' must be a positive number, got 0.0"),
        (rand(2), "'d/scale' must be one number"),
    ):
        with pytest.raises(jlora.TreeError, match=message):
            jlora.adopt({"d": {**leaves, "scale": scale}}, own)
    with pytest.raises(jlora.TreeError, match="'d/down' is there without 'd/scale'"):
        jlora.adopt({"d": leaves}, own)


def test_alpha_may_differ_by_weight():
    params = {"x": dense()["d"], "y": dense()["d"]}
    _, trainable = jlora.adopt(params, "qwix", alpha={"x/*": 1.0, "y/*": 4.0})
    assert [f.scale for f in trainable.lora.values()] == [0.5, 2.0]


@pytest.mark.once
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("*/w", "a", "*/b"), "one number of stars"),
        (("*/w", "*/a", "*/b", "i o, i r, r o"), "must look like"),
        (("*/w", "*/a", "*/b", "i o -> i r, s o"), "share one name, the rank"),
        (("*/w", "*/a", "*/b", "i i -> i r, r i"), "a name of its own"),
        (("*/w", "*/a", "*/b", "i o k -> i r, r o"), "must be in one factor"),
    ],
)
def test_rules_that_cannot_be_read(fields, message):
    with pytest.raises(jlora.ConfigError, match=message):
        Place(*fields)


def test_hand_back_keeps_the_update_in_another_rank_and_scale():
    params = dense()
    frozen, trainable = jlora.adopt(params, "qwix", alpha=3.0)
    like = dense(kernel_lora_a=rand(6, 4), kernel_lora_b=rand(4, 5))
    back = jlora.hand_back(like, trainable, "qwix", alpha=9.0)
    _, again = jlora.adopt(back, "qwix", alpha=9.0)
    assert again.lora["d/kernel"].rank == 4
    np.testing.assert_allclose(
        jlora.merge(frozen, again)["d"]["kernel"],
        jlora.merge(frozen, trainable)["d"]["kernel"],
        rtol=1e-6,
        atol=1e-6,
    )
    with pytest.raises(jlora.TreeError, match="'d/kernel' needs rank 4, the tree has"):
        jlora.hand_back(params, again, "qwix", alpha=9.0)


@pytest.mark.parametrize(
    ("spec", "factor", "message"),
    [
        ({"init": "pissa"}, 1.0, "for a base changed by init='pissa': jlora.rebase"),
        ({"invocation": (3,)}, 1.0, "'d/kernel' is activated LoRA"),
        ({}, 1e6, "or numbers too large for float16"),
    ],
)
def test_hand_back_refuses_an_update_that_the_tree_cannot_hold(spec, factor, message):
    params = jax.tree.map(lambda x: x.astype(np.float16), dense())
    own = jlora.adopt(params, "qwix", alpha=3.0)[1].lora["d/kernel"]
    spec = dataclasses.replace(own.spec, alpha=own.spec.alpha * factor, **spec)
    trainable = jlora.Trainable({"d/kernel": dataclasses.replace(own, spec=spec)})
    with pytest.raises(jlora.TreeError, match=message):
        jlora.hand_back(params, trainable, "qwix", alpha=3.0)


def test_hand_back_names_what_only_one_side_has():
    _, trainable = jlora.adopt(dense(), "qwix", alpha=3.0)
    more = jlora.Trainable({**trainable.lora, "x": trainable.lora["d/kernel"]})
    with pytest.raises(jlora.TreeError, match="the tree has no factors for 'x'"):
        jlora.hand_back(dense(), more, "qwix", alpha=3.0)
    none = jlora.Trainable(full={"d/kernel": rand(6, 5)})
    with pytest.raises(
        jlora.TreeError, match=r"'d/kernel' is trained in full.*no factors for 'd/ker"
    ):
        jlora.hand_back(dense(), none, "qwix", alpha=3.0)
