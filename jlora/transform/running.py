"""What rules run on: arrays, or only types of arrays.

A rule is written once, and reaches JAX through a `Run`. On types nothing is bound or
traced, since the types of an equation's results stand in the code. So finding out how a
function uses its weights takes no second trace.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import compat
from .alike import bind_again
from .coded import Coded
from .compat import Equation, result_types, shaped
from .values import Value, Weight

Fun = Callable[..., Any]


class Run(NamedTuple):
    """How equations run, and the functions that stand for the code inside them.

    Attributes:
      at: `eqn -> context` in which the rule of `eqn` works.
      bind: `(eqn, *values) -> results`, inside `at`.
      again: the same for an equation that is bound as it was, with its own `at`.
      stages: whether a `jit` on these values stays one; else it is inlined.
      jit: `(eqn, fun) -> fun` as the `jit` that `eqn` is.
      checkpoint: `(eqn, fun) -> fun` as the `jax.checkpoint` that `eqn` is.
      scan: `(eqn, body, init, xs) -> (carry, ys)`.
      while_loop: `(goes_on, step, start) -> state`.
      while_loop_of_each: the same where every example has its own predicate.
      switch: `(index, branches, *operands) -> results`.
      apply: `(fun, *values) -> result`, where `fun` computes with arrays.
    """

    at: Callable[[Equation], AbstractContextManager[None]]
    bind: Callable[..., list[Any]]
    again: Callable[..., list[Any]]
    stages: Callable[[Sequence[Value]], bool]
    jit: Callable[[Equation, Fun], Fun]
    checkpoint: Callable[[Equation, Fun], Fun]
    scan: Callable[[Equation, Fun, Any, Any], tuple[Any, Any]]
    while_loop: Callable[[Fun, Fun, Any], Any]
    while_loop_of_each: Callable[[Fun, Fun, Any], Any]
    switch: Callable[..., Any]
    apply: Callable[..., Any]


def _again(eqn: Equation, *values: Value) -> list[Any]:
    with compat.traced_as(eqn), eqn.ctx.manager:
        return bind_again(eqn, *values)


def _jit(eqn: Equation, fun: Fun) -> Fun:
    """`jax.jit` with the name and shardings of `eqn`."""
    ins, outs = compat.call_shardings(eqn)

    def inner(key: jax.Array | None, *values: Value) -> list[Value]:
        placed = [_place(v, s) for v, s in zip(values, ins, strict=True)]
        results = fun(key, *placed)
        return [_place(v, s) for v, s in zip(results, outs, strict=True)]

    inner.__name__ = compat.call_name(eqn)
    return jax.jit(inner)


def _place(value: Value, sharding: jax.sharding.Sharding | None) -> Value:
    if sharding is None:
        return value
    if isinstance(value, Weight):
        if isinstance(value.w, Coded):
            return value  # codes stay where they are
        return value.replace(w=lax.with_sharding_constraint(value.w, sharding))
    return lax.with_sharding_constraint(value, sharding)


def _checkpoint(eqn: Equation, fun: Fun) -> Fun:
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(fun, policy=policy, prevent_cse=prevent_cse)


def _scan(eqn: Equation, body: Fun, init: Any, xs: Any) -> tuple[Any, Any]:
    settings = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    return lax.scan(body, init, xs, **settings)


def _while_loop_of_each(goes_on: Fun, step: Fun, start: Any) -> Any:
    """A loop whose `(key, state)` has a predicate for each example.

    An example that has stopped stays so. With dropout its next predicate might hold.
    """

    def step_of_each(loop: Any) -> Any:
        (key, state), runs = loop
        key, new = step((key, state))
        kept = jax.tree.map(lambda new, old: _where(runs, new, old), new, state)
        return (key, kept), runs & goes_on((key, kept))

    init = (start, goes_on(start))
    return lax.while_loop(lambda loop: jnp.any(loop[1]), step_of_each, init)[0]


def _where(holds: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new` where `holds`, which has the first axes of both, else `old`."""
    spread = lax.broadcast_in_dim(holds, new.shape, range(holds.ndim))
    return lax.select(spread, new, old)


ON_ARRAYS = Run(
    at=compat.at,
    bind=compat.bind,
    again=_again,
    stages=compat.is_staging,
    jit=_jit,
    checkpoint=_checkpoint,
    scan=_scan,
    while_loop=lax.while_loop,
    while_loop_of_each=_while_loop_of_each,
    switch=lax.switch,
    apply=lambda fun, *values: fun(*values),
)


def _once(eqn: Equation, fun: Fun) -> Fun:
    """Runs `fun` at the first call only: code that is called twice is read once."""
    results = []

    def run(*values: Value) -> Any:
        if not results:
            results.append(fun(*values))
        return results[0]

    return run


def _one_step(eqn: Equation, body: Fun, init: Any, xs: Any) -> tuple[Any, Any]:
    carry, ys = body(init, jax.tree.map(lambda x: shaped(x.shape[1:], x.dtype), xs))
    types = result_types(eqn)[len(carry) :]
    return carry, [None if y is None else t for y, t in zip(ys, types, strict=True)]


def _both(goes_on: Fun, step: Fun, start: Any) -> Any:
    goes_on(start)
    return step(start)


def _every(index: Any, branches: Sequence[Fun], *operands: Any) -> Any:
    first, *_ = [branch(*operands) for branch in branches]
    return first


ON_TYPES = Run(
    at=compat.Inside,
    bind=lambda eqn, *_: result_types(eqn),
    again=lambda eqn, *_: result_types(eqn),
    stages=lambda _: True,
    jit=_once,
    checkpoint=lambda _, fun: fun,
    scan=_one_step,
    while_loop=_both,
    while_loop_of_each=_both,
    switch=_every,
    apply=compat.types_of,
)
