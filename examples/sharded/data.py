"""Rows of numbers to continue; each process makes those that its devices hold."""

from collections.abc import Iterable

import jax
import numpy as np


def batch_at(
    step: int,
    *,
    rows: int,
    length: int,
    vocab: int,
    seed: int,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Returns the batch of a step, `[rows, length]` int32, laid out as `sharding`.

    It is a function of `seed` and `step`, whatever the mesh and the number of
    processes are.
    """
    places = sharding.addressable_devices_indices_map((rows, length)).values()
    mine = sorted({range(rows)[own[0]] for own in places}, key=lambda own: own.start)
    local = np.concatenate(
        [sequences(own, step, length=length, vocab=vocab, seed=seed) for own in mine]
    )
    return jax.make_array_from_process_local_data(sharding, local, (rows, length))


def sequences(
    rows: Iterable[int], step: int, *, length: int, vocab: int, seed: int
) -> np.ndarray:
    """Returns some rows of a batch, `[len(rows), length]`.

    The first number of a row is random. Each of the others follows from the one before.
    """
    number = [np.random.default_rng((seed, step, row)).integers(vocab) for row in rows]
    columns = [np.array(number, np.int32)]
    while len(columns) < length:
        columns.append((5 * columns[-1] + 3) % vocab)
    return np.stack(columns, axis=1)
