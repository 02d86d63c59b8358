"""A weight on its way through the interpreter: the array, its factors, labelled axes.

An adapted weight stands for `gain * (w + sum of scale * einsum(a, b))`; most have no
gain. Operations on the weight permute, split, join or slice the groups of its axes, and
act on the factor that holds the atoms concerned.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .._numerics import add_rounded, at_least_float32
from ..factors import Form, Leaf
from ..quantised import is_quantized, typed_as
from .atoms import (
    BROADCAST,
    INDEX,
    Atom,
    Group,
    Labels,
    Step,
    lay_out,
    leaf_dims,
    regroup,
)
from .coded import Coded, coded_leaf, widened
from .compat import has_typed_placement
from .sums import Spread, added, not_zero, times
from .thin import Dims, thin_dot
from .views import View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand: `scale * sum over RANK of a * b`, axes named by labels.

    `product` is the activation's product with `a`, with axes `[free, rank]`. It is
    there only where several weights that the activation meets share one product.
    """

    a: Leaf
    b: Leaf
    a_labels: Labels = dataclasses.field(metadata={"static": True})
    b_labels: Labels = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})
    form: Form = dataclasses.field(default="auto", metadata={"static": True})
    product: Leaf = None

    def swapped(self) -> "Term":
        """Returns the same summand with A and B exchanged."""
        return dataclasses.replace(
            self, a=self.b, b=self.a, a_labels=self.b_labels, b_labels=self.a_labels
        )

    def map(self, fun: Step) -> "Term":
        """Returns the term with `fun(array, labels)` applied to both factors."""
        a, a_labels = fun(self.a, self.a_labels)
        b, b_labels = fun(self.b, self.b_labels)
        return dataclasses.replace(self, a=a, b=b, a_labels=a_labels, b_labels=b_labels)


