"""Prompt tuning: trained vectors go before those of the input.

References:
  Lester et al., 2021, The Power of Scale for Parameter-Efficient Prompt Tuning,
  https://arxiv.org/abs/2104.08691
"""

import jax

from ..hooks import Array, Extra, Params
from .method import Method, adding


def prompt(tokens: int) -> Method:
    """Returns the method; the vectors start as those of random input tokens."""

    def init(key: Array, params: Params, inputs: tuple[Array, ...]) -> Array:
        x, mask = inputs[:2]
        flat, there = x.reshape(-1, x.shape[-1]), mask.reshape(-1)
        chances = there / there.sum()
        return jax.random.choice(key, flat, (tokens,), p=chances)

    return adding(init, lambda added: Extra(prompt=added))
