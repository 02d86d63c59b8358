"""LoRA: `w + scale * a @ b` in place of `w`; merged, it is the model's own program.

References:
  Hu et al., 2021, LoRA, https://arxiv.org/abs/2106.09685
"""

from typing import Any

import jlora

from .head import HEAD
from .method import Method, planned

QV = "layers/{query,value}/kernel"


def lora(rank: int = 8, alpha: float = 16, **settings: Any) -> Method:
    """Returns the method on queries and values, or on `targets`, and the head."""
    return planned(config(rank, alpha, **settings))


def config(rank: int, alpha: float, **settings: Any) -> jlora.LoraConfig:
    """Returns what is trained, for a model with a head or without one."""
    head = settings.pop("head", True)
    chosen = {"targets": QV, **settings}
    if head:
        chosen = {"exclude": HEAD, "train": HEAD, **chosen}
    return jlora.LoraConfig(rank=rank, alpha=alpha, **chosen)
