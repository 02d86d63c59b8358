"""A quantised weight on its way through the interpreter: it stays codes and scales.

Steps that move axes change labels alone. A step that picks entries does so in the codes
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
from .compat import Equation, bind, kind

# `(array, labels, empty) -> (array, labels)`: picks entries along some axes.
Pick = Callable[[jax.Array, Labels, Any], tuple[jax.Array, Labels]]


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
    """Returns the array, whose axes are the groups `dims`."""
    x = coded.q.dense()
    for dtype in coded.casts:
        x = x.astype(dtype)
    atoms = tuple(atom for group in coded.labels for atom in group)
    x = lax.reshape(x, [atom.size for atom in atoms])
    return lay_out(x, atoms, [atom for group in dims for atom in group], coded.shape)


def moved(eqn: Equation, w: Any) -> Any:
    """Returns what `eqn`, which moves or adds axes, casts or copies, makes of `w`."""
    if not isinstance(w, Coded):
        return bind(eqn, w)[0]
    out = kind(eqn.outvars[0])
    casts = w.casts if out.dtype == w.dtype else (*w.casts, out.dtype)
    return w.replace(shape=tuple(out.shape), casts=casts)


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
) -> Coded | None:
    """Returns it cut along axes.

    Args:
      coded: the weight.
      changed: for each atom to cut the weight's axis and the atom that is left.
      cut: `(array, axis, axis of the weight) -> array`.
      shape: the shape of the result.
    """
    apart = _apart(coded, changed)
    if apart is None:
        return None
    axes = {apart.labels.index((atom,)): i for atom, (i, _) in changed.items()}

    def cut_all(x: jax.Array, _: Any) -> jax.Array:
        for axis, i in axes.items():
            x = cut(x, axis, i)
        return x

    q = quantised.rearranged(apart.q, cut_all, list(axes))
    names = {atom: (new,) for atom, (_, new) in changed.items()}
    return relabelled(apart.replace(q=q, shape=tuple(shape)), names)


def picked_along(
    coded: Coded,
    atoms: Iterable[Atom],
    pick: Pick,
    shape: Sequence[int],
    empty: float,
) -> Coded | None:
    """Returns its entries at computed positions.

    Args:
      coded: the weight.
      atoms: the axes along which entries are picked.
      pick: does it to codes and to scales.
      shape: the shape of the result.
      empty: what a missing entry is: NaN or 0.
    """
    apart = _apart(coded, atoms)
    if apart is None:
        return None
    # A group of several atoms is one axis here, whatever its name.
    names: list[Any] = [g[0] if len(g) == 1 else g for g in apart.labels]
    axes = [names.index(atom) for atom in atoms]
    made: list[Any] = []

    def run(x: jax.Array, empty: Any) -> jax.Array:
        x, labels = pick(x, tuple(names), empty)
        made[:] = labels
        return x

    jax.eval_shape(lambda x: run(x, 0), apart.q.codes)
    origin = [names.index(s) if s in names else -1 for s in made]
    q = quantised.rearranged(apart.q, run, axes, origin, empty)
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


def _apart(coded: Coded, atoms: Iterable[Atom]) -> Coded | None:
    """Returns it with an axis of `q` for each of `atoms`.

    The result is None if one shares its scales or bytes, or is not an axis of `q`.
    """
    for atom in atoms:
        at = [i for i, group in enumerate(coded.labels) if atom in group]
        if not at or not quantised.has_own_entries(coded.q, at[0]):
            return None
        (axis,) = at
        group = coded.labels[axis]
        if len(group) > 1:
            q = quantised.split_axis(coded.q, axis, [s.size for s in group])
            alone = [(s,) for s in group]
            labels = (*coded.labels[:axis], *alone, *coded.labels[axis + 1 :])
            coded = coded.replace(q=q, labels=labels)
    return coded


def times(coded: Coded, scale: Callable[[jax.Array], jax.Array]) -> Coded:
    """Returns it multiplied by a number: `scale` does it to the scales, in float32."""
    q = coded.q
    offset = None if q.offset is None else scale(q.offset.astype(jnp.float32))
    scales = scale(q.float_scales())
    return coded.replace(q=dataclasses.replace(q, scales=scales, offset=offset))


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
