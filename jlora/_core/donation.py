"""Which arrays a verb that consumes its input may delete."""

from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ..factors import PyTree


class Donation:
    """The arrays of a tree that nothing else in it, and nothing in `kept`, holds.

    Arrays count by their memory: two JAX arrays may share it. NumPy arrays belong to
    whoever made them.
    """

    def __init__(self, tree: PyTree, kept: PyTree) -> None:
        self._holders = Counter(
            place for x in jax.tree.leaves((tree, kept)) for place in _memory(x)
        )

    def has(self, leaf: PyTree) -> bool:
        """Returns whether `leaf` is one JAX array that may be deleted."""
        return isinstance(leaf, jax.Array) and self._is_last(leaf)

    def release(self, leaf: PyTree) -> None:
        """Deletes the arrays of `leaf` that nothing else holds."""
        for x in jax.tree.leaves(leaf):
            if isinstance(x, jax.Array) and not x.is_deleted():
                is_last = self._is_last(x)
                self._holders.subtract(_memory(x))
                if is_last:
                    x.delete()

    def _is_last(self, x: jax.Array) -> bool:
        return all(self._holders[place] == 1 for place in _memory(x))


def _memory(x: object) -> Iterator[tuple[object, int]]:
    """Yields where the parts of an array lie that this process reaches."""
    if not isinstance(x, jax.Array):
        return
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    for shard in x.addressable_shards:
        yield shard.device, shard.data.unsafe_buffer_pointer()
