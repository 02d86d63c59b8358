"""A quantised weight on its way through the interpreter: it stays codes and scales.

Steps that move axes change only labels. A step that picks entries does so in the codes
and the scales, along axes on which every entry has a scale of its own. Any other step
needs the array: then the result is None, and the weight is widened.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import quantised
from ..quantised import Quantized
from .atoms import Atom, Group, Labels, lay_out, leaf_dims
from .compat import Equation, Type, kind, shaped

Positions = Mapping[Atom, jax.Array]  # negative where there is no entry
# `(array, labels, positions, empty) -> (array, labels)`: picks entries along some axes.
Pick = Callable[[jax.Array, Labels, Positions, Any], tuple[jax.Array, Labels]]

Op = Callable[[jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """A quantised leaf, or what steps that move axes made of it.

    Attributes:
      q: the codes and scales.
      labels: the group of atoms of each axis of `q`.
      shape: the shape that the steps gave it.
      casts: the dtypes that it was cast to, in order.
    """

    q: Quantized
    labels: tuple[Group, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    casts: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def ndim(self) -> int:
        """How many axes the steps gave it."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that the last cast gave it."""
        return self.casts[-1] if self.casts else self.q.dtype

    def replace(self, **changes: Any) -> "Coded":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def coded_leaf(q: Quantized) -> Coded:
    """Returns an untouched quantised leaf."""
    return Coded(q, leaf_dims(q.shape), q.shape)


def widened(coded: Coded, dims: Sequence[Group]) -> jax.Array:
    """Returns the array, whose axes are the groups `dims`; of types, its type."""
    x: Any = shaped(coded.shape, coded.dtype)
    if isinstance(coded.q.codes, Type):
        return x
    x = coded.q.dense()
    for dtype in coded.casts:
        x = x.astype(dtype)
    atoms = tuple(atom for group in coded.labels for atom in group)
    x = lax.reshape(x, [atom.size for atom in atoms])
    return lay_out(x, atoms, [atom for group in dims for atom in group], coded.shape)


def retyped(eqn: Equation, coded: Coded) -> Coded:
    """Returns it after `eqn`, which moves or adds axes, casts or copies."""
    out = kind(eqn.outvars[0])
    same = out.dtype == coded.dtype
    casts = coded.casts if same else (*coded.casts, out.dtype)
    return coded.replace(shape=tuple(out.shape), casts=casts)


def with_axis(w: Any, axis: int) -> Any:
    """Returns the type of `w` with a new axis of size one; codes stay codes."""
    shape = (*w.shape[:axis], 1, *w.shape[axis:])
    return w.replace(shape=shape) if isinstance(w, Coded) else shaped(shape, w.dtype)


def relabelled(w: Any, names: Mapping[Atom, Group]) -> Any:
    """Returns `w` with atoms renamed, split, resized or dropped, if it has labels."""
    if not isinstance(w, Coded):
        return w
    labels = tuple(
        tuple(new for atom in group for new in names.get(atom, (atom,)))
        for group in w.labels
    )
    return w.replace(labels=labels)


def reversed_along(coded: Coded, atoms: Iterable[Atom]) -> Coded | None:
    """Returns it reversed along the axes `atoms`."""
    apart = _apart(coded, atoms)
    if apart is None:
        return None
    axes = [apart.labels.index((atom,)) for atom in atoms]
    q = quantised.rearranged(apart.q, lambda x, _: lax.rev(x, axes), axes)
    return apart.replace(q=q)


