"""From `fn(params, *args, **kwargs)` to a jaxpr, for any inputs and results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..quantised import Quantized, is_qarray, is_quantized, like_dense
from . import compat

_OF_QWIX = (
    "The parameters hold quantised arrays of qwix (QArray). Give the plain function "
    "jlora.from_qwix(params), which jlora computes with."
)


class Staged(NamedTuple):
    """A staged call.

    Attributes:
      code: the jaxpr; its arguments are the array leaves of the inputs.
      inputs: those leaves, some perhaps `Quantized`; the leaves of `params` come first.
      param_slots: for each leaf of `params` its position in `inputs`, or None.
      rebuild: `arrays -> fn's result`, given the jaxpr's results.
    """

    code: compat.Code
    inputs: list[Any]
    param_slots: list[int | None]
    rebuild: Callable[[Sequence[Any]], Any]


def is_array(x: Any) -> bool:
    """Returns whether `x` is traced: an array or a shape, not a Python value."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "OSU"
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct | Quantized)


def stage(
    fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Staged:
    """Stages `fn(params, *args, **kwargs)` without running it.

    `fn` sees quantised leaves as the dense arrays that they stand for. Leaves that are
    not arrays (flags, strings, functions) stay as they are, both in the
    inputs and in the result.
    """
    leaves, treedef = jax.tree.flatten((params, args, kwargs), is_leaf=is_quantized)
    slots = [i for i, x in enumerate(leaves) if is_array(x)]
    result: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for i, x in zip(slots, arrays, strict=True):
            filled[i] = x
        params, args, kwargs = treedef.unflatten(filled)
        out, result["tree"] = jax.tree.flatten(fn(params, *args, **kwargs))
        result["fixed"] = [None if is_array(x) else x for x in out]
        return [x for x in out if is_array(x)]

    inputs = [leaves[i] for i in slots]
    try:
        code = compat.stage(flat, *map(like_dense, inputs))
    except Exception as error:
        if any(map(is_qarray, jax.tree.leaves(params, is_leaf=is_qarray))):
            error.add_note(_OF_QWIX)
        raise

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        return result["tree"].unflatten(
            next(rest) if x is None else x for x in result["fixed"]
        )

    n_params = len(jax.tree.leaves(params, is_leaf=is_quantized))
    place = {slot: k for k, slot in enumerate(slots)}
    return Staged(code, inputs, [place.get(i) for i in range(n_params)], rebuild)
