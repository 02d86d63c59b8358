"""Which form of an adapted product is cheaper; only its shapes say it.

The low-rank term is added to the activations, `x w + s (x a) b`, or to a temporary
weight, `x (w + s a b)`. The first reads and writes the product once more: tokens x out
entries. The second reads and writes the weight once more: in x out entries. Both do the
same few FLOPs, so bytes decide. The backward pass is the same for both.
"""

from typing import Literal

import jax.numpy as jnp

PLATFORMS = ("cpu", "accelerator")


def form(
    tokens: int, fan_in: int, dtype: object, platform: str, devices: int = 1
) -> Literal["factored", "merged"]:
    """Returns the cheaper form for the product of `tokens` rows and a weight.

    The fan-out does not matter: both costs grow with it.

    Args:
      tokens: rows of the activation.
      fan_in: entries of a row.
      dtype: dtype of the activation and the weight.
      platform: one of `PLATFORMS`.
      devices: over how many devices XLA divides the program. Of a weight that they
        share it would gather the sum for the value, and the weight for the gradient.
    """
    if devices > 1:
        return "factored"
    if platform == "cpu":
        # Measured: where rows fit the cache, the thin products are nearly free. A CPU
        # emulates low precision, and rounding the sum costs digits.
        exact = jnp.finfo(dtype).bits >= 32
        return "merged" if exact and tokens >= 4 * fan_in else "factored"
    return "merged" if tokens >= fan_in else "factored"


def forms(tokens: object, fan_in: int, dtype: object) -> list[str]:
    """Returns the form on each of `PLATFORMS`.

    It is factored where `tokens` is unknown: a program exported for any number of them.
    """
    if not isinstance(tokens, int):
        return ["factored"] * len(PLATFORMS)
    return [form(tokens, fan_in, dtype, platform) for platform in PLATFORMS]
