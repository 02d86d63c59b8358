"""What a method is: how it starts, and how it changes a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jlora

from ..hooks import Array, Extra, Params

Model = Callable[..., Array]  # (params, stream, mask, extra=...) -> logits


class Method(NamedTuple):
    """A way to fine-tune; two pure functions.

    Attributes:
      start: `(key, model, params, inputs) -> (frozen, trained)`. `inputs` are a batch
        of the model: a stream and a mask. `key` is consumed.
      adapted: `model -> run`, with `run(frozen, trained, *inputs)` the logits.
    """

    start: Callable[[Array, Model, Params, tuple[Array, ...]], tuple[Any, Any]]
    adapted: Callable[[Model], Callable[..., Array]]


def adding(
    init: Callable[[Array, Params, tuple[Array, ...]], Any],
    extra: Callable[[Any], Extra],
) -> Method:
    """Returns a method that adds parameters, and trains the head if there is one.

    Args:
      init: `(key, params, inputs) -> added`, the parameters at the start.
      extra: `added -> Extra`, what they do in the model.
    """

    def start(
        key: Array, model: Model, params: Params, inputs: tuple[Array, ...]
    ) -> tuple[Params, Params]:
        head = {k: v for k, v in params.items() if k == "head"}
        return params, {"added": init(key, params, inputs), **head}

    def adapted(model: Model) -> Callable[..., Array]:
        def run(frozen: Params, trained: Params, *inputs: Array) -> Array:
            head = {k: v for k, v in trained.items() if k == "head"}
            return model(frozen | head, *inputs, extra=extra(trained["added"]))

        return run

    return Method(start, adapted)


def planned(config: jlora.LoraConfig) -> Method:
    """Returns a method that jlora's `config` describes."""

    def start(
        key: Array, model: Model, params: Params, inputs: tuple[Array, ...]
    ) -> tuple[Any, jlora.Trainable]:
        plan = jlora.plan(model, params, *inputs, config=config)
        return jlora.split(key, params, plan)

    return Method(start, jlora.apply_lora)