def cut_along(
    coded: Coded,
    changed: Mapping[Atom, tuple[int, Atom]],
    cut: Callable[[jax.Array, int, int], jax.Array],
    shape: Sequence[int],
    single: Positions,
) -> Coded | None:
    """Returns it cut along axes.

    Args:
      coded: the weight.
      changed: for each atom to cut the weight's axis and the atom that is left.
      cut: `(array, axis, axis of the weight) -> array`.
      shape: the shape of the result.
      single: the atoms of which one entry is left, and its position.
    """
    apart = _apart(coded, changed, shared=single)
    if apart is None:
        return None
    axes = {apart.labels.index((atom,)): i for atom, (i, _) in changed.items()}
    alone = {apart.labels.index((atom,)): at for atom, at in single.items()}

    def cut_all(x: jax.Array, _: Any) -> jax.Array:
        for axis in axes.keys() - alone.keys():
            x = cut(x, axis, axes[axis])
        return x

    def pick(x: jax.Array, at: Mapping[int, jax.Array], _: Any) -> jax.Array:
        for axis, i in at.items():
            x = lax.dynamic_slice_in_dim(x, i, 1, axis)
        return x

    q = quantised.looked_up(apart.q, pick, alone) if alone else apart.q
    rest = [axis for axis in axes if axis not in alone]
    q = quantised.rearranged(q, cut_all, rest) if rest else q
    names = {atom: (new,) for atom, (_, new) in changed.items()}
    return relabelled(apart.replace(q=q, shape=tuple(shape)), names)


def picked_along(
    coded: Coded,
    positions: Positions,
    paired: Iterable[Atom],
    pick: Pick,
    shape: Sequence[int],
    empty: float,
) -> Coded | None:
    """Returns its entries at computed positions.

    Args:
      coded: the weight.
      positions: for each axis along which entries are picked, where.
      paired: the axes that the positions have too.
      pick: does it to codes and to scales.
      shape: the shape of the result.
      empty: what a missing entry is: NaN or 0.
    """
    there = [atom for atom in paired if holds(coded, (atom,))]
    apart = _apart(coded, [*positions, *there], shared=positions)
    if apart is None:
        return None
    # A group of several atoms is one axis here, whatever its name.
    names: list[Any] = [g[0] if len(g) == 1 else g for g in apart.labels]
    made: list[Any] = []

    def run(x: jax.Array, at: Mapping[int, jax.Array], empty: Any) -> jax.Array:
        own = {names[axis]: i for axis, i in at.items()}
        x, labels = pick(x, tuple(names), own, empty)
        made[:] = labels
        return x

    where = {names.index(atom): at for atom, at in positions.items()}
    jax.eval_shape(lambda x, at: run(x, at, 0), apart.q.codes, where)
    origin = [names.index(s) if s in names else -1 for s in made]
    q = quantised.looked_up(apart.q, run, where, origin, empty)
    labels = tuple((s,) if isinstance(s, Atom) else s for s in made)
    return apart.replace(q=q, labels=labels, shape=tuple(shape))


def stacked_first(coded: Coded, group: Group) -> Coded | None:
    """Returns it with the axis `group` moved to the front of codes and scales."""
    apart = _apart(coded, group)
    if apart is None or len(group) != 1:
        return None
    axis = apart.labels.index(group)
    origin = [axis, *(i for i in range(len(apart.labels)) if i != axis)]
    q = quantised.rearranged(apart.q, lambda x, _: jnp.moveaxis(x, axis, 0), [], origin)
    return apart.replace(q=q, labels=tuple(apart.labels[i] for i in origin))


def side_by_side(
    several: Sequence[Coded], atoms: Sequence[Group], new: Atom, shape: Sequence[int]
) -> Coded | None:
    """Returns weights side by side.

    Args:
      several: the weights, with equal labels but for the axis along which they lie.
      atoms: that axis of each; a group of no atom for an axis of size one.
      new: that axis of the result.
      shape: the shape of the result.
    """
    placed = []
    for coded, own in zip(several, atoms, strict=True):
        apart = _apart(coded, own) if own else coded
        if apart is None or len(own) > 1:
            return None
        names = {own[0]: (new,)} if own else {}
        placed.append(relabelled(apart, names))
    first = placed[0]
    if any(c.labels != first.labels or c.casts != first.casts for c in placed):
        return None
    if not atoms[0]:
        placed = [_with_new_axis(coded, new) for coded in placed]
        first = placed[0]
    q = quantised.joined([c.q for c in placed], first.labels.index((new,)))
    return None if q is None else first.replace(q=q, shape=tuple(shape))


