"""Planning takes time in proportion to leaves and patterns; deep trees are walked."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import paths
from jlora._plan.resolve import resolve
from jlora._plan.serial import plan_from_dict, plan_to_dict


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
        start = time.process_time()
        plan = resolve(rows, config)
        took[n] = time.process_time() - start
        assert sum(row.status == "adapted" for row in plan) >= n - 1
    # 16 times the leaves; 256 times the time if each were compared with each.
    assert took[4000] < 100 * took[250]


def test_patterns_that_match_nothing_do_not_take_for_ever():
    config = jlora.LoraConfig(targets=[f"layers/{i}/x" for i in range(300)])
    with pytest.raises(jlora.TargetError, match=r"nearest: 'layers/") as caught:
        resolve(rows_of(300), config)
    assert len(str(caught.value)) < 21_000


@pytest.fixture
def deep():
    tree = {"w": np.ones((4, 4), np.float32)}
    for i in range(800):
        tree = {f"a b c d e{i % 10}": tree}
    return tree


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
