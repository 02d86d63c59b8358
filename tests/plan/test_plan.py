"""What a plan says of a function: who is adapted, over which axes, and why not."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

EMBED_NOTE = "embedding: name it in targets to adapt it"


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


IDS = shape(4, 8, dtype=jnp.int32)
N_LAYERS = 6


def params():
    """Shapes of a small language model with every kind of leaf."""
    tree = {
        f"layer_{i}": {
            "up": {"kernel": shape(16, 64), "bias": shape(64)},
            "down": {"kernel": shape(64, 16)},
            "norm": shape(16),
        }
        for i in range(N_LAYERS)
    }
    tree |= {"embed": shape(100, 16), "head": shape(16, 100), "pos": shape(8, 16)}
    tree |= {"spare": shape(3, 5), "step": shape(dtype=jnp.int32)}
    return tree


def model(p, ids):
    h = p["embed"][ids] + p["pos"][None] * p["step"].astype(jnp.float32)
    for i in range(N_LAYERS):
        layer = p[f"layer_{i}"]
        up = h @ layer["up"]["kernel"] + layer["up"]["bias"][None, None]
        h = (h + jnp.tanh(up) @ layer["down"]["kernel"]) * layer["norm"][None, None]
    return h @ p["head"]


def plan(**config):
    return jlora.plan(model, params(), IDS, config=jlora.LoraConfig(**config))


def row(plan, path):
    (found,) = [r for r in plan.rows() if r.path == path]
    return found


KERNELS = tuple(f"layer_{i}/{n}/kernel" for i in range(6) for n in ("down", "up"))


# What is adapted.


def test_all_linear_leaves_out_embedding_and_output_head():
    made = plan(rank=4)
    assert made.adapted == KERNELS
    assert made.full == ()
    assert row(made, "embed").note == EMBED_NOTE
    assert row(made, "head").head
    assert row(made, "head").note == "output head: name it in targets, or in train"
    assert [r.path for r in made.rows() if r.head] == ["head"]


def test_all_linear_takes_a_lone_linear_layer_even_as_head():
    made = jlora.plan(
        lambda p, x: x @ p["w"] + p["b"][None],
        {"w": shape(4, 3), "b": shape(3)},
        shape(2, 4),
        config=jlora.LoraConfig(rank=1),
    )
    assert made.adapted == ("w",)
    assert row(made, "w").head


def test_all_linear_without_a_linear_operation_is_an_error():
    with pytest.raises(
        jlora.TargetError,
        match="'all-linear' found no weight of a linear operation; to adapt 'e', name",
    ):
        jlora.plan(
            lambda p, i: p["e"][i],
            {"e": shape(5, 4)},
            shape(3, dtype=jnp.int32),
            config=jlora.LoraConfig(rank=1),
        )


def test_an_embedding_is_adapted_when_named():
    spec = row(plan(rank=4, targets="embed"), "embed").spec
    assert spec.op == "embedding"
    assert spec.axes == jlora.Axes((), (0,), (1,))


def test_an_output_head_is_adapted_when_named():
    made = plan(rank=4, targets=("head", "**/up/kernel"))
    assert made.adapted == ("head", *(k for k in KERNELS if "up" in k))


@pytest.mark.parametrize(
    ("predicate", "adapted"),
    [
        (lambda r: r.op == "linear" and r.layer >= 4, KERNELS[8:]),
        (lambda r: r.head, ("head",)),
        (lambda r: r.path == "embed" or r.shape == (16, 64), ("embed", *KERNELS[1::2])),
    ],
    ids=["layers", "head", "shape"],
)
def test_a_predicate_chooses_rows(predicate, adapted):
    assert plan(rank=4, targets=predicate).adapted == adapted


def test_a_predicate_sees_every_row():
    seen = []
    plan(rank=4, targets=lambda r: seen.append(r) or r.path == KERNELS[0])
    assert {r.path for r in seen} == {r.path for r in plan(rank=4).rows()}
    assert all(isinstance(r, jlora.Row) for r in seen)


def test_exclude_takes_leaves_away_from_all_linear_and_from_globs():
    rest = tuple(k for k in KERNELS if not k.startswith("layer_0/"))
    for targets in ("all-linear", "**/kernel"):
        made = plan(rank=4, targets=targets, exclude="layer_0/**")
        assert made.adapted == rest
    assert row(made, KERNELS[0]).note == "excluded"
    assert row(made, KERNELS[0]).status == "frozen"


def test_train_in_full_takes_any_float_leaf():
    made = plan(rank=4, train=("head", "**/{bias,norm}"))
    assert made.adapted == KERNELS
    assert len(made.full) == 1 + 2 * N_LAYERS
    assert row(made, "head").status == "full"
    assert row(made, "head").trained == 1600
    assert made.trained_count == 12 * 4 * 80 + 1600 + 6 * 80


def test_train_wins_over_all_linear():
    made = plan(rank=4, train="layer_0/up/kernel")
    assert "layer_0/up/kernel" in made.full
    assert made.adapted == tuple(k for k in KERNELS if k != "layer_0/up/kernel")


def test_the_bias_of_an_adapted_layer_stays_frozen():
    assert row(plan(rank=4), "layer_0/up/bias").status == "frozen"


# Settings of each weight.


def test_rules_set_single_fields_and_the_last_match_wins():
    made = plan(
        rank=4,
        alpha=8,
        dropout=0.1,
        rules=(
            jlora.Rule("**/up/**", rank=2, init="gaussian"),
            jlora.Rule("layer_{0,1}/**", alpha=5),
            jlora.Rule("layer_1/**", rank=1, dropout=0.5),
        ),
    )

    def settings(path):
        spec = row(made, path).spec
        return spec.rank, spec.alpha, spec.dropout, spec.init

    assert settings("layer_2/down/kernel") == (4, 8.0, 0.1, "kaiming")
    assert settings("layer_2/up/kernel") == (2, 8.0, 0.1, "gaussian")
    assert settings("layer_0/up/kernel") == (2, 5.0, 0.1, "gaussian")
    assert settings("layer_1/up/kernel") == (1, 5.0, 0.5, "gaussian")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 4, "alpha": 8, "rslora": True}, 4.0),
        ({"rank": 16, "rslora": True}, 4.0),
        ({"rank": 8, "rules": jlora.Rule("**", rank=2)}, 1.0),
        ({"rank": 8, "alpha": 8, "rules": jlora.Rule("**", rank=2)}, 4.0),
    ],
)
def test_scale_is_alpha_over_rank_or_its_root(config, scale):
    assert row(plan(**config), KERNELS[0]).spec.scale == scale


def test_rule_axes_replace_what_the_trace_found():
    axes = jlora.Axes((0,), (2,), (1,))
    made = jlora.plan(
        lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]),
        {"w": shape(3, 4, 6)},
        shape(5, 4),
        config=jlora.LoraConfig(rank=2, rules=jlora.Rule("w", axes=axes)),
    )
    assert row(made, "w").spec.axes == axes
    assert row(made, "w").trained == 3 * 2 * (6 + 4)


def test_rank_is_bounded_by_the_axes_that_count():
    def fn(p, x):
        return jnp.einsum("td,dhk->thk", x, p["w"])

    args = ({"w": shape(8, 2, 3)}, shape(5, 8))
    config = jlora.LoraConfig(rank=6)
    assert jlora.plan(fn, *args, config=config).adapted == ("w",)
    with pytest.raises(jlora.TargetError, match=r"rank 7 is above .* min\(8, 6\)"):
        jlora.plan(fn, *args, config=jlora.LoraConfig(rank=7))


# What it costs.


def test_counts_are_those_of_the_arrays_that_split_makes():
    made = plan(rank=3, targets=("embed", "**/up/kernel"), train=("head", "**/norm"))
    _, trainable = jax.eval_shape(
        lambda p: jlora.split(jax.random.key(0), p, made), params()
    )
    sizes = [x.size for x in jax.tree.leaves(trainable)]
    assert made.trained_count == sum(sizes)
    assert made.total_count == sum(x.size for x in jax.tree.leaves(params()))


def gpt3(p, x):
    for layer in p["layers"]:
        q, k, v = (jnp.reshape(x @ layer[n], (1, 64, 96, 128)) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        x = x + jnp.reshape(mixed, x.shape) @ layer["o"]
        x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
    return x @ p["embed"].T


def test_gpt3_is_planned_in_seconds_without_arrays():
    d = 12288
    layer = {name: shape(d, d) for name in "qkvo"}
    layer |= {"up": shape(d, 4 * d), "down": shape(4 * d, d)}
    tree = {"layers": [dict(layer) for _ in range(96)], "embed": shape(50257, d)}
    config = jlora.LoraConfig(rank=1, targets="layers/*/{q,v}")
    live = len(jax.live_arrays())
    start = time.perf_counter()
    made = jlora.plan(gpt3, tree, shape(1, 64, d), config=config)
    seconds = time.perf_counter() - start
    assert made.trained_count == 4_718_592
    assert made.total_count == 96 * 12 * d * d + 50257 * d
    assert len(made.adapted) == 2 * 96
    assert len(jax.live_arrays()) <= live
    assert seconds < 20, f"{seconds:.1f} s; about 1 s on a quiet machine"
    assert "layers/{0..95}/q (×96)" in str(made)


# What a function may be.


def test_shapes_give_the_plan_of_arrays():
    tree = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), params())
    config = jlora.LoraConfig(rank=4, train="head")
    ids = np.zeros(IDS.shape, IDS.dtype)
    for to in (lambda x: x, jnp.asarray):
        made = jlora.plan(model, jax.tree.map(to, tree), to(ids), config=config)
        assert made == plan(rank=4, train="head")
        assert hash(made) == hash(plan(rank=4, train="head"))


def test_static_arguments_reach_the_function():
    seen = []

    def fn(p, x, scale, mode, *, train, act=jnp.tanh):
        seen.append((scale, mode, train, act))
        return act(x @ p["w" if train else "v"]) * scale, None, "text", 3

    made = jlora.plan(
        fn,
        {"w": shape(4, 4), "v": shape(4, 4)},
        shape(2, 4),
        0.5,
        "gelu",
        config=jlora.LoraConfig(rank=1),
        train=True,
        act=jnp.sin,
    )
    assert seen == [(0.5, "gelu", True, jnp.sin)]
    assert made.adapted == ("w",)
    assert row(made, "v").status == "unused"


def test_the_function_is_traced_once():
    calls = []

    def fn(p, x):
        calls.append(1)
        return x @ p["w"]

    jlora.plan(
        fn,
        {"w": shape(4, 4)},
        shape(2, 4),
        config=jlora.LoraConfig(rank=1, targets="w"),
    )
    assert len(calls) == 1


def test_leaves_that_are_no_arrays_stand_in_the_plan():
    made = jlora.plan(
        lambda p, x: p["act"](x @ p["w"]),
        {"w": shape(4, 4), "act": jnp.tanh, "name": "mlp"},
        shape(2, 4),
        config=jlora.LoraConfig(rank=1),
    )
    assert made.adapted == ("w",)
    assert row(made, "name").dtype == "str"
    assert row(made, "act").shape == ()
    str(made)


USES = {
    "a norm's scale": lambda p, x: (x @ p["m"]) * p["w"][None],
    "a cast bias": lambda p, x: (x @ p["m"]).astype(int) + p["w"].astype(int)[None],
    "columns scaled": lambda p, x: x @ (p["m"] * p["w"][None]),
    "rows scaled": lambda p, x: x @ (p["m"] / p["w"][:, None]),
    "a temperature": lambda p, x: x @ (p["m"] * p["w"][0]),
    "returned": lambda p, x: (x @ p["m"], p["w"]),
    "a loop's end": lambda p, x: jax.lax.while_loop(
        lambda s: s[1] < p["w"].sum(), lambda s: (s[0] @ p["m"], s[1] + 1), (x, 0.0)
    ),
    "an index": lambda p, x: (x @ p["m"])[jnp.argmax(p["w"])],
    "one entry": lambda p, x: (x @ p["m"]) * p["w"][2],
    "a fallback": lambda p, x: x @ jnp.exp(p["m"]) @ jnp.diag(p["w"]),
}


@pytest.mark.parametrize("use", USES)
def test_a_leaf_that_is_used_is_not_called_unused(use):
    made = jlora.plan(
        USES[use],
        {"m": shape(4, 4), "w": shape(4), "spare": shape(4)},
        shape(3, 4),
        config=jlora.LoraConfig(rank=1, targets="m"),
    )
    assert row(made, "w").status == "frozen"
    assert row(made, "spare").status == "unused"


# What is refused, and the text of each refusal.


def refused(message, **config):
    with pytest.raises(jlora.TargetError) as caught:
        plan(**{"rank": 4, **config})
    assert re.search(message, str(caught.value)), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("field", ["targets", "exclude", "train"])
def test_a_pattern_that_matches_nothing_names_the_nearest(field):
    refused(
        f"{field}: '\\*\\*/upp/kernel' matched none of 29 leaves, "
        "nearest: 'layer_0/up/kernel'",
        **{field: "**/upp/kernel"},
    )


def test_what_is_no_config_or_no_function_is_refused():
    with pytest.raises(jlora.ConfigError, match=r"a jlora\.LoraConfig, got dict"):
        jlora.plan(jnp.sin, jnp.ones(2), config={"rank": 2})
    with pytest.raises(jlora.ConfigError, match="plan takes the function first"):
        jlora.plan({"w": 1}, jnp.ones(2), config=jlora.LoraConfig())


def test_a_rule_that_matches_nothing_names_the_nearest():
    refused(
        r"rules: 'layer_9/\*\*' matched none of 29 leaves, nearest: 'layer_",
        rules=jlora.Rule("layer_9/**", rank=2),
    )


def test_a_rule_for_leaves_that_are_not_adapted_has_no_effect():
    refused(
        "rules: 'head' matched 'head', but no adapted leaf",
        rules=jlora.Rule("head", rank=2),
    )


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (
            "layer_0/up/bias",
            r"float32\[64\]\) is not a weight of a .*`add` at",
        ),
        ("layer_0/norm", r"float32\[16\]\) is not a weight of a linear op.*`mul` at"),
        ("pos", "is not a weight of a linear operation"),
        ("spare", "is not used by the function"),
        ("step", "is not a floating-point array"),
    ],
)
def test_a_target_that_takes_no_factors_is_refused(path, why):
    text = refused(f"targets: '{path}' .*{why}", targets=path)
    assert "so it takes no factors; nearest that does: 'layer_0/" in text


def test_a_vector_used_in_a_product_takes_no_factors():
    with pytest.raises(jlora.TargetError, match=r"'w' \(float32\[4\]\) is a vector"):
        jlora.plan(
            lambda p, x: x @ p["w"],
            {"w": shape(4)},
            shape(3, 4),
            config=jlora.LoraConfig(rank=1, targets="w"),
        )


def test_the_source_line_of_the_wrong_use_is_named():
    text = refused("targets: 'layer_0/norm'", targets="layer_0/norm")
    assert re.search(r"`mul` at test_plan\.py:\d+", text)


def test_integer_weights_are_refused_by_name_and_left_out_of_all_linear():
    def fn(p, x):
        return x @ p["w"].astype(jnp.float32) @ p["v"] @ p["head"]

    args = (
        {"w": shape(4, 4, dtype=jnp.int8), "v": shape(4, 4), "head": shape(4, 2)},
        shape(3, 4),
    )
    made = jlora.plan(fn, *args, config=jlora.LoraConfig(rank=1))
    assert made.adapted == ("v",)
    assert row(made, "w").dtype == "int8"
    with pytest.raises(jlora.TargetError, match=r"int8\[4, 4\]\) is not a floating"):
        jlora.plan(fn, *args, config=jlora.LoraConfig(rank=1, targets="w"))


def test_rank_above_the_smaller_side_is_refused_with_a_remedy():
    text = refused(
        r"rank 17 is above min\(in, out\) = min\(64, 16\) of "
        r"'layer_{0\.\.5}/down/kernel'",
        rank=17,
    )
    assert "Rule('layer_{0..5}/down/kernel', rank=16) (×6)" in text
    remedy = jlora.Rule("**/down/kernel", rank=16)
    plan(rank=16, rules=(jlora.Rule("**", rank=17), jlora.Rule("**", rank=16), remedy))


def test_errors_about_many_layers_are_short():
    params = {
        f"layers_{i}": {name: {"kernel": jnp.ones((8, 8))} for name in "qkvo"}
        for i in range(32)
    }

    def fn(p, x):
        for layer in p.values():
            for weight in layer.values():
                x = jnp.tanh(x @ weight["kernel"])
        return x

    config = jlora.LoraConfig(rank=64)
    with pytest.raises(jlora.TargetError) as caught:
        jlora.plan(fn, params, jnp.ones((1, 8)), config=config)
    text = str(caught.value)
    assert len(text) < 1500
    assert "'layers_{0..31}/q/kernel'" in text
    assert text.count("(×32)") == 3
    assert text.count("(×31)") == 1  # the last is the output head
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("field", "pattern", "glob"),
    [
        ("targets", "up", "**/up/kernel"),
        ("targets", "layer_{0,1}", "**/layer_{0,1}/**"),
        ("exclude", "up", "**/up/**"),
    ],
)
def test_a_module_named_as_in_peft_is_told_the_glob(field, pattern, glob):
    text = refused(f"{field}: .*: write '(.*?)'", **{field: pattern})
    assert f"write '{glob}'" in text
    assert jlora.paths.select(glob, [row.path for row in plan().rows()])


def test_a_keyword_of_the_function_may_be_called_config():
    def scaled(params, x, config):
        return config * (x @ params["w"])

    found = jlora.plan(
        scaled,
        {"w": jnp.ones((4, 4))},
        jnp.ones((1, 4)),
        config=jlora.LoraConfig(rank=2),
        fn_kwargs={"config": 2.0},
    )
    assert found.adapted == ("w",)


def test_rule_axes_must_be_all_axes_once():
    for axes in (((), (0,), ()), ((), (0, 0), (1,)), ((), (0,), (1, 2))):
        refused(
            r"axes: .* of 'layer_0/up/kernel' must name each of its 2 axes once",
            rules=jlora.Rule("layer_0/up/kernel", axes=jlora.Axes(*axes)),
        )


def test_a_leaf_in_targets_and_train_is_a_contradiction():
    refused("'head' in both targets and train", targets="head", train="head")


def test_a_target_that_exclude_takes_away_whole_is_a_contradiction():
    refused(
        r"targets: exclude= removes every match of '\*\*/up/kernel'",
        targets=("**/up/kernel", "**/down/kernel"),
        exclude="**/up/**",
    )


def test_excluding_everything_leaves_nothing_to_adapt():
    told = "exclude= and train= take every weight that 'all-linear' means"
    refused(told, exclude="**")


def test_training_an_integer_leaf_is_refused():
    refused("train: 'step' is int32, which has no gradient", train="step")


def test_a_predicate_that_chooses_nothing_is_refused():
    refused("the predicate chose none of 29 leaves", targets=lambda r: False)


def test_a_predicate_that_chooses_wrong_leaves_is_refused():
    refused("'spare' .* is not used by the function", targets=lambda r: True)


def test_all_that_is_wrong_is_told_at_once():
    text = refused(
        "This config does not fit the model",
        targets=("**/nothing", "spare"),
        train="nowhere",
        exclude="never",
        rules=jlora.Rule("**/nobody", rank=3),
    )
    for part in ("'**/nothing'", "'spare'", "'nowhere'", "'never'", "'**/nobody'"):
        assert part in text


# How it is printed.


TABLE = """
leaf                     shape           status   op         in → out  rank  trained     cost
───────────────────────  ──────────────  ───────  ─────────  ────────  ────  ───────  ───────  ─────────────────────────────────────────
embed                    float32[50,16]  frozen   embedding                                    embedding: name it in targets to adapt it
head                     float32[16,2]   full     linear                          32
layers/{0..2}/bias (×3)  float32[32]     frozen
layers/{0..2}/down (×3)  float32[32,16]  adapted  linear     32 → 16      2      288  +18.8 %
layers/{0..2}/up (×3)    float32[16,32]  adapted  linear     16 → 32      2      288  +18.8 %
spare                    int32[7]        unused
trained 608 of 4,007 parameters (15.17 %), 32 of them in full; 2.43 kB in float32, 7.3 kB with Adam
adapted: 3 of 3 blocks, 76.7 % of the weights, 99.0 % of a token's FLOPs
"""  # noqa: E501


def test_printing_shows_the_table():
    def fn(p, ids):
        h = p["embed"][ids]
        for layer in p["layers"]:
            h = h + jnp.tanh(h @ layer["up"] + layer["bias"][None]) @ layer["down"]
        return h @ p["head"]

    layer = {"up": shape(16, 32), "bias": shape(32), "down": shape(32, 16)}
    tree = {"embed": shape(50, 16), "layers": [layer, layer, layer]}
    tree |= {"head": shape(16, 2), "spare": shape(7, dtype=jnp.int32)}
    made = jlora.plan(
        fn,
        tree,
        shape(4, dtype=jnp.int32),
        config=jlora.LoraConfig(rank=2, train="head"),
    )
    assert f"\n{made}\n" == TABLE


def test_layers_that_differ_stand_on_lines_of_their_own():
    text = str(plan(rank=4, rules=jlora.Rule("layer_5/**", rank=2)))
    assert "layer_{0..4}/up/kernel (×5)" in text
    assert re.search(r"^layer_5/up/kernel .* 16 → 64 +2 +160 ", text, re.MULTILINE)


def test_batch_axes_are_printed_apart():
    made = jlora.plan(
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"]),
        {"experts": shape(3, 4, 6)},
        shape(3, 5, 4),
        config=jlora.LoraConfig(rank=2),
    )
    assert "4 → 6 ×3" in str(made)
    assert row(made, "experts").trained == 3 * 2 * (4 + 6)


def test_a_weight_that_is_merged_on_the_fly_is_shown_with_its_place():
    def fn(p, x):
        with jax.named_scope("odd"):
            x = x @ jnp.exp(p["w"])
        return x @ p["v"]

    args = ({"w": shape(4, 4), "v": shape(4, 4)}, shape(2, 4))
    made = jlora.plan(fn, *args, config=jlora.LoraConfig(rank=1, targets="{w,v}"))
    text = str(made)
    assert "merged on the fly" in text
    assert re.search(r"^  w: `exp` at test_plan\.py:\d+", text, re.MULTILINE)
    assert row(made, "w").route == "merged"
    assert {use.scope for use in row(made, "w").uses} == {"odd"}
    quiet = str(jlora.plan(fn, *args, config=jlora.LoraConfig(rank=1, targets="v")))
    assert "merged on the fly (right" not in quiet


MIXED = {
    "scales an activation": lambda p, x: x @ p["w"] + x * p["w"],
    "masked penalty": lambda p, x: (x @ p["w"], jnp.sum(p["w"] * jnp.tri(4))),
    "added to an activation": lambda p, x: jnp.sin(x) @ p["w"] + p["w"],
    "picked by data": lambda p, x: x @ p["w"] + jnp.where(x > 0, p["w"], 0.0),
    "its norm": lambda p, x: x @ p["w"] / jnp.linalg.norm(p["w"]),
    "returned": lambda p, x: (x @ p["w"], p["w"]),
    "in a custom rule": lambda p, x: x @ p["w"] + jax.nn.relu(p["w"]),
}


@pytest.mark.parametrize("use", MIXED)
def test_one_merged_use_among_factored_ones_is_shown(use):
    """What the plan says is what `apply_lora` does."""
    args = {"w": jnp.ones((4, 4))}, jnp.ones((4, 4))
    config = jlora.LoraConfig(rank=1, targets="w")
    made = jlora.plan(MIXED[use], *args, config=config)
    parts = jlora.split(jax.random.key(0), args[0], made)
    with pytest.raises(jlora.MergeError):
        jlora.apply_lora(MIXED[use], on_merge="error")(*parts, args[1])
    assert row(made, "w").route == "factored+merged"
    assert "merged on the fly" in str(made)


QUERIES = {
    "repeated": lambda q: jnp.broadcast_to(q, (2, 3, 4)),
    "normalised": lambda q: jax.nn.standardize(q),
    "added to zeros": lambda q: jnp.zeros((2, 3, 4)) + q[None],
}


@pytest.mark.parametrize("made", QUERIES)
def test_weights_that_learned_queries_meet_are_linear(made):
    def fn(p, x):
        scores = QUERIES[made](p["queries"]) @ p["wq"] @ (x @ p["wk"]).T
        return jax.nn.softmax(scores) @ x @ p["wo"]

    params = {"queries": jnp.ones((3, 4))} | {k: jnp.eye(4) for k in ("wq", "wk", "wo")}
    x = jnp.ones((5, 4))
    plan = jlora.plan(fn, params, x, config=jlora.LoraConfig(rank=1))
    assert plan.adapted == ("wk", "wq")  # the head is left, and the queries
    parts = jlora.split(jax.random.key(0), params, plan)
    jlora.apply_lora(fn, on_merge="error")(*parts, x)


TRIANGLE = jnp.tri(4)
COMPUTED = {
    "masked": lambda p, x: x @ jnp.triu(p["w"]),
    "masked by a product": lambda p, x: x @ (p["w"] * TRIANGLE),
    "masked in a jit": lambda p, x: x @ jax.jit(lambda w: w * TRIANGLE)(p["w"]),
    "masked by a leaf": lambda p, x: x @ jnp.where(p["mask"], p["w"], 0.0),
    "standardised": lambda p, x: x @ jax.nn.standardize(p["w"], axis=0),
    "chosen or turned": lambda p, x: x @ jnp.where(x[0, 0] > 0, p["w"], p["w"].T),
}


@pytest.mark.parametrize("use", COMPUTED)
def test_a_weight_computed_from_weights_can_be_named_and_is_merged(use):
    """Constants in it, and what chooses, are no activations that it meets."""
    args = {"w": jnp.eye(4), "mask": jnp.ones((4, 4), bool)}, jnp.ones((2, 4))
    config = jlora.LoraConfig(rank=1, targets="w")
    made = jlora.plan(COMPUTED[use], *args, config=config)
    parts = jlora.split(jax.random.key(0), args[0], made)
    with pytest.raises(jlora.MergeError):
        jlora.apply_lora(COMPUTED[use], on_merge="error")(*parts, args[1])
    assert row(made, "w").route == "merged"


def test_all_linear_leaves_out_what_could_only_be_merged():
    def fn(p, x):
        return x @ jnp.exp(p["w"]) @ p["v"] @ p["u"]

    made = jlora.plan(
        fn,
        {"w": shape(4, 4), "v": shape(4, 4), "u": shape(4, 4)},
        shape(2, 4),
        config=jlora.LoraConfig(rank=1),
    )
    assert made.adapted == ("v",)
    assert (
        row(made, "w").note == "only merged on the fly: name it in targets to adapt it"
    )


def test_a_scale_of_several_rules_is_told_with_its_leaf():
    rules = jlora.Rule("w", alpha=2e-38), jlora.Rule("*", rank=4)
    config = jlora.LoraConfig(rank=1, targets=("w", "v"), rules=rules)
    params = {"w": shape(4, 4), "v": shape(4, 3)}
    with pytest.raises(jlora.TargetError) as caught:
        jlora.plan(lambda p, x: x @ p["w"] @ p["v"], params, shape(2, 4), config=config)
    text = "'w': alpha must give a scale that float32 holds, got 2e-38 at rank 4"
    assert text in str(caught.value)
    assert "rank 4 is above min(in, out) = min(4, 3) of 'v'" in str(caught.value)


# What one use factors may not serve the others.

GROUPS = jnp.array([1, 2, 1])
EXPERTS = jlora.Axes(batch=(0,), fan_in=(1,), fan_out=(2,))


def experts_twice(p, x):
    return jnp.einsum("td,edf->tef", x, p["w"]), jax.lax.ragged_dot(x, p["w"], GROUPS)


@pytest.mark.parametrize("rules", [(), (jlora.Rule("w", axes=EXPERTS),)])
def test_a_use_that_the_chosen_axes_do_not_serve_is_told(rules):
    args = {"w": jnp.ones((3, 4, 4))}, jnp.ones((4, 4))
    config = jlora.LoraConfig(rank=1, targets="w", rules=rules)
    made = jlora.plan(experts_twice, *args, config=config)
    parts = jlora.split(jax.random.key(0), args[0], made)
    if rules:
        assert row(made, "w").route == "factored"
        jlora.apply_lora(experts_twice, on_merge="error")(*parts, args[1])
        return
    assert row(made, "w").route == "factored+merged"
    assert "w: `ragged_dot_general` at" in str(made)
    with pytest.raises(jlora.MergeError, match="ragged_dot_general"):
        jlora.apply_lora(experts_twice, on_merge="error")(*parts, args[1])


def test_leaves_that_are_merged_alike_share_a_line():
    params = {"layers": [{"w": shape(4, 4)} for _ in range(3)]}

    def fn(p, x):
        for layer in p["layers"]:
            x = x @ layer["w"] ** 2
        return x

    config = jlora.LoraConfig(rank=1, targets="layers/*/w")
    text = str(jlora.plan(fn, params, shape(2, 4), config=config))
    assert text.count("integer_pow") == 1
    assert "  layers/{0..2}/w (×3): `integer_pow` at" in text


# What to write instead.


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"targets": "all_linear"}, "write targets='all-linear', and nothing"),
        ({"targets": ("all-linear", "head")}, "write targets='all-linear', and"),
        ({"targets": "layer_0/"}, "not a whole one: write 'layer_0/**/kernel'"),
        ({"targets": "layer_*/up"}, "not a whole one: write 'layer_*/up/**/kernel'"),
        ({"exclude": "layer_0/up"}, "not a whole one: write 'layer_0/up/**'"),
        ({"targets": lambda path: "up" in path}, "lambda row: 'attn' in row.path"),
        ({"targets": "layer_[^0]/up/kernel"}, "Write '[!0]' for any other"),
    ],
)
def test_a_wrong_pattern_is_told_what_to_write(config, remedy):
    with pytest.raises(jlora.JloraError, match=re.escape(remedy)):
        plan(rank=2, **config)


def test_a_target_of_no_size_is_to_be_excluded():
    config = jlora.LoraConfig(rank=1, targets="w")
    with pytest.raises(jlora.TargetError, match="'w' has an axis of size 0: exclude"):
        jlora.plan(
            lambda p, x: x @ p["w"], {"w": shape(0, 4)}, shape(2, 0), config=config
        )


def test_names_of_any_characters_make_a_straight_table():
    names = ["重み", "new\nline", "\x1b[31mred", "w"]
    params = {name: shape(4, 4) for name in names}

    def fn(p, x):
        for name in names:
            x = x @ p[name]
        return x

    config = jlora.LoraConfig(rank=1, targets=lambda row: True)
    lines = str(jlora.plan(fn, params, shape(2, 4), config=config)).splitlines()[:6]
    assert lines[2].startswith(r"\x1b[31mred  float32")
    assert lines[3].startswith(r"new\nline    float32")
    assert lines[5].startswith("重み         float32")  # two columns a character
    assert "\x1b" not in "".join(lines)
