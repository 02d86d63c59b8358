"""Adapters that come and go while one compiled program serves: a pool of slots.

`Pool` is a stack of adapters of fixed capacity: a pytree with pure functions. `Cache`
does what the host has to do: it keeps names, replaces the least recently used adapter,
and loads in the background. Every adapter is padded to the pool's shapes on the host,
so that inserting or removing one never compiles anything.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .. import _exports
from .._core.algebra import lora_spec
from .._core.rebase import changed_base
from .._core.tree import check_trainable
from .._numerics import is_finite
from .._tables import listed
from ..adapters import to_lora
from ..adapters._several import is_lora, rescales
from ..adapters._stack import pick
from ..errors import PoolError
from ..factors import Factors, Leaf, Trainable
from ..transform.compat import is_staging


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Slots for adapters, a pytree of device arrays.

    Attributes:
      adapters: leaves `[capacity, ...]` with a scale of 1, for
        `jlora.adapters.per_row` and `jlora.adapters.select`.
      occupied: `[capacity]` booleans, whether a slot holds an adapter.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> pool = insert(create(like, 2), 1, like)
      >>> pool.capacity, pool.occupied
      (2, Array([False,  True], dtype=bool))
    """

    adapters: Trainable
    occupied: Leaf

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.occupied.shape[0]


_exports.register(Pool)


def create(like: Trainable, capacity: int) -> Pool:
    """Returns an empty pool for adapters that are no larger than `like`.

    Args:
      like: an adapter, or its shapes from `jax.eval_shape`, with every weight that an
        adapter of the pool may adapt, at the highest rank. The pool has its dtypes.
      capacity: the number of slots, see `capacity_for`.

    Raises:
      PoolError: if `like` has leaves trained in full or leaves of other methods than
        plain LoRA, which a pool cannot hold; lists them. Also if `capacity` is not a
        whole number from 1.
      TreeError: if `like` is not a `jlora.Trainable`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 2)), jnp.ones((2, 4)),
      ...                                Spec(rank=2, alpha=2))})
      >>> pool = create(like, 5)
      >>> pool.adapters.lora["w"].a.shape, bytes_of(like)
      ((5, 3, 2), 56)
    """
    check_number("capacity", capacity)
    check_trainable(like, "like")
    wrong = [f"{p!r} is trained in full" for p in like.full]
    wrong += [
        f"{p!r} has method {f.spec.method!r}"
        for p, f in like.lora.items()
        if not is_lora(f.spec)
    ]
    if wrong:
        raise PoolError(
            f"A pool holds only plain LoRA factors: {listed(wrong)}. See "
            "jlora.adapters.to_lora and jlora.adapters.stack."
        )

    def zeros(x: Leaf) -> jax.Array:
        return jnp.zeros((capacity, *x.shape), x.dtype)

    lora = {
        path: Factors(zeros(f.a), zeros(f.b), lora_spec(f.spec, f.rank, dropout=0.0))
        for path, f in like.lora.items()
    }
    return Pool(Trainable(lora), jnp.zeros(capacity, bool))


def check_number(name: str, value: Any, least: int = 1) -> None:
    """Raises a PoolError unless `value` is a whole number of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise PoolError(f"{name} must be a whole number from {least}, got {value!r}.")


def bytes_of(like: Trainable) -> int:
    """Returns the bytes of one slot of a pool for adapters like `like`.

    Args:
      like: see `create`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> bytes_of(like)  # 3 + 4 numbers of four bytes
      28
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))


def capacity_for(like: Trainable, budget: int) -> int:
    """Returns how many adapters like `like` fit into `budget` bytes.

    Args:
      like: see `create`.
      budget: bytes of device memory for the whole pool.

    Raises:
      PoolError: if `budget` is not a whole number, or too small for one adapter.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> capacity_for(like, 16 * 1024**2)
      578524
    """
    slot = bytes_of(like) + 1  # and one byte of `occupied`
    check_number("budget", budget, least=slot)
    return budget // slot


