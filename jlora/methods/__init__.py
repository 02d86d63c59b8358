"""What a method or an initialisation is: pure functions, one file each.

May import the vocabulary below `config`.
"""

import dataclasses

import jax

from ..factors import Factors, Leaf, Spec
from .adalora import adalora
from .dora import dora
from .fused_parts import fused_parts
from .init import Init as Init, residual as residual
from .inits import (
    INITS as INITS,
    find_init as find_init,
    init_clashes as init_clashes,
    init_name as init_name,
)
from .lora_xs import lora_xs
from .method import Method as Method
from .mica import mica
from .token_rows import token_rows
from .vera import vera

METHODS = {
    "lora": Method(),
    "dora": dora,
    "vera": vera,
    "adalora": adalora,
    "lora_xs": lora_xs,
    "mica": mica,
}


def method_of(spec: Spec) -> Method:
    """Returns the method of `spec`.

    Args:
      spec: its `rows` and `parts` count before its `method`.

    Examples:
      >>> method_of(Spec(rank=2, alpha=2.0, method="dora")).gain is not None
      True
    """
    if spec.rows:
        return token_rows
    return METHODS[spec.method] if spec.parts is None else fused_parts


def leaf_shapes(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns `{leaf: shape}` of the `Factors` of a weight of shape `shape`.

    Args:
      spec: how the weight is adapted.
      shape: the weight's shape.

    Examples:
      >>> leaf_shapes(Spec(rank=2, alpha=2.0, method="dora"), (8, 16))
      {'a': (8, 2), 'b': (2, 16), 'magnitude': (16,)}
    """
    return method_of(spec).shapes(spec, shape)


def low_rank_pair(factors: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns `(a, b)` with which the update is `scale * a @ b`, for any method.

    Shapes: `[*batch, *fan_in, rank]` and `[*batch, rank, *fan_out]`, differentiable
    with respect to the leaves of `factors` that are trained. DoRA's magnitude is not
    part of them.

    Args:
      factors: of any method.

    Returns:
      Two arrays of the dtypes of `factors`.

    Examples:
      >>> import jax.numpy as jnp
      >>> spec = Spec(rank=2, alpha=2.0, method="adalora")
      >>> values = jnp.array([5.0, 0.0])
      >>> factors = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), spec, values)
      >>> a, b = low_rank_pair(factors)
      >>> a.shape, (a @ b)[0]
      ((3, 2), Array([5., 5., 5., 5.], dtype=float32))
    """
    method = method_of(factors.spec)
    held = {k: jax.lax.stop_gradient(getattr(factors, k)) for k in method.fixed}
    return method.pair(dataclasses.replace(factors, **held) if held else factors)


def trained_leaves(factors: Factors) -> dict[str, Leaf]:
    """Returns the leaves of `factors` that are trained, by name.

    Args:
      factors: of any method.

    Examples:
      >>> spec = Spec(rank=2, alpha=2.0, method="mica")
      >>> list(trained_leaves(Factors((8, 2), (2, 16), spec)))
      ['a']
    """
    found = {"a": factors.a, "b": factors.b, "magnitude": factors.magnitude}
    fixed = method_of(factors.spec).fixed
    return {k: x for k, x in found.items() if x is not None and k not in fixed}
