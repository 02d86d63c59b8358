"""The low-rank factors that a method's leaves stand for."""

from typing import Any

from ..factors import Factors


def plain(factors: Factors) -> tuple[Any, Any]:
    """Returns `(a, b)` with which the update is `scale * a @ b`, for any method.

    Shapes: `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`, differentiable
    with respect to the leaves of `factors`. What a magnitude does is not in them.
    """
    return factors.a, factors.b
