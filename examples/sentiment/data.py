"""Review sentences as padded token arrays, in the order of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from . import assets

CLASSES = ("negative", "positive")


class Sentence(NamedTuple):
    """One sentence of a review, `label` an index into `CLASSES`."""

    review: int
    label: int
    text: str


class Examples(NamedTuple):
    """Tokenised sentences; `N` sentences, `T` tokens after padding.

    Attributes:
      ids: `[N, T]` int32 token ids.
      mask: `[N, T]` bool, true where a token is not padding.
      labels: `[N]` int32 indices into `CLASSES`.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def read_sentences(archive: Path) -> list[Sentence]:
    """Returns the clearly positive and clearly negative sentences, in file order.

    People rated each from -4 to 4; a mean within ±0.5 counts as neither and is left
    out. A line reads `<review>_<sentence> <tab> <mean> <tab> <text>`.
    """
    name = "amazonReviewSnippets_GroundTruth.txt"
    text = assets.read(assets.REVIEWS, archive, name).decode(errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [
        Sentence(int(name.split("_")[0]), int(float(score) > 0), text)
        for name, score, text in rows
        if abs(float(score)) > 0.5
    ]


def split_by_review(
    sentences: Sequence[Sentence], *, train: int, test: int
) -> tuple[list[Sentence], list[Sentence]]:
    """Returns `train` sentences and at least `test` others, from different reviews.

    Sentences of one review share its product and its mood, so a split by sentence
    would let the test set be guessed from memory. The split is the same each time.
    """
    reviews = np.unique([sentence.review for sentence in sentences])
    order = np.random.default_rng(0).permutation(reviews).tolist()
    ranked = sorted(sentences, key=lambda sentence: order.index(sentence.review))
    cut = test
    while ranked[cut].review == ranked[cut - 1].review:
        cut += 1
    return ranked[cut : cut + train], ranked[:cut]


def encode(tokenizer: Tokenizer, sentences: Sequence[Sentence]) -> Examples:
    """Returns `sentences` as arrays, padded or cut to what `tokenizer` is set to."""
    encoded = tokenizer.encode_batch([sentence.text for sentence in sentences])
    return Examples(
        ids=np.array([row.ids for row in encoded], np.int32),
        mask=np.array([row.attention_mask for row in encoded], bool),
        labels=np.array([sentence.label for sentence in sentences], np.int32),
    )


def make_tokenizer(spec: bytes, *, length: int) -> Tokenizer:
    """Returns the tokenizer stored as `spec` (JSON), fixed to `length` tokens a row.

    One length for every batch means one compilation of the training step.
    """
    tokenizer = Tokenizer.from_str(spec.decode())
    tokenizer.enable_padding(length=length)
    tokenizer.enable_truncation(length)
    return tokenizer


def batch_at(examples: Examples, step: int, *, size: int, seed: int) -> Examples:
    """Returns the batch of training step `step`, counted from 0 over all epochs.

    Each epoch is a new permutation. The rest that does not fill a batch is left out.
    The batch is a function of only `seed` and `step`, so a resumed run sees what an
    uninterrupted one would have seen.
    """
    epoch, position = divmod(step, len(examples.labels) // size)
    order = np.random.default_rng((seed, epoch)).permutation(len(examples.labels))
    rows = order[position * size : (position + 1) * size]
    return Examples(*(field[rows] for field in examples))
