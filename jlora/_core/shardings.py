"""How factors are laid out over devices: as the axes of the weight that they share."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .. import paths
from .._tables import listed
from ..errors import TreeError
from ..factors import Factors, Trainable
from ..methods import method_of
from .tree import Missing, check_trainable


def shardings(base_shardings: Any, trainable: Trainable) -> Trainable:
    """Returns a sharding for each leaf of `trainable`, from those of the base.

    A takes the batch and fan-in axes of its weight, B the batch and fan-out axes, and
    the rank axis is replicated; so the products with A and B need no more communication
    than the base's own. A magnitude lies as the columns that it scales, a leaf trained
    in full as the base's. Storage, collectives and optimizer state are left to JAX.

    Args:
      base_shardings: a tree as the parameters (or `frozen`) with a `NamedSharding` or
        `PartitionSpec` at each leaf, or the placed arrays themselves.
      trainable: from `split`, or its `jax.eval_shape`.

    Returns:
      A `Trainable` of `NamedSharding`s (`PartitionSpec`s where the base has those), for
      `jax.device_put`, `jax.jit(..., out_shardings=...)` or `checkpoint.restore`.

    Raises:
      TreeError: if `trainable` is not a `Trainable`; lists the leaves without a
        sharding, or with one for too many axes.

    Examples:
      >>> import jax, jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"w": jnp.ones((8, 16))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> config = jlora.LoraConfig(rank=2)
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 8)), config=config)
      >>> frozen, trainable = jlora.split(jax.random.key(0), params, plan)
      >>> factors = jlora.shardings({"w": P("data", "model")}, trainable).lora["w"]
      >>> tuple(factors.a), tuple(factors.b)
      (('data', None), (None, 'model'))
    """
    check_trainable(trainable)
    leaves, _ = paths.flatten(base_shardings, is_leaf=_is_placement)
    known = {path: _placement(leaf) for path, leaf in leaves.items()}
    wrong: list[str] = []

    def base(path: str) -> Any:
        if known.get(path) is None:
            near = paths.nearest(path, tuple(known), n=1)
            hint = f" (nearest: {near[0]!r})" if near and path not in known else ""
            wrong.append(f"no sharding for {path!r}{hint}")
        return known.get(path)

    lora = {
        path: _laid_out(path, base(path), factors, wrong)
        for path, factors in trainable.lora.items()
    }
    full = {path: base(path) for path in trainable.full}
    if wrong:
        raise TreeError(
            f"The shardings do not fit the adapter: {listed(wrong)}. Give a "
            "tree as the parameters, with a sharding at each leaf."
        )
    return Trainable(lora, full)


def _is_placement(x: Any) -> bool:
    return isinstance(x, Sharding | PartitionSpec | Missing)


def _placement(leaf: Any) -> Any:
    """Returns the sharding that a leaf is or has; None for neither."""
    if isinstance(leaf, Sharding | PartitionSpec):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, Sharding) else None


def _laid_out(path: str, base: Any, factors: Factors, wrong: list[str]) -> Any:
    """Returns `factors` with a sharding at each leaf."""
    if base is None:
        return factors
    if not isinstance(base, NamedSharding | PartitionSpec):
        return jax.tree.map(lambda _: base, factors)
    spec, axes = factors.spec, method_of(factors.spec).axes(factors.spec)
    named = base.spec if isinstance(base, NamedSharding) else base
    ndim = len(spec.axes.order)
    if len(named) > ndim:
        wrong.append(f"{path!r} has {ndim} axes, its sharding {named} is for more")
        return factors
    entries = [*named, *(None for _ in range(ndim - len(named)))]
    if spec.parts is not None:
        entries[spec.parts.axis] = None  # B holds one part's length of it

    def place(leaf: str) -> Any:
        own = PartitionSpec(*(None if i is None else entries[i] for i in axes[leaf]))
        if isinstance(base, PartitionSpec):
            return own
        return NamedSharding(base.mesh, own, memory_kind=base.memory_kind)

    placed = {leaf: place(leaf) for leaf in axes}
    return Factors(placed.get("a"), placed["b"], spec, placed.get("magnitude"))
