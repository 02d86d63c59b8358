"""`per_row`: each batch row uses its own adapter."""

from collections.abc import Callable
from typing import Any, Concatenate, Protocol, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import check_function
from .._core.apply import Args, OnMerge, Out, Out_co, apply_lora
from ..errors import TreeError
from ..factors import Leaf, PyTree, Trainable
from ._several import leaves_of
from ._stack import count, pick


class RowFunction(Protocol[Args, Out_co]):
    """What `per_row` returns, for type checkers; see `LoraFunction`."""

    @overload
    def __call__(
        self,
        frozen: PyTree,
        stacked: Trainable,
        ids: ArrayLike | None,
        /,
        *args: Args.args,
        **kwargs: Args.kwargs,
    ) -> Out_co: ...
    @overload
    def __call__(
        self,
        frozen: PyTree,
        stacked: Trainable,
        ids: ArrayLike | None,
        /,
        *args: Any,
        lora_key: jax.Array | None,
        lora_gate: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Out_co: ...
    @overload
    def __call__(
        self,
        frozen: PyTree,
        stacked: Trainable,
        ids: ArrayLike | None,
        /,
        *args: Any,
        lora_gate: ArrayLike | None,
        **kwargs: Any,
    ) -> Out_co: ...


def per_row(
    fn: Callable[Concatenate[PyTree, Args], Out],
    *,
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    on_merge: OnMerge = "warn",
) -> RowFunction[Args, Out]:
    """Returns `row_fn(frozen, stacked, ids, *args, lora_key=, lora_gate=, **kwargs)`.

    `row_fn` runs `fn`, a function of a batch, with adapter `ids[i]` in batch row `i`,
    or with the base model where the id is -1. The product with a frozen weight is
    computed once for the whole batch. The factors are gathered and multiplied in a
    batched product. `row_fn` is pure and composes with `jit` and `grad`: a batch of
    several tasks trains several adapters, each from its own batch rows. Batch rows do
    not affect each other.

    If a function runs many times on the same batch rows, as in generation, gather
    once: `own = jlora.adapters.select(stacked, ids)`, and then
    `row_fn(frozen, own, None, ...)` in the loop. If each adapter has the same number
    of batch rows, known beforehand, reshape `x` to `[adapters, batch, ...]`:
    `jax.vmap(jlora.apply_lora(fn), (None, 0, 0))(frozen, stacked, x)` gathers nothing.

    Args:
      fn: `fn(params, *args, **kwargs)`. It is traced once, for a batch of length one.
      in_axes: the batch axis of `args`, as in `jax.vmap`: an integer, or None for what
        all batch rows share. A tuple has one of these, or a tree of them, for each
        argument. Keyword arguments are shared.
      out_axes: the batch axis of the results, or a tree of them where they differ.
      on_merge: see `apply_lora`.

    Returns:
      The function of a mixed batch. `stacked` is from `jlora.adapters.stack` (or a
      pool). `ids` is an integer array `[batch]`, or None if `stacked` already has one
      adapter for each batch row. An id that the stack does not have makes its batch
      row NaN. So does -1 where leaves are trained in full, unless `frozen` is the whole
      model: the `frozen` of `split` has no base values for them. The axes of a
      `lora_gate` are the batch and those that follow it in activations.

    Raises:
      ConfigError: if `fn` is not a function.
      TreeError: (when called) if the batch, `ids` and `stacked` do not fit.

    Examples:
      >>> import jax.numpy as jnp, jlora
      >>> from jlora.factors import Factors, Spec, Trainable
      >>> params = {"w": jnp.ones((3, 2))}
      >>> fn = lambda p, x: x @ p["w"]
      >>> def adapter(value):
      ...     own = Factors(jnp.full((3, 1), value), jnp.ones((1, 2)),
      ...                   Spec(rank=1, alpha=1.0))
      ...     return Trainable({"w": own})
      >>> stacked = jlora.adapters.stack([adapter(1.0), adapter(2.0)])
      >>> row_fn = jlora.adapters.per_row(fn)
      >>> row_fn(params, stacked, jnp.array([1, -1, 0]), jnp.ones((3, 3)))[:, 0]
      Array([9., 3., 6.], dtype=float32)
    """
    check_function("adapters.per_row", fn)

    def row_fn(
        frozen: PyTree,
        stacked: Trainable,
        ids: ArrayLike | None,
        /,
        *args: Any,
        lora_key: jax.Array | None = None,
        lora_gate: ArrayLike | None = None,
        **kwargs: Any,
    ) -> Out:
        axes = _per_argument(in_axes, args)
        batch = _batch_size(axes, args)
        if ids is None:
            shape, rows = (count(stacked),), stacked
        else:
            ids = jnp.asarray(ids)
            shape, rows = ids.shape, pick(stacked, ids, leaves_of(frozen))
        if shape != (batch,):
            raise TreeError(
                f"There are {batch} batch rows, but the shape of the "
                + ("stack" if ids is None else "ids")
                + f" is {shape}. Give one id for each batch row, -1 for the base model."
            )
        keys = None if lora_key is None else jax.random.split(lora_key, batch)
        apply = apply_lora(fn, on_merge=on_merge)

        gate_axis = None if lora_gate is None or jnp.ndim(lora_gate) == 0 else 0

        def one(row: Trainable, own: PyTree, *args: PyTree) -> PyTree:
            args = tuple(_restore(a, x) for a, x in zip(axes, args, strict=True))
            key, gate = own
            gate = gate if gate_axis is None else gate[None]
            out = apply(frozen, row, *args, lora_key=key, lora_gate=gate, **kwargs)
            return _drop(out_axes, out)

        own_axes = (None if keys is None else 0, gate_axis)
        run = jax.vmap(one, (0, own_axes, *axes), out_axes)
        return run(rows, (keys, lora_gate), *args)

    return row_fn


def _per_argument(in_axes: PyTree, args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    if not isinstance(in_axes, tuple | list):
        return (in_axes,) * len(args)
    if len(in_axes) != len(args):
        raise TreeError(
            f"in_axes has {len(in_axes)} entries for {len(args)} arguments. Give one "
            "for each argument after the ids."
        )
    return tuple(in_axes)


def _batch_size(axes: tuple[PyTree, ...], args: tuple[PyTree, ...]) -> int:
    sizes = {
        jnp.shape(x)[axis]
        for a, arg in zip(axes, args, strict=True)
        for axis, x in _pairs(a, arg)
        if axis is not None
    }
    if len(sizes) != 1:
        raise TreeError(
            f"The arguments have batches of {sorted(sizes) or 'no size'}. Give "
            "in_axes=: the batch axis of each argument, None for what batch rows share."
        )
    return sizes.pop()


def _pairs(axes: PyTree, tree: PyTree) -> list[tuple[int | None, Leaf]]:
    """Returns `(axis, leaf)` for all leaves of `tree`."""
    whole = jax.tree.broadcast(axes, tree, is_leaf=lambda x: x is None)
    found = jax.tree.leaves(whole, is_leaf=lambda x: x is None)
    return list(zip(found, jax.tree.leaves(tree), strict=True))


def _restore(axes: PyTree, tree: PyTree) -> PyTree:
    """Returns `tree` with a batch axis of length one where `vmap` removed it."""
    new = [
        x if axis is None else jnp.expand_dims(x, axis)
        for axis, x in _pairs(axes, tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def _drop(axes: PyTree, tree: PyTree) -> PyTree:
    """Returns `tree` without the batch axis of length one, which `vmap` adds."""
    new = [
        x if axis is None else jnp.squeeze(x, axis) for axis, x in _pairs(axes, tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), new)