def fit(pool: Pool, trainable: Trainable) -> Trainable:
    """Returns the adapter with the pool's shapes, as NumPy arrays.

    Missing ranks and weights are filled with zeros, B is multiplied by the scale, and
    the numbers are rounded to the pool's dtypes.

    Args:
      pool: the pool, or its shapes from `jax.eval_shape`.
      trainable: an adapter of any method but DoRA, without leaves trained in full.

    Raises:
      PoolError: if the adapter does not fit; lists every reason.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> own = Trainable({"w": Factors(np.ones((3, 1)), np.ones((1, 4)),
      ...                               Spec(rank=1, alpha=5.0))})
      >>> fitted = fit(create(like, 2), own).lora["w"]
      >>> fitted.b, fitted.scale
      (array([[5., 5., 5., 5.]], dtype=float32), 1.0)
    """
    if not isinstance(trainable, Trainable):
        raise PoolError(f"An adapter is a Trainable, not a {type(trainable).__name__}.")
    slots = pool.adapters.lora
    wrong = [f"{p!r} is trained in full" for p in trainable.full]
    wrong += [
        f"{p!r} is not a weight of the pool" for p in trainable.lora if p not in slots
    ]
    wrong += [f"{p!r} is DoRA" for p, f in trainable.lora.items() if rescales(f.spec)]
    wrong += [
        f"{p!r} is for a base changed by init={f.spec.init!r}"
        for p, f in trainable.lora.items()
        if changed_base(f)
    ]
    if not wrong:
        trainable = to_lora(trainable)
        for path, f in trainable.lora.items():
            wrong += _misfit(path, f, slots[path])
    filled = {}
    if not wrong:
        filled = {p: _fill(trainable.lora.get(p), slot) for p, slot in slots.items()}
        wrong = [
            f"{p!r} holds NaN or infinity, or numbers too large for the pool's dtypes"
            for p, f in filled.items()
            if not (is_finite(f.a) and is_finite(f.b))
        ]
    if wrong:
        raise PoolError(
            f"This adapter does not fit the pool: {listed(wrong)}. Make a pool for "
            "larger adapters with jlora.pool.create, or see jlora.adapters.to_lora."
        )
    return Trainable(filled)


def _misfit(path: str, factors: Factors, slot: Factors) -> list[str]:
    """Returns why `factors` do not fit into the leaf `slot` of the pool."""
    spec = factors.spec
    if spec.axes != slot.spec.axes or spec.op != slot.spec.op:
        return [
            f"{path!r} is for a {spec.op} with {spec.axes}, that of the pool for a "
            f"{slot.spec.op} with {slot.spec.axes}"
        ]
    if spec.invocation != slot.spec.invocation:
        return [
            f"{path!r} acts after the tokens {spec.invocation}, those of the pool "
            f"after {slot.spec.invocation}"
        ]
    n = len(spec.axes.batch)
    own = (*factors.a.shape[:-1], *factors.b.shape[n + 1 :])
    sizes = (*slot.a.shape[1:-1], *slot.b.shape[n + 2 :])
    if own != sizes:
        return [f"{path!r} is for a weight of sizes {own}, that of the pool of {sizes}"]
    if factors.rank > slot.rank:
        return [f"{path!r} has rank {factors.rank}, above the pool's {slot.rank}"]
    return []


def _fill(factors: Factors | None, slot: Factors) -> Factors:
    """Returns `factors` padded with zeros to one slot, on the host; zeros for None."""
    a = np.zeros(slot.a.shape[1:], slot.a.dtype)
    b = np.zeros(slot.b.shape[1:], slot.b.dtype)
    if factors is not None:
        n, rank = len(slot.spec.axes.batch), factors.rank
        with np.errstate(over="ignore", invalid="ignore"):  # `fit` looks for infinity
            a[..., :rank] = np.asarray(factors.a).astype(a.dtype)
            wide = np.asarray(factors.b).astype(np.float32) * np.float32(factors.scale)
            b[(slice(None),) * n + (slice(rank),)] = wide.astype(b.dtype)
    return Factors(a, b, slot.spec)


