"""Arithmetic of adapters, and many adapters as one; pure functions on trainables.

An adapter is a `Trainable`. Its update is what `merge` adds to the weights, and all
functions are exact in that update. They work on factors: only methods that select
entries (`ties`, `dare`, `magnitude_prune`) form the dense change of a weight. One
adapter with a weight of 1 comes back as it is. May import the vocabulary, `methods` and
`_core`.
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
from ._invocation import invocation_gate as invocation_gate
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
    "invocation_gate",
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
