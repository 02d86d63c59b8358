"""The driver: evaluates a jaxpr in which some values are weights with factors."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import compat, share
from .cost import Form
from .values import Derived, Weight

Rule = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What rules need besides the values; one for each staging.

    Attributes:
      rules: a rule by primitive name. A rule takes `(ctx, eqn, *values)` and returns
        the list of results, or NotImplemented to leave the equation to `fallback`.
      used: told of every linear use of a weight:
        `(weight, op, fan_in atoms, batch atoms, eqn)`, of a product also its forms.
      fallback: `(ctx, eqn, values) -> results` where no rule holds.
      materialise: `(value, eqn) -> array`, the plain array of a weight, recorded.
      constant: `array -> value`, what the code closes over, or computes from that.
      hoist: whether a weight that a loop would merge is merged before the loop.
      form: how to compute a product, see `cost`.
      share: whether weights that meet the same activation share a product with it.
      key: PRNG key of dropout, or None.
      sites: numbers the uses of the key.
      calls: functions already rewritten, so that a `jit` called twice stays one.
    """

    rules: Mapping[str, Rule]
    used: Callable[..., None]
    fallback: Callable[["Context", Any, Sequence[Any]], list[Any]]
    materialise: Callable[[Any, Any], Any]
    constant: Callable[[Any], Any] = lambda x: x
    hoist: bool = False
    form: Form = "auto"
    share: bool = False
    key: Any = None
    sites: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    calls: dict = dataclasses.field(default_factory=dict)

    def next_key(self) -> Any:
        """Returns a key for one more place that draws random numbers, or None."""
        if self.key is None:
            return None
        return jax.random.fold_in(self.key, next(self.sites))

    def drops(self, rate: float) -> bool:
        """Returns whether `drop` at `rate` changes anything."""
        return self.key is not None and rate != 0

    def drop(self, x: Any, rate: float) -> Any:
        """Returns `x` with entries dropped at `rate`, the others scaled up for it.

        Without a key nothing is dropped.
        """
        if not self.drops(rate):
            return x
        kept = jax.random.bernoulli(self.next_key(), 1 - rate, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))

    def within(self, key: Any) -> "Context":
        """Returns the context for code that is traced apart, with its own key."""
        return dataclasses.replace(self, key=key, sites=itertools.count(), calls={})


def is_special(value: Any) -> bool:
    """Returns whether a rule has to look at `value`."""
    return isinstance(value, Weight | Derived)


def interpret(ctx: Context, code: compat.Code, values: Sequence[Any]) -> list[Any]:
    """Evaluates `code` on `values` and returns its results, weights among them.

    Equations that no weight reaches are bound again as they are. Source lines, name
    stacks and equation contexts are those of `code`.
    """
    jaxpr, consts = code
    known = map(ctx.constant, consts)
    env: dict[Any, Any] = dict(zip(compat.constvars(jaxpr), known, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, compat.Literal) else env[atom]

    eqns, uses = jaxpr.eqns, {}
    if ctx.share:
        weights = [v for v, value in env.items() if isinstance(value, Weight)]
        eqns = share.weights_first(eqns, weights)
        uses = share.sites(eqns)
    shared: dict[int, Weight] = {}

    last_use = {}
    for i, eqn in enumerate(eqns):
        last_use.update((v, i) for v in eqn.invars if isinstance(v, compat.Var))
    for v in jaxpr.outvars:
        if isinstance(v, compat.Var):
            last_use.pop(v, None)

    for i, eqn in enumerate(eqns):
        operands = [read(v) for v in eqn.invars]
        with compat.at(eqn):
            if uses and i not in shared:
                shared |= share.products(i, eqns, uses, env)
            if i in shared:
                own = shared.pop(i)
                operands = [own if isinstance(v, Weight) else v for v in operands]
            results = evaluate(ctx, eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
        for v in eqn.invars:
            if isinstance(v, compat.Var) and last_use.get(v) == i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def evaluate(ctx: Context, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Returns the results of one equation."""
    if not any(map(is_special, operands)):
        results = compat.bind(eqn, *operands)
        if any(isinstance(v, compat.Var) for v in eqn.invars):
            return results
        return [ctx.constant(x) for x in results]
    rule = ctx.rules.get(eqn.primitive.name)
    results = NotImplemented if rule is None else rule(ctx, eqn, *operands)
    if results is NotImplemented:
        results = ctx.fallback(ctx, eqn, operands)
    return results
