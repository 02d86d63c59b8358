"""Planning takes time in proportion to leaves and patterns; deep trees are walked."""

import dataclasses
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import paths
from jlora._plan.resolve import resolve
from jlora._plan.serial import plan_from_dict, plan_to_dict
from jlora.transform.compat import Primitive


def product(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def rows_of(n):
    """Rows of a model with `n` layers."""
    params = {"w": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}
    config = jlora.LoraConfig(rank=2, targets="w")
    plan = jlora.plan(product, params, np.ones((2, 4), np.float32), config=config)
    return tuple(
        dataclasses.replace(row, path=f"layers/{i}/{row.path}", spec=None)
        for i in range(n)
        for row in plan.leaves
    )


CONFIGS = {
    "globs": lambda n: jlora.LoraConfig(
        rank=2, targets="**/w", train="**/b", rules=jlora.Rule("**/w", rank=1)
    ),
    "all-linear": lambda n: jlora.LoraConfig(rank=2, exclude="**/0/w", train="**/b"),
    "names": lambda n: jlora.LoraConfig(
        rank=2,
        targets=[f"layers/{i}/w" for i in range(n)],
        rules=[jlora.Rule(f"layers/{i}/w", rank=1) for i in range(n)],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_planning_is_linear_in_leaves(name):
    took = {}
    for n in (250, 4000):
        rows, config = rows_of(n), CONFIGS[name](n)
        paths.select("**/w", ["w"])
        gc.disable()  # a pass through all that the tests keep takes a second
        start = time.process_time()
        plan = resolve(rows, config)
        took[n] = time.process_time() - start
        gc.enable()
        assert sum(row.status == "adapted" for row in plan) >= n - 1
    # 16 times the leaves; 256 times the time if each were compared with each.
    assert took[4000] < 100 * took[250]


def loops(params, x):
    """A weight in every kind of inner code."""
    one, two, stack = params["one"], params["two"], params["stack"]

    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, stack)
    x = jax.checkpoint(lambda x: layer(x, one)[0])(x)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ one, lambda x: x, x)
    x = jax.lax.fori_loop(0, 3, lambda _, x: x @ one.T, x)
    x, _ = jax.lax.while_loop(
        lambda state: state[1] < 2, lambda state: (state[0] @ two, state[1] + 1), (x, 0)
    )
    return jax.jit(lambda x: jax.nn.gelu(x @ two))(x)


def unrolled(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["stack"][i] + params["b"][None])
    return x @ params["one"] @ params["two"]


@pytest.mark.parametrize("fn", [loops, unrolled])
def test_planning_binds_nothing_but_what_tracing_binds(fn, monkeypatch):
    """So a plan costs the trace, and what reading the code costs."""
    shapes = {"one": (4, 4), "two": (4, 4), "stack": (3, 4, 4), "b": (4,)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    bound = []
    bind = Primitive.bind
    monkeypatch.setattr(
        Primitive,
        "bind",
        lambda self, *a, **k: bound.append(self) or bind(self, *a, **k),
    )

    def binds(run):
        bound.clear()
        run(lambda *args: fn(*args))
        return len(bound)

    config = jlora.LoraConfig(rank=1, targets=["one", "stack"])
    jax.make_jaxpr(fn)(params, x)  # JAX keeps the code of inner functions
    traced = binds(lambda fn: jax.make_jaxpr(fn)(params, x))
    assert binds(lambda fn: jlora.plan(fn, params, x, config=config)) == traced > 0


def test_patterns_that_match_nothing_do_not_take_for_ever():
    config = jlora.LoraConfig(targets=[f"layers/{i}/x" for i in range(300)])
    with pytest.raises(jlora.TargetError, match=r"nearest: 'layers/") as caught:
        resolve(rows_of(300), config)
    assert len(str(caught.value)) < 21_000


def nested(levels):
    tree = {"w": np.ones((4, 4), np.float32)}
    for i in range(levels):
        tree = {f"a b c d e{i % 10}": tree}
    return tree


@pytest.fixture
def deep():
    return nested(800)


def test_a_tree_of_800_levels_is_planned_and_kept(deep, tmp_path):
    def fn(params, x):
        (w,) = jax.tree.leaves(params)
        return x @ w

    (path,) = paths.flatten(deep)[0]
    config = jlora.LoraConfig(
        rank=2, targets=path, rules=jlora.Rule("a*/**/w", alpha=1)
    )
    plan = jlora.plan(fn, deep, np.ones((2, 4), np.float32), config=config)
    assert path in str(plan)
    assert plan_from_dict(plan_to_dict(plan)) == plan
    _, trainable = jlora.split(jax.random.key(0), deep, plan)
    jlora.save(tmp_path / "a", trainable)
    assert list(jlora.load(tmp_path / "a").lora) == [path]
    jlora.peft.save(tmp_path / "p", trainable)
    assert list(jlora.peft.load(tmp_path / "p", deep).lora) == [path]


@pytest.mark.parametrize("levels", range(850, 1001, 25))
def test_a_tree_at_the_limit_is_planned_or_refused(levels):
    """Nothing but jlora's own error comes out near the depth that JAX can walk."""

    def fn(params, x):
        return x @ jax.tree.leaves(params)[0]

    config, x = jlora.LoraConfig(rank=2, targets="**/w"), np.ones((2, 4), np.float32)
    adapted, told = (), ""
    try:
        adapted = jlora.plan(fn, nested(levels), x, config=config).adapted
    except jlora.TreeError as error:
        told = str(error)
    assert len(adapted) == 1 or "nested deeper than JAX can walk" in told


def test_a_tree_that_jax_cannot_walk_is_an_error_that_says_so():
    """How deep JAX walks depends on Python: 1,000 levels in 3.11, more in 3.13."""
    tree = {"w": 1}
    for _ in range(5000):
        tree = {"a": tree}
    found, told = [], ""
    try:
        found = list(paths.flatten(tree)[0])
    except jlora.TreeError as error:
        told = str(error)
    assert found == ["a/" * 5000 + "w"] or "nested deeper than JAX can walk" in told
