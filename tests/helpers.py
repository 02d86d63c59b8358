"""What the tests of many rooms share: random trees, and how two trees are compared."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import Factors

PyTree = Any


def normal(
    shapes: PyTree, seed: int = 0, dtype: str = "float32", scale: float = 1.0
) -> PyTree:
    """Returns normal arrays for a shape, or for a tree whose leaves are shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * scale, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def random_like(tree: PyTree, seed: int = 1, scale: float = 1.0) -> PyTree:
    """Returns `tree` with normal numbers in place of its arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype), tree
    )


def bits(tree: PyTree) -> list[tuple]:
    """Returns dtype, shape and bytes of every leaf."""
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def same(actual: PyTree, expected: PyTree) -> None:
    """Asserts that two trees have one structure and are equal to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert bits(actual) == bits(expected)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that has an entry for each compilation of XLA's, as they happen."""
    heard: list[str] = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        del seconds, kwargs
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def close(
    actual: PyTree,
    expected: PyTree,
    rtol: float = 1e-5,
    atol: float | None = None,
    *,
    largest: float = 0.0,
) -> None:
    """Asserts that two trees agree in structure, shapes, dtypes, and nearly in values.

    Args:
      actual: the tree that the test got.
      expected: the tree that it should have got.
      rtol: the allowed error of an entry, relative to the entry.
      atol: the allowed absolute error, `rtol` by default.
      largest: the allowed error relative to the largest entry of the leaf. It counts
        where it is more than `atol`.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves_with_path(actual)
    for (keys, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        path = jax.tree_util.keystr(keys)
        assert jnp.shape(a) == jnp.shape(b), path
        assert jnp.result_type(a) == jnp.result_type(b), path
        a, b = comparable(a), comparable(b)
        of_largest = largest * float(np.abs(b).max(initial=0))
        allowed = max(rtol if atol is None else atol, of_largest)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=allowed, err_msg=path)


def comparable(x: Any) -> np.ndarray:
    """Returns an array that NumPy can compare; of a random key, its data."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    low = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.asarray(x, np.float32 if low else None)


def update(factors: Factors) -> np.ndarray:
    """Returns `scale * a @ b` in float64, from the definition, as the weight lies."""
    axes = factors.spec.axes
    letters = {axis: chr(ord("a") + axis) for axis in axes.order}
    batch, fan_in, fan_out = (
        "".join(letters[i] for i in role)
        for role in (axes.batch, axes.fan_in, axes.fan_out)
    )
    out = "".join(sorted(letters.values()))
    a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    return factors.scale * np.einsum(f"{batch}{fan_in}z,{batch}z{fan_out}->{out}", a, b)
