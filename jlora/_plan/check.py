"""Makes a plan say what `apply_lora` does, where the trace does not tell."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..factors import Axes, Spec
from ..methods import method_of
from ..quantised import is_quantized
from ..transform import compat
from ..transform.discover import FACTORED, MERGED, WIDENED, Use
from ..transform.rewrite import rewrite
from ..transform.stage import Staged
from ..transform.values import Weight, leaf
from .row import Row
from .weight import adapted_leaf


def check_routes(
    rows: Sequence[Row], staged: Staged, slots: Mapping[str, int], dtype: str
) -> tuple[Row, ...]:
    """Returns `rows`; what is adapted has the routes that `apply_lora` takes.

    The trace finds uses before anybody knows which leaves get factors, over which axes.
    Where that decides, the function is rewritten once more, on shapes, with the factors
    that the plan is for.

    Args:
      rows: of a resolved plan.
      staged: the function.
      slots: for each leaf that is an array its position in the function's inputs.
      dtype: dtype of the factors.
    """
    adapted = {row.path: row.spec for row in rows if row.spec}
    if not any(map(_is_doubtful, rows)):
        return tuple(rows)
    merges, factored = _taken(adapted, staged, slots, dtype)
    return tuple(
        _with_uses(row, merges.get(row.path, {}), row.path in factored)
        if row.path in adapted
        else row
        for row in rows
    )


def _is_doubtful(row: Row) -> bool:
    if row.spec is None:
        return False
    axes, has_gain = row.spec.axes, method_of(row.spec).gain is not None
    return has_gain or any(
        use.route not in (FACTORED, WIDENED)
        or use.doubtful
        or (use.route == FACTORED and not _has_axes(use, axes))
        for use in row.uses
    )


def _has_axes(use: Use, axes: Axes) -> bool:
    """Returns whether `use` sums over the fan-in or the fan-out, batch by batch."""
    sides = {frozenset(use.fan_in), frozenset(use.fan_out)}
    same = sides == {frozenset(axes.fan_in), frozenset(axes.fan_out)}
    return same and set(use.batch) == set(axes.batch)


def _taken(
    adapted: Mapping[str, Spec], staged: Staged, slots: Mapping[str, int], dtype: str
) -> tuple[dict[str, dict[Use, None]], set[str]]:
    """Returns where `apply_lora` merges or widens leaves, and those that it factors."""
    found: dict[str, dict[Use, None]] = {}
    factored: set[str] = set()

    def used(weight: Weight, *_: Any, **__: Any) -> None:
        factored.update(part.path for part in weight.parts)

    def noting(route: str) -> Callable[[str, compat.Equation | None], None]:
        def note(path: str, eqn: compat.Equation | None) -> None:
            op, where, scope = ("return", "", "") if eqn is None else compat.marked(eqn)
            use = Use(path, op, route, (), (), (), where, scope)
            found.setdefault(path, {})[use] = None

        return note

    def run(inputs: Sequence[Any], parts: Mapping[str, Any]) -> list[jax.Array]:
        values = [
            leaf(f"argument {i}", x) if is_quantized(x) else x
            for i, x in enumerate(inputs)
        ]
        for path, own in parts.items():
            slot = slots[path]
            values[slot] = adapted_leaf(path, inputs[slot], adapted[path], *own)
        hooks = {"merged": noting(MERGED), "widened": noting(WIDENED), "used": used}
        return rewrite(staged.code, values, key=None, form="factored", **hooks)

    parts = {
        path: _parts(spec, staged.inputs[slots[path]].shape, dtype)
        for path, spec in adapted.items()
    }
    jax.eval_shape(run, list(staged.inputs), parts)
    return found, factored


def _parts(spec: Spec, shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    """Returns the shapes of A, B and the gain, None if the method has none."""
    axes, gain = spec.axes, None
    if method_of(spec).gain is not None:
        of_columns = tuple(shape[i] for i in (*axes.batch, *axes.fan_out))
        gain = jax.ShapeDtypeStruct(of_columns, jnp.dtype(dtype))
    a = jax.ShapeDtypeStruct(axes.a_shape(shape, spec.rank), jnp.dtype(dtype))
    b = jax.ShapeDtypeStruct(axes.b_shape(shape, spec.rank), jnp.dtype(dtype))
    return a, b, gain


def _with_uses(row: Row, merges: Mapping[Use, None], factored: bool) -> Row:
    """Returns `row` with its factored uses, if it has some, and `merges`."""
    assert row.spec is not None
    kept = [
        use
        for use in row.uses
        if use.route == FACTORED and (factored or use.op == "gather")
    ]
    if factored and not kept:  # a product that the trace took for another leaf's
        axes = row.spec.axes
        roles = {"batch": axes.batch, "fan_in": axes.fan_in, "fan_out": axes.fan_out}
        kept = [dataclasses.replace(row.uses[0], route=FACTORED, **roles)]
    return dataclasses.replace(row, uses=(*kept, *merges))
