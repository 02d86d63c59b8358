"""Running code with factors: what `apply_lora` does at each equation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..factors import Form
from . import RULES, compat
from .compat import Equation
from .gate import no_gate
from .interpret import Context, interpret
from .shards import varied_axes
from .trail import Trail
from .values import Value, Weight, array_of, dense, is_coded


def rewrite(
    code: compat.Code,
    values: Sequence[Value],
    *,
    key: jax.Array | None,
    gate: jax.Array | None = None,
    form: Form,
    merged: Callable[[str, Equation | None], object],
    widened: Callable[[str, Equation | None], object],
    used: Callable[..., None] = lambda *_, **__: None,
) -> list[jax.Array]:
    """Evaluates `code` with weights among `values`, and returns plain arrays.

    Args:
      code: the staged function.
      values: its arguments; adapted ones are `Weight`s.
      key: PRNG key of dropout, or None.
      gate: multiplies the low-rank term of each token, or None.
      form: how to compute a product, see `cost`.
      merged: called with `(path, eqn)` for each weight merged on the fly; `eqn` is None
        where it is returned.
      widened: called with `(path, eqn)` for each quantised weight that `eqn` needs as
        an array.
      used: called for each use that is factored, see `Context`.
    """

    def materialise(value: Any, eqn: Equation | None) -> jax.Array:
        if not isinstance(value, Weight):
            return value
        if not value.is_lookup:
            if gate is not None and value.terms:
                raise no_gate(value, eqn, "is needed as a merged array")
            for part in value.parts:
                if is_coded(value):
                    widened(part.path, eqn)
                if value.terms:
                    merged(part.path, eqn)
        return dense(value)

    def widen(weight: Weight, eqn: Equation) -> Value:
        if not weight.is_lookup:
            for part in weight.parts:
                widened(part.path, eqn)
        w = array_of(weight)
        return weight.replace(w=w) if weight.terms else w

    arrays = [_any_array(v) for v in values]
    varies = {}
    if key is not None and any(map(compat.varying_axes, [*arrays, *code.consts])):
        varies = varied_axes(code, list(map(compat.varying_axes, arrays)))
    ctx = Context(
        rules=RULES,
        materialise=materialise,
        widen=widen,
        used=used,
        key=key,
        gate=gate,
        varies=varies,
        hoist=True,
        form=form,
        # With dropout, or a gate, each weight meets an activation of its own.
        share=key is None and gate is None,
        trail=Trail() if compat.is_staging(values) else None,
    )
    return [materialise(v, None) for v in interpret(ctx, code, values)]


def _any_array(value: Any) -> jax.Array:
    """Returns the frozen array, or the codes that stand for it."""
    return value.w.q.codes if is_coded(value) else array_of(value)


def why_widened(eqn: Equation | None) -> str:
    """Returns in words why the quantised weight that `eqn` needs is widened whole."""
    if eqn is None:
        return "it is returned by the function"
    return f"`{eqn.primitive.name}`{compat.place(eqn)} needs the whole array"


def why_merged(eqn: Equation | None) -> str:
    """Returns in words why the weight that `eqn` needs is merged."""
    if eqn is None:
        return "it is returned by the function"
    return f"`{eqn.primitive.name}`{compat.place(eqn)} has no factored rule for it"
