"""`adapted_dot`: the product with an adapted weight, in the form the platform likes.

It is one primitive with a lowering for each platform, so a program that is exported for
several platforms is right on all of them. Only the value uses the temporary weight
`w + s a b`. Derivatives are those of `x . w + t . b` with `t = s x . a`, so no
weight-sized gradient is formed.

With a gain `g` the value is `g (x . w + t . b)`, see `sums`.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from ..factors import Form, Leaf
from . import cost
from .atoms import OTHER, Atom, Group, Labels
from .coded import Coded
from .compat import Primitive, has_typed_placement, partitions, policies_see, shaped
from .low_rank import Site, first_product, oriented, second_product
from .sums import added, not_zero, tangent
from .thin import Dims
from .trail import Source
from .values import Term, Weight, dense, gain_along


@dataclasses.dataclass(frozen=True)
class Static:
    """The static settings of an adapted product.

    Attributes:
      site: as in `low_rank_product`.
      term: the term, without its factors.
      t_labels: labels of the axes of `t`.
      gain_labels: labels of the axes of the gain.
      dims: the groups of atoms of the weight's axes.
      numbers: `dot_general`'s dimension numbers, operands in their order.
      form: the form to use, or `"auto"`.
      kept: whether a derivative is taken, see `kept.added`.
    """

    site: Site
    term: Term
    t_labels: Labels
    gain_labels: Labels
    dims: tuple[Group, ...]
    numbers: Dims
    form: Form
    kept: bool = False

    def weight(self, w: Leaf, terms: tuple[Term, ...], gain: Sequence[Leaf]) -> Weight:
        """Returns a weight of these settings; `gain` is empty if it has none."""
        own = gain[0] if gain else None
        labels = self.gain_labels if gain else ()
        return Weight(w, terms, self.dims, (), gain=own, gain_labels=labels)


def adapted_dot(
    x: jax.Array,
    weight: Weight,
    site: Site,
    numbers: Dims,
    form: Form,
    source: Source | None = None,
) -> jax.Array:
    """Returns `x . gain * (w + s a b)` for a weight with one term."""
    (term,) = weight.terms
    term = oriented(term, site)
    t, t_labels = first_product(x, term, site, source)
    bare = dataclasses.replace(term, a=None, b=None, product=None)
    static = Static(
        site, bare, t_labels, weight.gain_labels, weight.dims, numbers, form
    )
    gain = () if weight.gain is None else (not_zero(weight.gain, site.dtype),)
    return adapted_dot_p.bind(x, weight.w, term.a, term.b, t, *gain, static=static)


def _is_plain(x: jax.Array, w: Leaf) -> bool:
    """Returns whether `w` is not codes, and no type says where `x` and `w` lie."""
    if isinstance(w, Coded):
        return False
    return not (has_typed_placement(x) or has_typed_placement(w))


def has_forms(x: jax.Array, w: Leaf, dtype: DTypeLike) -> bool:
    """Returns whether a product can take a sum with its weight in place of the weight.

    Codes have none, sums in another dtype would be rounded, and shards or explicit
    axes have collectives of their own.
    """
    return _is_plain(x, w) and x.dtype == w.dtype == dtype


def form_of(x: jax.Array, weight: Weight, site: Site, form: Form) -> Form | None:
    """Returns the form of the `adapted_dot` to use, or None where it does not help.

    It helps where some platform uses a temporary weight.
    """
    if not has_forms(x, weight.w, site.dtype):
        return None
    forms = (form,)
    if form == "auto":
        forms = cost.forms(site.tokens, site.fan_in, x.dtype)
    return form if "merged" in forms else None


def _dot(x: jax.Array, w: jax.Array, static: Static) -> jax.Array:
    site = static.site
    return lax.dot_general(
        *((x, w) if site.x_first else (w, x)),
        static.numbers,
        precision=site.precision,
        preferred_element_type=site.dtype,
    )


def _expand(t: jax.Array, b: jax.Array, static: Static) -> jax.Array:
    term = dataclasses.replace(static.term, b=b)
    return second_product(t, static.t_labels, term, static.site)


def _along(gain: Sequence[jax.Array], static: Static) -> tuple[Any, Any]:
    """Returns the gain and how it lies along the result; None if there is none."""
    site = static.site
    weight = static.weight(None, (), gain)
    return gain_along(weight, site.want, site.dtype, site.view)


def _factored(*operands: jax.Array, static: Static) -> jax.Array:
    x, w, _, b, t, *gain = operands
    y, z = _dot(x, w, static), _expand(t, b, static)
    return added(y, z, *_along(gain, static), kept=static.kept)


def _lowered(
    *operands: jax.Array, static: Static, platform: str, devices: int
) -> jax.Array:
    x, w, a, b, _, *gain = operands
    form, site = static.form, static.site
    if form == "auto":
        form = cost.form(site.tokens, site.fan_in, x.dtype, platform, devices)
    if form == "factored":
        return _factored(*operands, static=static)
    term = dataclasses.replace(static.term, a=a, b=b)
    merged = dense(static.weight(w, (term,), gain))
    if platform != "cpu":
        # Without it XLA may give `w` the layout of the sum, and copy a stack of layers.
        merged = lax.optimization_barrier(merged)
    return _dot(x, merged, static)


def _jvp(primals: Any, tangents: Any, *, static: Static) -> Any:
    x, w, _, b, t, *gain = primals
    dx, dw, _, db, dt, *dgain = (None if type(v) is ad.Zero else v for v in tangents)
    static = dataclasses.replace(static, kept=True)
    out = adapted_dot_p.bind(*primals, static=static)
    parts = []
    if dx is not None:
        parts.append(_dot(dx, w, static))
    if dw is not None:
        parts.append(_dot(x, dw, static))
    if dt is not None:  # the tangent of A is part of that of `t`
        parts.append(_expand(dt, b, static))
    if db is not None:
        parts.append(_expand(t, db, static))
    summed = functools.reduce(operator.add, parts) if parts else None
    if not gain:
        return out, tangent(out, summed)
    own, spread = _along(gain, static)
    (dgain,) = dgain
    change = None if dgain is None else _along([dgain], static)[0]
    return out, tangent(out, summed, own, change, spread)


def _transpose(ct: Any, x: Any, w: Any, a: Any, b: Any, t: Any, *gain: Any, static):
    """Transposes with respect to `x` and `t`: both come from the activation."""

    def product(x: Any, t: Any) -> Any:
        return _factored(x, w, a, b, t, *gain, static=static)

    dx, dt = jax.linear_transpose(product, x.aval, t.aval)(ct)
    return dx, None, None, None, dt, *(None for _ in gain)


def _batch(operands: Any, axes: Any, *, static: Static) -> Any:
    """Batches of activations stay one product; other batches take the factored form."""
    factored = functools.partial(_factored, static=static)
    has_batch_axes = any(map(len, static.numbers[1]))
    of_rows = [i in (0, 4) for i in range(len(axes))]  # the activation and `t`
    if [axis is not None for axis in axes] != of_rows or has_batch_axes:
        return jax.vmap(factored, axes)(*operands), 0
    x, w, a, b, t, *gain = operands
    x, t = (jnp.moveaxis(v, axis, 0) for v, axis in ((x, axes[0]), (t, axes[4])))
    site, (contracted, batch) = static.site, static.numbers
    names = [s.name[1] for s in site.x_labels if s.root == OTHER]
    new = Atom((OTHER, min([0, *names]) - 1), x.shape[0])
    shifted = list(contracted)
    shifted[not site.x_first] = tuple(i + 1 for i in contracted[not site.x_first])
    at = 0 if site.x_first else w.ndim - len(contracted[0])
    before = [s for s in site.want if s not in site.x_labels]
    place = 0 if site.x_first else len(before)
    site = dataclasses.replace(
        site,
        x_groups=((new,), *site.x_groups),
        want=(*site.want[:place], new, *site.want[place:]),
        shape=(*site.shape[:at], new.size, *site.shape[at:]),
        view=site.view and (None if at else site.view.rows(new.size)),
    )
    static = dataclasses.replace(
        static,
        site=site,
        t_labels=(new, *static.t_labels),
        numbers=(tuple(shifted), batch),
    )
    return adapted_dot_p.bind(x, w, a, b, t, *gain, static=static), at


def _base_product(eqn: Any) -> tuple[Primitive, Sequence[Any], dict[str, Any]]:
    """Returns what a policy sees: the product of the frozen model."""
    static = eqn.params["static"]
    x, w = (v.aval for v in eqn.invars[:2])
    types = (x, w) if static.site.x_first else (w, x)
    return (
        lax.dot_general_p,
        types,
        {
            "dimension_numbers": static.numbers,
            "precision": static.site.precision,
            "preferred_element_type": static.site.dtype,
            "out_sharding": None,
        },
    )


adapted_dot_p = Primitive("adapted_dot")
policies_see(adapted_dot_p, _base_product)
adapted_dot_p.def_impl(_factored)
adapted_dot_p.def_abstract_eval(
    lambda *_, static: shaped(static.site.shape, static.site.dtype)
)
ad.primitive_jvps[adapted_dot_p] = _jvp
ad.primitive_transposes[adapted_dot_p] = _transpose
batching.primitive_batchers[adapted_dot_p] = _batch


def _lowering(ctx: Any, *operands: Any, static: Static, platform: str) -> Any:
    run = functools.partial(_lowered, platform=platform, devices=partitions(ctx))
    return mlir.lower_fun(run, multiple_results=False)(ctx, *operands, static=static)


_cpu, _other = (
    functools.partial(_lowering, platform=platform) for platform in cost.PLATFORMS
)
mlir.register_lowering(adapted_dot_p, _cpu, platform="cpu")
mlir.register_lowering(adapted_dot_p, _other)
