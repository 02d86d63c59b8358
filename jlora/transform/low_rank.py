"""The low-rank term of a matrix product: `scale * (x . a) . b`, for any layout."""

import dataclasses
import functools
import math

import jax
from jax import lax
from jax.typing import DTypeLike

from .._numerics import at_least_float32, cast, dtype_of_sums
from .atoms import RANK, Atom, Group, Labels, lay_out, regroup, size
from .thin import PrecisionLike, thin_dot
from .trail import Source
from .values import Term, Weight, contract, sum_out
from .views import View


@dataclasses.dataclass(frozen=True)
class Site:
    """The static settings of the product of an activation and a weight.

    Attributes:
      x_groups: the atoms of each axis of the activation.
      want: the atoms of the result, in order.
      x_first: whether the activation's free axes stand before the weight's.
      shape: shape of the result.
      dtype: dtype of the result.
      compute: dtype in which the activation meets factors.
      precision: as in `dot_general`.
      view: how later operations keep the result; None if as it is, or if the weight has
        no gain.
    """

    x_groups: tuple[Group, ...]
    want: Group
    x_first: bool
    shape: tuple[int, ...]
    dtype: DTypeLike
    compute: DTypeLike
    precision: PrecisionLike
    view: View | None = None

    @property
    def x_labels(self) -> Labels:
        """The atoms of the activation, in order."""
        return tuple(atom for group in self.x_groups for atom in group)

    @property
    def tokens(self) -> int:
        """How many rows the activation has."""
        return size(tuple(s for s in self.x_labels if s in self.want))

    @property
    def fan_in(self) -> int:
        """How many entries a row of the activation has."""
        return size(tuple(s for s in self.x_labels if s not in self.want))


def low_rank_product(
    x: jax.Array, term: Term, site: Site, source: Source | None = None
) -> jax.Array:
    """Returns `scale * (x . a) . b` in the layout of `site`.

    The products are in the dtype that the site computes in, and sum in float32.
    """
    term = oriented(term, site)
    t, t_labels = first_product(x, term, site, source)
    return second_product(t, t_labels, term, site)


def oriented(term: Term, site: Site) -> Term:
    """Returns `term` with the factor to multiply by first as `a`.

    It is the factor that sums over more. That is B where a tied weight is transposed.
    """

    def summed(labels: Labels) -> int:
        own = [s for s in labels if s in site.x_labels and s not in site.want]
        return math.prod(s.size for s in own)

    if summed(term.b_labels) <= summed(term.a_labels):
        return term
    return term.swapped()


def first_product(
    x: jax.Array, term: Term, site: Site, source: Source | None = None
) -> tuple[jax.Array, Labels]:
    """Returns `scale * x . a` in the site's dtype, and the labels of its axes."""
    compute = site.compute
    if term.product is not None:
        t = term.product
        t_labels = (*(s for s in site.x_labels if s in site.want), RANK)
    else:
        keep, a_labels = (*site.want, *term.b_labels), term.a_labels
        prepared = _Prepared(site, keep, a_labels)
        dot = functools.partial(
            thin_dot,
            dtype=at_least_float32(compute),
            precision=site.precision,
            source=None if source is None else source.then(prepared),
        )
        x_labels = tuple(s for s in site.x_labels if s in keep or s in a_labels)
        t, t_labels = contract(dot, prepared(x), x_labels, term.a, a_labels, keep=keep)
    t = (t * term.scale).astype(compute)
    return sum_out(t, t_labels, site.want, term.b_labels)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The step from the activation of a site to the operand of its first product."""

    site: Site
    keep: Labels
    a_labels: Labels

    def __call__(self, x: jax.Array) -> jax.Array:
        labels = self.site.x_labels
        if any(len(group) != 1 for group in self.site.x_groups):
            x = lax.reshape(x, [atom.size for atom in labels])
        x = x.astype(self.site.compute)
        return sum_out(x, labels, self.keep, self.a_labels)[0]


def second_product(t: jax.Array, t_labels: Labels, term: Term, site: Site) -> jax.Array:
    """Returns `t . b` in the layout of `site`."""
    shared = [s for s in term.b_labels if s in t_labels]
    free = [s for s in site.want if s in term.b_labels and s not in t_labels]
    batch = [s for s in t_labels if s in shared and s in site.want]
    summed = [s for s in t_labels if s in shared and s not in site.want]
    out = thin_dot(
        t,
        regroup(term.b, term.b_labels, [(s,) for s in (*shared, *free)]),
        (
            ([t_labels.index(s) for s in summed], [shared.index(s) for s in summed]),
            ([t_labels.index(s) for s in batch], [shared.index(s) for s in batch]),
        ),
        dtype=dtype_of_sums(t.dtype, site.dtype),
        precision=site.precision,
        x_first=site.x_first,
    )
    out = cast(out, site.dtype)
    rest = [s for s in t_labels if s not in shared]
    labels = (*batch, *((rest + free) if site.x_first else (free + rest)))
    return lay_out(out, labels, site.want, site.shape)


def join_groups(weight: Weight) -> Weight:
    """Returns `weight` with a group made one atom where all its atoms share factors.

    Only factors are reshaped, so activations keep their axes.
    """

    def holders(atom: Atom) -> tuple[bool, ...]:
        factors = [s for term in weight.terms for s in (term.a_labels, term.b_labels)]
        return tuple(atom in labels for labels in (*factors, weight.gain_labels))

    joint: dict[Group, Atom] = {
        group: Atom((*group[0].name, -1), size(group))
        for group in weight.dims
        if len(group) > 1 and len({holders(atom) for atom in group}) == 1
    }
    if not joint:
        return weight
    member = {atom: group for group in joint for atom in group}

    def join(x: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        groups = []
        for atom in labels:
            group = member.get(atom, (atom,))
            if group not in groups:
                groups.append(group)
        x = regroup(x, labels, groups)
        return x, tuple(joint[g] if g in joint else g[0] for g in groups)

    dims = tuple((joint[g],) if g in joint else g for g in weight.dims)
    return weight.map(join, dims=dims)
