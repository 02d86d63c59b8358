"""How `Factors` and `Trainable` show themselves, and as state dicts of Flax."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import treescope
from flax import serialization
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import jlora
from jlora import ConfigError, Factors, FusedParts, Spec, Trainable
from tests.helpers import bits, normal

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
    seen = []
    jax.eval_shape(lambda t: seen.append(repr(t)), ADAPTER)  # of tracers
    assert seen == [SHOWN]


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
    short = Trainable({}, {"b": leaf})
    assert repr(short) == f"Trainable(lora={{}}, full={{'b': {text}}})"
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
    assert "magnitude=float32[4], rank=2, alpha=4.0" in shown
    assert shown.endswith("dropout=0.1, method='dora')")
    spec = dataclasses.replace(SPEC, method="rows", rows=tuple(range(300)))
    assert "a=None, b=float32[3,4], " in repr(Factors(None, x, spec))
    assert "rows=(0, 1, 2, 3, 4, 5, 6, 7, and 292 more)" in repr(Factors(None, x, spec))


# treescope asks for NumPy's chararray.
@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")
def test_treescope_shows_the_arrays():
    text = treescope.render_to_text(ADAPTER)
    assert text.startswith("Trainable(")
    assert "'layers/0/q': Factors(a=<jax.Array float32(8, 2)" in text


ORDERS = {
    "flax first": "import flax.serialization, jlora",
    "jlora first": "import jlora, flax.serialization",
    "flax when saving": "import jlora",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=list(ORDERS))
def test_flax_serializes_in_any_order_of_imports(imports):
    program = f"""
{imports}
import numpy as np
from jlora import Factors, Spec, Trainable

def adapter(value):
    own = Factors(np.full((2, 1), value), np.full((1, 2), value), Spec(rank=1, alpha=2))
    return Trainable({{"w": own}}, {{"b": np.full(2, value)}})

one, two = adapter(1.0), adapter(2.0)
from flax import serialization
again = serialization.from_bytes(adapter(0.0), serialization.to_bytes(two))
own = again.lora["w"]
print(own.a[0, 0], again.full["b"][0], own.spec == two.lora["w"].spec)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2.0 2.0 True\n", done.stderr


def test_a_state_dict_has_the_leaves_by_name():
    state = serialization.to_state_dict(ADAPTER)
    assert state.keys() == {"lora", "full"}
    assert state["lora"]["layers/3/q"].keys() == {"a", "b", "magnitude"}
    zeros = jax.tree.map(jnp.zeros_like, ADAPTER)
    again = serialization.from_state_dict(zeros, state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, ADAPTER))
    assert jax.tree.structure(again) == jax.tree.structure(ADAPTER)


@pytest.mark.parametrize("masked", [False, True])
def test_a_train_state_of_flax_can_hold_a_trainable(masked, standard_dtypes):
    def made(params):
        tx = optax.adam(1e-2)
        if masked:
            mask = jax.tree.map(lambda x: x.ndim == 2, params)
            tx = optax.masked(tx, mask)
        return TrainState.create(apply_fn=lambda *_: None, params=params, tx=tx)

    adapter = Trainable({"w": ADAPTER.lora["layers/0/q"]}, {"b": jnp.ones(3)})
    state = made(adapter)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, adapter))
    template = made(jax.tree.map(jnp.zeros_like, adapter))
    again = serialization.from_bytes(template, serialization.to_bytes(state))
    assert jax.tree.structure(again.params) == jax.tree.structure(state.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, state.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.opt_state, state.opt_state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("full"), "Missing field.*'full'.*instance of Trainable"),
        (lambda s: s["lora"].pop("w"), "Missing field.*'w'.* at path ./lora"),
        (lambda s: s["lora"].update(v={}), "Unknown field.*'v'.* at path ./lora"),
        (lambda s: s["full"].update(c=0), "Unknown field.*'c'.* at path ./full"),
        (lambda s: s["lora"]["w"].pop("a"), "Missing field.*'a'.* instance of Factors"),
        (lambda s: s["lora"]["w"].update(c=0), "Unknown field.*'c'.* of Factors"),
    ],
)
def test_a_state_dict_of_another_adapter_is_refused(change, message):
    adapter = Trainable({"w": ADAPTER.lora["layers/0/q"]}, {"b": jnp.ones(3)})
    state = serialization.to_state_dict(adapter)
    change(state)
    with pytest.raises(ValueError, match=message):
        serialization.from_state_dict(adapter, state)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, "rank must be a positive integer, got 2.0"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": -2}, "alpha must be a positive number, got -2"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"alpha": float("inf")}, "alpha must be a positive number, got inf"),
        ({"alpha": None}, "alpha must be a positive number, got None"),
        ({"alpha": 1e39}, "a scale that float32 holds, got 1e+39 at rank 2"),
        ({"alpha": 1e-38}, "a scale that float32 holds, got 1e-38 at rank 2"),
        ({"parts": FusedParts(1, (2, 2), (0, 0))}, "rank must be a positive integer"),
        ({"parts": FusedParts(1, (), ())}, "rank must be a positive integer"),
    ],
)
def test_a_spec_has_a_scale_that_float32_holds(fields, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        Spec(**{"rank": 2, "alpha": 4, **fields})
    good = Spec(rank=2, alpha=4)
    with pytest.raises(ConfigError, match=re.escape(text)):
        dataclasses.replace(good, **fields)
    assert Spec(rank=4, alpha=6e38, rslora=True).scale == 3e38


@pytest.mark.parametrize("options", [{}, {"double": True}, {"kind": "int8"}])
def test_flax_writes_and_restores_codes(options):
    state = {
        "w": jlora.quantize({"w": normal((128, 8))}, **options)["w"],
        "b": jnp.ones(1),
    }
    template = jax.tree.map(jnp.zeros_like, state)
    again = serialization.from_bytes(template, serialization.to_bytes(state))
    assert bits(again) == bits(state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
