"""Quantised arrays of qwix, which keeps a value and a scale, as `Quantized`.

References:
  https://github.com/google/qwix
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tables import listed
from ..errors import TreeError
from ._kinds import KINDS
from ._node import Quantized
from ._pack import pack, usual_packing

_KINDS = {"int8": "int8", "int4": "int4", "nf4": "nf4", "float8_e4m3fn": "float8_e4m3"}


def is_qarray(x: object) -> bool:
    """Returns whether `x` is a quantised array of qwix, by itself or in its box.

    Examples:
      >>> is_qarray(3)
      False
    """
    of_qwix = type(x).__module__.partition(".")[0] == "qwix"
    return of_qwix and (
        hasattr(x, "qvalue") or hasattr(getattr(x, "array", 0), "qvalue")
    )


def from_qwix(params: Any) -> Any:
    """Returns `params` with `Quantized` in place of qwix's `QArray`s.

    Nothing is rounded: code and scale are multiplied in float32. The result is for the
    plain function of the model, which qwix was given too, through `jlora.apply_lora`.

    Args:
      params: any pytree, such as `qwix.quantize_params` returns.

    Raises:
      TreeError: lists the arrays of a type that jlora does not have.

    Examples:
      >>> import jlora
      >>> jlora.from_qwix({"bias": 3})
      {'bias': 3}
    """
    wrong: list[str] = []

    def convert(keys: Any, x: Any) -> Any:
        if not is_qarray(x):
            return x
        q = x if hasattr(x, "qvalue") else x.array
        fault = _fault(q)
        if fault:
            wrong.append(f"{jax.tree_util.keystr(keys)} {fault}")
        return x if fault else _converted(q)

    out = jax.tree_util.tree_map_with_path(convert, params, is_leaf=is_qarray)
    if wrong:
        raise TreeError(
            f"These arrays of qwix have no form in jlora: {listed(wrong, 5)}. Widen "
            "them with qwix.dequantize, and quantise them with jlora.quantize."
        )
    return out


def _fault(q: Any) -> str:
    kind = _name(q)
    if kind not in _KINDS:
        return f"is of type {kind}"
    zero = q.zero_point
    if zero is not None and zero.shape != q.scale.shape:
        return "has other blocks for zero points than for scales"
    return ""


def _name(q: Any) -> str:
    return q.qtype if isinstance(q.qtype, str) else np.dtype(q.qtype).name


def _converted(q: Any) -> Quantized:
    kind = _KINDS[_name(q)]
    counts = q.scale.shape
    blocks = tuple(n // count for n, count in zip(q.qvalue.shape, counts, strict=True))
    codes, how, offset = q.qvalue, None, None
    if KINDS[kind].bits == 4:
        shift = 8 if kind == "int4" else 0
        how = usual_packing(codes.shape, blocks)
        codes = pack((codes.astype(jnp.int8) + shift).astype(jnp.uint8), how)
    if q.zero_point is not None:
        wide = q.zero_point.astype(jnp.float32)
        offset = -wide * q.scale.astype(jnp.float32)
    return Quantized(codes, q.scale, offset, kind, blocks, np.dtype(q.scale.dtype), how)
