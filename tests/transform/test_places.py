"""Where a plan and a warning say that a weight is merged: the user's line."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora.transform import compat
from jlora.transform.discover import Use

X = jnp.ones((2, 4))


def standardised(w):
    return jax.nn.standardize(w, axis=0)


MERGED = {
    "a function of JAX": lambda p, x: x @ jax.nn.standardize(p["w"], axis=0),
    "in a function": lambda p, x: x @ standardised(p["w"]),
    "its norm": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
    "sorted": lambda p, x: x @ jnp.sort(p["w"]),
    "in jit": lambda p, x: jax.jit(lambda w: x @ jnp.sort(w))(p["w"]),
    "in scan": lambda p, x: lax.scan(
        lambda h, _: (h @ standardised(p["w"]), None), x, length=2
    ),
    "in while": lambda p, x: lax.fori_loop(0, 2, lambda _, h: h @ jnp.sort(p["w"]), x),
    "in cond": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda w: x @ jnp.sort(w), lambda w: x @ w, p["w"]
    ),
    "in remat": jax.checkpoint(lambda p, x: x @ jnp.sort(p["w"])),
    "under vmap": lambda p, x: jax.vmap(lambda x: x @ jnp.sort(p["w"]))(x),
    "in a gradient": lambda p, x: jax.grad(
        lambda x: jnp.tanh(x @ jnp.sort(p["w"])).sum()
    )(x),
}
PARAMS = {"w": jnp.arange(16.0).reshape(4, 4)}


def merged_notes(fn, params=PARAMS):
    """Returns what the plan and the warning say about merges, as two texts."""
    made = jlora.plan(fn, params, X, config=jlora.LoraConfig(rank=1, targets="w"))
    parts = jlora.split(jax.random.key(0), params, made)
    with pytest.warns(jlora.MergeWarning) as caught:
        jlora.apply_lora(fn)(*parts, X)
    lines = str(made).split("merged on the fly")[1]
    return lines, str(caught[0].message)


@pytest.mark.parametrize("use", MERGED)
def test_a_merge_names_the_line_of_the_user(use):
    fn = MERGED[use]
    for text in merged_notes(fn):
        places = [int(n) for n in re.findall(r" at test_places\.py:(\d+)", text)]
        assert places
        assert "unknown" not in text
        assert " in '" not in text
        _, start = inspect.getsourcelines(standardised)
        _, end = inspect.getsourcelines(merged_notes)
        assert all(start <= n < end for n in places)


def test_a_loop_names_the_line_inside_and_not_its_own():
    def fn(p, x):
        def step(h, _):
            return h @ jnp.sort(p["w"]), None

        return lax.scan(step, x, length=2)

    for text in merged_notes(fn):
        assert "`sort` at test_places.py" in text
        assert ".step)" in text


def test_a_returned_weight_is_said_to_be_returned():
    for text in merged_notes(lambda p, x: (x @ p["w"], p["w"])):
        assert "returned by the function" in text
        assert " at \n" not in text


def test_without_a_line_the_scope_is_named():
    def fn(w):
        with jax.named_scope("encoder"):
            return jnp.exp(w)

    (eqn,) = jax.make_jaxpr(fn)(PARAMS["w"]).jaxpr.eqns
    nowhere = type(eqn.source_info)(None, eqn.source_info.name_stack)
    eqn = eqn.replace(source_info=nowhere)
    assert compat.where(eqn) == ""
    assert compat.place(eqn) == " in 'encoder'"
    use = Use("w", "exp", "merged", (), (), (), where="", scope="encoder")
    assert use.place == "`exp` in 'encoder'"
    assert dataclasses.replace(use, scope="").place == "`exp`"


def test_disable_jit_shows_tracers_inside_the_function():
    """As the documents say."""
    seen = []

    def fn(p, x):
        seen.append(isinstance(x, jax.core.Tracer))
        return x @ p["w"]

    made = jlora.plan(fn, PARAMS, X, config=jlora.LoraConfig(rank=1))
    parts = jlora.split(jax.random.key(0), PARAMS, made)
    with jax.disable_jit():
        jlora.apply_lora(fn)(*parts, X)
        assert seen == [True, True]
        fn(jlora.merge(*parts), X)
        assert seen == [True, True, False]
