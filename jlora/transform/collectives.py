"""Steps between devices: a weight is laid out anew, gathered, or sent on.

Each factor moves by the axes that it has, so what moves is as small as the factors. A
function that gathers its own weights (FSDP by hand) thus stays factored.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..quantised import Quantized, has_own_entries
from .atoms import STACKED, Atom, Labels
from .coded import Coded, placed, relabelled
from .compat import Equation, kind, mesh_axes, rebind, varying_axes
from .interpret import Context
from .values import Weight, new_atom


def reshard(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """`jax.sharding.reshard`, under a mesh with explicit axes."""
    where = eqn.params["dst_sharding"]
    entries: dict[Atom, Any] = {}
    for group, entry in zip(weight.dims, where.spec, strict=False):
        if entry is not None:
            if len(group) != 1:
                return NotImplemented
            entries[group[0]] = entry

    def move(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        spec = jax.P(*(entries.get(s) for s in labels))
        return jax.sharding.reshard(x, where.update(spec=spec)), labels

    w = weight.w
    if isinstance(w, Coded):
        specs = placed(w, entries, where.mesh)
        if specs is None:
            return NotImplemented
        leaves, tree = jax.tree.flatten(w)
        moved = [
            jax.sharding.reshard(x, where.update(spec=spec))
            for x, spec in zip(leaves, jax.tree.leaves(specs), strict=True)
        ]
        w = tree.unflatten(moved)
    else:
        (w,) = ctx.run.bind(eqn, w)
    return [weight.map(move, w=w)]


def all_gather(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """`lax.all_gather` inside `shard_map`: only a factor with the axis is gathered.

    Where the shards become a new axis, each factor that differs between devices gets
    that axis.
    """
    axis, n = eqn.params["all_gather_dimension"], eqn.params["axis_size"]
    if not eqn.params["tiled"]:
        return _gathered_apart(ctx, eqn, weight, axis, n)
    if len(weight.dims[axis]) != 1:
        return NotImplemented
    (old,) = weight.dims[axis]
    new = old._replace(size=old.size * n)

    def gather(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        if old not in labels:
            return x, labels
        i = labels.index(old)
        x = rebind(eqn, x, all_gather_dimension=i)
        return x, (*labels[:i], new, *labels[i + 1 :])

    w = weight.w
    if isinstance(w, Coded):
        w = _coded_gather(eqn, w, old, new)
        if w is None:
            return NotImplemented
    else:
        (w,) = ctx.run.bind(eqn, w)
    dims = tuple(tuple(new if a == old else a for a in g) for g in weight.dims)
    return [weight.map(gather, w=w, dims=dims)]


def _gathered_apart(
    ctx: Context, eqn: Equation, weight: Weight, axis: int, n: int
) -> list[Weight]:
    """Returns the shards of all devices along a new axis."""
    new = new_atom(weight, STACKED, n)
    differs = _differs(eqn, weight)

    def gather(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        if not differs(x):
            return x, labels
        return rebind(eqn, x, all_gather_dimension=0), (new, *labels)

    def stack(x: jax.Array) -> jax.Array:
        return gather(x, ())[0] if differs(x) else jnp.broadcast_to(x, (n, *x.shape))

    w = weight.w
    if isinstance(w, Coded):
        shape = tuple(kind(eqn.outvars[0]).shape)
        labels = ((new,), *w.labels)
        w = w.replace(q=jax.tree.map(stack, w.q), labels=labels, shape=shape)
    else:
        (w,) = ctx.run.bind(eqn, w)
    dims = (*weight.dims[:axis], (new,), *weight.dims[axis:])
    return [weight.map(gather, w=w, dims=dims)]


def ppermute(ctx: Context, eqn: Equation, weight: Weight) -> list[Weight]:
    """`lax.ppermute`: the next device gets the weight, and so its factors."""
    differs = _differs(eqn, weight)

    def send(x: jax.Array) -> jax.Array:
        return rebind(eqn, x) if differs(x) else x

    w = jax.tree.map(send, weight.w)
    return [weight.map(lambda x, labels: (send(x), labels), w=w)]


def _differs(eqn: Equation, weight: Weight) -> Callable[[jax.Array], bool]:
    """Returns a function that says whether an array differs between the devices.

    Without JAX's types of it (`check_vma=False`) every array may.
    """
    typed = any(map(varying_axes, jax.tree.leaves(weight.w)))
    return lambda x: not typed or bool(mesh_axes(eqn) & varying_axes(x))


def _coded_gather(eqn: Equation, coded: Coded, old: Atom, new: Atom) -> Coded | None:
    """Returns codes gathered along `old`; None if it is not an axis of only theirs."""
    if (old,) not in coded.labels:
        return None
    i = coded.labels.index((old,))
    q = _whole(eqn, coded.q, i)
    if q is None:
        return None
    shape = tuple(kind(eqn.outvars[0]).shape)
    return relabelled(coded.replace(q=q, shape=shape), {old: (new,)})


def _whole(eqn: Equation, q: Quantized, axis: int) -> Quantized | None:
    """Returns the array of all shards along `axis`, each of whole blocks."""

    def gather(x: jax.Array) -> jax.Array:
        return rebind(eqn, x, all_gather_dimension=axis)

    n, block = q.shape[axis], q.block(axis)
    if block < n and n % block:
        return None
    # A block that is longer than a shard has one scale, which all devices hold.
    shared = block > n and not has_own_entries(q, axis)
    scales = q.scales
    if isinstance(scales, Quantized):
        if q.offset is not None or not has_own_entries(scales, axis):
            return None
        scales = scales if shared else _whole(eqn, scales, axis)
    else:
        scales = scales if shared else gather(scales)
    offset = q.offset
    if offset is not None and offset.shape[axis] > 1:
        offset = gather(offset)
    return dataclasses.replace(q, codes=gather(q.codes), scales=scales, offset=offset)
