"""Taking parameters apart and putting them together; how factors start."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import jlora
from jlora.factors import Spec
from tests.helpers import bits

X = jnp.ones((2, 4))


class Pair(NamedTuple):
    w: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    w: Any
    v: Any
    name: str = dataclasses.field(default="m", metadata={"static": True})


def weights():
    return {
        "w": jnp.arange(24.0).reshape(4, 6),
        "v": -jnp.arange(18.0).reshape(6, 3),
    }


def product(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def fields(p, x):
    return jnp.tanh(x @ p.w) @ p.v


def state_product(p, x):
    return jnp.tanh(x @ p["w"][...]) @ p["v"][...]


TREES = {
    "dict": (weights, product),
    "FrozenDict": (lambda: FrozenDict(weights()), product),
    "NamedTuple": (lambda: Pair(**weights()), fields),
    "dataclass": (lambda: Model(**weights()), fields),
    "nnx.State": (
        lambda: nnx.State({k: nnx.Param(w) for k, w in weights().items()}),
        state_product,
    ),
    "nested": (lambda: [weights(), (), {"n": None}], lambda p, x: product(p[0], x)),
    "numpy": (lambda: jax.tree.map(np.asarray, weights()), product),
}


def plan_of(params, fn=product, **config):
    return jlora.plan(fn, params, X, config=jlora.LoraConfig(**{"rank": 2, **config}))


@pytest.mark.parametrize("train", [(), "**/v", "**"], ids=["none", "one", "all"])
@pytest.mark.parametrize("name", TREES)
def test_split_then_combine_is_identity(name, train, key):
    make, fn = TREES[name]
    params = make()
    plan = plan_of(params, fn, train=train, targets=() if train == "**" else "**/w")
    frozen, trainable = jlora.split(key, params, plan)
    again = jlora.combine(frozen, trainable)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert bits(again) == bits(params)
    n_full = {(): 0, "**/v": 1, "**": 2}[train]
    assert len(jax.tree.leaves(frozen)) == 2 - n_full
    assert len(trainable.full) == n_full


def test_frozen_leaves_are_the_parameters_own_arrays(key):
    params = weights()
    frozen, trainable = jlora.split(key, params, plan_of(params, train="v"))
    assert frozen["w"] is params["w"]
    assert trainable.full["v"] is params["v"]


def test_missing_is_a_node_without_leaves(key):
    frozen, _ = jlora.split(key, weights(), plan_of(weights(), train="v"))
    assert isinstance(frozen["v"], type(jlora.MISSING))
    assert jax.tree.leaves(jlora.MISSING) == []
    assert frozen["v"] == jlora.MISSING != 0
    assert hash(frozen["v"]) == hash(jlora.MISSING)
    assert repr(jlora.MISSING) == "Missing()"
    assert jax.tree.map(lambda x: x, frozen)["v"] == jlora.MISSING


def test_params_are_not_written_to(key):
    params = weights()
    before = dict(params)
    jlora.split(key, params, plan_of(params, train="v"))
    assert params == before
    assert all(params[k] is before[k] for k in before)


def test_factors_describe_themselves(key):
    params = weights()
    plan = plan_of(params, alpha=6, rslora=True, dropout=0.25)
    _, trainable = jlora.split(key, params, plan)
    assert list(trainable.lora) == ["w"]
    factors = trainable.lora["w"]
    assert factors.a.shape == (4, 2)
    assert factors.b.shape == (2, 6)
    assert factors.magnitude is None
    assert factors.rank == 2
    assert factors.scale == 6 / math.sqrt(2)
    assert factors.spec == Spec(rank=2, alpha=6.0, rslora=True, dropout=0.25)
    assert len(jax.tree.leaves(trainable)) == 2


# Random numbers.


def test_factors_depend_on_key_and_path_alone(key):
    params = {"u": jnp.ones((4, 4)), "w": jnp.ones((4, 4)), "z": jnp.ones((4, 4))}

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]) @ p["z"]

    def a_of_w(key, params, **config):
        _, trainable = jlora.split(key, params, plan_of(params, fn, **config))
        return np.asarray(trainable.lora["w"].a)

    alone = a_of_w(key, params, targets="w")
    among = a_of_w(key, params, targets="*")
    with_head = a_of_w(key, params, train="z")
    other_values = a_of_w(key, {**params, "w": jnp.zeros((4, 4))})
    other_key = a_of_w(jax.random.key(1), params)
    np.testing.assert_array_equal(alone, among)
    np.testing.assert_array_equal(alone, with_head)
    np.testing.assert_array_equal(alone, other_values)
    assert not (alone == other_key).any()
    _, trainable = jlora.split(key, params, plan_of(params, fn, targets="*"))
    values = [float(f.a[0, 0]) for f in trainable.lora.values()]
    assert len(set(values)) == 3


def test_old_style_keys_work_too():
    params = weights()
    _, trainable = jlora.split(jax.random.PRNGKey(0), params, plan_of(params))
    assert bool((trainable.lora["w"].a != 0).all())


def test_split_under_jit_gives_the_same_bits(key):
    params = weights()
    plan = plan_of(params, train="v", dtype="bfloat16")
    eager = jlora.split(key, params, plan)
    jitted = jax.jit(lambda key, p: jlora.split(key, p, plan))(key, params)
    static = jax.jit(jlora.split, static_argnums=2)(key, params, plan)
    for other in (jitted, static):
        assert jax.tree.structure(other) == jax.tree.structure(eager)
        assert bits(other) == bits(eager)


def test_split_of_weights_that_a_traced_function_closes_over(key):
    params = weights()
    plan = plan_of(params)
    shapes = jax.eval_shape(lambda key: jlora.split(key, params, plan), key)
    assert shapes[1].lora["w"].a.shape == (4, 2)
    jitted = jax.jit(lambda key: jlora.split(key, params, plan)[1])(key)
    assert bits(jitted) == bits(jlora.split(key, params, plan)[1])


def test_split_on_shapes_alone_has_the_same_shapes(key):
    params = weights()
    plan = plan_of(params, train="v")
    shapes = jax.eval_shape(lambda key, p: jlora.split(key, p, plan), key, params)
    arrays = jlora.split(key, params, plan)
    assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
    for s, x in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
        assert (s.shape, s.dtype) == (x.shape, x.dtype)


def test_split_under_vmap_gives_one_adapter_for_each_key():
    params = weights()
    plan = plan_of(params)
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: jlora.split(key, params, plan)[1])(keys)
    assert stacked.lora["w"].a.shape == (3, 4, 2)
    second = jlora.split(keys[1], params, plan)[1]
    np.testing.assert_array_equal(stacked.lora["w"].a[1], second.lora["w"].a)


# How A and B start.


@dataclasses.dataclass
class Start:
    """A weight of `shape` used by `fn`, and the fan-in that bounds its A."""

    shape: tuple[int, ...]
    x: tuple[int, ...]
    fn: Any
    fan_in: int

    def factors(self, **config):
        params = {"w": jax.ShapeDtypeStruct(self.shape, jnp.float32)}
        x = jax.ShapeDtypeStruct(self.x, jnp.float32)
        config = jlora.LoraConfig(**{"rank": 16, "targets": "w", **config})
        plan = jlora.plan(self.fn, params, x, config=config)
        whole = {"w": jnp.zeros(self.shape)}
        _, trainable = jlora.split(jax.random.key(7), whole, plan)
        return trainable.lora["w"]


def conv(p, x):
    return jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


STARTS = {
    "kernel": Start((300, 64), (1, 300), lambda p, x: x @ p["w"], 300),
    "transposed": Start((64, 300), (1, 300), lambda p, x: x @ p["w"].T, 300),
    "heads out": Start(
        (300, 8, 8), (1, 300), lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), 300
    ),
    "heads in": Start(
        (10, 30, 64),
        (1, 10, 30),
        lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"]),
        300,
    ),
    "experts": Start(
        (5, 60, 64),
        (5, 1, 60),
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
        60,
    ),
    "conv": Start((3, 3, 40, 64), (1, 4, 4, 40), conv, 360),
}


@pytest.mark.parametrize("name", STARTS)
def test_kaiming_fills_exactly_one_over_root_fan_in(name):
    start = STARTS[name]
    factors = start.factors()
    a = np.asarray(factors.a, np.float64).ravel()
    bound = 1 / math.sqrt(start.fan_in)
    assert a.size > 4000
    assert np.abs(a).max() <= np.float32(bound)
    assert np.abs(a).max() > 0.998 * bound
    assert a.min() < -0.998 * bound
    assert abs(a.mean()) < 0.05 * bound
    assert abs(a.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert not np.asarray(factors.b).any()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_gaussian_has_standard_deviation_one_over_rank(rank):
    start = Start((5000, 20), (1, 5000), lambda p, x: x @ p["w"], 5000)
    factors = start.factors(rank=rank, init="gaussian")
    a = np.asarray(factors.a, np.float64)
    assert abs(a.std() * rank - 1) < 0.03
    assert abs(a.mean()) * rank < 0.05
    assert np.abs(a).max() * rank > 3  # no uniform
    assert not np.asarray(factors.b).any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_embedding_starts_the_other_way_round(init):
    ids = jnp.array([0, 3])
    start = Start((50, 400), (1,), lambda p, x: p["w"][ids] * x[None], 50)
    factors = start.factors(init=init)
    assert factors.spec.op == "embedding"
    assert factors.a.shape == (50, 16)
    assert not np.asarray(factors.a).any()
    b = np.asarray(factors.b, np.float64)
    assert abs(b.std() - 1) < 0.03
    assert abs(b.mean()) < 0.05
    assert np.abs(b).max() > 3


def test_init_is_a_rules_to_choose(key):
    params = {"u": jnp.ones((200, 200)), "w": jnp.ones((200, 200))}
    plan = jlora.plan(
        lambda p, x: jnp.tanh(x @ p["u"]) @ p["w"],
        params,
        jnp.ones((1, 200)),
        config=jlora.LoraConfig(
            rank=16, targets="*", rules=jlora.Rule("w", init="gaussian")
        ),
    )
    _, trainable = jlora.split(key, params, plan)
    largest = {k: float(jnp.abs(f.a).max()) for k, f in trainable.lora.items()}
    assert largest["u"] <= 1 / math.sqrt(200) * (1 + 1e-6)
    assert largest["w"] > 2 / 16


@pytest.mark.parametrize(
    ("config", "weight", "expected"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_factors_have_the_configs_dtype_or_float32(config, weight, expected, key):
    params = jax.tree.map(lambda w: w.astype(weight), weights())
    plan = jlora.plan(
        product,
        params,
        X.astype(weight),
        config=jlora.LoraConfig(rank=2, dtype=config, train="v"),
    )
    frozen, trainable = jlora.split(key, params, plan)
    assert trainable.lora["w"].a.dtype == expected
    assert trainable.lora["w"].b.dtype == expected
    assert trainable.full["v"].dtype == weight
    assert frozen["w"].dtype == weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kaiming_keeps_its_bound_in_low_precision(dtype):
    start = STARTS["kernel"]
    a = np.asarray(start.factors(dtype=dtype).a, np.float64)
    bound = float(jnp.asarray(1 / math.sqrt(300), dtype))
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.98 * bound


# Trees that do not belong together.


def test_split_with_the_plan_of_another_model_lists_what_differs(key):
    plan = plan_of(weights())
    params = {"w": jnp.ones((4, 7)), "u": jnp.ones((7, 3))}
    with pytest.raises(jlora.TreeError) as caught:
        jlora.split(key, params, plan)
    text = str(caught.value)
    assert text.startswith("These parameters are not the ones the plan was made for: ")
    assert "'u' is not in the plan" in text
    assert "'v' is not in the parameters" in text
    assert "'w' has shape (4, 7), the plan has (4, 6)" in text
    assert text.endswith("Make a new plan for them.")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_weight_that_is_not_finite_is_refused(value, key):
    params = weights()
    plan = plan_of(params)
    with pytest.raises(jlora.TreeError, match=r"'w' holds NaN or inf.*exclude="):
        jlora.split(key, {**params, "w": params["w"].at[0, 0].set(value)}, plan)
    with pytest.raises(jlora.ConfigError, match=r"key must be one PRNG key.*got dict"):
        jlora.split(params, key, plan)
    with pytest.raises(jlora.ConfigError, match=r"one PRNG key.*got key<fry>\[2\]"):
        jlora.split(jax.random.split(key), params, plan)
    with pytest.raises(jlora.ConfigError, match=r"a jlora\.Plan, got LoraConfig"):
        jlora.split(key, params, plan.config)
    jlora.split(key, {**params, "v": params["v"].at[0, 0].set(value)}, plan)


def test_a_long_list_of_misfits_is_cut():
    many = {"x" * i: jnp.ones((2, 2)) for i in range(1, 31)}
    plan = plan_of(weights())
    with pytest.raises(
        jlora.TreeError, match=r"'x' is not in the plan; .*; and 22 more\."
    ):
        jlora.split(jax.random.key(0), many, plan)
    many = {f"x{i}": jnp.ones((2, 2)) for i in range(30)}
    with pytest.raises(
        jlora.TreeError, match=r"'x\{0\.\.29\}' is not in the plan \(×30\)"
    ):
        jlora.split(jax.random.key(0), many, plan)


@pytest.fixture
def parts(key):
    return jlora.split(key, weights(), plan_of(weights(), train="v"))


def combine_error(frozen, trainable, message):
    with pytest.raises(jlora.TreeError, match=message):
        jlora.combine(frozen, trainable)


def test_swapped_arguments_are_told(parts):
    frozen, trainable = parts
    combine_error(
        trainable,
        frozen,
        r"trainable must be a jlora\.Trainable, got dict.*mind the order",
    )


def test_factors_of_another_model_name_the_nearest_leaf(parts):
    frozen, trainable = parts
    strange = dataclasses.replace(trainable, lora={"ww": trainable.lora["w"]})
    combine_error(
        frozen,
        strange,
        r"factors for 'ww', which frozen does not have \(nearest: 'w'\)",
    )


def test_factors_for_a_hole_are_refused(parts):
    frozen, trainable = parts
    both = dataclasses.replace(trainable, lora={"v": trainable.lora["w"]})
    combine_error(frozen, both, "factors for 'v', which frozen does not have")


@pytest.mark.parametrize(
    ("part", "to", "message"),
    [
        ("a", (5, 2), r"a of 'w' has shape \(5, 2\), a weight of shape \(4, 6\) at "),
        ("a", (4, 3), r"a of 'w' has shape \(4, 3\), .* rank 2 needs \(4, 2\)"),
        ("b", (2, 7), r"b of 'w' has shape \(2, 7\), .* rank 2 needs \(2, 6\)"),
        ("b", (6, 2), r"b of 'w' has shape \(6, 2\), .* rank 2 needs \(2, 6\)"),
    ],
)
def test_a_factor_of_the_wrong_shape_is_named(parts, part, to, message):
    frozen, trainable = parts
    bad = dataclasses.replace(trainable.lora["w"], **{part: jnp.zeros(to)})
    combine_error(frozen, dataclasses.replace(trainable, lora={"w": bad}), message)


def test_a_weight_with_other_axes_than_its_factors_is_named(parts):
    frozen, trainable = parts
    combine_error(
        {**frozen, "w": jnp.ones((4, 2, 3))},
        trainable,
        "'w' has 3 axes, its factors are for 2",
    )


def test_an_integer_weight_takes_no_factors(parts):
    frozen, trainable = parts
    combine_error(
        {**frozen, "w": jnp.ones((4, 6), jnp.int32)},
        trainable,
        "'w' is not a floating-point array, so it takes no factors",
    )


def test_what_is_no_factors_is_named(parts):
    frozen, trainable = parts
    bad = dataclasses.replace(trainable, lora={"w": jnp.ones(3)})
    combine_error(frozen, bad, "'w' holds ArrayImpl, not Factors")
    for a, what in (jnp.ones((4, 2), jnp.int32), "int32"), ([[1.0, 2.0]] * 4, "list"):
        odd = dataclasses.replace(trainable.lora["w"], a=a)
        message = f"a of 'w' is {what}, it must be a floating-point array"
        combine_error(frozen, dataclasses.replace(trainable, lora={"w": odd}), message)


def test_a_hole_without_its_leaf_is_named(parts):
    frozen, trainable = parts
    empty = dataclasses.replace(trainable, full={})
    combine_error(frozen, empty, "no leaf for the missing 'v'")


def test_a_full_leaf_takes_the_place_of_the_base_models(parts):
    frozen, trainable = parts
    base = jlora.combine(frozen, dataclasses.replace(trainable, lora={}))
    tuned = dataclasses.replace(trainable, full={"v": trainable.full["v"] + 1})
    assert bits(jlora.combine(base, tuned)) == bits(jlora.combine(frozen, tuned))


def test_a_full_leaf_that_does_not_fit_is_named(parts):
    frozen, trainable = parts
    known = dataclasses.replace(trainable, full={**trainable.full, "w": jnp.ones(1)})
    combine_error(frozen, known, r"a full leaf 'w' of shape \(1,\), where frozen has")
    unknown = dataclasses.replace(trainable, full={**trainable.full, "x": jnp.ones(1)})
    combine_error(frozen, unknown, "a full leaf 'x', which frozen does not have")


def test_all_misfits_are_told_at_once(parts):
    _, trainable = parts
    combine_error(
        {"w": jnp.ones((5, 6)), "v": jnp.ones((7, 3))},
        trainable,
        r"(?s)a of 'w' has shape.*'v' of shape .*from one jlora\.split",
    )
