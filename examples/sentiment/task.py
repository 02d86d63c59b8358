"""The pretrained model and the data, ready to train."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load

import jlora

from . import assets, data, weights
from .model import BertConfig, SentenceClassifier

LENGTH = 32
TRAIN_SENTENCES, TEST_SENTENCES = 2000, 600


class Task(NamedTuple):
    """A model, its pretrained variables and data; an export adds `files`."""

    model: SentenceClassifier
    variables: Any
    train: data.Examples
    test: data.Examples
    files: dict[str, bytes]


def load_task(
    minilm: assets.Asset, weights_at: Path, reviews_at: Path, *, dtype: str, seed: int
) -> Task:
    """Returns the task in the archives of the model and the reviews.

    Args:
      minilm: which upload of the model it is.
      weights_at: its archive.
      reviews_at: the archive of `assets.REVIEWS`.
      dtype: what the model computes in.
      seed: of the new head.
    """
    names = ("config.json", "tokenizer.json")
    files = {name: assets.read(minilm, weights_at, name) for name in names}
    tensors = load(assets.read(minilm, weights_at, "model.safetensors"))

    sizes = BertConfig.from_json(files["config.json"])
    model = SentenceClassifier(sizes, len(data.CLASSES), jnp.dtype(dtype))
    variables = pretrained(model, weights.from_hf(tensors), jax.random.key(seed))

    tokenizer = data.make_tokenizer(files["tokenizer.json"], length=LENGTH)
    train, test = data.split_by_review(
        data.read_sentences(reviews_at), train=TRAIN_SENTENCES, test=TEST_SENTENCES
    )
    train, test = data.encode(tokenizer, train), data.encode(tokenizer, test)
    return Task(model, variables, train, test, files)


def planned(task: Task, config: jlora.LoraConfig) -> jlora.Plan:
    """Returns what `config` means for the task's model."""
    ids, mask = task.train.ids[:1], task.train.mask[:1]
    return jlora.plan(task.model.apply, task.variables, ids, mask, config=config)


def quantised(task: Task, plan: jlora.Plan, kind: str) -> Task:
    """Returns the task with the linear weights of its model quantised, but the head."""
    return task._replace(variables=jlora.quantize(task.variables, plan, kind=kind))


def pretrained(model: SentenceClassifier, encoder: dict, key: jax.Array) -> Any:
    """Returns variables of `model`: the weights in `encoder` and a new head.

    Only the head is drawn from `key`. Of the rest that `init` makes, only the shapes
    are used.
    """
    ids, mask = jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool)
    template = jax.eval_shape(model.init, key, ids, mask)["params"]
    head = jax.jit(lambda key: model.init(key, ids, mask)["params"]["head"])(key)
    return jax.device_put({"params": weights.with_head(encoder, template, head)})
