"""How many parameters the papers say they train, and how many their shapes give."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import encoder, methods
from .hooks import Params
from .methods import Method
from .methods.lora import QV


class Size(NamedTuple):
    """A transformer of `layers` layers whose perceptrons are four times as wide."""

    width: int
    layers: int


ROBERTA_BASE, ROBERTA_LARGE = Size(768, 12), Size(1024, 24)
DEBERTA_XXL = Size(1536, 48)
GPT2_M, GPT2_L, GPT3 = Size(1024, 24), Size(1280, 36), Size(12288, 96)


class Reported(NamedTuple):
    """A row of a table of Hu et al. (2021), LoRA, https://arxiv.org/abs/2106.09685.

    The paper leaves the classifier out, and so does `count`.

    Attributes:
      row: model and method.
      size: of the model.
      method: with the hyperparameters of the paper.
      trained: what shapes give.
      millions: what the paper prints.
    """

    row: str
    size: Size
    method: Method
    trained: int
    millions: str


def _lora(rank: int, targets: str = QV) -> Method:
    return methods.lora(rank, targets=targets)


EQUAL = (
    Reported("RoBERTa base, LoRA", ROBERTA_BASE, _lora(8), 294_912, "0.3"),
    Reported("RoBERTa base, BitFit", ROBERTA_BASE, methods.bitfit(), 101_376, "0.1"),
    Reported("RoBERTa large, LoRA", ROBERTA_LARGE, _lora(8), 786_432, "0.8"),
    Reported(
        "RoBERTa large, Pfeiffer 16",
        ROBERTA_LARGE,
        methods.pfeiffer(16),
        811_392,
        "0.8",
    ),
    Reported(
        "RoBERTa large, Houlsby 8", ROBERTA_LARGE, methods.houlsby(8), 835_968, "0.8"
    ),
    Reported("DeBERTa XXL, LoRA", DEBERTA_XXL, _lora(16), 4_718_592, "4.7"),
    Reported(
        "GPT-3, LoRA, values, r 2",
        GPT3,
        _lora(2, "layers/value/kernel"),
        4_718_592,
        "4.7",
    ),
    Reported("GPT-3, LoRA, r 1", GPT3, _lora(1), 4_718_592, "4.7"),
    Reported("GPT-3, LoRA, r 8", GPT3, _lora(8), 37_748_736, "37.7"),
    Reported("GPT-3, prompt of 264", GPT3, methods.prompt(264), 3_244_032, "3.2"),
    Reported(
        "GPT-2 M, two layers in full",
        Size(GPT2_M.width, 2),
        methods.full("layers/**"),
        25_192_448,
        "25.19",
    ),
    Reported("GPT-3, Houlsby 1", GPT3, methods.houlsby(1), 7_078_080, "7.1"),
    Reported("GPT-3, Houlsby 8", GPT3, methods.houlsby(8), 40_109_568, "40.1"),
)
"""Rows where the paper's figure is that of the shapes, rounded."""

DIFFERENT = (
    # microsoft/LoRA, issue 172, asks the same; its code trains 393,216.
    Reported("GPT-2 M, LoRA", GPT2_M, _lora(4), 393_216, "0.35"),
    Reported("GPT-2 L, LoRA", GPT2_L, _lora(4), 737_280, "0.77"),
    # Eleven widths a layer: four in attention, five in the perceptron, two in norms.
    Reported("GPT-3, BitFit", GPT3, methods.bitfit(), 12_976_128, "14.2"),
    # The paper counts 8 tokens before and 8 after the input, one vector each: as many
    # numbers as 8 keys and 8 values, and fewer than it prints.
    Reported("GPT-3, prefix of 8", GPT3, methods.prefix(8), 18_874_368, "20.2"),
    Reported(
        "RoBERTa large, Pfeiffer 64",
        ROBERTA_LARGE,
        methods.pfeiffer(64),
        3_171_840,
        "3.0",
    ),
    Reported(
        "RoBERTa large, Houlsby 64",
        ROBERTA_LARGE,
        methods.houlsby(64),
        6_343_680,
        "6.0",
    ),
)
"""Rows that the shapes and formulas of the paper do not give."""


def count(method: Method, size: Size) -> int:
    """Returns how many numbers a method trains beside the head, of shapes alone."""
    model = functools.partial(encoder.classify, heads=size.width // 64)
    inputs = (
        jax.ShapeDtypeStruct((1, 2, size.width), jnp.float32),
        jax.ShapeDtypeStruct((1, 2), jnp.bool_),
    )

    def started(key: jax.Array, params: Params, *inputs: jax.Array) -> object:
        return method.start(key, model, params, inputs)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    trained = jax.eval_shape(started, key, shapes(size), *inputs)
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    return sum(
        leaf.size for path, leaf in leaves if "head" not in jax.tree_util.keystr(path)
    )


def shapes(size: Size) -> Params:
    """Returns the shapes of an encoder's layers, and of a head for two classes."""
    d, h, n = size.width, 4 * size.width, size.layers

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(into: int, out: int) -> Params:
        return {"kernel": array(n, into, out), "bias": array(n, out)}

    norm = {"scale": array(n, d), "bias": array(n, d)}
    layers = {name: dense(d, d) for name in ("query", "key", "value", "output")}
    layers |= {"up": dense(d, h), "down": dense(h, d)}
    layers |= {"attention_norm": norm, "output_norm": norm}
    return {"layers": layers, "head": {"kernel": array(d, 2), "bias": array(2)}}
