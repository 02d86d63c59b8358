"""How `Factors` and `Trainable` show themselves, and as state dicts of Flax."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import treescope
from jax.sharding import PartitionSpec as P

from jlora import Factors, Spec, Trainable

SPEC = Spec(rank=2, alpha=4.0)
ADAPTER = Trainable(
    {
        f"layers/{i}/{name}": Factors(jnp.ones((8, 2)), jnp.ones((2, 4)), SPEC)
        for i in range(32)
        for name in ("q", "v")
    },
    {"head": jnp.ones((4, 3), "bfloat16")},
)
FACTORS = "Factors(a=float32[8,2], b=float32[2,4], rank=2, alpha=4.0)"
SHOWN = f"""Trainable(
  1,548 parameters,
  lora={{
    'layers/{{0..31}}/q (×32)': {FACTORS},
    'layers/{{0..31}}/v (×32)': {FACTORS},
  }},
  full={{
    'head': bfloat16[4,3],
  }},
)"""


def test_a_trainable_shows_shapes_and_counts_and_folds_what_is_alike():
    assert repr(ADAPTER) == SHOWN
    assert repr(jax.eval_shape(lambda: ADAPTER)) == SHOWN
    jax.jit(lambda t: [repr(t) == SHOWN or pytest.fail(repr(t))] and 0)(ADAPTER)


def test_a_trainable_is_a_table_in_a_notebook():
    page = ADAPTER._repr_html_()
    assert "<caption>1,548 parameters</caption>" in page
    row = f"<td>layers/{{0..31}}/q (×32)</td><td>{FACTORS}</td><td>768</td>"
    assert row in page


@pytest.mark.parametrize(
    ("leaf", "text"),
    [(None, "None"), ("lora", "'lora'"), (True, "True"), (P("x"), repr(P("x")))],
)
def test_other_leaves_show_themselves(leaf, text):
    short = Trainable({"w": Factors(leaf, leaf, SPEC)}, {"b": leaf})
    assert repr(short) == (
        f"Trainable(lora={{'w': Factors(a={text}, b={text}, rank=2, alpha=4.0)}}, "
        f"full={{'b': {text}}})"
    )
    labels = jax.tree.map(lambda _: leaf, ADAPTER)
    assert f"'layers/{{0..31}}/q (×32)': Factors(a={text}, b=" in repr(labels)
    whole = jax.tree.map(
        lambda _: leaf, ADAPTER, is_leaf=lambda x: isinstance(x, Factors)
    )
    assert f"'layers/{{0..31}}/v (×32)': {text}," in repr(whole)


def test_what_stands_for_whole_fields_is_shown():
    assert repr(Trainable(0, None)) == "Trainable(lora=0, full=None)"
    assert repr(Trainable()) == "Trainable(lora={}, full={})"
    assert Trainable(0, None)._repr_html_()


def test_factors_show_what_is_special_of_them():
    x = jnp.ones((3, 4))
    spec = dataclasses.replace(SPEC, method="dora", dropout=0.1)
    shown = repr(Factors(x, x, spec, jnp.ones(4)))
    assert (
        "magnitude=float32[4], rank=2, alpha=4.0, dropout=0.1, method='dora'" in shown
    )
    spec = dataclasses.replace(SPEC, method="rows", rows=tuple(range(300)))
    assert "a=None, b=float32[3,4], " in repr(Factors(None, x, spec))
    assert "rows=(0, 1, 2, 3, 4, 5, 6, 7, and 292 more)" in repr(Factors(None, x, spec))


def test_treescope_shows_the_arrays():
    text = treescope.render_to_text(ADAPTER)
    assert text.startswith("Trainable(")
    assert "'layers/0/q': Factors(a=<jax.Array float32(8, 2)" in text
