"""The two tasks: sentiment by MiniLM, headlines by SmolLM2, upper layers trained.

The lower layers are frozen in every row. They run once for all examples, and what they
give is where each training step begins.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load

from examples.many_adapters import data as news
from examples.many_adapters.weights import pretrained
from examples.sentiment import assets, data, weights
from examples.sentiment.model import BertConfig

from . import decoder, encoder
from .hooks import Array, Params
from .methods.method import Model

ENCODER, DECODER = "encoder", "decoder"
LENGTH = 24  # tokens of a sentence
PROMPT, ANSWER = 40, 12  # tokens of a story and of its headline
TRAIN, TEST = 2000, 600  # sentences; the rest is for validation
STORIES, HELD = 256, 64  # stories to train on; for validation, and for the test
UPPER = {ENCODER: 3, DECODER: 4}  # layers that are trained


class Examples(NamedTuple):
    """`N` examples before the first trained layer.

    Attributes:
      x: `[N, T, D]`, the stream.
      mask: `[N, T]` bool, where tokens are.
      labels: `[N, A]` int32, the right answers.
      counts: `[N, A]` float32, 1 where an answer counts.
    """

    x: Any
    mask: Any
    labels: Any
    counts: Any

    def first(self, count: int) -> "Examples":
        """Returns the first `count` examples."""
        return Examples(*(field[:count] for field in self))


class Task(NamedTuple):
    """What is learnt, and the part of a model that learns it.

    Attributes:
      name: `"encoder"` or `"decoder"`.
      model: the upper layers, `(params, x, mask, extra=...) -> [B, A, C]` logits.
      params: of these layers.
      train, validation, test: examples of different reviews or stories.
    """

    name: str
    model: Model
    params: Params
    train: Examples
    validation: Examples
    test: Examples


def measure(logits: Array, examples: Examples) -> tuple[Array, Array]:
    """Returns the sums over a batch of losses and of right answers."""
    logits = logits.astype(jnp.float32)
    labels, counts = examples.labels, examples.counts
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    return (losses * counts).sum(), (right * counts).sum()


def load_task(name: str, cache: Path) -> Task:
    """Returns a task; fetches model and data into `cache` if they are not there."""
    return {ENCODER: sentiment, DECODER: headlines}[name](cache)


def sentiment(cache: Path) -> Task:
    """Returns the task of `examples/sentiment` with its split, and a validation part.

    The sentences that are neither for training nor for the test are for validation,
    less those of reviews that are used for training.
    """
    minilm, at = assets.fetch_any(assets.MINILM, cache)
    tokenizer = data.make_tokenizer(
        assets.read(minilm, at, "tokenizer.json"), length=LENGTH
    )
    everything = data.read_sentences(assets.fetch(assets.REVIEWS, cache))
    train, test = data.split_by_review(everything, train=TRAIN, test=TEST)
    used = {s.review for s in (*train, *test)}
    held = [s for s in everything if s.review not in used]
    parts = [data.encode(tokenizer, part) for part in (train, held, test)]
    sizes = BertConfig.from_json(assets.read(minilm, at, "config.json"))
    params = minilm_params(load(assets.read(minilm, at, "model.safetensors")))
    return split_task(
        ENCODER,
        encoder.embed,
        functools.partial(encoder.run, heads=sizes.num_attention_heads),
        functools.partial(classify, heads=sizes.num_attention_heads),
        params,
        [
            (part.ids, part.mask, part.labels[:, None], np.ones((len(part.ids), 1)))
            for part in parts
        ],
    )


def classify(*args: Any, **kwargs: Any) -> Array:
    """Returns the encoder's logits as those of one answer a row, `[B, 1, C]`."""
    return encoder.classify(*args, **kwargs)[:, None]


def minilm_params(tensors: dict[str, np.ndarray]) -> Params:
    """Returns MiniLM's parameters with a head of zeros for two classes."""
    tree = weights.from_hf(tensors)
    width = tree["embeddings"]["word"]["embedding"].shape[1]
    classes = len(data.CLASSES)
    kernel = np.zeros((width, classes), np.float32)
    head = {"kernel": kernel, "bias": np.zeros(classes, np.float32)}
    return encoder.from_linen(tree | {"head": head})


def headlines(cache: Path) -> Task:
    """Returns the task of writing the headline of a story's first paragraph."""
    params, config, tokenizer = pretrained(cache, "float32")
    stories = news.read_stories(assets.fetch(news.NEWS, cache))
    pairs = [news.Pair(story.text, story.headline) for story in stories]
    sizes = (STORIES, HELD, HELD)
    ends = np.cumsum(sizes)
    parts = []
    for size, end in zip(sizes, ends, strict=True):
        own = news.encode(
            tokenizer, "headline", pairs[end - size : end], PROMPT, ANSWER
        )
        labels, counted = own.tokens[:, PROMPT:], own.mask[:, PROMPT:]
        parts.append((own.tokens[:, :-1], own.mask[:, :-1], labels, counted))
    return split_task(
        DECODER,
        decoder.embed,
        functools.partial(decoder.run, heads=config.heads),
        functools.partial(decoder.predict, heads=config.heads, last=ANSWER),
        decoder.from_chat(params),
        parts,
    )


def split_task(
    name: str,
    embed: Callable[[Params, Array], Array],
    run: Callable[..., Array],
    model: Model,
    params: Params,
    parts: Sequence[tuple[Any, ...]],
    *,
    upper: int | None = None,
    chunk: int = 64,
) -> Task:
    """Returns a task whose examples have run through the lower layers.

    Args:
      name: of the task.
      embed: `(params, ids) -> stream`.
      run: `(layers, stream, mask) -> stream`.
      model: what follows, see `Task`.
      params: of the whole model, with stacked `layers`.
      parts: for train, validation and test: ids, mask, labels and counts.
      upper: how many layers `model` keeps; by default those of `UPPER`.
      chunk: examples at once.
    """
    upper = UPPER[name] if upper is None else upper
    params = jax.tree.map(jnp.asarray, params)
    lower = jax.tree.map(lambda x: x[:-upper], params["layers"])
    rest = {k: v for k, v in params.items() if k != "layers"}
    if name == ENCODER:
        del rest["embeddings"]  # nothing above reads them

    @jax.jit
    def before(params: Params, lower: Params, ids: Array, mask: Array) -> Array:
        return run(lower, embed(params, ids), mask)

    def streams(ids: Any, mask: Any) -> Array:
        rows = np.arange(-(-len(ids) // chunk) * chunk).reshape(-1, chunk) % len(ids)
        found = [np.asarray(before(params, lower, ids[r], mask[r])) for r in rows]
        return jnp.asarray(np.concatenate(found)[: len(ids)])

    examples = [
        Examples(
            streams(ids, mask),
            jnp.asarray(mask),
            jnp.asarray(labels, jnp.int32),
            jnp.asarray(counts, jnp.float32),
        )
        for ids, mask, labels, counts in parts
    ]
    layers = jax.tree.map(lambda x: x[-upper:], params["layers"])
    return Task(name, model, {**rest, "layers": layers}, *examples)
