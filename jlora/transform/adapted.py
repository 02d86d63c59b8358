"""`adapted_dot`: the product with an adapted weight, in the form the platform likes.

One primitive with a lowering for each platform, so that a program exported for several
is right on all. Only the value takes the temporary weight `w + s a b`; derivatives are
those of `x . w + t . b` with `t = s x . a`, so no weight-sized gradient is formed.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from . import cost
from .compat import Primitive, has_typed_placement, shaped
from .low_rank import Site, first_product, oriented, second_product
from .values import OTHER, Atom, Group, Labels, Term, Weight, dense


@dataclasses.dataclass(frozen=True)
class Static:
    """What is static about an adapted product.

    Attributes:
      site: as in `low_rank_product`.
      term: the term without its factors.
      t_labels: labels of the axes of `t`.
      dims: the groups of atoms of the weight's axes.
      numbers: `dot_general`'s dimension numbers, operands in their order.
      form: the form to use, or `"auto"`.
    """

    site: Site
    term: Term
    t_labels: Labels
    dims: tuple[Group, ...]
    numbers: Any
    form: cost.Form


def adapted_dot(
    x: Any, weight: Weight, site: Site, numbers: Any, form: cost.Form
) -> jax.Array:
    """Returns `x . (w + s a b)` for a weight with one term."""
    (term,) = weight.terms
    term = oriented(term, site)
    t, t_labels = first_product(x, term, site)
    bare = dataclasses.replace(term, a=None, b=None, product=None)
    static = Static(site, bare, t_labels, weight.dims, numbers, form)
    return adapted_dot_p.bind(x, weight.w, term.a, term.b, t, static=static)


def pays(x: Any, weight: Weight, site: Site, form: cost.Form) -> bool:
    """Returns whether some platform would compute a temporary weight."""
    w = weight.w
    if form == "factored" or x.dtype != w.dtype or x.dtype != site.dtype:
        return False
    if has_typed_placement(x) or has_typed_placement(w):
        return False
    forms = cost.forms(site.tokens, site.fan_in, x.dtype, w.dtype)
    return form == "merged" or "merged" in forms


def _dot(x: Any, w: Any, static: Static) -> Any:
    operands = (x, w) if static.site.x_first else (w, x)
    return lax.dot_general(
        *operands,
        static.numbers,
        precision=static.site.precision,
        preferred_element_type=static.site.dtype,
    )


def _expand(t: Any, b: Any, static: Static) -> Any:
    term = dataclasses.replace(static.term, b=b)
    return second_product(t, static.t_labels, term, static.site)


def _factored(x: Any, w: Any, a: Any, b: Any, t: Any, *, static: Static) -> Any:
    del a
    return _dot(x, w, static) + _expand(t, b, static)


def _lowered(
    x: Any, w: Any, a: Any, b: Any, t: Any, *, static: Static, platform: str
) -> Any:
    form = static.form
    if form == "auto":
        form = cost.form(static.site.tokens, static.site.fan_in, x.dtype, platform)
    if form == "factored":
        return _factored(x, w, a, b, t, static=static)
    term = dataclasses.replace(static.term, a=a, b=b)
    merged = dense(Weight(w, (term,), static.dims, ()))
    if platform != "cpu":
        # Else XLA may choose the sum's layout for `w` too, and copy a stack of layers.
        merged = lax.optimization_barrier(merged)
    return _dot(x, merged, static)


def _jvp(primals: Any, tangents: Any, *, static: Static) -> Any:
    x, w, _, b, t = primals
    dx, dw, _, db, dt = (None if type(v) is ad.Zero else v for v in tangents)
    out = adapted_dot_p.bind(*primals, static=static)
    parts = []
    if dx is not None:
        parts.append(_dot(dx, w, static))
    if dw is not None:
        parts.append(_dot(x, dw, static))
    if dt is not None:  # what the tangent of A does is in that of `t`
        parts.append(_expand(dt, b, static))
    if db is not None:
        parts.append(_expand(t, db, static))
    return out, functools.reduce(operator.add, parts or [jnp.zeros_like(out)])


def _transpose(ct: Any, x: Any, w: Any, a: Any, b: Any, t: Any, *, static: Static):
    """Transposes with respect to the activation, `x` and `t` together."""

    def product(x: Any, t: Any) -> Any:
        return _factored(x, w, a, b, t, static=static)

    dx, dt = jax.linear_transpose(product, x.aval, t.aval)(ct)
    return dx, None, None, None, dt


def _batch(operands: Any, axes: Any, *, static: Static) -> Any:
    """More rows of the activation stay one product; other batches are factored."""
    factored = functools.partial(_factored, static=static)
    has_batch_axes = any(map(len, static.numbers[1]))
    if [axis is None for axis in axes] != [0, 1, 1, 1, 0] or has_batch_axes:
        return jax.vmap(factored, axes)(*operands), 0
    x, w, a, b, t = operands
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
    )
    static = dataclasses.replace(
        static,
        site=site,
        t_labels=(new, *static.t_labels),
        numbers=(tuple(shifted), batch),
    )
    return adapted_dot_p.bind(x, w, a, b, t, static=static), at


adapted_dot_p = Primitive("adapted_dot")
adapted_dot_p.def_impl(_factored)
adapted_dot_p.def_abstract_eval(
    lambda *_, static: shaped(static.site.shape, static.site.dtype)
)
ad.primitive_jvps[adapted_dot_p] = _jvp
ad.primitive_transposes[adapted_dot_p] = _transpose
batching.primitive_batchers[adapted_dot_p] = _batch
_cpu, _other = (
    mlir.lower_fun(
        functools.partial(_lowered, platform=platform), multiple_results=False
    )
    for platform in cost.PLATFORMS
)
mlir.register_lowering(adapted_dot_p, _cpu, platform="cpu")
mlir.register_lowering(adapted_dot_p, _other)
