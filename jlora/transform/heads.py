"""Which linear weights are output heads: after them only biases act."""

from collections.abc import Mapping, Sequence

from . import LINEAR, compat
from .primitives import BIASES, CALLS, MAPPED_CALLS


def output_heads(code: compat.Code, paths: Sequence[str | None]) -> frozenset[str]:
    """Returns the leaves whose product meets only biases on its way to the outputs.

    Args:
      code: the staged function.
      paths: for each of its arguments the leaf's path, or None for data.
    """
    heads: set[str] = set()
    made_of = {
        var: frozenset([path])
        for var, path in zip(code.invars, paths, strict=True)
        if path is not None
    }
    for var in compat.constvars(code.jaxpr):
        made_of[var] = frozenset()
    _walk(code, made_of, [False] * len(code.outvars), heads)
    return frozenset(heads)


def _walk(
    code: compat.Code,
    made_of: dict[compat.Var, frozenset[str]],
    after: Sequence[bool | None],
    heads: set[str],
) -> Mapping[compat.Var, bool]:
    """Returns for each variable that reaches a result whether a parameter acts later.

    `made_of` has the variables that are made of parameters only; this function fills
    it. `after` has the answer for each result of `code`, None for an unused one.
    """
    for eqn in code.jaxpr.eqns:
        sources = [v for v in eqn.invars if not isinstance(v, compat.Literal)]
        if all(v in made_of for v in sources):
            union = frozenset().union(*(made_of[v] for v in sources))
            made_of.update((v, union) for v in eqn.outvars)
    acts: dict[compat.Var, bool] = {}

    def mark(var: compat.Var | compat.Literal, later: bool) -> None:
        if not isinstance(var, compat.Literal) and var not in made_of:
            acts[var] = acts.get(var, False) or later

    for var, later in zip(code.outvars, after, strict=True):
        if later is not None:
            mark(var, later)
    for eqn in reversed(code.jaxpr.eqns):
        reached = [acts[v] for v in eqn.outvars if v in acts]
        if not reached:
            continue
        params = frozenset().union(
            *(made_of.get(v, ()) for v in eqn.invars if isinstance(v, compat.Var))
        )
        if eqn.primitive.name in CALLS | MAPPED_CALLS:
            inner = compat.inner_code(eqn)
            known = {
                var: made_of[outer]
                for var, outer in zip(inner.invars, eqn.invars, strict=True)
                if isinstance(outer, compat.Var) and outer in made_of
            }
            flags = _walk(inner, known, [acts.get(v) for v in eqn.outvars], heads)
            for var, outer in zip(inner.invars, eqn.invars, strict=True):
                if var in flags:
                    mark(outer, flags[var])
            continue
        later = any(reached)
        if params and not later and eqn.primitive.name in LINEAR:
            heads |= params
        for var in eqn.invars:
            mark(var, later or bool(params and eqn.primitive.name not in BIASES))
    return acts
