"""Work that XLA's CPU compiler is kept from taking apart, to save memory.

That compiler drops `optimization_barrier`, but it keeps a call that is marked so. The
gradient of A is computed in such a call, from the roots of its activation (see
`trail`), so the activation is not kept. `sums` has the other use.

On other platforms, inside `shard_map` and on meshes with explicit axes, it is the plain
operation.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from .compat import Primitive, kept_call, policies_see
from .trail import Source

Product = Callable[..., jax.Array]


def one_at_a_time(fun: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Returns `fun(*args)`; XLA's CPU compiler does not mix its work with other work.

    So several of these hold their temporary arrays one after the other.
    """
    return jax.lax.platform_dependent(
        *args, cpu=functools.partial(kept_call, fun), default=fun
    )


def product_of_roots(
    fn: Product,
    x: jax.Array,
    b: jax.Array,
    source: Source | None,
    seen: Callable[..., Any] | None = None,
    more: Sequence[jax.Array] = (),
    *,
    inside: bool = True,
) -> jax.Array:
    """Returns `fn(x, b, *more)`, linear in `x` and `b`.

    Its derivative in `b` needs only roots.

    Args:
      fn: the product. It holds no arrays, which could be those of a trace.
      x: an activation.
      b: a factor.
      source: how `x` follows from its roots, or None.
      seen: `(types of x and b, type of the result) -> ` what a policy of
        `jax.checkpoint` sees, see `policies_see`; None for a primitive of its own.
      more: integers.
      inside: whether the product may be in a call that XLA keeps; else only the
        activation is computed in one.
    """
    if source is None:
        return fn(x, b, *more)
    operands = (x, b, *more, *source.roots)
    settings = {"fn": fn, "n": len(more), "chain": source.chain, "seen": seen}
    return product_of_roots_p.bind(*operands, late=False, inside=inside, **settings)


def _product(x: Any, b: Any, *rest: Any, fn: Product, n: int, **__: Any) -> jax.Array:
    return fn(x, b, *rest[:n])


def _product_of_one(
    x: Any, b: Any, *rest: Any, fn: Product, n: int, **_: Any
) -> jax.Array:
    """As `_product`, of an `x` that is made once where its roots are more to read.

    Such is the hidden activation of a gated layer: of two products and a tanh. XLA may
    make it anew for each product, but not the input of a barrier.
    """
    wide = sum(root.size for root in rest[n:] if root.size >= x.size)
    x = jax.lax.optimization_barrier(x) if wide >= 3 * x.size else x
    return fn(x, b, *rest[:n])


def _abstract(x: Any, b: Any, *rest: Any, fn: Product, n: int, **__: Any) -> Any:
    return jax.make_jaxpr(fn)(x, b, *rest[:n]).out_avals[0]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    x, b, *rest = primals
    dx, db, *_ = tangents
    out = product_of_roots_p.bind(x, b, *rest, **params)
    parts = []
    if type(dx) is not ad.Zero:
        parts.append(_product(dx, b, *rest, **params))
    if type(db) is not ad.Zero:
        parts.append(product_of_roots_p.bind(x, db, *rest, **params))
    return out, functools.reduce(operator.add, parts or [jnp.zeros_like(out)])


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """The product `(x, ct, *more) -> b` that transposes `fn(x, b, *more)` in `b`."""

    fn: Product
    b: Any

    def __call__(self, x: jax.Array, ct: jax.Array, *more: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda b: self.fn(x, b, *more), self.b)(ct)[0]


def _transpose(
    ct: Any, x: Any, b: Any, *rest: Any, fn: Product, n: int, **params: Any
) -> Any:
    none = [None for _ in rest]
    if ad.is_undefined_primal(x):
        (dx,) = jax.linear_transpose(lambda x: fn(x, b, *rest[:n]), x.aval)(ct)
        return dx, None, *none
    params |= {"fn": _Transposed(fn, b.aval), "late": True, "seen": None}
    return None, product_of_roots_p.bind(x, ct, *rest, n=n, **params), *none


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, n: int, **params: Any):
    at_x, at_roots = axes[0], tuple(axes[2 + n :])
    fn = jax.vmap(params.pop("fn"), tuple(axes[: 2 + n]))
    of_roots = any(axis is not None for axis in at_roots)
    if of_roots != (at_x is not None):
        return fn(*operands[: 2 + n]), 0
    chain = params.pop("chain")
    if of_roots:
        chain = jax.vmap(chain, at_roots, at_x)
    return product_of_roots_p.bind(*operands, fn=fn, n=n, chain=chain, **params), 0


def _product_kept(
    x: Any,
    b: Any,
    *rest: Any,
    fn: Product,
    n: int,
    chain: Any,
    late: bool,
    inside: bool,
    **_: Any,
) -> jax.Array:
    if not late:
        return fn(x, b, *rest[:n])
    if inside:
        return kept_call(_Late(fn, n, chain), b, *rest)
    x, b = kept_call(_After(chain), b, *rest[n:])
    return fn(x, b, *rest[:n])


@dataclasses.dataclass(frozen=True)
class _Late:
    """A product with an activation that is computed from its roots."""

    fn: Product
    n: int
    chain: Callable[..., jax.Array]

    def __call__(self, b: jax.Array, *rest: jax.Array) -> jax.Array:
        return self.fn(self.chain(*rest[self.n :]), b, *rest[: self.n])


@dataclasses.dataclass(frozen=True)
class _After:
    """An activation that is computed from its roots, not before `b` is there."""

    chain: Callable[..., jax.Array]

    def __call__(self, b: jax.Array, *roots: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.chain(*roots), b


def _seen(eqn: Any) -> Any:
    types = [v.aval for v in eqn.invars]
    if eqn.params["seen"] is None:
        return product_of_roots_p, types, eqn.params
    return eqn.params["seen"](types[:2], eqn.outvars[0].aval)


product_of_roots_p = Primitive("product_of_roots")
policies_see(product_of_roots_p, _seen)
product_of_roots_p.def_impl(_product)
product_of_roots_p.def_abstract_eval(_abstract)
ad.primitive_jvps[product_of_roots_p] = _jvp
ad.primitive_transposes[product_of_roots_p] = _transpose
batching.primitive_batchers[product_of_roots_p] = _batch
mlir.register_lowering(
    product_of_roots_p, mlir.lower_fun(_product_of_one, multiple_results=False)
)
mlir.register_lowering(
    product_of_roots_p,
    mlir.lower_fun(_product_kept, multiple_results=False),
    platform="cpu",
)
