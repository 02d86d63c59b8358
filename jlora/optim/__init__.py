"""Optax glue: masks and labels, and optimizers that know what A and B are.

May import the vocabulary and `methods`, and optax once an optimizer is made.
"""

from ._adalora import (
    RankBudgetState as RankBudgetState,
    adalora as adalora,
    orthogonality_penalty as orthogonality_penalty,
)
from ._labels import decay_mask as decay_mask, labels as labels, mask as mask
from ._lora_plus import lora_plus as lora_plus
from ._masked import masked as masked
from ._precondition import lora_fa as lora_fa, riemannian as riemannian

__all__ = [
    "RankBudgetState",
    "adalora",
    "decay_mask",
    "labels",
    "lora_fa",
    "lora_plus",
    "mask",
    "masked",
    "orthogonality_penalty",
    "riemannian",
]
