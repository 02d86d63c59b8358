"""What the processes of `jax.distributed` do together when one of them writes.

Every process calls the writer. Arrays come to the host in each, the first process
writes, and the others wait for it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import CheckpointError
from ..factors import PyTree
from .disk import Fault

_MOST = 4096  # bytes of a text that the first process tells the others
_LEAF = "leaf "  # with its number: the one to gather next


def on_host(tree: PyTree) -> PyTree:
    """Returns `tree` with arrays that also lie on devices of other processes gathered.

    Every process must call it, with the same tree. Other arrays stay where they are.
    """
    if not any(map(_is_elsewhere, jax.tree.leaves(tree))):
        return tree  # JAX's map would sort the keys of mappings
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> Any:
    if not _is_elsewhere(x):
        return x
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def _is_elsewhere(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


@contextlib.contextmanager
def first_writes(fault: Fault = CheckpointError) -> Iterator[bool]:
    """Yields whether this process writes; all go on once the first has written.

    Raises:
      fault: in the other processes, if the first one raised an error.
    """
    first = jax.process_index() == 0
    try:
        yield first
    except Exception as error:
        if first:
            of_first(f"{type(error).__name__}: {error}")
        raise
    why = of_first("")
    if why and not first:
        raise fault(f"The first process has not written: {why}")


def write_in_first(
    write: Callable[[Callable[[str], Any]], None],
    leaves: Mapping[str, Any],
    fault: Fault = CheckpointError,
) -> None:
    """Calls `write(read)` in the first process; all go on once it has written.

    `read(path)` returns a leaf whose arrays lie on this process's devices, or on the
    host: the other processes gather each leaf with the first one when it is read. So no
    process has more than a leaf of a model that many share.

    Raises:
      fault: in the other processes, if the first one raised an error.
    """
    if jax.process_count() == 1:
        return write(leaves.__getitem__)
    order = list(leaves)
    if jax.process_index() == 0:

        def read(path: str) -> Any:
            if not any(map(_is_elsewhere, jax.tree.leaves(leaves[path]))):
                return leaves[path]
            of_first(f"{_LEAF}{order.index(path)}")
            return on_host(leaves[path])

        with first_writes(fault):
            write(read)
        return None
    told = of_first("")
    while told.startswith(_LEAF):
        on_host(leaves[order[int(told.removeprefix(_LEAF))]])
        told = of_first("")
    if told:
        raise fault(f"The first process has not written: {told}")
    return None


def of_first(text: str) -> str:
    """Returns the text of the first process, once all have come here."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.zeros(_MOST, np.uint8)
    mine = np.frombuffer(text.encode()[:_MOST], np.uint8)
    data[: mine.size] = mine
    shared = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return shared.tobytes().rstrip(b"\0").decode(errors="ignore")