class Part(NamedTuple):
    """A leaf that a weight comes from.

    Attributes:
      path: the leaf.
      roots: pairs of an atom's root and the leaf's axis that it stands for.
    """

    path: str
    roots: tuple[tuple[int, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of the parameters, or what linear operations made of it.

    Attributes:
      w: the frozen array, or `Coded` if quantised; while planning, its type.
      terms: what is added to it; empty while planning.
      dims: the group of atoms of each axis of `w`.
      parts: the leaves it comes from; more than one after a concatenation or a sum.
      looked_up: whether computed indices picked entries, as in an embedding.
      mixed: where an array that is not a weight became part of it, as `(operation,
        source line, scope)`; empty if there is none. It may be an activation then.
      with_data: while planning, whether that array comes from the function's inputs.
      joined: while planning, the leaves that such an array was computed from.
      doubtful: while planning, whether the leaf's axes decide if a factor serves it.
      gain: multiplies the sum along the axes that it has; None stands for 1.
      gain_labels: labels of its axes.
    """

    w: Leaf
    terms: tuple[Term, ...]
    dims: tuple[Group, ...] = dataclasses.field(metadata={"static": True})
    parts: tuple[Part, ...] = dataclasses.field(metadata={"static": True})
    looked_up: bool = dataclasses.field(default=False, metadata={"static": True})
    gain: Leaf = None
    gain_labels: Labels = dataclasses.field(default=(), metadata={"static": True})
    mixed: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    with_data: bool = dataclasses.field(default=False, metadata={"static": True})
    joined: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    doubtful: bool = dataclasses.field(default=False, metadata={"static": True})

    def replace(self, **changes: Any) -> "Weight":
        """Returns a copy with some fields changed."""
        return Weight(**{**vars(self), **changes})

    def map(self, fun: Step, **changes: Any) -> "Weight":
        """Returns a copy with `fun(array, labels)` applied to each factor and the gain.

        `changes` are the changes of other fields.
        """
        if self.gain is not None:
            gain, gain_labels = fun(self.gain, self.gain_labels)
            changes |= {"gain": gain, "gain_labels": gain_labels}
        terms = tuple(term.map(fun) for term in self.terms)
        return self.replace(terms=terms, **changes)

    @property
    def is_lookup(self) -> bool:
        """Whether this is the result of an embedding: looked-up rows, not a matrix.

        A row that is repeated, or one for each entry of a batch, is one too.
        """
        own = [g for g in self.dims if any(atom.root != BROADCAST for atom in g)]
        return self.looked_up and (bool(self.index_atoms) or len(own) <= 1)

    @property
    def is_matrix(self) -> bool:
        """Whether it has at least two axes of a leaf."""
        return sum(any(a.root >= 0 for a in group) for group in self.dims) > 1

    @property
    def index_atoms(self) -> frozenset[Atom]:
        """Atoms that count looked-up positions, and not entries of the leaf."""
        return frozenset(a for g in self.dims for a in g if a.root == INDEX)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Derived:
    """While planning: what is computed from the leaves `paths` and no input data."""

    w: Leaf
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})


# What an equation can be given while its code is interpreted.
Operand = jax.Array | Weight
Value = Operand | Derived


def array_of(value: Value) -> jax.Array:
    """Returns the frozen array of a weight, and any other value as an array."""
    if isinstance(value, Weight) and isinstance(value.w, Coded):
        return widened(value.w, value.dims)
    return value.w if isinstance(value, Weight | Derived) else value


def is_coded(value: object) -> bool:
    """Returns whether `value` is a weight whose frozen array is quantised."""
    return isinstance(value, Weight) and isinstance(value.w, Coded)


def leaf(path: str, w: Leaf, terms: tuple[Term, ...] = ()) -> Weight:
    """Returns the untouched leaf `path`, whose axis `i` is the atom `(i,)`."""
    array = coded_leaf(w) if is_quantized(w) else w
    return Weight(array, terms, leaf_dims(w.shape), (Part(path, _roots(w.ndim)),))


@functools.cache
def _roots(ndim: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, i) for i in range(ndim))


def new_atom(weight: Weight, kind: int, n: int) -> Atom:
    """Returns an atom of size `n` and the negative root `kind`, new to `weight`."""
    taken = [a.name[1] for group in weight.dims for a in group if a.root == kind]
    return Atom((kind, max(taken, default=-1) + 1), n)


def dense(weight: Weight) -> jax.Array:
    """Returns `gain * (w + sum of terms)`, computed in float32 and rounded once."""
    w = array_of(weight)
    if not weight.terms:
        return w
    wide = at_least_float32(w.dtype)
    exact_dot = functools.partial(thin_dot, dtype=wide, precision=lax.Precision.HIGHEST)
    atoms = [atom for group in weight.dims for atom in group]

    def delta(term: Term) -> jax.Array:
        a, b = term.a.astype(wide), term.b.astype(wide) * term.scale
        product, labels = contract(
            exact_dot, a, term.a_labels, b, term.b_labels, keep=atoms
        )
        return lay_out(product, labels, atoms, w.shape)

    changes = (typed_as(w, delta, term) for term in weight.terms)
    return add_rounded(w, changes, lambda total: rescaled(total, weight, atoms))


def rescaled(x: jax.Array, weight: Weight, want: Sequence[Atom]) -> jax.Array:
    """Returns `x`, whose axes are `want` (some joined), times the gain of `weight`."""
    gain, spread = gain_along(weight, want, x.dtype)
    if gain is None:
        return x
    return typed_as(x, functools.partial(times, spread=spread), x, gain)


def with_terms(
    y: jax.Array,
    zs: Sequence[jax.Array],
    weight: Weight,
    want: Sequence[Atom],
    view: View | None = None,
) -> jax.Array:
    """Returns the sum of `y` and all `zs`, times the gain of `weight`.

    Args:
      y: the product with the frozen array.
      zs: the products with the terms; there is at least one.
      weight: what was multiplied by.
      want: the axes of `y`.
      view: how later operations keep the result; None if as it is.
    """
    *first, last = zs
    y = functools.reduce(added, first, y)
    if has_typed_placement(y) or has_typed_placement(last):
        return rescaled(y + last, weight, want)
    if weight.gain is not None:
        weight = weight.replace(gain=not_zero(weight.gain, y.dtype))
    return added(y, last, *gain_along(weight, want, y.dtype, view))


def gain_along(
    weight: Weight, want: Sequence[Atom], dtype: DTypeLike, view: View | None = None
) -> tuple[jax.Array | None, Spread | None]:
    """Returns the gain of `weight`, and how it lies along an array of axes `want`.

    It has the dtype to multiply an array of `dtype` in. Both are None if there is none.
    """
    if weight.gain is None:
        return None, None
    own = [atom for atom in want if atom in weight.gain_labels]
    gain = regroup(weight.gain, weight.gain_labels, [(atom,) for atom in own])
    along = tuple(i for i, atom in enumerate(want) if atom in own)
    wide = gain.astype(at_least_float32(dtype, gain.dtype))
    return wide, Spread(tuple(atom.size for atom in want), along, view)


def contract(
    dot: Callable[[jax.Array, jax.Array, Dims], jax.Array],
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    *,
    keep: Sequence[Atom],
) -> tuple[jax.Array, Labels]:
    """Returns the einsum of two arrays by label, and the labels of its axes.

    `dot(x, y, dimension_numbers)` is the product. Labels that are not in `keep` are
    summed over. A label in `keep` that both arrays have is a batch axis. The axes of
    the result are the batch axes, then the others of `x`, then the others of `y`.
    """
    x, x_labels = sum_out(x, x_labels, keep, y_labels)
    y, y_labels = sum_out(y, y_labels, keep, x_labels)
    batch = [atom for atom in x_labels if atom in y_labels and atom in keep]
    summed = [atom for atom in x_labels if atom in y_labels and atom not in keep]
    numbers = (
        ([x_labels.index(s) for s in summed], [y_labels.index(s) for s in summed]),
        ([x_labels.index(s) for s in batch], [y_labels.index(s) for s in batch]),
    )
    out = dot(x, y, numbers)
    rest = [*x_labels, *y_labels]
    rest = [atom for atom in rest if atom not in batch and atom not in summed]
    return out, (*batch, *rest)


def sum_out(
    x: jax.Array, labels: Labels, keep: Sequence[Atom], other: Labels
) -> tuple[jax.Array, Labels]:
    """Returns `x` summed over labels that are neither in `keep` nor in `other`."""
    lonely = [i for i, s in enumerate(labels) if s not in keep and s not in other]
    if lonely:
        x = jnp.sum(x, axis=lonely)
    return x, tuple(s for i, s in enumerate(labels) if i not in lonely)
