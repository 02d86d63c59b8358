"""Casts on the host: what a narrower dtype does not hold is told, never infinity."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora._numerics import narrowed, on_device, overflow

# What each holds at most, and whether it rounds what is a little above that down.
MOST = {
    "float16": 65504,
    "bfloat16": 3.38953e38,
    "float32": 3.40282e38,
    "float8_e4m3fn": 448,
    "float8_e5m2": 57344,
    "float8_e4m3b11fnuz": 30,
    "float4_e2m1fn": 6,
}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_a_dtype_does_not_hold_is_told(name, sign):
    dtype, most = dtype_of(name), MOST[name]
    x = np.array([0.5, sign * 2.0 * most])
    text = f"'w' holds {2.0 * most:.6g}, but {name} holds at most {most:g}. Choose "
    with pytest.raises(ValueError, match=re.escape(text)):
        narrowed("w", x, dtype, ValueError)
    assert narrowed("w", x[:1], dtype, ValueError)[0] == 0.5


@pytest.mark.parametrize("name", MOST)
def test_what_a_dtype_holds_is_cast_as_ever(name):
    dtype = dtype_of(name)
    x = np.array([0.0, -1.0, float(jnp.finfo(dtype).max), 0.3])
    out = narrowed("w", x, dtype, ValueError)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, x.astype(dtype))


def test_infinity_and_nan_stay_what_they_are():
    x = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    for name in ("float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"):
        dtype = dtype_of(name)
        out = narrowed("w", x, dtype, ValueError)
        assert out.tobytes() == x.astype(dtype).tobytes()
    with pytest.raises(ValueError, match="holds 70000"):
        narrowed("w", np.array([np.inf, 7e4]), np.float16, ValueError)


def test_wide_numbers_are_not_cut_by_jax():
    with pytest.raises(ValueError, match=r"1e\+300, but float32.* jax_enable_x64"):
        on_device("w", np.array([1e300]), np.float64, ValueError)
    assert on_device("w", np.array([0.1]), np.float64, ValueError) == np.float32(0.1)


def test_whole_numbers_and_equal_dtypes_are_let_through():
    assert overflow(np.array([300]), np.array([44], np.uint8)) == ""
    x = np.array([np.inf], np.float16)
    assert overflow(x, x) == ""
    assert narrowed("w", np.zeros((0, 3)), np.float16, ValueError).shape == (0, 3)
