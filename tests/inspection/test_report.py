"""The report's numbers are those of the dense update, computed by numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jlora
from jlora._core.algebra import norm, on_host
from jlora.factors import Axes, Factors, Spec
from tests.helpers import normal, update


def fn(p, x):
    h = jnp.einsum("td,dhk->thk", jnp.tanh(x @ p["w"]), p["q"])
    return h.reshape(h.shape[0], -1) @ p["head"]


@pytest.fixture
def parts():
    params = {
        "w": normal((4, 6), 1),
        "q": normal((6, 2, 3), 2),
        "head": normal((6, 2), 3),
        "spare": normal((5,), 4),
    }
    config = jlora.LoraConfig(
        rank=2, alpha=3, train="head", rules=jlora.Rule("q", rank=1, alpha=5)
    )
    plan = jlora.plan(fn, params, normal((3, 4)), config=config)
    frozen, trainable = jlora.split(jax.random.key(0), params, plan)
    lora = {
        path: dataclasses.replace(
            f, a=normal(f.a.shape, 5), b=normal(f.b.shape, 6).astype("bfloat16")
        )
        for path, f in trainable.lora.items()
    }
    return frozen, dataclasses.replace(trainable, lora=lora)


def entry(report, path):
    (found,) = [e for e in report.entries if e.path == path]
    return found


def dense_norm(factors):
    a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    n_batch = len(factors.spec.axes.batch)
    a = a.reshape(*a.shape[:n_batch], -1, factors.rank)
    b = b.reshape(*b.shape[:n_batch], factors.rank, -1)
    return factors.scale * np.linalg.norm(a @ b)


def test_norms_are_those_of_the_dense_update(parts):
    frozen, trainable = parts
    report = jlora.report(frozen, trainable)
    merged = jlora.merge(frozen, trainable)
    for path in ("w", "q"):
        change = np.asarray(merged[path], np.float64) - np.asarray(frozen[path])
        base = np.linalg.norm(np.asarray(frozen[path], np.float64))
        found = entry(report, path)
        assert found.update == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert found.update == pytest.approx(dense_norm(trainable.lora[path]))
        assert found.relative == pytest.approx(np.linalg.norm(change) / base, rel=1e-5)
        assert found.shape == frozen[path].shape
        assert found.finite


def test_full_leaves_stand_with_their_own_norm(parts):
    frozen, trainable = parts
    found = entry(jlora.report(frozen, trainable), "head")
    norm = np.linalg.norm(np.asarray(trainable.full["head"], np.float64))
    assert found.update == pytest.approx(norm)
    assert math.isnan(found.relative)
    assert (found.rank, found.trained, found.shape) == (0, 12, (6, 2))


def test_totals(parts):
    frozen, trainable = parts
    report = jlora.report(frozen, trainable)
    in_lora = 2 * (4 + 6) + 1 * (6 + 6)
    assert report.trained_count == in_lora + 12
    assert report.trained_count == sum(e.trained for e in report.entries)
    assert report.total_count == 24 + 36 + 12 + 5
    # A and the head in float32, B in bfloat16.
    assert report.adapter_bytes == 4 * (2 * 4 + 6 + 12) + 2 * (2 * 6 + 6)
    assert report.model_bytes == 4 * report.total_count
    assert {e.path: e.rank for e in report.entries} == {"w": 2, "q": 1, "head": 0}


def test_totals_are_the_plans():
    params = {"w": normal((4, 6)), "q": normal((6, 2, 3)), "head": normal((6, 2))}
    config = jlora.LoraConfig(rank=2, train="head")
    plan = jlora.plan(fn, params, normal((3, 4)), config=config)
    report = jlora.report(*jlora.split(jax.random.key(0), params, plan))
    assert report.trained_count == plan.trained_count
    assert report.total_count == plan.total_count


def test_a_fresh_adapter_has_moved_nothing():
    params = {"w": normal((4, 6)), "q": normal((6, 2, 3)), "head": normal((6, 2))}
    plan = jlora.plan(fn, params, normal((3, 4)), config=jlora.LoraConfig(rank=2))
    report = jlora.report(*jlora.split(jax.random.key(0), params, plan))
    assert all(e.update == e.relative == 0 for e in report.entries)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["a", "b", "full"])
def test_nan_and_infinity_are_flagged(parts, value, where):
    frozen, trainable = parts
    if where == "full":
        head = trainable.full["head"].at[0, 0].set(value)
        trainable = dataclasses.replace(trainable, full={"head": head})
    else:
        old = trainable.lora["w"]
        new = getattr(old, where).at[0, 0].set(value)
        lora = {**trainable.lora, "w": dataclasses.replace(old, **{where: new})}
        trainable = dataclasses.replace(trainable, lora=lora)
    report = jlora.report(frozen, trainable)
    bad = [e.path for e in report.entries if not e.finite]
    assert bad == ["head" if where == "full" else "w"]
    (line,) = [s for s in str(report).splitlines() if "NaN or infinity" in s]
    assert line.startswith(bad[0])


def test_a_zero_weight_has_no_relative_norm(parts):
    frozen, trainable = parts
    report = jlora.report({**frozen, "w": jnp.zeros((4, 6))}, trainable)
    assert math.isnan(entry(report, "w").relative)
    assert entry(report, "w").update > 0


def test_leaves_that_are_no_numbers_are_passed_over(parts):
    frozen, trainable = parts
    more = {"key": jax.random.key(0), "name": "mlp", "act": jnp.tanh}
    report = jlora.report({**frozen, **more}, trainable)
    plain = jlora.report(frozen, trainable)
    assert report.entries == plain.entries or all(
        dataclasses.astuple(a)[:5] == dataclasses.astuple(b)[:5]
        for a, b in zip(report.entries, plain.entries, strict=True)
    )
    str(report)


def test_printing_shows_the_table(parts):
    text = str(jlora.report(*parts)).splitlines()
    assert text[0].split() == [
        *("leaf", "shape", "rank", "trained", "‖ΔW‖", "‖ΔW‖/‖W‖"),
    ]
    rows = {line.split()[0]: line.split()[1:] for line in text[2:5]}
    assert rows["w"][:3] == ["4×6", "2", "20"]
    assert rows["q"][:3] == ["6×2×3", "1", "12"]
    assert rows["head"][:3] == ["6×2", "full", "12"]
    assert float(rows["w"][3]) == pytest.approx(
        dense_norm(parts[1].lora["w"]), rel=0.01
    )
    assert text[-1] == (
        "trained 44 of 77 parameters (57.14 %); adapter 140 B, model 308 B"
    )


def test_trees_that_do_not_fit_are_refused(parts):
    frozen, trainable = parts
    with pytest.raises(jlora.TreeError, match="'q', which frozen does not have"):
        jlora.report({k: v for k, v in frozen.items() if k != "q"}, trainable)


@settings(max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    rank=st.integers(1, 3),
    alpha=st.floats(0.1, 10),
)
def test_the_norm_never_needs_the_dense_update(sizes, rank, alpha):
    """One batch axis, two inputs, one output."""
    batch, *fan_in, fan_out = sizes
    axes = Axes((0,), (1, 2), (3,))
    factors = Factors(
        normal((batch, *fan_in, rank), 1),
        normal((batch, rank, fan_out), 2),
        Spec(rank=rank, alpha=alpha, axes=axes),
    )
    expected = dense_norm(factors)
    assert float(norm(factors)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(norm(on_host(factors), np)) == pytest.approx(expected, rel=1e-12)


def test_the_norm_is_right_where_updates_cancel():
    """As `rebase` makes them: a trained product minus one that is nearly the same."""
    w = normal((64, 48), 1)
    config = jlora.LoraConfig(rank=4, init="pissa")
    x = normal((8, 64), 2)
    plan = jlora.plan(lambda p, x: x @ p["w"], {"w": w}, x, config=config)
    _, initial = jlora.split(jax.random.key(0), {"w": w}, plan)
    factors = initial.lora["w"]
    trained = dataclasses.replace(
        factors,
        a=factors.a + 1e-4 * normal(factors.a.shape, 3),
        b=factors.b + 1e-4 * normal(factors.b.shape, 4),
    )
    plain = jlora.rebase(jlora.Trainable({"w": trained}), initial)
    found = entry(jlora.report({"w": w}, plain), "w").update
    assert found == pytest.approx(dense_norm(plain.lora["w"]), rel=1e-6)
    (leaf,) = jlora.inspection.inspect(plain).leaves
    assert leaf.norm == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("axes", [Axes(), Axes((1,), (3, 0), (2,))])
def test_dora_is_measured_where_the_weight_hardly_moves(size, axes):
    shape = (8, 3, 6, 4)[: len(axes.order)]
    own = Spec(rank=2, alpha=3, axes=axes, method="dora")
    w = normal(shape, 1)
    a, b = normal(axes.a_shape(shape, 2), 2), normal(axes.b_shape(shape, 2), 3) * size
    wide = np.asarray(w, np.float64)
    length = np.sqrt(np.sum(wide**2, axis=axes.fan_in, keepdims=True))
    m = np.squeeze(length, axes.fan_in).astype(np.float32)
    kept = sorted((*axes.batch, *axes.fan_out))
    order = [kept.index(i) for i in (*axes.batch, *axes.fan_out)]
    factors = Factors(a, b, own, jnp.asarray(np.transpose(m, order)))
    total = wide + update(factors)
    new = np.sqrt(np.sum(total**2, axis=axes.fan_in, keepdims=True))
    gain = np.expand_dims(m.astype(np.float64), axes.fan_in) / new
    found = jlora.report({"w": w}, jlora.Trainable({"w": factors})).entries[0]
    assert found.update == pytest.approx(np.linalg.norm(total * gain - wide), rel=1e-9)
    fresh = dataclasses.replace(factors, b=jnp.zeros_like(b))
    found = jlora.report({"w": w}, jlora.Trainable({"w": fresh})).entries[0]
    assert found.update == found.relative == 0
    spoilt = dataclasses.replace(factors, b=jnp.full_like(b, jnp.nan))
    found = jlora.report({"w": w}, jlora.Trainable({"w": spoilt})).entries[0]
    assert math.isnan(found.update)
    assert not found.finite


def test_warnings_show_names_that_are_commands_to_a_terminal_as_text():
    own = Factors(np.ones((3, 1)), np.zeros((1, 2)), Spec(rank=1, alpha=1.0))
    shown = str(jlora.inspection.inspect(jlora.Trainable({"\x1b[2Jw\n": own})))
    assert "\x1b" not in shown
    assert r"in 1 of 1 leaves: \x1b[2Jw\n" in shown