def insert(pool: Pool, slot: ArrayLike, trainable: Trainable) -> Pool:
    """Returns the pool with an adapter in `slot`, in place of the one that was there.

    This is a pure function. Under `jax.jit` with the pool donated it writes one slot
    and copies nothing. `slot` may be traced. The adapter must come from `fit`, so that
    adapters of all ranks have one shape.

    Args:
      pool: the pool.
      slot: number of the slot, an integer or a scalar array.
      trainable: from `fit`.

    Raises:
      PoolError: if the shapes of the adapter are not those of a slot, or the pool has
        no such slot. A traced slot that does not exist is not written, so `lookup`
        gives NaN for it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> pool = create(like, 2)
      >>> pool = insert(pool, 1, fit(pool, like))
      >>> pool.adapters.lora["w"].b[:, 0, 0]
      Array([0., 1.], dtype=float32)
    """
    _check_shapes(pool, trainable)
    place = place_of(pool.capacity, slot)

    def put(slots: Leaf, x: Leaf) -> jax.Array:
        return slots.at[place].set(x, mode="drop")

    adapters = jax.tree.map(put, pool.adapters, trainable)
    return Pool(adapters, put(pool.occupied, True))


def place_of(capacity: int, slot: ArrayLike) -> ArrayLike:
    """Returns the number of a slot; a traced one that does not exist is too large.

    JAX counts a negative index from the end, which would be the slot of another
    adapter.
    """
    n = capacity
    if is_staging(slot):
        index = jnp.asarray(slot)
        if index.shape or not jnp.issubdtype(index.dtype, jnp.integer):
            raise PoolError(f"A slot is one integer, got {index.dtype}{index.shape}.")
        return jnp.where((index >= 0) & (index < n), index, n)
    number = np.asarray(slot)
    if number.shape or not np.issubdtype(number.dtype, np.integer):
        raise PoolError(f"A slot is one integer, got {slot!r}.")
    if not 0 <= number < n:
        raise PoolError(f"The pool has slots 0 to {n - 1}, but no slot {slot}.")
    return slot


def _check_shapes(pool: Pool, trainable: Trainable) -> None:
    whole, own = (jax.tree.structure(t) for t in (pool.adapters, trainable))
    same = whole == own and all(
        (x.shape[1:], x.dtype) == (y.shape, y.dtype)
        for x, y in zip(
            jax.tree.leaves(pool.adapters), jax.tree.leaves(trainable), strict=True
        )
    )
    if not same:
        raise PoolError(
            "The leaves, ranks, scales or dtypes of the adapter are not those of the "
            "pool's slots. Give insert what jlora.pool.fit(pool, adapter) returns."
        )


def evict(pool: Pool, slot: ArrayLike) -> Pool:
    """Returns the pool with `slot` free; its numbers stay until the next `insert`.

    Args:
      pool: the pool.
      slot: number of the slot, an integer or a scalar array.

    Raises:
      PoolError: if the pool has no such slot; a traced one then changes nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> pool = insert(create(like, 2), 1, like)
      >>> evict(pool, 1).occupied
      Array([False, False], dtype=bool)
    """
    place = place_of(pool.capacity, slot)
    return Pool(pool.adapters, pool.occupied.at[place].set(False, mode="drop"))


def lookup(pool: Pool, ids: ArrayLike) -> Trainable:
    """Returns the adapters in slots `ids`, one for each id, as `adapters.select` does.

    The id -1 is the base model. A slot that is free or does not exist gives NaN in
    place of an adapter: that spoils its own batch row and cannot pass unnoticed.

    Args:
      pool: the pool.
      ids: an integer, or an integer array `[batch]`.

    Returns:
      A `Trainable` of leaves `[...]`, or `[batch, ...]`, which
      `jlora.adapters.per_row` takes with None for `ids`.

    Raises:
      TreeError: for ids that are not integers.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> pool = insert(create(like, 2), 1, like)
      >>> lookup(pool, np.array([1, -1, 0])).lora["w"].b[:, 0, 0]
      Array([ 1.,  0., nan], dtype=float32)
    """
    ids = jnp.asarray(ids)
    n = pool.capacity
    known = (ids >= 0) & (ids < n)
    taken = known & pool.occupied[jnp.where(known, ids, 0)]
    return pick(pool.adapters, jnp.where(taken | (ids == -1), ids, n), None)
