"""Arithmetic of adapters, and many adapters as one; pure functions on trainables.

An adapter is a `Trainable`, its update is what `merge` adds to the weights. All
functions are exact in that update and work on factors: the dense change of a weight is
formed only where its entries are what a method is about (`ties`, `dare`,
`magnitude_prune`). One adapter with a weight of 1 is that adapter. May import the
vocabulary, `methods` and `_core`.
"""

from ._combine import (
    add as add,
    average as average,
    concat as concat,
    interpolate as interpolate,
    linear as linear,
    negate as negate,
    scale as scale,
    to_lora as to_lora,
    truncate as truncate,
)
from ._measure import cosine as cosine, norms as norms, orthogonality as orthogonality
from ._per_row import per_row as per_row
from ._prune import dare as dare, magnitude_prune as magnitude_prune, ties as ties
from ._stack import select as select, stack as stack, unstack as unstack

__all__ = [
    "add",
    "average",
    "concat",
    "cosine",
    "dare",
    "interpolate",
    "linear",
    "magnitude_prune",
    "negate",
    "norms",
    "orthogonality",
    "per_row",
    "scale",
    "select",
    "stack",
    "ties",
    "to_lora",
    "truncate",
    "unstack",
]
