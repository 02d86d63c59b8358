"""Quantised arrays in files: their tensors, and their description in the metadata.

The array of a path is `PATH.codes`, `PATH.scales` and perhaps `PATH.offset`; with
double quantisation the scales are `PATH.scales.codes` and so on. What is static stands
as JSON under one key of the metadata. Two codes of four bits share a byte.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError
from ..quantised import KINDS, Packing, Quantized, is_quantized, repacked, usual_packing
from . import tensors as tensors
from .disk import Json

KEY = "jlora_quantised"
_FIELDS = ("codes", "scales", "offset")
_MOST_AXES = 32


def parts(path: str, q: Quantized) -> dict[str, Any]:
    """Returns the arrays of a quantised array by the names of their tensors.

    Examples:
      >>> list(parts("up/kernel", Quantized(np.ones(2, np.int8), np.ones(1))))
      ['up/kernel.codes', 'up/kernel.scales']
    """
    found: dict[str, Any] = {}
    for field in _FIELDS:
        x = getattr(q, field)
        if isinstance(x, Quantized):
            found |= parts(f"{path}.{field}", x)
        elif x is not None:
            found[f"{path}.{field}"] = x
    return found


def metadata_of(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the metadata say of the quantised arrays among `shapes`."""
    fields = {path: _described(q) for path, q in shapes.items() if is_quantized(q)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return {KEY: text} if fields else {}


def _described(q: Quantized) -> Json:
    how = q.packing
    return {
        "kind": q.kind,
        "blocks": list(q.blocks),
        "dtype": np.dtype(q.dtype).name,
        "packing": None if how is None else [how.axis, how.run, how.pad],
        "scales": _described(q.scales) if is_quantized(q.scales) else None,
    }


def for_file(x: Any) -> Any:
    """Returns a quantised array with two codes of four bits in a byte; else `x`.

    That is how files hold them: no format for arrays has codes of four bits.

    Args:
      x: arrays, or shapes.
    """
    if not is_quantized(x) or KINDS[x.kind].bits != 4 or x.packing is not None:
        return x
    how = usual_packing(x.shape, [x.block(i) for i in range(x.ndim)])
    if isinstance(x.codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda q: repacked(q, how), x)
    return repacked(x, how)


def shapes_of(x: Any) -> Any:
    """Returns shape and dtype of an array, or of all arrays of a quantised one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def described_in(
    text: str | bytes, forms: Mapping[str, tensors.Form], joint: str = "."
) -> dict[str, Quantized]:
    """Returns the quantised arrays of a file, each tensor's name in its place.

    Args:
      text: the description of the quantised arrays.
      forms: dtype and shape of each tensor of the file.
      joint: what stands between a path and what the tensor is.

    Raises:
      CheckpointError: lists what is missing, or does not fit together.
    """
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise _damaged([f"it is not JSON ({error})"]) from error
    if not isinstance(fields, dict):
        raise _damaged([f"it is {fields!r:.60}"])
    found: dict[str, Quantized] = {}
    wrong: list[str] = []
    for path, about in fields.items():
        q = _rebuilt(path, about, forms, joint, wrong)
        if q is None:
            continue
        if path in forms:
            wrong.append(f"{path!r} is a tensor and a quantised array")
        found[path] = q
        wrong += [f"{path!r}: {fault}" for fault in faults(of_forms(q, forms))]
    if wrong:
        raise _damaged(wrong)
    return found


def _damaged(wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"The description of its quantised arrays is damaged: {listed(wrong, 5)}."
    )


def of_forms(q: Quantized, forms: Mapping[str, tensors.Form]) -> Quantized:
    """Returns a quantised array of names as one of shapes."""
    return jax.tree.map(
        lambda name: jax.ShapeDtypeStruct(forms[name].shape, forms[name].dtype), q
    )


def _rebuilt(
    path: str,
    about: object,
    forms: Mapping[str, tensors.Form],
    joint: str,
    wrong: list[str],
    nested: bool = False,
) -> Quantized | None:
    """Returns the array that `about` describes, of names; None and notes in `wrong`."""
    match about:
        case {
            "kind": str(kind),
            "blocks": [*blocks],
            "dtype": str(name),
            "packing": how,
            "scales": scales,
            **rest,
        } if not rest and len(blocks) <= _MOST_AXES and _are_ints(blocks):
            pass
        case _:
            wrong.append(f"{path!r:.100} is described by {about!r:.100}")
            return None
    dtype = next((d for d in tensors.NAMES if d.name == name), None)
    if kind not in KINDS:
        wrong.append(f"{path!r} is of the unknown kind {kind!r:.40}")
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        wrong.append(f"{path!r} stands for an array of {name!r:.40}")
    match how:
        case None:
            own = None
        case [int(axis), int(run), int(pad)] if _are_ints([axis, run, pad]):
            own = Packing(axis, run, pad)
        case _:
            wrong.append(f"{path!r} is packed as {how!r:.60}")
            return None
    named: dict[str, Any] = {f: f"{path}{joint}{f}" for f in _FIELDS}
    if named["offset"] not in forms:
        named["offset"] = None
    if scales is not None:
        if nested:
            wrong.append(f"{path!r} is quantised more than twice")
            return None
        named["scales"] = _rebuilt(named["scales"], scales, forms, joint, wrong, True)
    absent = [x for x in named.values() if isinstance(x, str) and x not in forms]
    wrong += [f"tensor {x!r:.100} is missing" for x in absent]
    odd = kind not in KINDS or dtype is None or named["scales"] is None
    if absent or odd:
        return None
    return Quantized(**named, kind=kind, blocks=tuple(blocks), dtype=dtype, packing=own)


def _are_ints(values: list[Any]) -> bool:
    return all(type(n) is int and -(2**31) < n < 2**31 for n in values)


def faults(q: Quantized) -> list[str]:
    """Returns in words what of a quantised array, of shapes, does not fit together."""
    kind, how, ndim = KINDS[q.kind], q.packing, len(q.codes.shape)
    if len(q.blocks) != ndim or min(q.blocks, default=0) < 1:
        return [f"blocks {q.blocks} for {ndim} axes"]
    want = kind.dtype
    if how is not None:
        n = q.codes.shape[how.axis] if -ndim <= how.axis < 0 else 0
        whole = how.run > 0 and how.pad in (0, 1) and n > 0 and n % how.run == 0
        if kind.bits != 4 or not whole:
            return [f"codes {list(q.codes.shape)} packed as {dataclasses.astuple(how)}"]
        want = "uint8"
    found = []
    if q.codes.dtype.name != want:
        found.append(f"codes of {q.codes.dtype}, {q.kind} has {want}")
    counts = [-(-n // block) for n, block in zip(q.shape, q.blocks, strict=True)]
    for field in ("scales", "offset"):
        x = getattr(q, field)
        if x is None:
            continue
        shape = tuple(x.shape)
        fits = len(shape) == ndim and all(
            n in (1, count) for n, count in zip(shape, counts, strict=True)
        )
        if not fits:
            found.append(f"{field} {list(shape)}, blocks {q.blocks} need {counts}")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            found.append(f"{field} of {x.dtype}")
    if not found and isinstance(q.scales, Quantized):
        found += [f"its scales: {fault}" for fault in faults(q.scales)]
    return found
