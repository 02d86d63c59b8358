"""What every model of every library has to satisfy; the tables are in the tests.

A case is a model as its library wrote it. Everything in it that can be adapted is,
heads and embeddings too: the plan names exactly the leaves that the table names.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers import close, comparable

PLAN, VALUES = "plan", "values"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model and what a plan for it must say.

    Attributes:
      name: the test's id.
      build: returns `(fn, params, args)` or `(fn, params, args, kwargs)`.
      adapted: globs of the leaves on the factored route, each matches one at least.
      merged: globs of those that are merged on the fly, and said to be.
      axes: (batch, fan-in, fan-out) that the plan must find, by glob.
      broken: by check, the reason why jlora does not do this yet.
    """

    name: str
    build: Callable[[], tuple]
    adapted: tuple[str, ...] | str = "**/kernel"
    merged: tuple[str, ...] | str = ()
    axes: dict[str, tuple] = dataclasses.field(default_factory=dict)
    rank: int = 2
    tolerance: float = 1e-4
    slow: bool = False
    broken: dict[str, str] = dataclasses.field(default_factory=dict)


def params(cases: Iterable[Case], check: str) -> list[Any]:
    """Returns the cases for `pytest.mark.parametrize`, marked for `check`."""
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[
                *([pytest.mark.slow] if case.slow else []),
                *(
                    [pytest.mark.xfail(reason=case.broken[check])]
                    if check in case.broken
                    else []
                ),
            ],
        )
        for case in cases
    ]


@dataclasses.dataclass(frozen=True)
class Model:
    """A built case; `fn(params, *args)` with the keyword arguments bound."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@functools.lru_cache(maxsize=4)
def build(case: Case) -> Model:
    fn, params, args, *kwargs = case.build()
    return Model(fn, params, args, kwargs[0] if kwargs else {})


@functools.lru_cache(maxsize=4)
def plan(case: Case) -> jlora.Plan:
    """Returns the plan that adapts whatever can be."""
    model = build(case)
    config = jlora.LoraConfig(
        rank=case.rank,
        alpha=3,
        targets=lambda row: (
            row.op and len(row.shape) > 1 and row.dtype in ("float32", "bfloat16")
        ),
    )
    return jlora.plan(
        model.fn, model.params, *model.args, config=config, **model.kwargs
    )


def select(globs: tuple[str, ...] | str, paths: Iterable[str]) -> set[str]:
    """Returns the paths that the globs match; each must match one."""
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        hits = jlora.paths.select(glob, paths)
        assert hits, f"{glob} matches none of {list(paths)}"
        found.update(hits)
    return found


def lora(case: Case) -> Callable[..., Any]:
    """Returns `lora_fn(frozen, trainable, *args)`; it may merge what the case says."""
    model = build(case)
    lora_fn = jlora.apply_lora(model.fn, on_merge="allow" if case.merged else "error")
    return functools.partial(lora_fn, **model.kwargs)


def check_plan(case: Case) -> None:
    rows = {row.path: row for row in plan(case).rows()}
    merged = select(case.merged, rows)
    factored = select(case.adapted, rows) - merged
    able = {path for path, row in rows.items() if row.status == "adapted"}
    assert able == factored | merged
    assert {path for path in able if rows[path].route == "factored"} == factored
    for glob, expected in case.axes.items():
        for path in select(glob, rows):
            found = rows[path].spec.axes
            assert (found.batch, found.fan_in, found.fan_out) == expected, path


def jit(function: Callable[..., Any], *trees: Any) -> Callable[..., Any]:
    """Returns the jitted function of such trees; what is no array in them is static."""
    leaves, treedef = jax.tree.flatten(trees)
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    @jax.jit
    def run(arrays):
        filled = dict(enumerate(leaves)) | dict(zip(slots, arrays, strict=True))
        return function(*treedef.unflatten(filled.values()))

    def call(*trees):
        arrays = jax.tree.leaves(trees)
        return run([arrays[i] for i in slots])

    return call


def check_values(case: Case) -> None:
    """A fresh adapter changes nothing; any equals its merged weights, and so do slopes.

    Each side is one program, of the output and the gradient by A and B.
    """
    model = build(case)
    frozen, fresh = jlora.split(jax.random.key(1), model.params, plan(case))
    leaves, treedef = jax.tree.flatten(fresh)
    rng = np.random.default_rng(2)
    trained = treedef.unflatten(
        jnp.asarray(rng.normal(size=x.shape, scale=0.4), x.dtype) for x in leaves
    )
    merged = jlora.merge(frozen, trained)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)

    def gradient_and_value(function):
        def loss(trainable, frozen, *args):
            out = function(frozen, trainable, *args)
            floats = [
                o for o in jax.tree.leaves(out) if jnp.issubdtype(o.dtype, jnp.floating)
            ]
            return sum(jnp.sum(jnp.cos(o)) for o in floats), out

        return jit(jax.grad(loss, has_aux=True), fresh, frozen, *model.args)

    factored = gradient_and_value(lora(case))
    expected = gradient_and_value(
        lambda f, t, *args: model.fn(jlora.merge(f, t), *args, **model.kwargs)
    )
    near(
        factored(fresh, frozen, *model.args)[1],
        expected(fresh, frozen, *model.args)[1],
        1e-5,
    )
    gradient, out = factored(trained, frozen, *model.args)
    expected_gradient, expected_out = expected(trained, frozen, *model.args)
    near(out, expected_out, case.tolerance)
    near(gradient, expected_gradient, case.tolerance)
    for path, factors in gradient.lora.items():
        assert np.abs(factors.a).max() > 0, path
        assert np.abs(factors.b).max() > 0, path


def equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(comparable(a), comparable(b))


def near(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that leaves agree to `tolerance` of the largest entry of each."""
    close(actual, expected, rtol=0, atol=tolerance * 1e-3, largest=tolerance)


def fill(shapes: Any, seed: int = 0) -> Any:
    """Returns random values for a tree of shapes: nothing is run to initialise it."""
    rng = np.random.default_rng(seed)

    def value(keys: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(keys)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or "cache" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if any(word in name for word in ("var", "sigma", "scale")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)
