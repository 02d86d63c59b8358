"""Slots that train: many adapters of one base, each with an optimizer of its own."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import check_function, check_optimizer
from .._core.tree import check_trainable
from .._tables import listed
from ..adapters import per_row
from ..adapters._stack import pick
from ..errors import PoolError
from ..factors import Leaf, PyTree, Trainable
from ._pool import check_number, place_of

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What a `Trainer` trains, a pytree of device arrays `[capacity, ...]`.

    Attributes:
      adapters: the adapters, as from `jlora.adapters.stack`.
      state: the optimizer's state of each.
      gradients: the sums since the last step, for each.
      rows: `[capacity]`, the number of batch rows in these sums.
      step: `[capacity]`, the number of steps taken.
      occupied: `[capacity]` booleans, whether a slot holds an adapter.

    Examples:
      >>> import optax
      >>> from jlora import Factors, Spec
      >>> like = Trainable({"w": Factors(jnp.ones((3, 1)), jnp.ones((1, 4)),
      ...                                Spec(rank=1, alpha=1))})
      >>> Trainer(lambda p, x: x @ p["w"], optax.sgd(0.1)).create(like, 2).capacity
      2
    """

    adapters: Trainable
    state: PyTree
    gradients: Trainable
    rows: Leaf
    step: Leaf
    occupied: Leaf

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.occupied.shape[0]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains the adapters of many users in one program, each in a slot.

    Every method is a pure function of `Slots`. Wrap each in `jax.jit` once, with
    `donate_argnums=0` where it returns new slots. Then nothing compiles again,
    whichever adapters come, train and go. A batch may mix rows of any slots. A slot
    sees only the gradients of its own rows, so NaN in one user's data stays in that
    user's slot, and there it is not applied.

    Attributes:
      loss: `loss(params, *args) -> [batch]`, the loss of each batch row; what
        `jlora.adapters.per_row` takes.
      tx: the optimizer. Each slot has a state of its own, also clipping by a norm. With
        `optax.inject_hyperparams` a slot has its own learning rate.

    Raises:
      ConfigError: if `loss` is not a function, or `tx` is not an optimizer of optax.

    Examples:
      >>> import optax, jlora
      >>> params = {"w": jnp.ones((3, 1))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> config = jlora.LoraConfig(rank=1)
      >>> plan = jlora.plan(fn, params, jnp.ones((1, 3)), config=config)
      >>> fresh = lambda n: jlora.split(jax.random.key(n), params, plan)[1]
      >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
      >>> trainer = Trainer(lambda p, x, y: (fn(p, x)[:, 0] - y) ** 2, tx)
      >>> slots = trainer.create(fresh(0), capacity=4)
      >>> slots = trainer.add(slots, 2, fresh(1), learning_rate=0.1)
      >>> x, y = jnp.ones((2, 3)), jnp.array([1.0, jnp.nan])
      >>> ids = jnp.array([2, -1])  # -1 is the base
      >>> losses, slots = trainer.forward_backward(slots, params, ids, x, y)
      >>> slots, stepped = trainer.optim_step(slots)
      >>> losses, stepped.astype(int), slots.step
      (Array([ 4., nan], dtype=float32), Array([0, 0, 1, 0], dtype=int32),
       Array([0, 0, 1, 0], dtype=int32))
      >>> bool(trainer.evaluate(slots, params, ids, x, y)[0] < 4)
      True
      >>> trained = trainer.adapter(slots, 2)
      >>> slots = trainer.remove(slots, 2)
    """

    loss: Callable[..., Any]
    tx: "optax.GradientTransformation"

    def __post_init__(self) -> None:
        check_function("pool.Trainer", self.loss)
        check_optimizer("pool.Trainer", self.tx)

    def create(self, like: Trainable, capacity: int) -> Slots:
        """Returns empty slots for adapters of the plan that `like` is of.

        Args:
          like: an adapter of any method; only its structure, shapes and dtypes count.
          capacity: the number of slots.

        Raises:
          PoolError: if `capacity` is not a whole number from 1.
          TreeError: if `like` is not a `jlora.Trainable`.
        """
        check_trainable(like, "like")
        check_number("capacity", capacity)

        def zeros(x: Leaf) -> jax.Array:
            return jnp.zeros((capacity, *x.shape), x.dtype)

        adapters = jax.tree.map(zeros, like)
        return Slots(
            adapters,
            jax.vmap(self.tx.init)(adapters),
            jax.tree.map(jnp.zeros_like, adapters),
            jnp.zeros(capacity, jnp.int32),
            jnp.zeros(capacity, jnp.int32),
            jnp.zeros(capacity, bool),
        )

    def add(
        self, slots: Slots, slot: ArrayLike, trainable: Trainable, **settings: ArrayLike
    ) -> Slots:
        """Returns the slots with an adapter in `slot`, at step 0.

        Args:
          slots: the slots.
          slot: number of the slot, an integer or a scalar array, also traced.
          trainable: the adapter, new or trained, with the specs of `like`.
          **settings: its values of what `optax.inject_hyperparams` injects, such as
            `learning_rate=1e-3`.

        Raises:
          PoolError: if the adapter is not one of the slots' plan, there is no such
            slot, or the optimizer injects no setting of a name.
        """
        whole, own = (jax.tree.structure(t) for t in (slots.adapters, trainable))
        shapes = [(x.shape[1:], x.dtype) for x in jax.tree.leaves(slots.adapters)]
        found = [(x.shape, x.dtype) for x in jax.tree.leaves(trainable)]
        if whole != own or shapes != found:
            raise PoolError(
                "The leaves, specs, shapes or dtypes of the adapter are not those of "
                "the slots. Take it from jlora.split, with the plan that they are for."
            )
        place = place_of(slots.capacity, slot)
        state = _with_settings(cast(Any, self.tx.init)(trainable), settings)

        def put(whole: Leaf, x: Leaf) -> jax.Array:
            return whole.at[place].set(jnp.asarray(x, whole.dtype), mode="drop")

        return Slots(
            jax.tree.map(put, slots.adapters, trainable),
            jax.tree.map(put, slots.state, state),
            jax.tree.map(lambda x: put(x, 0), slots.gradients),
            put(slots.rows, 0),
            put(slots.step, 0),
            put(slots.occupied, True),
        )

    def remove(self, slots: Slots, slot: ArrayLike) -> Slots:
        """Returns the slots with `slot` free: rows that name it are NaN from now on.

        Args:
          slots: the slots.
          slot: number of the slot, an integer or a scalar array, also traced.

        Raises:
          PoolError: if there is no such slot.
        """
        place = place_of(slots.capacity, slot)
        occupied = slots.occupied.at[place].set(False, mode="drop")
        return dataclasses.replace(slots, occupied=occupied)

    def adapter(self, slots: Slots, slot: ArrayLike) -> Trainable:
        """Returns the adapter in `slot`; NaN if the slot is free.

        Args:
          slots: the slots.
          slot: number of the slot, an integer or a scalar array, also traced.

        Raises:
          PoolError: if there is no such slot.
        """
        ids = jnp.asarray(place_of(slots.capacity, slot))
        return pick(slots.adapters, _known(slots, ids), None)

    def evaluate(
        self, slots: Slots, frozen: PyTree, ids: ArrayLike, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns the loss of each batch row, `[batch]`, without a gradient.

        Args:
          slots: the slots.
          frozen: the base.
          ids: `[batch]` integers, the slot of each batch row; -1 for the base.
          *args: of `loss`, batches.
          **kwargs: of `loss`, shared by all rows.
        """
        return self._losses(slots.adapters, slots, frozen, ids, *args, **kwargs)

    def forward_backward(
        self, slots: Slots, frozen: PyTree, ids: ArrayLike, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Slots]:
        """Returns the loss of each batch row, and the slots with gradients added.

        A row adds to the gradients of its own slot only. Several calls accumulate.

        Args:
          slots: the slots.
          frozen: the base.
          ids: `[batch]` integers, the slot of each batch row; -1 for the base. A row
            whose slot is free or does not exist has a loss of NaN.
          *args: of `loss`, batches.
          **kwargs: of `loss`, shared by all rows; `lora_key` turns dropout on.

        Raises:
          PoolError: if `loss` does not return one number for each batch row.
        """

        def total(adapters: Trainable) -> tuple[jax.Array, jax.Array]:
            losses = self._losses(adapters, slots, frozen, ids, *args, **kwargs)
            return jnp.sum(losses.astype(jnp.float32)), losses

        gradients, losses = jax.grad(total, has_aux=True)(slots.adapters)
        own = _known(slots, jnp.asarray(ids))
        counted = jax.nn.one_hot(own, slots.capacity, dtype=jnp.int32).sum(axis=0)
        summed = jax.tree.map(jnp.add, slots.gradients, gradients)
        rows = slots.rows + counted
        return losses, dataclasses.replace(slots, gradients=summed, rows=rows)

    def optim_step(
        self, slots: Slots, which: ArrayLike | None = None
    ) -> tuple[Slots, jax.Array]:
        """Returns the slots after a step, and which of them have taken it.

        A slot takes a step with the mean gradient of its rows. It takes none if NaN or
        infinity is in its gradient, or would come into its adapter or its state: both
        stay, and the gradient is forgotten.

        Args:
          slots: the slots.
          which: `[capacity]` booleans, whose turn it is; None is every slot with rows.
            The others keep their gradients.

        Returns:
          `(slots, stepped)`, booleans `[capacity]`.

        Raises:
          PoolError: if `which` is something else.
        """
        turn = slots.occupied & (slots.rows > 0)
        if which is not None:
            asked = jnp.asarray(which)
            if (asked.shape, asked.dtype) != (turn.shape, turn.dtype):
                raise PoolError(
                    f"which must be booleans {turn.shape}, one for each slot, got "
                    f"{asked.dtype}{asked.shape}."
                )
            turn &= asked
        count, update = jnp.maximum(slots.rows, 1), cast(Any, self.tx.update)

        def one(adapter: Trainable, state: PyTree, gradient: Trainable, n: jax.Array):
            mean = jax.tree.map(lambda g: g / n.astype(g.dtype), gradient)
            updates, new = update(mean, state, adapter)
            moved = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), adapter, updates)
            finite = [jnp.isfinite(g).all() for g in jax.tree.leaves(mean)]
            finite += jax.tree.leaves(
                jax.tree.map(_stays_finite, (adapter, state), (moved, new))
            )
            return moved, new, jnp.stack(finite).all()

        moved, state, finite = jax.vmap(one)(
            slots.adapters, slots.state, slots.gradients, count
        )
        stepped = turn & finite

        def chosen(is_new: jax.Array, new: Leaf, old: Leaf) -> jax.Array:
            return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        def after(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: chosen(stepped, x, y), new, old)

        kept = jax.tree.map(
            lambda g: chosen(turn, jnp.zeros_like(g), g), slots.gradients
        )
        return Slots(
            after(moved, slots.adapters),
            after(state, slots.state),
            kept,
            jnp.where(turn, 0, slots.rows),
            slots.step + stepped.astype(slots.step.dtype),
            slots.occupied,
        ), stepped

    def _losses(
        self,
        adapters: Trainable,
        slots: Slots,
        frozen: PyTree,
        ids: ArrayLike,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        ids = _known(slots, jnp.asarray(ids))
        losses = per_row(self.loss)(frozen, adapters, ids, *args, **kwargs)
        if not hasattr(losses, "shape") or losses.shape != ids.shape:
            raise PoolError(
                "The loss of a Trainer returns one number for each batch row, "
                f"{ids.shape}, but this one returned "
                f"{getattr(losses, 'shape', type(losses).__name__)}."
            )
        return losses


def _stays_finite(old: Leaf, new: Leaf) -> jax.Array:
    """Returns whether no finite number of `old` is NaN or infinity in `new`."""
    return (jnp.isfinite(new) | ~jnp.isfinite(old)).all()


def _known(slots: Slots, ids: jax.Array) -> jax.Array:
    """Returns `ids`, those of free or missing slots beyond the last one."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise PoolError(f"ids must be integers, got {ids.dtype}.")
    n = slots.capacity
    there = (ids >= 0) & (ids < n)
    taken = there & slots.occupied[jnp.where(there, ids, 0)]
    return jnp.where(taken | (ids == -1), ids, n)


def _with_settings(state: PyTree, settings: dict[str, ArrayLike]) -> PyTree:
    """Returns the state of `optax.inject_hyperparams` with other values."""
    if not settings:
        return state
    known = getattr(state, "hyperparams", {})
    unknown = [repr(name) for name in settings if name not in known]
    if unknown:
        raise PoolError(
            f"The optimizer injects no {listed(unknown, 5, ', ')}. Make it with "
            "optax.inject_hyperparams(optax.adam)(learning_rate=0.0), outermost."
        )
    own = {name: jnp.asarray(x, known[name].dtype) for name, x in settings.items()}
    return state._replace(hyperparams={**known, **own})
