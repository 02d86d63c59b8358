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
      method: with the hyperparameters of the paper, or, where it does not print them,
        those that its figure or its code gives.
      trained: what shapes give.
      millions: what the paper prints.
    """

    row: str
    size: Size
    method: Method
    trained: int
    millions: str


QKVO = "layers/{query,key,value,output}/kernel"


def _lora(rank: int, targets: str = QV) -> Method:
    return methods.lora(rank, targets=targets)


def _gpt3(row: str, method: Method, trained: int, millions: str) -> Reported:
    return Reported(f"GPT-3, {row}", GPT3, method, trained, millions)


# Table 2: RoBERTa and DeBERTa.
_GLUE = (
    Reported("RoBERTa base, LoRA", ROBERTA_BASE, _lora(8), 294_912, "0.3"),
    Reported("RoBERTa base, BitFit", ROBERTA_BASE, methods.bitfit(), 101_376, "0.1"),
    Reported(
        "RoBERTa base, Pfeiffer 16", ROBERTA_BASE, methods.pfeiffer(16), 304_320, "0.3"
    ),
    Reported(
        "RoBERTa base, Pfeiffer 48", ROBERTA_BASE, methods.pfeiffer(48), 894_528, "0.9"
    ),
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
    # Table 10 prints rank 8; the paper's scripts train rank 16.
    Reported("DeBERTa XXL, LoRA", DEBERTA_XXL, _lora(16), 4_718_592, "4.7"),
)

# Table 3: GPT-2.
_E2E = (
    Reported("GPT-2 M, Lin 6", GPT2_M, methods.pfeiffer(6, norm=True), 368_784, "0.37"),
    Reported(
        "GPT-2 M, Lin 224",
        GPT2_M,
        methods.pfeiffer(224, norm=True),
        11_089_152,
        "11.09",
    ),
    Reported(
        "GPT-2 M, two layers in full",
        Size(GPT2_M.width, 2),
        methods.full("layers/**"),
        25_192_448,
        "25.19",
    ),
    Reported("GPT-2 L, Lin 8", GPT2_L, methods.pfeiffer(8, norm=True), 875_808, "0.88"),
    Reported(
        "GPT-2 L, Lin 248",
        GPT2_L,
        methods.pfeiffer(248, norm=True),
        23_002_848,
        "23.00",
    ),
)

# Tables 4 and 15: GPT-3.
_GPT3 = (
    _gpt3("prompt of 72", methods.prompt(72), 884_736, "0.9"),
    _gpt3("prompt of 136", methods.prompt(136), 1_671_168, "1.7"),
    _gpt3("prompt of 264", methods.prompt(264), 3_244_032, "3.2"),
    _gpt3("prompt of 520", methods.prompt(520), 6_389_760, "6.4"),
    _gpt3("Houlsby 1", methods.houlsby(1), 7_078_080, "7.1"),
    _gpt3("Houlsby 4", methods.houlsby(4), 21_234_432, "21.2"),
    _gpt3("Houlsby 8", methods.houlsby(8), 40_109_568, "40.1"),
    _gpt3("Houlsby 16", methods.houlsby(16), 77_859_840, "77.9"),
    _gpt3("Houlsby 64", methods.houlsby(64), 304_361_472, "304.4"),
    _gpt3("LoRA, v, r 2", _lora(2, "layers/value/kernel"), 4_718_592, "4.7"),
    _gpt3("LoRA, q v, r 1", _lora(1), 4_718_592, "4.7"),
    _gpt3("LoRA, q v, r 2", _lora(2), 9_437_184, "9.4"),
    _gpt3("LoRA, q k v o, r 1", _lora(1, QKVO), 9_437_184, "9.4"),
    _gpt3("LoRA, q v, r 8", _lora(8), 37_748_736, "37.7"),
    _gpt3("LoRA, q k v o, r 4", _lora(4, QKVO), 37_748_736, "37.7"),
)

EQUAL = _GLUE + _E2E + _GPT3
"""Rows where the paper's figure is that of the shapes, rounded."""

DIFFERENT = (
    # A thousandth of the model: 0.35 of 354.92 million, and 0.77 of 774.03.
    Reported("GPT-2 M, LoRA", GPT2_M, _lora(4), 393_216, "0.35"),
    Reported("GPT-2 L, LoRA", GPT2_L, _lora(4), 737_280, "0.77"),
    Reported("GPT-2 M, prefix of 7", GPT2_M, methods.prefix(7), 344_064, "0.35"),
    Reported("GPT-2 L, prefix of 8", GPT2_L, methods.prefix(8), 737_280, "0.77"),
    # The figure of Lin 224; no size of Houlsby's gives it.
    Reported("GPT-2 M, Houlsby 112", GPT2_M, methods.houlsby(112), 11_064_576, "11.09"),
    # In units of 2 ** 20, 3.02 and 6.05.
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
    # Eleven widths a layer: four in attention, five in the perceptron, two in norms.
    # Twelve would give 14.2.
    _gpt3("BitFit", methods.bitfit(), 12_976_128, "14.2"),
    # The paper counts 8 tokens before and 8 after the input, one vector each: as many
    # numbers as 8 keys and 8 values, and fewer than it prints.
    _gpt3("prefix of 2", methods.prefix(2), 4_718_592, "5.1"),
    _gpt3("prefix of 4", methods.prefix(4), 9_437_184, "10.1"),
    _gpt3("prefix of 8", methods.prefix(8), 18_874_368, "20.2"),
    _gpt3("prefix of 18", methods.prefix(18), 42_467_328, "44.1"),
    _gpt3("prefix of 32", methods.prefix(32), 75_497_472, "76.1"),
    # Cut off, where others are rounded.
    _gpt3("prompt of 40", methods.prompt(40), 491_520, "0.4"),
    _gpt3("LoRA, q v, r 4", _lora(4), 18_874_368, "18.8"),
    _gpt3("LoRA, q k v o, r 2", _lora(2, QKVO), 18_874_368, "18.8"),
    _gpt3("LoRA, q v, r 64", _lora(64), 301_989_888, "301.9"),
    # Twice the row above, as the paper cut it off.
    _gpt3("LoRA, q k v o, r 64", _lora(64, QKVO), 603_979_776, "603.8"),
)
"""Rows where shapes and the paper's formulas give another figure, and why if known."""


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
