"""Blocks of a GGUF file as `jlora.Quantized`: the same codes, and nothing widened."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

import jlora
from jlora.quantised import pack_on_host, usual_packing

BLOCK = 32  # numbers that share a scale
# Bytes of a block: a scale of two bytes, of Q4_1 also a minimum, then the codes.
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


class Blocks(NamedTuple):
    """A quantised tensor as it lies in the file.

    Attributes:
      data: `[rows, bytes of a row]`.
      kind: a key of `BYTES`.
    """

    data: np.ndarray
    kind: str


def table(blocks: Blocks, dtype: str) -> jlora.Quantized:
    """Returns the tensor as it lies, `[rows, columns]`, with blocks along the columns.

    In Q4_1 a number is `code * scale + minimum`, with codes from 0 to 15. Those of
    `int4` stand for -8 to 7, so the minimum gets eight scales more. Q4_0 and Q8_0 have
    no minimum.

    Raises:
      ValueError: for another kind.
    """
    raw = _cut(blocks)
    scales, codes = _float16(raw, 0), raw[..., 2:]
    offset = None
    if blocks.kind == "Q8_0":
        return jlora.Quantized(
            codes.reshape(len(codes), -1).view(np.int8),
            scales,
            kind="int8",
            blocks=(1, BLOCK),
            dtype=np.dtype(dtype),
        )
    if blocks.kind == "Q4_1":
        wide = scales.astype(np.float32)
        offset, codes = _float16(raw, 2) + 8 * wide, raw[..., 4:]
    # A byte holds a code of the first half of a block and one of the second.
    codes = np.concatenate([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    how = usual_packing(codes.shape, (1, BLOCK))
    packed = pack_on_host(codes, how)
    return jlora.Quantized(
        packed, scales, offset, "int4", (1, BLOCK), np.dtype(dtype), how
    )


def kernel(blocks: Blocks, dtype: str) -> jlora.Quantized:
    """Returns `[in, out]` of a tensor `[out, in]`, with blocks along `in`."""
    q = table(blocks, dtype)
    turned = jax.tree.map(np.transpose, q)
    packing = q.packing and dataclasses.replace(q.packing, axis=-2)
    return dataclasses.replace(turned, blocks=(BLOCK, 1), packing=packing)


def _cut(blocks: Blocks) -> np.ndarray:
    """Returns `[rows, blocks, bytes]`."""
    if blocks.kind not in BYTES:
        raise ValueError(
            f"{blocks.kind} is not read as codes, only {', '.join(BYTES)} are. Widen "
            "one tensor at a time with gguf.dequantize, and give it to jlora.quantize."
        )
    return blocks.data.reshape(len(blocks.data), -1, BYTES[blocks.kind])


def _float16(raw: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(raw[..., at : at + 2]).view("<f2")[..., 0]
