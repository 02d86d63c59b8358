"""How weights are adapted, and how factors start: one file a method or init."""

from typing import Any

from ..factors import Factors, Spec
from .adalora import adalora
from .dora import dora
from .init import Init as Init, residual as residual
from .inits import (
    INITS as INITS,
    find_init as find_init,
    init_clashes as init_clashes,
    init_name as init_name,
)
from .method import Method as Method
from .parts import parts
from .rows import rows
from .vera import vera

METHODS = {
    "lora": Method(),
    "dora": dora,
    "vera": vera,
    "adalora": adalora,
}


def method_of(spec: Spec) -> Method:
    """Returns the method of `spec`."""
    if spec.rows:
        return rows
    return METHODS[spec.method] if spec.parts is None else parts


def leaf_shapes(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns `{leaf: shape}` of the `Factors` of a weight of shape `shape`."""
    return method_of(spec).shapes(spec, shape)


def misshapen(path: str, factors: Factors, shape: tuple[int, ...]) -> list[str]:
    """Returns in words which leaves of `factors` a weight of `shape` does not have.

    Examples:
      >>> import numpy as np
      >>> f = Factors(np.ones((3, 2)), np.ones((2, 5)), Spec(rank=2, alpha=2))
      >>> misshapen("w", f, (3, 4))
      ["b of 'w' has shape (2, 5), a weight of shape (3, 4) at rank 2 needs (2, 4)"]
    """
    wanted = leaf_shapes(factors.spec, shape)
    found = {name: getattr(factors, name) for name in ("a", "b", "magnitude")}
    shapes = {k: tuple(x.shape) for k, x in found.items() if x is not None}
    return [
        f"{name} of {path!r} has shape {shapes.get(name)}, a weight of shape {shape} "
        f"at rank {factors.spec.rank} needs {wanted.get(name)}"
        for name in found
        if shapes.get(name) != wanted.get(name)
    ]


def plain(factors: Factors) -> tuple[Any, Any]:
    """Returns `(a, b)` with which the update is `scale * a @ b`, for any method.

    Shapes: `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`, differentiable
    with respect to the leaves of `factors`. What a DoRA magnitude does is not in them.
    """
    return method_of(factors.spec).plain(factors)