def _with_new_axis(coded: Coded, new: Atom) -> Coded:
    origin = [-1, *range(coded.q.ndim)]
    q = quantised.rearranged(coded.q, lambda x, _: x[None], [], origin)
    return coded.replace(q=q, labels=((new,), *coded.labels))


def _apart(
    coded: Coded, atoms: Iterable[Atom], shared: Iterable[Atom] = ()
) -> Coded | None:
    """Returns it with an axis of `q` for each of `atoms`.

    The result is None if one shares its scales or bytes, or is not an axis of `q`.
    Those in `shared` may share them.
    """
    for atom in atoms:
        at = [i for i, group in enumerate(coded.labels) if atom in group]
        if not at:
            return None
        (axis,) = at
        group = coded.labels[axis]
        if len(group) == 1 and atom in shared:
            continue
        if not quantised.has_own_entries(coded.q, axis):
            return None
        if len(group) > 1:
            q = quantised.split_axis(coded.q, axis, [s.size for s in group])
            alone = [(s,) for s in group]
            labels = (*coded.labels[:axis], *alone, *coded.labels[axis + 1 :])
            coded = coded.replace(q=q, labels=labels)
    return coded


def times(
    coded: Coded, by: jax.Array, atoms: Sequence[Atom], op: Op, dtype: Any
) -> Coded | None:
    """Returns `op(coded, by)`: `op` does it to the scales, in float32.

    Args:
      coded: the weight.
      by: real numbers, with an axis for each of `atoms`.
      atoms: the axes along which they differ.
      op: multiplies or divides.
      dtype: dtype of the result.
    """
    apart = _apart(coded, atoms)
    narrowest = min(jnp.finfo(d).nmant for d in (coded.q.dtype, *coded.casts))
    if apart is None or narrowest < jnp.finfo(coded.dtype).nmant:
        return None  # after a cast to more digits the product has them all
    if jnp.iscomplexobj(by) or jnp.issubdtype(dtype, jnp.complexfloating):
        return None
    axes = [apart.labels.index((atom,)) for atom in atoms]
    by = lax.transpose(
        by.astype(jnp.float32), sorted(range(len(axes)), key=axes.__getitem__)
    )
    by = lax.expand_dims(by, [i for i in range(apart.q.ndim) if i not in axes])

    def rescale(x: jax.Array) -> jax.Array:
        return op(*jnp.broadcast_arrays(x.astype(jnp.float32), by))

    q = apart.q
    offset = None if q.offset is None else rescale(q.offset)
    q = dataclasses.replace(q, scales=rescale(q.float_scales()), offset=offset)
    casts = coded.casts if dtype == coded.dtype else (*coded.casts, dtype)
    return apart.replace(q=q, casts=casts)


def negated(coded: Coded) -> Coded:
    """Returns it with the signs of all entries changed."""
    offset = None if coded.q.offset is None else -coded.q.offset
    scales = -coded.q.float_scales()
    return coded.replace(q=dataclasses.replace(coded.q, scales=scales, offset=offset))


def holds(coded: Coded, group: Group) -> bool:
    """Returns whether the codes have an axis of `group`; a repeated weight has none."""
    return any(atom in own for own in coded.labels for atom in group)


def layer_of(stack: Coded, q: Quantized | None) -> Coded:
    """Returns one entry of a stack along the first axis.

    `q` holds the codes of the entry, None if all entries are one.
    """
    if q is None:
        return stack.replace(shape=stack.shape[1:])
    return stack.replace(q=q, labels=stack.labels[1:], shape=stack.shape[1:])


def placed(coded: Coded, entries: Mapping[Atom, Any], mesh: Any) -> Coded | None:
    """Returns it with a `PartitionSpec` in place of each array.

    The result is None if shards would cut blocks.

    Args:
      coded: the weight.
      entries: for each atom the mesh axes over which it is cut.
      mesh: the mesh.
    """
    axes = []
    for group in coded.labels:
        own = [entries.get(atom) for atom in group]
        if any(entry is not None for entry in own[1:]):
            return None
        axes.append(own[0] if own else None)
    specs = quantised.shard_specs(coded.q, axes, dict(mesh.shape))
    return None if isinstance(specs, str) else coded.replace(q=specs)
