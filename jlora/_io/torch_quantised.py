"""Quantised weights as libraries for torch write them, read as `Quantized`.

bitsandbytes' 4 bits (blocks over the flat weight), its 8 bits (a scale a row), and
float8 with scales for blocks, rows or the whole. Other formats are refused by name.

References:
  https://huggingface.co/docs/bitsandbytes
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tables import listed
from .._text.json_text import parse_json
from ..errors import CheckpointError
from ..quantised import NF4, Quantized, pack_on_host, packing
from . import tensors as tensors
from .shards import Slot
from .torch_models import Facts, scale_beside

_STATE = ".quant_state.bitsandbytes__"
_FLOAT8 = np.dtype(jnp.float8_e4m3fn)
_MAX_STATE = 100_000  # bytes of JSON
# What tensors are called that only one format has, and what it is called. `{}` stands
# for the weight's module, or for the weight.
_OTHERS = {
    "{}.g_idx": "GPTQ",
    "{}.qweight": "AWQ",
    "{}.weight_scale_2": "NVFP4",
    "{}.weight_packed": "compressed-tensors",
    "{}_blocks": "MXFP4",
    "{}.W_q": "HQQ",
}
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "mxfp4": "MXFP4", "aqlm": "AQLM"}
REMEDY = (
    "Load the model in full precision, or have the library that wrote it widen it "
    "(`model.dequantize()` in transformers) and save it; jlora.quantize and "
    "`jlora quantize` quantise that"
)


class Leaf(NamedTuple):
    """A quantised weight.

    Attributes:
      form: `Quantized` of shapes, or a shape if it is read dense.
      read: returns it, on the host.
      tensors: the names of its tensors but the first.
      widened: why it is read dense, if it is.
    """

    form: Any
    read: Callable[[], Any]
    tensors: tuple[str, ...]
    widened: str = ""


class _UnfitError(ValueError):
    """The tensors of a weight are not what their format says."""


def tell_widened(widened: Collection[str], then: str) -> None:
    """Warns of weights whose codes have no form in jlora; `then` says what happens."""
    if widened:
        warnings.warn(
            "These weights are quantised in a way that jlora.Quantized does not have: "
            f"{listed(widened, 5, ', ')}. {then}.",
            stacklevel=3,
        )


def has_scales(names: Collection[str]) -> bool:
    """Returns whether any tensor is of a quantised weight, by the names."""
    ends = tuple(name.rpartition("}")[2] for name in _OTHERS)
    return any(n.endswith(ends) or scale_beside(n, names) for n in names)


def found_in(
    slots: Mapping[str, Slot], facts: Facts
) -> tuple[dict[str, Leaf], dict[str, str]]:
    """Returns the quantised weights among tensors, and in words which are not read.

    Args:
      slots: the tensors by name.
      facts: what the model's `config.json` says.
    """
    found: dict[str, Leaf] = {}
    refused: dict[str, str] = {}
    for name, format_ in _of_others(slots, facts).items():
        refused[name] = f"{name} is quantised as {format_}, which jlora does not read"
    dtype = _dtype_of_others(slots, facts)
    for name in slots:
        scale = scale_beside(name, slots)
        if scale is None or name in refused:
            continue
        try:
            leaf = _leaf(name, scale, slots, facts, dtype)
        except (_UnfitError, CheckpointError) as error:
            refused[name] = f"{name} is quantised, its scale is {scale}: {error}"
            continue
        if leaf is None:
            refused[name] = (
                f"{name} is quantised, its scale is {scale}, in a format that jlora "
                "does not read"
            )
        else:
            found[name] = leaf
    return found, {name: f"{why}. {REMEDY}" for name, why in refused.items()}


def _of_others(slots: Mapping[str, Slot], facts: Facts) -> dict[str, str]:
    """Returns the weights of formats that are refused, each with its format."""
    found: dict[str, str] = {}
    for pattern, format_ in _OTHERS.items():
        end = pattern.removeprefix("{}")
        for name in slots:
            if name.endswith(end):
                module = name.removesuffix(end)
                weight = module if end[0] == "_" else f"{module}.weight"
                own = _NAMES.get(facts.quantised, format_)
                found.setdefault(weight, own)
    return found


def _dtype_of_others(slots: Mapping[str, Slot], facts: Facts) -> np.dtype:
    """Returns the dtype of a model whose quantised weights do not say theirs.

    That is what its config says, or the dtype of most of its other tensors.
    """
    for dtype in tensors.NAMES:
        if dtype.name == facts.dtype and jnp.issubdtype(dtype, jnp.floating):
            return dtype
    counts: dict[np.dtype, int] = {}
    for name, slot in slots.items():
        wide = slot.dtype.itemsize >= 2 and jnp.issubdtype(slot.dtype, jnp.floating)
        if wide and name.endswith((".weight", ".bias")):
            counts[slot.dtype] = counts.get(slot.dtype, 0) + 1
    return max(counts, key=lambda d: counts[d], default=np.dtype("float32"))


def _leaf(
    name: str, scale: str, slots: Mapping[str, Slot], facts: Facts, dtype: np.dtype
) -> Leaf | None:
    slot = slots[name]
    state = next((f"{name}{_STATE}{t}" for t in ("nf4", "fp4")
                  if f"{name}{_STATE}{t}" in slots), None)  # fmt: skip
    if state is not None:
        return _four_bits(name, state, slots)
    if slot.dtype == np.int8 and scale.endswith("SCB"):
        return _eight_bits(name, scale, slots, dtype)
    if slot.dtype == _FLOAT8 and scale.endswith(("weight_scale_inv", "weight_scale")):
        return _float8(name, scale, slots, facts, dtype)
    return None


# --- bitsandbytes, 4 bits ---


class _State(NamedTuple):
    """What bitsandbytes says of a weight of 4 bits."""

    kind: str
    block: int
    dtype: np.dtype
    shape: tuple[int, ...]
    nested_block: int | None
    nested_offset: float


def _four_bits(name: str, state_name: str, slots: Mapping[str, Slot]) -> Leaf:
    state = _state(slots[state_name])
    size = math.prod(state.shape)
    own = ["absmax", "quant_map"]
    if state.nested_block is not None:
        own += ["nested_absmax", "nested_quant_map"]
    names = {end: f"{name}.{end}" for end in own}
    absent = [x for x in names.values() if x not in slots]
    if absent:
        raise _UnfitError(f"{absent[0]} is missing")
    codes, absmax = slots[name], slots[names["absmax"]]
    n_bytes = math.prod(codes.shape) * codes.dtype.itemsize
    if n_bytes != -(-size // 2):
        raise _UnfitError(f"{n_bytes} bytes do not hold {list(state.shape)} codes")
    if math.prod(absmax.shape) != -(-size // state.block):
        raise _UnfitError(
            f"{names['absmax']} is {list(absmax.shape)}, blocks of {state.block} in "
            f"{list(state.shape)} need {-(-size // state.block)}"
        )
    if math.prod(slots[names["quant_map"]].shape) != 16:
        raise _UnfitError(f"{names['quant_map']} does not have 16 numbers")
    read = functools.partial(_read_four_bits, name, names, state, slots)
    told = (*names.values(), state_name)
    blocks = _blocks(state.shape, state.block)
    if state.kind != "nf4" or blocks is None:
        why = state.kind if state.kind != "nf4" else f"blocks of {state.block}"
        form = jax.ShapeDtypeStruct(state.shape, state.dtype)
        return Leaf(form, read, told, f"{name} ({why} in {list(state.shape)})")
    return Leaf(_form(state, blocks), read, told)


def _form(state: _State, blocks: tuple[int, ...]) -> Quantized:
    how = packing(-1, state.shape[-1])
    in_bytes = (*state.shape[:-1], (state.shape[-1] + how.pad) // 2)
    counts = tuple(-(-n // b) for n, b in zip(state.shape, blocks, strict=True))
    return Quantized(
        jax.ShapeDtypeStruct(in_bytes, np.uint8),
        jax.ShapeDtypeStruct(counts, np.float32),
        None,
        "nf4",
        blocks,
        state.dtype,
        how,
    )


def _read_four_bits(
    name: str, names: Mapping[str, str], state: _State, slots: Mapping[str, Slot]
) -> Any:
    size = math.prod(state.shape)
    packed = np.frombuffer(tensors.raw(slots[name].read()), np.uint8)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]
    table = slots[names["quant_map"]].read().reshape(-1).astype(np.float32)
    scales = _absmax(names, state, slots)
    blocks = _blocks(state.shape, state.block)
    if state.kind == "nf4" and not np.allclose(table, NF4, rtol=0, atol=1e-7):
        raise CheckpointError(f"{names['quant_map']} is not the table of nf4.")
    if state.kind != "nf4" or blocks is None:
        wide = table[codes] * np.repeat(scales, state.block)[:size]
        return wide.reshape(state.shape).astype(state.dtype)
    form = _form(state, blocks)
    how = packing(-1, state.shape[-1])
    codes = pack_on_host(codes.reshape(state.shape), how)
    return dataclasses.replace(
        form, codes=codes, scales=scales.reshape(form.scales.shape)
    )


def _absmax(
    names: Mapping[str, str], state: _State, slots: Mapping[str, Slot]
) -> np.ndarray:
    """Returns the scale of each block as float32; quantised ones are widened."""
    absmax = slots[names["absmax"]].read().reshape(-1)
    if state.nested_block is None:
        return absmax.astype(np.float32)
    table, second = (
        slots[names[end]].read().reshape(-1).astype(np.float32)
        for end in ("nested_quant_map", "nested_absmax")
    )
    if absmax.dtype != np.uint8 or table.size != 256:
        raise CheckpointError(f"{names['absmax']} is not of 256 codes.")
    if second.size != -(-absmax.size // state.nested_block):
        raise CheckpointError(f"{names['nested_absmax']} has {second.size} numbers.")
    wide = table[absmax] * np.repeat(second, state.nested_block)[: absmax.size]
    return wide + np.float32(state.nested_offset)


def _state(slot: Slot) -> _State:
    """Returns what the JSON in a tensor says."""
    if slot.dtype != np.uint8 or math.prod(slot.shape) > _MAX_STATE:
        raise _UnfitError("its quant_state is not a text")
    try:
        fields = parse_json(bytes(tensors.raw(slot.read())))
    except ValueError as error:
        raise _UnfitError(f"its quant_state is not JSON ({error})") from error
    match fields:
        case {
            "quant_type": "nf4" | "fp4" as kind,
            "blocksize": int(block),
            "dtype": str(name),
            "shape": [*shape],
        } if block > 0 and shape and all(type(n) is int and n > 0 for n in shape):
            dtypes = {d.name: d for d in tensors.NAMES if d.itemsize > 1}
            if not jnp.issubdtype(dtypes.get(name, np.dtype("int8")), jnp.floating):
                raise _UnfitError(f"it stands for an array of {name!r:.40}")
        case _:
            raise _UnfitError(f"its quant_state is {fields!r:.100}")
    nested, offset = fields.get("nested_blocksize"), fields.get("nested_offset", 0.0)
    if not (nested is None or (type(nested) is int and nested > 0)):
        raise _UnfitError(f"its nested blocks have {nested!r:.40} codes")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise _UnfitError(f"its nested offset is {offset!r:.40}")
    return _State(kind, block, dtypes[name], tuple(shape), nested, float(offset))


def _blocks(shape: Sequence[int], block: int) -> tuple[int, ...] | None:
    """Returns the lengths along each axis of blocks over the flat array.

    The result is None where a block ends within a row and goes on in the next one.

    Examples:
      >>> _blocks((8, 128), 64), _blocks((8, 32), 64), _blocks((8, 96), 64)
      ((1, 64), (2, 32), None)
    """
    found = [1] * len(shape)
    for i in reversed(range(len(shape))):
        outermost = math.prod(shape[:i]) == 1
        if block >= shape[i]:
            if block % shape[i] and not outermost:
                return None
            found[i], block = shape[i], max(block // shape[i], 1)
        else:
            if shape[i] % block and not outermost:
                return None
            found[i], block = block, 1
    return tuple(found)


# --- bitsandbytes, 8 bits; float8 ---


def _eight_bits(
    name: str, scale: str, slots: Mapping[str, Slot], dtype: np.dtype
) -> Leaf:
    codes, rows = slots[name], slots[scale]
    if len(codes.shape) != 2 or math.prod(rows.shape) != codes.shape[0]:
        raise _UnfitError(f"{list(rows.shape)} scales for {list(codes.shape)}")
    tried = (f"{end}weight_format" for end in (f"{name}.", name.removesuffix("weight")))
    layout = tuple(x for x in tried if x in slots)
    if layout and slots[layout[0]].read().any():
        raise _UnfitError("its codes do not lie in rows")
    blocks = (1, codes.shape[1])
    form = Quantized(
        jax.ShapeDtypeStruct(codes.shape, np.int8),
        jax.ShapeDtypeStruct((codes.shape[0], 1), np.float32),
        None,
        "int8",
        blocks,
        dtype,
    )

    def read() -> Quantized:
        scales = rows.read().astype(np.float32).reshape(-1, 1) / np.float32(127)
        return dataclasses.replace(form, codes=codes.read(), scales=scales)

    return Leaf(form, read, (scale, *layout))


def _float8(
    name: str, scale: str, slots: Mapping[str, Slot], facts: Facts, dtype: np.dtype
) -> Leaf:
    codes, held = slots[name], slots[scale]
    if not jnp.issubdtype(held.dtype, jnp.floating):
        raise _UnfitError(f"the scales are {held.dtype}")
    ndim = len(codes.shape)
    counts = held.shape
    if math.prod(counts) == 1:
        counts = (1,) * ndim
    elif len(counts) == 1 and counts[0] == codes.shape[0]:
        counts = (counts[0], *(1 for _ in codes.shape[1:]))
    usual = (*(1 for _ in codes.shape[:-2]), *facts.block)[-ndim:] if ndim else ()
    blocks = [_block(*three) for three in zip(codes.shape, counts, usual, strict=False)]
    if ndim < 2 or len(counts) != ndim or None in blocks:
        raise _UnfitError(
            f"{list(held.shape)} scales for {list(codes.shape)}, in blocks of "
            f"{list(facts.block)}"
        )
    form = Quantized(
        jax.ShapeDtypeStruct(codes.shape, _FLOAT8),
        jax.ShapeDtypeStruct(counts, np.float32),
        None,
        "float8_e4m3",
        tuple(blocks),
        dtype,
    )

    def read() -> Quantized:
        scales = held.read().astype(np.float32).reshape(counts)
        return dataclasses.replace(form, codes=codes.read(), scales=scales)

    # Of the activations; jlora computes these in their own dtype.
    inputs = name.removesuffix("weight") + "input_scale"
    return Leaf(form, read, (scale, *([inputs] if inputs in slots else [])))


def _block(n: int, count: int, usual: int) -> int:
    """Returns the length of blocks along an axis of `n` entries and `count` scales.

    It is 0 if there is none.
    """
    if count == -(-n // usual):
        return min(n, usual)
    return n if count == 1 else 1 if count == n else 0
