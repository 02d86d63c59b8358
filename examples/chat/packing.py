"""Documents as batches of rows that hold several of them, shuffled and resumable."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from .template import Document

BINS = 64  # rows that are packed together: more waste less, and cost more to resume


IN_MEMORY = grain.ReadOptions(num_threads=0)


class Batch(NamedTuple):
    """`N` rows of `T` tokens, in which documents stand one after the other.

    Attributes:
      tokens: `[N, T]` int32, what the model reads.
      targets: `[N, T]` int32, the token that follows each one in its document.
      learnt: `[N, T]` int32, 1 where the target belongs to an answer.
      segments: `[N, T]` int32, the document's number in its row; 0 where none is.
      positions: `[N, T]` int32, the place in the document.
    """

    tokens: np.ndarray
    targets: np.ndarray
    learnt: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Epoch(NamedTuple):
    """What packing makes of all documents once: rows, and the share of real tokens."""

    rows: int
    real: float


def training(
    documents: Sequence[Document], *, rows: int, length: int, seed: int
) -> grain.IterDataset:
    """Returns batches without end: each epoch has another order.

    The state of its iterator (`get_state`) is a few numbers, a JSON value; an iterator
    that is given it (`set_state`) goes on with the next batch. It is the same in all
    processes: each of them makes the whole batch, and puts its own rows on its devices.
    """
    mixed = grain.MapDataset.source(documents).seed(seed).shuffle().repeat()
    return _packed(mixed, length, seed).batch(rows, batch_fn=_batch)


def once(documents: Sequence[Document], *, rows: int, length: int) -> list[Batch]:
    """Returns all documents once, in their order; the last rows may be empty."""
    packed = _packed(grain.MapDataset.source(documents), length, seed=None)
    batches = [*packed.batch(rows, batch_fn=_batch)]
    last = batches[-1]
    missing = ((0, rows - len(last.tokens)), (0, 0))
    return [*batches[:-1], Batch(*(np.pad(field, missing) for field in last))]


def epoch(documents: Sequence[Document], *, length: int) -> Epoch:
    """Returns how many rows hold all documents once, and how full they are."""
    rows = once(documents, rows=1, length=length)
    real = sum(np.count_nonzero(row.segments) for row in rows)
    return Epoch(len(rows), real / (len(rows) * length))


def _packed(data: Any, length: int, seed: int | None) -> grain.IterDataset:
    return grain.experimental.FirstFitPackIterDataset(
        data.map(_shifted).to_iter_dataset(IN_MEMORY),
        length_struct=dict.fromkeys(("tokens", "targets", "learnt"), length),
        num_packing_bins=BINS,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )


def _shifted(document: Document) -> dict[str, np.ndarray]:
    """Returns tokens and their targets, so that no target is of another document."""
    tokens, learnt = document
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "learnt": learnt[1:].astype(np.int32),
    }


def _batch(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    names = ("tokens", "targets", "learnt", "tokens_segment_ids", "tokens_positions")
    return Batch(*(np.stack([row[name] for row in rows]) for name in names))
