"""DoRA: LoRA changes the direction of each column, a vector its length.

References:
  Liu et al., 2024, DoRA, https://arxiv.org/abs/2402.09353
"""

from typing import Any

from .lora import lora
from .method import Method


def dora(rank: int = 8, alpha: float = 16, **settings: Any) -> Method:
    """Returns the method on queries and values; the head is trained."""
    return lora(rank, alpha, method="dora", **settings)
