"""What a plan says of quantised leaves."""

import json

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._plan.serial import plan_from_dict, plan_to_dict
from tests.helpers import normal

pytestmark = pytest.mark.once

X = jnp.ones((2, 64))


def model(p, x):
    for w in p["layers"]:
        x = x + jnp.tanh(x @ w)
    x = x * jnp.broadcast_to(p["scale"], x.shape)
    return x @ p["shared"] + jnp.square(p["shared"]).sum() * x


def params_of(**more):
    shapes = {"layers": [(64, 64), (64, 64)], "scale": (1, 64), "shared": (64, 64)}
    return {**normal(shapes, scale=0.1), **more}


def plan_of(params, **settings):
    config = jlora.LoraConfig(**{"rank": 2, "targets": "layers/*", **settings})
    return jlora.plan(model, params, X, config=config)


def test_a_plan_shows_kind_bytes_and_both_sizes():
    coded = jlora.quantize(params_of(), kind="nf4", targets="layers/*")
    plan = plan_of(coded)
    rows = {row.path: row for row in plan.rows()}
    row = rows["layers/0"]
    assert (row.storage, row.nbytes, row.dense_nbytes) == ("nf4", 2304, 4 * 64 * 64)
    row = rows["shared"]
    assert (row.storage, row.nbytes, row.dense_nbytes) == ("", 16384, 16384)
    text = str(plan)
    assert "layers/{0..1} (×2)  nf4 of float32[64,64]  4.61 kB  adapted" in text
    assert "base 49.4 kB dense, 21.2 kB quantised (nf4; 43 %)" in text
    assert "widened" not in text
    shown = plan._repr_html_()
    assert "<td>nf4 of float32[64,64]</td><td>4.61 kB</td>" in shown
    assert "base 49.4 kB dense" in shown
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan
    shapes = jax.eval_shape(lambda: coded)
    assert plan_of(shapes) == plan


def test_a_plan_of_arrays_shows_no_bytes():
    text = str(plan_of(params_of()))
    assert "bytes" not in text
    assert "base" not in text


def test_the_choice_and_the_factors_are_those_of_the_dense_model():
    params = params_of()
    dense = plan_of(params, targets="all-linear")
    coded = plan_of(jlora.quantize(params, kind="int8"), targets="all-linear")
    assert coded.adapted == dense.adapted == ("layers/0", "layers/1")
    for one, other in zip(coded.rows(), dense.rows(), strict=True):
        assert (one.spec, one.route, one.op) == (other.spec, other.route, other.op)
        if not one.widenings:
            assert one.note == other.note


def test_what_is_widened_is_said_with_its_place():
    coded = jlora.quantize(params_of(), kind="nf4")
    plan = plan_of(coded)
    text = str(plan)
    lines = text.split("widened whole (correct, but")[1].splitlines()[1:]
    assert len(lines) == 2
    assert lines[0].startswith("  scale: `mul` at test_quantised_plan.py:")
    assert lines[1].startswith("  shared: `square` at test_quantised_plan.py:")
    (line,) = [s for s in text.splitlines() if s.startswith("scale ")]
    assert line.endswith("widened whole, see below")
    trainable = jlora.split(jax.random.key(0), coded, plan)[1]
    lora_fn = jlora.apply_lora(model, on_merge="error")
    with pytest.raises(jlora.MergeError, match="widened whole") as caught:
        lora_fn(coded, trainable, X)
    told = str(caught.value)
    assert "scale: `mul`" in told
    assert "shared: `square`" in told
    assert "layers" not in told


def test_a_factored_leaf_that_is_widened_too_stays_factored():
    def fn(p, x):
        gate = jnp.broadcast_to(x[:1].T, p["w"].shape)
        return jnp.tanh(x @ p["w"]) @ (p["v"] * gate)

    params = normal({"w": (64, 64), "v": (64, 64)})
    config = jlora.LoraConfig(rank=2)
    plan = jlora.plan(fn, jlora.quantize(params), X, config=config)
    assert plan.adapted == jlora.plan(fn, params, X, config=config).adapted
    row = next(row for row in plan.rows() if row.path == "v")
    assert row.route == "factored"
    assert [use.op for use in row.widenings] == ["mul"]
    assert "v: `mul` at" in str(plan)
    assert "merged" not in str(plan)
