"""What the processes of `jax.distributed` do together when one of them writes.

Every process calls the writer. Arrays come to the host in each, the first process
writes, and the others wait for it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._tables import listed
from ..errors import CheckpointError
from ..factors import PyTree
from .disk import Fault

_MOST = 4096  # bytes of a text that the first process tells the others


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


def check_here(leaves: dict[str, Any], fault: Fault = CheckpointError) -> None:
    """Raises `fault` if arrays of a whole model lie on devices of other processes."""
    away = [
        path
        for path, x in leaves.items()
        if any(map(_is_elsewhere, jax.tree.leaves(x)))
    ]
    if away:
        raise fault(
            f"Not written: {listed(map(repr, away), 3, ', ')} lie on devices of other "
            "processes. Write with jlora.export.orbax, where each process writes its "
            "shards; or gather them in all processes with "
            "jax.experimental.multihost_utils.process_allgather(params, tiled=True)."
        )


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
