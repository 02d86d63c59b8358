"""The driver: evaluates a jaxpr in which some values are weights with factors."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate

import jax
import jax.numpy as jnp

from ..factors import Form
from ..quantised import typed_as
from . import compat, share, views
from .compat import Equation, Literal, Var
from .primitives import CHEAP, KEPT, SEPARATE
from .running import ON_ARRAYS, Run
from .trail import Source, Trail, has_only
from .values import Derived, Value, Weight, array_of, is_coded

# Takes `(ctx, eqn, *operands)` and returns the results of the equation, or
# NotImplemented to leave it to `Context.fallback`.
Rule = Callable[Concatenate["Context", Equation, ...], Sequence[Value]]


def _bind_arrays(
    ctx: "Context", eqn: Equation, operands: Sequence[Value]
) -> list[jax.Array]:
    return ctx.run.bind(eqn, *(ctx.materialise(v, eqn) for v in operands))


def _widened(weight: Weight, eqn: Equation) -> Value:
    return weight.replace(w=array_of(weight))


@dataclasses.dataclass(frozen=True)
class Context:
    """What rules need besides the values; there is one for each staging.

    Attributes:
      rules: a rule for each name of a primitive.
      materialise: `(value, eqn) -> array`, a weight as an array. It notes that the
        equation needed one; None stands for the function's return.
      widen: `(weight, eqn) -> weight` with an array in place of codes. It notes that
        the equation needed one.
      used: called with every linear use of a weight:
        `(weight, op, fan_in atoms, batch atoms, eqn)`, for a product also its forms.
      fallback: `(ctx, eqn, operands) -> results` where no rule holds.
      constant: `array -> value` for literals, what the code closes over, and what is
        computed from these.
      run: what equations run on: arrays or types.
      hoist: whether a weight that a loop would merge is merged before the loop.
      form: how to compute a product whose term does not say it, see `cost`.
      share: whether weights that meet the same activation share a product with it.
      key: PRNG key of dropout, or None.
      gate: multiplies the low-rank term of each token, or None.
      varies: the mesh axes along which each variable differs inside a `shard_map`.
      sites: counts the uses of the key.
      calls: functions already rewritten, so that a `jit` called twice stays one.
      code: the code being interpreted.
      trail: the cheap equations so far, or None where no derivative may follow.
    """

    rules: Mapping[str, Rule]
    materialise: Callable[[Value, Equation | None], jax.Array]
    widen: Callable[[Any, Equation], Value] = _widened
    used: Callable[..., None] = lambda *_, **__: None
    fallback: Callable[["Context", Equation, Sequence[Value]], Sequence[Value]] = (
        _bind_arrays
    )
    constant: Callable[[jax.Array], Value] = lambda x: x
    run: Run = ON_ARRAYS
    hoist: bool = False
    form: Form = "auto"
    share: bool = False
    key: jax.Array | None = None
    gate: jax.Array | None = None
    varies: Mapping[Var, frozenset[str]] = dataclasses.field(default_factory=dict)
    sites: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    calls: dict = dataclasses.field(default_factory=dict)
    code: compat.Jaxpr | None = None
    trail: Trail | None = None

    @functools.cached_property
    def made(self) -> Mapping[Var, Equation]:
        """The equation that made each variable of the code being interpreted."""
        eqns = () if self.code is None else self.code.eqns
        return {v: eqn for eqn in eqns for v in eqn.outvars}

    @functools.cached_property
    def read(self) -> views.Readers:
        """The equations that read each variable of the code being interpreted."""
        return {} if self.code is None else views.readers(self.code)

    def next_key(self) -> jax.Array | None:
        """Returns a new key for a place that draws random numbers; None without one."""
        if self.key is None:
            return None
        key = compat.in_this_mesh(self.key)
        return jax.random.fold_in(key, next(self.sites))

    def drops(self, rate: float) -> bool:
        """Returns whether `drop` at `rate` changes anything."""
        return self.key is not None and rate != 0

    def axes_of(self, atom: Var | Literal) -> frozenset[str]:
        """Returns the mesh axes along which `atom` differs inside a `shard_map`."""
        own = None if isinstance(atom, Literal) else self.varies.get(atom)
        return frozenset() if own is None else own

    def drop(
        self, x: jax.Array, rate: float, var: Var | Literal, source: Source | None
    ) -> tuple[jax.Array, Source | None]:
        """Returns `x` with entries dropped at `rate`, and how that follows from roots.

        The other entries are scaled up. Without a key nothing is dropped. Devices draw
        the same mask, except along mesh axes over which `var`, the variable of `x`, is
        sharded.
        """
        key = self.next_key() if self.drops(rate) else None
        if key is None:
            return x, source
        for axis in sorted(self.axes_of(var)):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x.shape)
        kept = typed_as(x, draw, key)

        def dropped(x: jax.Array, kept: jax.Array) -> jax.Array:
            scaled = x / jnp.asarray(1 - rate, x.dtype)
            return jnp.where(kept, scaled, jnp.zeros_like(scaled))

        return dropped(x, kept), source and source.then(dropped, kept)

    def varied_axes(self, atom: Var | Literal) -> tuple[int, ...] | None:
        """Returns the axes along which a broadcast array can vary; None if unknown."""
        if compat.kind(atom).ndim == 0:
            return ()
        eqn = None if isinstance(atom, Literal) else self.made.get(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return None
        shape = compat.kind(eqn.invars[0]).shape
        axes = eqn.params["broadcast_dimensions"]
        return tuple(i for i, n in zip(axes, shape, strict=True) if n != 1)

    def within(self, key: jax.Array | None) -> "Context":
        """Returns the context for code that is traced separately, with its own key."""
        trail = None if self.trail is None else Trail()
        return dataclasses.replace(
            self, key=key, sites=itertools.count(), calls={}, trail=trail
        )

    def source(self, x: jax.Array) -> Source | None:
        """Returns how `x` follows from its roots; None if that is not known."""
        if self.trail is None or compat.has_typed_placement(x):
            return None
        return self.trail.source(x)


_SPECIAL = {Weight, Derived}


def is_special(value: Value) -> bool:
    """Returns whether a rule has to look at `value`."""
    return type(value) in _SPECIAL


def interpret(ctx: Context, code: compat.Code, values: Sequence[Value]) -> list[Value]:
    """Evaluates `code` on `values` and returns its results, weights among them.

    Equations that no weight reaches are bound again as they are. Source lines, name
    stacks and equation contexts are those of `code`.
    """
    jaxpr, consts = code
    known = map(ctx.constant, consts)
    env: dict[Var, Value] = dict(zip(compat.constvars(jaxpr), known, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Var | Literal) -> Value:
        return atom.val if isinstance(atom, Literal) else env[atom]

    ctx = dataclasses.replace(ctx, code=jaxpr)
    eqns, uses = jaxpr.eqns, {}
    if ctx.share:
        weights = [v for v, value in env.items() if isinstance(value, Weight)]
        eqns = share.weights_first(eqns, weights)
        uses = share.sites(eqns)
    shared: dict[int, Weight] = {}

    last_use: dict[Var, int] = {}
    for i, eqn in enumerate(eqns):
        last_use.update((v, i) for v in eqn.invars if isinstance(v, Var))
    last_use.update((v, -1) for v in jaxpr.outvars if isinstance(v, Var))

    for i, eqn in enumerate(eqns):
        operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if _SPECIAL.isdisjoint(map(type, operands)):
            results = _unreached(ctx, eqn, operands)
        else:
            with ctx.run.at(eqn):
                if uses and i not in shared:
                    shared |= share.products(i, eqns, uses, env, ctx.source)
                if i in shared:
                    own = shared.pop(i)
                    operands = [own if isinstance(v, Weight) else v for v in operands]
                results = evaluate(ctx, eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
        for v in eqn.invars:
            if isinstance(v, Var) and last_use[v] == i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _looked_up_first(
    ctx: Context, eqn: Equation, operands: Sequence[Value]
) -> Sequence[Value]:
    """Returns `operands`; rows that were looked up are activations where weights meet.

    Alone they stay weights, since steps that only move axes serve their factors too.
    """
    if len(operands) < 2:
        return operands
    met = [v for v in operands if isinstance(v, Weight) or _is_computed(v)]
    if len(met) < 2:
        return operands
    return [
        ctx.materialise(v, eqn) if isinstance(v, Weight) and v.is_lookup else v
        for v in operands
    ]


def _is_computed(value: Value) -> bool:
    return isinstance(value, Derived) and bool(value.paths)


def _unreached(
    ctx: Context, eqn: Equation, operands: Sequence[Value]
) -> Sequence[Value]:
    """Returns the results of an equation that no weight and no constant reaches."""
    if ctx.trail is not None and eqn.primitive.name == "jit":
        code = compat.inner_code(eqn)
        if has_only(code, CHEAP | KEPT):  # the roots of its result are inside
            with ctx.run.at(eqn):
                return interpret(ctx, code, operands)
    results = ctx.run.again(eqn, *operands)
    if ctx.trail is not None:
        ctx.trail.note(eqn, operands, results)
    if any(isinstance(v, Var) for v in eqn.invars):
        return results
    return [ctx.constant(x) for x in results]


def evaluate(ctx: Context, eqn: Equation, operands: Sequence[Value]) -> Sequence[Value]:
    """Returns the results of one equation that a weight or a constant reaches.

    Where it meets a literal, the literal is a constant too.
    """
    operands = [
        ctx.constant(atom.val) if isinstance(atom, Literal) else v
        for v, atom in zip(operands, eqn.invars, strict=True)
    ]
    if eqn.primitive.name not in SEPARATE:
        operands = _looked_up_first(ctx, eqn, operands)
    results = _by_rule(ctx, eqn, operands)
    if results is NotImplemented and any(map(is_coded, operands)):
        # The rule needs arrays. The factors may still follow it.
        operands = [ctx.widen(v, eqn) if is_coded(v) else v for v in operands]
        results = _by_rule(ctx, eqn, operands)
    if results is NotImplemented:
        results = ctx.fallback(ctx, eqn, operands)
    return results


def _by_rule(ctx: Context, eqn: Equation, operands: Sequence[Value]) -> Any:
    rule = ctx.rules.get(eqn.primitive.name)
    if rule is None or not any(map(is_special, operands)):
        return NotImplemented
    return rule(ctx, eqn, *operands)
