"""Which multipliers of an update there are."""

import math
import numbers
from typing import Any

import numpy as np

_FLOAT32 = np.finfo(np.float32)


def scale_fault(alpha: Any, rank: Any, rslora: bool) -> str:
    """Returns why `alpha` at `rank` gives no scale, or an empty text.

    A scale is a positive number that float32 holds: products are summed in float32.

    Args:
      alpha: the scale's numerator.
      rank: size of the rank axis.
      rslora: whether the scale is `alpha / sqrt(rank)`.

    Examples:
      >>> scale_fault(0, 8, False)
      'alpha must be a positive number, got 0'
      >>> scale_fault(1e308, 8, False)
      'alpha must give a scale that float32 holds, got 1e+308 at rank 8'
    """
    if not _is(numbers.Integral, rank) or rank < 1:
        return f"rank must be a positive integer, got {rank!r}"
    if rank >= 2**31:
        return f"rank must be below 2**31, got {rank!r}"
    if not _is(numbers.Real, alpha) or not 0 < alpha < math.inf:
        return f"alpha must be a positive number, got {alpha!r}"
    divisor = math.sqrt(rank) if rslora else rank
    least, most = (float(x) * divisor for x in (_FLOAT32.tiny, _FLOAT32.max))
    if not least <= alpha <= most:
        return (
            f"alpha must give a scale that float32 holds, got {alpha!r} at rank {rank}"
        )
    return ""


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
