"""`quantize`: what it takes, what it refuses, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers import normal, same

pytestmark = pytest.mark.once

X = jnp.ones((2, 64))


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def params_of():
    return {**normal({"w": (64, 32), "v": (32, 64)}), "b": jnp.zeros(4)}


def test_a_leaf_that_is_not_chosen_stays():
    params = params_of()
    coded = jlora.quantize(params, targets="w")
    assert coded["v"] is params["v"]
    again = jlora.quantize(coded, kind="int8", targets="v")
    assert again["w"] is coded["w"]
    assert (again["w"].kind, again["v"].kind) == ("nf4", "int8")


def test_with_a_plan_weights_and_not_heads_are_quantised():
    params = params_of()
    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(model, params, X, config=config)
    coded = jlora.quantize(params, plan, kind="int8")
    assert (coded["w"].kind, coded["v"]) == ("int8", params["v"])
    only_head = {"v": params["v"]}
    plan = jlora.plan(
        lambda p, x: x[:, :32] @ p["v"],
        only_head,
        X,
        config=jlora.LoraConfig(rank=2),
    )
    assert jlora.quantize(only_head, plan)["v"].kind == "nf4"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "nf5"}, "kind must be one of nf4; int4; int8, got 'nf5'"),
        ({"kind": "float8_e4m3"}, "kind must be one of"),
        ({"block": 1}, "block must be an integer of at least 2, got 1"),
        ({"storage": "disk"}, "storage must be 'auto', 'packed' or 'native'"),
        ({"scale_dtype": "int8"}, "scale_dtype must be a floating dtype of 16 bits"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(jlora.ConfigError, match=text):
        jlora.quantize(params_of(), **settings)


@pytest.mark.parametrize(
    ("w", "text"),
    [
        (jnp.ones((4, 4), jnp.int32), "'w' is int32, not a floating-point array"),
        (jnp.ones(4), "'w' has 1 axes: a weight has two or more"),
        (jnp.ones((0, 4)), "'w' is empty"),
        (jnp.full((4, 4), jnp.nan), "'w' holds NaN or infinity"),
        (np.full((4, 4), np.inf, np.float32), "'w' holds NaN or infinity"),
        (jlora.quantize([jnp.ones((4, 4))])[0], r"quantised already \(nf4\): name oth"),
        (jlora.MISSING, "'w' is trained in full, so it is not in frozen"),
    ],
)
def test_a_leaf_that_cannot_be_quantised_is_named(w, text):
    with pytest.raises(jlora.TreeError, match=f"Not quantised: .*{text}"):
        jlora.quantize({"w": w}, targets="w")


@pytest.mark.parametrize("double", [False, True])
def test_an_empty_leaf_that_nobody_named_stays(double):
    params = {"w": jnp.ones((4, 4)), "none": jnp.zeros((0, 4))}
    coded = jlora.quantize(params, kind="int8", double=double)
    assert coded["none"] is params["none"]
    assert isinstance(coded["w"], jlora.Quantized)


def test_numbers_too_large_for_the_scales_are_told():
    w = {"w": jnp.full((4, 4), 1e5)}
    wanted = "'w' holds numbers too large .* float16. Write scale_dtype='bfloat16' or"
    with pytest.raises(jlora.TreeError, match=wanted):
        jlora.quantize(w, scale_dtype="float16")
    coded = jlora.quantize(w, scale_dtype="bfloat16")["w"]
    assert jnp.isfinite(coded.dense()).all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_number_of_float16_stays_finite(kind, scale_dtype):
    largest = float(jnp.finfo("float16").max)
    w = {"w": jnp.full((4, 4), largest, "float16")}
    found = jlora.quantize(w, kind=kind, scale_dtype=scale_dtype)["w"].dense()
    assert float(jnp.abs(found.astype(jnp.float32) / largest - 1).max()) < 0.01


def test_nothing_is_left_out_in_silence():
    coded = jlora.quantize(params_of())
    with pytest.raises(jlora.TreeError, match=r"'v' is quantised already"):
        jlora.quantize(coded)
    with pytest.raises(
        jlora.TreeError, match="None of 1 leaves is a float leaf of two"
    ):
        jlora.quantize({"b": jnp.zeros(4)})
    with pytest.raises(jlora.TreeError, match=r"'ww' matched none .* \(nearest: 'w'\)"):
        jlora.quantize(params_of(), targets="ww")


def test_a_plan_for_other_shapes_is_refused():
    params = params_of()
    plan = jlora.plan(model, params, X, config=jlora.LoraConfig(rank=2))
    other = {**params, "w": jnp.ones((64, 16))}
    with pytest.raises(
        jlora.TreeError, match=r"'w' has shape \(64, 16\), the plan has"
    ):
        jlora.quantize(other, plan)
    with pytest.raises(
        jlora.TreeError, match=r"'w' has shape \(64, 16\), the plan has"
    ):
        jlora.split(jax.random.key(0), jlora.quantize(other), plan)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w,
        lambda w, x: w @ x.T,
        lambda w, x: jnp.dot(x, w),
        lambda w, x: w[0],
        lambda w, x: 2 * w,
        lambda w, x: w + 1,
        lambda w, x: jnp.tanh(w),
        lambda w, x: np.asarray(w),
        lambda w, x: list(w),
    ],
)
def test_a_function_that_meets_codes_says_how_to_call_it(use):
    w = jlora.quantize([jnp.ones((64, 64))])[0]
    with pytest.raises(jlora.TreeError, match=r"apply_lora\(fn\)\(params, jlora.Train"):
        use(w, X)


def test_a_method_of_arrays_is_refused_too():
    w = jlora.quantize([jnp.ones((64, 64))])[0]
    with pytest.raises(AttributeError, match=r"apply_lora\(fn\)\(params, jlora.Train"):
        _ = w.T
    assert not hasattr(w, "astype")
    with pytest.raises(AttributeError, match="no attribute 'quantize'"):
        _ = w.quantize


def test_shapes_and_arrays_under_jit_are_quantised_as_arrays_are():
    params = params_of()
    coded = jlora.quantize(params, double=True, scale_dtype="bfloat16")
    found = jax.jit(lambda p: jlora.quantize(p, double=True, scale_dtype="bfloat16"))(
        params
    )
    same(found, coded)
    shapes = jax.eval_shape(lambda: params)
    assert jlora.quantize(
        shapes, double=True, scale_dtype="bfloat16"
    ) == jax.eval_shape(lambda: coded)


@pytest.mark.parametrize("bad", [False, True])
def test_known_weights_are_looked_at_while_a_function_is_traced(bad):
    """A function may close over its weights: their numbers are known all the same."""
    w = jnp.ones((4, 6)).at[1, 2].set(jnp.nan if bad else 2)
    config = jlora.LoraConfig(rank=2, targets="w")
    x = jnp.ones((2, 4))
    plan = jlora.plan(lambda p, x: x @ p["w"], {"w": w}, x, config=config)
    coded = jax.jit(lambda: jlora.quantize({"w": w}, kind="int8"))
    parts = jax.jit(lambda key: jlora.split(key, {"w": w}, plan)[1])
    for run, args in ((coded, ()), (parts, (jax.random.key(0),))):
        if bad:
            with pytest.raises(jlora.TreeError, match="'w' holds NaN or infinity"):
                run(*args)
        else:
            assert jax.tree.leaves(run(*args))
