"""Codes and scales beside those of bitsandbytes, and the error of each kind."""

import pathlib
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.quantised import Scheme, encode, repacked

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "quantised.npz"


def test_nf4_codes_and_scales_are_those_of_bitsandbytes():
    """`tests/golden/check_quantised.py` wrote the file, and compares many more."""
    with np.load(GOLDEN) as found:
        units, codes, scales = (found[name] for name in ("units", "codes", "scales"))
    x = jnp.asarray(units.astype(np.float32) / 2**20)
    q = repacked(encode(x, (1,), Scheme("nf4", block=64)), None)
    np.testing.assert_array_equal(q.codes.astype(jnp.uint8), codes)
    np.testing.assert_array_equal(q.scales[:, 0], scales)
    assert set(codes.ravel()) == set(range(16))


# On N(0, 0.02²), over more seeds and shapes (tests/golden/check_quantised.py): nf4 has
# 0.09201 ± 0.00004, which is a property of its table; int8 0.00743 ± 0.00001; int4
# 0.10775 ± 0.0001.
@pytest.mark.once
@pytest.mark.parametrize(
    ("scheme", "bound"),
    [
        (Scheme("nf4"), 0.0921),
        (Scheme("nf4", double=True), 0.0921),
        (Scheme("int8"), 0.0075),
        (Scheme("int4"), 0.108),
    ],
    ids=["nf4", "nf4 double", "int8", "int4"],
)
def test_relative_error_on_normal_weights(scheme, bound):
    errors = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.normal(scale=0.02, size=(1024, 256)).astype(np.float32)
        dense = np.asarray(encode(jnp.asarray(x), (0,), scheme).dense())
        errors.append(np.linalg.norm(dense - x) / np.linalg.norm(x))
    assert 0.98 * bound < statistics.mean(errors) <= bound
    assert statistics.pstdev(errors) < 0.01 * bound
