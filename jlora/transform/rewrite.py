"""Running code with factors: what `apply_lora` does at each equation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import RULES, compat
from .compat import Equation
from .cost import Form
from .interpret import Context, interpret
from .values import Value, Weight, dense


def rewrite(
    code: compat.Code,
    values: Sequence[Value],
    *,
    key: jax.Array | None,
    form: Form,
    merged: Callable[[str, str], object],
) -> list[jax.Array]:
    """Evaluates `code` with weights among `values`, and returns plain arrays.

    Args:
      code: the staged function.
      values: its arguments; adapted ones are `Weight`s.
      key: PRNG key of dropout, or None.
      form: how to compute a product, see `cost`.
      merged: called with `(path, why)` for each weight merged on the fly.
    """

    def materialise(value: Any, eqn: Equation | None) -> jax.Array:
        if not isinstance(value, Weight):
            return value
        if not value.is_lookup:
            for part in value.parts:
                merged(part.path, _why(eqn))
        return dense(value)

    ctx = Context(
        rules=RULES,
        materialise=materialise,
        key=key,
        hoist=True,
        form=form,
        share=key is None,  # with dropout each weight meets an activation of its own
    )
    return [materialise(v, None) for v in interpret(ctx, code, values)]


def _why(eqn: Equation | None) -> str:
    if eqn is None:
        return "it is returned by the function"
    return f"`{eqn.primitive.name}`{compat.place(eqn)} has no factored rule for it"
