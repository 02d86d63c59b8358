"""Arrays whose type names mesh axes: the partitioner chooses layouts in between."""

from collections.abc import Callable
from typing import Any

import jax


def typed_as(like: Any, fun: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Returns `fun(*args)`, laid out as `like` along mesh axes that are explicit."""
    sharding = jax.typeof(like).sharding
    mesh, axes = sharding.mesh, sharding.mesh.explicit_axes
    if not axes:
        return fun(*args)
    typed: Any = jax.sharding.auto_axes(fun, axes=axes, out_sharding=sharding)
    with jax.sharding.use_abstract_mesh(mesh):  # inside `auto_axes` it is another
        return typed(*args)


def whole(x: Any) -> Any:
    """Returns `x` whole on each device, if its type cuts it along mesh axes.

    Some operations of JAX (QR, SVD, a sort, a reshape) refuse an array that is cut
    along explicit axes, or ask how their result shall lie. NumPy arrays and shapes come
    back as they are.
    """
    if not isinstance(x, jax.Array):
        return x
    sharding = jax.typeof(x).sharding
    explicit = {*sharding.mesh.explicit_axes}
    named = [n if isinstance(n, tuple) else (n,) for n in sharding.spec]
    if explicit.isdisjoint(n for own in named for n in own):
        return x
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        return jax.sharding.reshard(x, jax.P())
