"""Quantised arrays of qwix, which is not installed here: what they look like."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers import normal

pytestmark = pytest.mark.once


@flax.struct.dataclass
class QArray:
    """The fields of qwix 0.1.8."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = flax.struct.field(pytree_node=False, default="int8")

    def dequantize(self):
        """What `qwix.dequantize` computes."""
        own = self.qvalue.astype("float32")
        if self.zero_point is not None:
            own = own - self.spread(self.zero_point.astype("float32"))
        return own * self.spread(self.scale)

    def spread(self, x):
        for axis, n in enumerate(self.qvalue.shape):
            x = jnp.repeat(x, n // x.shape[axis], axis)
        return x


@flax.struct.dataclass
class WithAux:
    array: Any
    how: Any = flax.struct.field(pytree_node=False, default=None)


for _class in (QArray, WithAux):
    _class.__module__ = "qwix._src.core.qarray"


def array(qtype, zero=None, blocks=(64, 1)):
    low, high = {"int8": (-128, 128), "int4": (-8, 8), "nf4": (0, 16)}[qtype]
    codes = jax.random.randint(jax.random.key(0), (128, 6), low, high)
    dtype = {"int8": "int8", "int4": "int4", "nf4": "uint4"}[qtype]
    counts = tuple(n // b for n, b in zip((128, 6), blocks, strict=True))
    scales = abs(normal(counts, 1)) + 0.1
    zeros = None if zero is None else jnp.full(counts, zero, dtype)
    return QArray(codes.astype(dtype), scales, zeros, qtype)


@pytest.mark.parametrize("blocks", [(64, 1), (128, 1), (128, 6)])
@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_it_is_the_same_array(qtype, zero, blocks):
    q = array(qtype, zero, blocks)
    found = jlora.from_qwix({"w": q, "box": WithAux(q), "bias": jnp.ones(2)})
    for name in ("w", "box"):
        assert (found[name].kind, found[name].blocks) == (qtype, blocks)
        wide = found[name].dense()
        np.testing.assert_allclose(wide, q.dequantize(), rtol=1e-5, atol=1e-5)


def test_codes_of_nf4_are_the_same_table():
    q = array("nf4")
    wide = jlora.from_qwix({"w": q})["w"].dense() / q.spread(q.scale)
    table = np.unique(np.asarray(wide).round(4))
    assert len(table) == 16
    assert (table[0], table[7], table[-1]) == (-1, 0, 1)


def test_a_type_of_another_kind_is_refused():
    codes = jnp.ones((4, 4), "int2")
    params = {"w": QArray(codes, jnp.ones((1, 4)), None, "int2")}
    with pytest.raises(jlora.TreeError, match=r"\['w'\] is of type int2.*dequantize"):
        jlora.from_qwix(params)
    zeros = QArray(jnp.ones((4, 4), "int8"), jnp.ones((1, 4)), jnp.ones((1, 1), "int8"))
    with pytest.raises(jlora.TreeError, match="other blocks for zero points"):
        jlora.from_qwix({"w": zeros})


def test_a_function_that_meets_one_says_what_to_write():
    params = {"w": array("int8")}

    def fn(p, x):
        return x @ p["w"]

    config = jlora.LoraConfig(rank=2)
    with pytest.raises(TypeError) as error:
        jlora.plan(fn, params, jnp.ones((1, 128)), config=config)
    assert any("jlora.from_qwix(params)" in note for note in error.value.__notes__)
    converted = jlora.from_qwix(params)
    plan = jlora.plan(fn, converted, jnp.ones((1, 128)), config=config)
    assert plan.adapted == ("w",)
