"""Which linear weights are output heads: after them only biases act.

A path that derivatives do not take does not count: the token that `argmax` picks from
the logits goes into the embedding of the next step of a decode loop, and the weight
that gives the logits is still a head.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .._numerics import is_inexact
from . import LINEAR, compat
from .control import source
from .primitives import BIASES, CALLS, MAPPED_CALLS


class Way(NamedTuple):
    """How a value reaches the results.

    Attributes:
      bare: whether it reaches one without meeting a parameter, other than a bias.
      acts: whether a parameter acts on it later.
    """

    bare: bool = False
    acts: bool = False

    def either(self, other: "Way") -> "Way":
        """Returns how two values together reach the results."""
        return Way(self.bare or other.bare, self.acts or other.acts)


_NEITHER = Way()

Known = dict[compat.Var, frozenset[str]]
Ways = dict[compat.Var, Way]


def output_heads(code: compat.Code, paths: Sequence[str | None]) -> frozenset[str]:
    """Returns the leaves whose product meets only biases on its way to the outputs.

    Args:
      code: the staged function.
      paths: for each of its arguments the leaf's path, or None for data.
    """
    made_of = {
        var: frozenset([path])
        for var, path in zip(code.invars, paths, strict=True)
        if path is not None
    }
    _, heads = _walk(code, made_of, [Way(bare=True)] * len(code.outvars))
    return heads


def _walk(
    code: compat.Code, made_of: Known, after: Sequence[Way]
) -> tuple[Ways, frozenset[str]]:
    """Returns the way of each variable of `code` to the results, and the heads in it.

    `made_of` has the variables that are made of parameters only. `after` has the ways
    of the results of `code`.
    """
    made_of = _made_of_parameters(code, made_of)
    ways: Ways = {}
    heads: frozenset[str] = frozenset()

    def mark(var: compat.Var | compat.Literal, way: Way) -> None:
        if isinstance(var, compat.Literal) or var in made_of:
            return
        if not _has_derivative(var):
            way = way._replace(acts=False)
        ways[var] = way.either(ways[var]) if var in ways else way

    for var, way in zip(code.outvars, after, strict=True):
        mark(var, way)
    for eqn in reversed(code.jaxpr.eqns):
        reached = [ways.get(v, _NEITHER) for v in eqn.outvars]
        if not any(map(any, reached)):
            continue
        if eqn.primitive.name in _INSIDE:
            before, found = _INSIDE[eqn.primitive.name](eqn, made_of, reached)
        else:
            before, found = _through(eqn, made_of, _union(reached))
        heads |= found
        for var, way in zip(eqn.invars, before, strict=True):
            mark(var, way)
    return ways, heads


def _has_derivative(var: compat.Var) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and is_inexact(dtype)


def _made_of_parameters(code: compat.Code, made_of: Known) -> Known:
    """Returns `made_of` and what `code` computes from it and from constants only."""
    made_of = dict(made_of)
    made_of.update((var, frozenset()) for var in compat.constvars(code.jaxpr))
    for eqn in code.jaxpr.eqns:
        sources = [v for v in eqn.invars if not isinstance(v, compat.Literal)]
        known = [made_of[v] for v in sources if v in made_of]
        if len(known) == len(sources):
            union = frozenset().union(*known)
            made_of.update((v, union) for v in eqn.outvars)
    return made_of


def _union(ways: Iterable[Way]) -> Way:
    return functools.reduce(Way.either, ways)


Before = tuple[Sequence[Way], frozenset[str]]  # the operands' ways, and the heads


def _through(eqn: compat.Equation, made_of: Known, way: Way) -> Before:
    """Returns the ways through one operation whose result has `way`."""
    own = [made_of[v] for v in eqn.invars if isinstance(v, compat.Var) and v in made_of]
    params = frozenset().union(*own)
    name = eqn.primitive.name
    is_head = name in LINEAR and way.bare and not way.acts
    if params and name not in BIASES:
        way = Way(acts=True)
    return [way] * len(eqn.invars), params if is_head else frozenset()


def _called(eqn: compat.Equation, made_of: Known, after: Sequence[Way]) -> Before:
    """Returns the ways through code that runs once on the equation's operands."""
    code = compat.inner_code(eqn)
    ways, heads = _walk(code, _inside(code.invars, eqn.invars, made_of), after)
    return [ways.get(var, Way()) for var in code.invars], heads


def _scanned(eqn: compat.Equation, made_of: Known, after: Sequence[Way]) -> Before:
    """Returns the ways through `scan`, whose carries meet the next step too."""
    n_consts, n_carry = compat.scan_counts(eqn)
    ways, heads = _looped(
        compat.inner_code(eqn), eqn.invars, made_of, after, n_consts, n_carry
    )
    return ways, heads


def _while(eqn: compat.Equation, made_of: Known, after: Sequence[Way]) -> Before:
    """Returns the ways through the body of `while`; its condition has no derivative."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body = compat.inner_code(eqn, "body_jaxpr")
    own = eqn.invars[n_cond:]
    ways, heads = _looped(body, own, made_of, after, n_body, len(after))
    return [Way()] * n_cond + list(ways), heads


def _looped(
    body: compat.Code,
    operands: Sequence[compat.Var | compat.Literal],
    made_of: Known,
    after: Sequence[Way],
    n_consts: int,
    n_carry: int,
) -> Before:
    """Returns the ways through the body of a loop: those of any number of steps."""
    known = _inside(body.invars, operands, made_of)
    carry = body.invars[n_consts : n_consts + n_carry]
    for i, var in enumerate(carry):
        if source(body.jaxpr, i) != n_consts + i:
            known.pop(var, None)  # only what is handed on as it is stays a parameter
    after = list(after)
    while True:
        ways, heads = _walk(body, known, after)
        again = [
            w.either(ways.get(v, Way())) for v, w in zip(carry, after, strict=False)
        ]
        if again == after[:n_carry]:
            return [ways.get(var, Way()) for var in body.invars], heads
        after[:n_carry] = again


def _branched(eqn: compat.Equation, made_of: Known, after: Sequence[Way]) -> Before:
    """Returns the ways through all branches; the index has no derivative."""
    totals = [Way()] * (len(eqn.invars) - 1)
    heads: frozenset[str] = frozenset()
    for closed in eqn.params["branches"]:
        code = compat.code(closed)
        known = _inside(code.invars, eqn.invars[1:], made_of)
        ways, found = _walk(code, known, after)
        pairs = zip(totals, code.invars, strict=True)
        totals = [total.either(ways.get(var, Way())) for total, var in pairs]
        heads |= found
    return [Way(), *totals], heads


def _inside(
    inner: Sequence[compat.Var],
    outer: Sequence[compat.Var | compat.Literal],
    made_of: Mapping[compat.Var, frozenset[str]],
) -> Known:
    """Returns the arguments of inner code that are made of parameters only."""
    return {
        var: made_of[v]
        for var, v in zip(inner, outer, strict=True)
        if isinstance(v, compat.Var) and v in made_of
    }


_INSIDE = {
    **dict.fromkeys(CALLS | MAPPED_CALLS, _called),
    "cond": _branched,
    "scan": _scanned,
    "while": _while,
}
