"""Every way a weight can be used, by the table of cases.py.

For each row the adapted function equals the function of merged weights, in value and in
the gradients of A, B and the inputs, under `jit`, on the route that the row names.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers import close
from tests.transform.cases import ADAPTABLE, CASES, FACTORED, MERGED, build


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("dora", marks=pytest.mark.once)]
)
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_adapted_equals_merged_in_value_and_gradient(case, method):
    fn, _, x, _, frozen, trainable = build(case, method=method)
    lora_fn = jlora.apply_lora(fn, on_merge="allow")

    def value_and_gradient(function):
        def loss(trainable, x):
            out = function(trainable, x)
            floats = [o for o in jax.tree.leaves(out) if o.dtype == jnp.float32]
            return sum(jnp.sum(jnp.cos(o)) for o in floats), out

        if not case.has_gradient:
            return jax.jit(function)(trainable, x)
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)

    close(
        value_and_gradient(lambda t, x: lora_fn(frozen, t, x)),
        value_and_gradient(lambda t, x: fn(jlora.merge(frozen, t), x)),
        1e-4,
        largest=1e-4,
    )


@pytest.mark.once
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_fresh_adapter_changes_nothing(case):
    fn, params, x, plan, _, _ = build(case)
    frozen, trainable = jlora.split(jax.random.key(1), params, plan)
    # Not under one jit, where XLA may fuse, and so round, two programs differently.
    out = jlora.apply_lora(fn, on_merge="allow")(frozen, trainable, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(fn(params, x)), strict=True):
        if case.route == FACTORED:
            np.testing.assert_array_equal(a, b)
        else:  # what else is fused with the sum may round its results otherwise
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_plan_names_route_operation_and_axes(case):
    _, _, _, plan, _, _ = build(case)
    row = next(row for row in plan.rows() if row.path == "w")
    assert row.route == case.route
    assert row.status == "adapted"
    if case.route == FACTORED:
        axes = row.spec.axes
        assert (axes.batch, axes.fan_in, axes.fan_out) == case.axes
        assert row.op == case.op


@pytest.mark.once
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("case", ADAPTABLE, ids=str)
def test_what_the_plan_says_is_what_is_done(case, method):
    fn, _, x, plan, frozen, trainable = build(case, method=method)
    (row,) = (row for row in plan.rows() if row.path == "w")
    run = jlora.apply_lora(fn, on_merge="error")
    if row.route == FACTORED:
        jax.eval_shape(run, frozen, trainable, x)
        return
    with pytest.raises(jlora.MergeError) as caught:
        jax.eval_shape(run, frozen, trainable, x)
    said = {use.op for use in row.uses if use.route != FACTORED}
    assert any(f"`{op}`" in str(caught.value) for op in said)


@pytest.mark.parametrize("config", [{}, {"targets": "w"}, {"train": "w"}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_has_a_route_or_a_note(case, config):
    rng = np.random.default_rng(0)
    shapes = {"w": case.shape, **case.others, "unused": (2, 2)}
    params = {k: jnp.asarray(rng.normal(size=n), "float32") for k, n in shapes.items()}
    x = jnp.asarray(rng.normal(size=case.x), "float32")
    config = jlora.LoraConfig(rank=1, **config)
    try:
        plan = jlora.plan(case.fn, params, x, config=config)
    except jlora.TargetError:  # it has nothing to adapt
        return
    for row in plan.rows():
        assert row.route or row.note, row


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.route == "elementwise"], ids=str
)
def test_plan_refuses_what_is_not_a_weight(case):
    with pytest.raises(jlora.TargetError, match="not a weight of a linear operation"):
        build(case)


@pytest.mark.parametrize("case", [c for c in CASES if MERGED in c.route], ids=str)
def test_merging_on_the_fly_is_visible(case):
    fn, _, x, plan, frozen, trainable = build(case)
    assert "merged on the fly" in str(plan)
    with pytest.warns(jlora.MergeWarning, match="w: "):
        jlora.apply_lora(fn)(frozen, trainable, x)
    with pytest.raises(jlora.MergeError, match=r"w: .*cases\.py"):
        jlora.apply_lora(fn, on_merge="error")(frozen, trainable, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jlora.apply_lora(fn, on_merge="allow")(frozen, trainable, x)
