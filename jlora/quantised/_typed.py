"""Arrays whose type names mesh axes: the partitioner chooses layouts in between."""

from collections.abc import Callable
from typing import Any

import jax


def typed_as(like: Any, fun: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Returns `fun(*args)`, laid out as `like` under a mesh with explicit axes."""
    sharding = jax.typeof(like).sharding
    mesh = sharding.mesh
    if mesh.empty or mesh.are_all_axes_auto or mesh.are_all_axes_manual:
        return fun(*args)
    typed: Any = jax.sharding.auto_axes(fun, out_sharding=sharding)
    with jax.sharding.use_abstract_mesh(mesh):  # inside `auto_axes` it is another
        return typed(*args)
