"""jlora's codes beside those of bitsandbytes and qwix, on random blocks.

In an environment with jlora, `torch`, `bitsandbytes` and `qwix` (all run on a CPU):

    pip install -e . torch==2.13.* bitsandbytes==0.50.2 flax qwix==0.1.8
    python tests/golden/check_quantised.py [--blocks N] [--seeds N] [--write]

The first table counts, over all seeds, the codes, scales and dense numbers that are not
the same bits. The second has relative errors of weights drawn from N(0, 0.02²), mean
and spread over seeds. `--write` writes `quantised.npz`, which the tests compare with.
The exit code is 1 if a code, scale or dense number differs from bitsandbytes'.

Where numbers differ:

- qwix takes the nearest entry of the nf4 table by `argmin |entry - x|`, which rounds
  the difference. jlora and bitsandbytes compare `x` with the middles of the entries.
  A number that lies within one rounding of a middle can get the other code.
- qwix computes in the dtype of the array. With bfloat16 its `x / scale` has 8 bits, so
  that some codes are others, and the product of table entry and scale is rounded twice.
  jlora and bitsandbytes compute in float32, and round once.
- qwix divides the largest number of a block by 127.5 and 7.5, clips it to 127 and 7,
  and uses the codes -128 and -8. jlora divides by 127 and 7: the largest number is
  exact, and the codes are symmetric.
- Double quantisation: bitsandbytes stores a scale minus the mean of all as an index
  into a table of 256 numbers, in blocks of 256. jlora stores an integer of 8 bits, in
  blocks of 256 that lie along one axis of the scales.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Iterable, Sequence

import bitsandbytes
import bitsandbytes.functional as bnb
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import qwix
import torch
from qwix._src.core import qarray

from jlora._tables import table
from jlora.quantised import Quantized, Scheme, encode, repacked

GOLDEN = pathlib.Path(__file__).parent / "quantised.npz"
BLOCK, SIGMA = 64, 0.02
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
SHAPES = ((512, 512), (1024, 4096), (4096, 1024), (8192, 256))
Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, scales, dense numbers


def random(seed: int, shape: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """Returns weights drawn from N(0, 0.02²)."""
    x = np.random.default_rng(seed).normal(scale=SIGMA, size=shape)
    return x.astype(np.float32).astype(DTYPES[dtype])


def ours(x: np.ndarray, kind: str, axis: int = 1, **settings: object) -> Quantized:
    """Returns jlora's codes, a code an entry, with blocks along `axis`."""
    return repacked(encode(jnp.asarray(x), (axis,), Scheme(kind, **settings)), None)


def parts(q: Quantized) -> Found:
    """Returns codes, scales and dense numbers."""
    zero = 8 if q.kind == "int4" else 0
    codes = np.asarray(q.codes.astype(jnp.int32)) - zero
    return codes, np.asarray(q.float_scales()), np.asarray(q.dense(), np.float32)


def of_bitsandbytes(x: np.ndarray, *, double: bool = False) -> Found:
    """Returns the nf4 codes of bitsandbytes for blocks `[N, 64]`."""
    wide = torch.from_numpy(x.astype(np.float32))
    wide = wide if x.dtype == np.float32 else wide.to(torch.bfloat16)
    packed, state = bnb.quantize_4bit(
        wide, blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    dense = bnb.dequantize_4bit(packed, state).float().numpy()
    scales = state.absmax
    if double:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    pairs = packed.numpy().ravel()
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[: x.size]
    return codes.reshape(x.shape), scales.numpy().reshape(-1, 1), dense


def of_qwix(x: np.ndarray, kind: str, block: int = BLOCK, axis: int = 1) -> Found:
    """Returns the codes of qwix with blocks along `axis`."""
    how = qarray.HowToQuantize(
        qtype=kind if kind == "nf4" else jnp.dtype(kind),
        channelwise_axes=[1 - axis],
        tiled_axes={axis: block},
    )
    found = qarray.quantize(jnp.asarray(x), how)
    dense = qarray.dequantize(found)
    return (
        np.asarray(found.qvalue.astype(jnp.int32)),
        np.asarray(found.scale, np.float32),
        np.asarray(dense, np.float32),
    )


def unequal(one: Found, other: Found) -> list[int]:
    """Returns how many codes, scales and dense numbers differ, and the codes there are.

    Dense numbers are compared where the codes are equal.
    """
    same = one[0] == other[0]
    dense = int((one[2] != other[2])[same].sum())
    return [int((~same).sum()), int((one[1] != other[1]).sum()), dense, same.size]


def compare(blocks: int, seeds: int) -> tuple[str, bool]:
    """Returns the table of differences, and whether all is as in bitsandbytes."""
    counts: dict[tuple[str, str, str], np.ndarray] = {}

    def add(kind: str, dtype: str, name: str, found: Sequence[int]) -> None:
        key = (kind, dtype, name)
        counts[key] = counts.get(key, np.zeros(4, int)) + np.array(found)

    for seed in range(seeds):
        for dtype in DTYPES:
            x = random(seed, (blocks, BLOCK), dtype)
            for kind in ("nf4", "int8", "int4"):
                own = parts(ours(x, kind, block=BLOCK))
                add(kind, dtype, "qwix", unequal(own, of_qwix(x, kind)))
                if kind == "nf4":
                    theirs = of_bitsandbytes(x)
                    add(kind, dtype, "bitsandbytes", unequal(own, theirs))
    head = ("kind", "of", "beside", "codes", "scales", "dense", "codes in all")
    lines = [(*key, *(f"{n:,}" for n in found)) for key, found in counts.items()]
    same = not any(
        found[:3].any() for key, found in counts.items() if key[2] == "bitsandbytes"
    )
    return table(head, lines, right=head[3:]), same


def error(dense: np.ndarray, x: np.ndarray) -> float:
    """Returns the relative error of all numbers together."""
    return float(np.linalg.norm(dense - x) / np.linalg.norm(x))


def errors(seeds: int) -> str:
    """Returns the table of relative errors, over seeds and shapes."""

    def line(who: str, kind: str, found: Iterable[float]) -> tuple[str, ...]:
        all_ = list(found)
        mean, spread = statistics.mean(all_), statistics.pstdev(all_)
        figures = (mean, spread, min(all_), max(all_))
        return who, kind, *(f"{x:.5f}" for x in figures)

    drawn = [random(seed, shape) for seed in range(seeds) for shape in SHAPES]
    settings = {
        "nf4": {"kind": "nf4"},
        "nf4, double": {"kind": "nf4", "double": True},
        "nf4, bfloat16 scales": {"kind": "nf4", "scale_dtype": "bfloat16"},
        "int8": {"kind": "int8"},
        "int4": {"kind": "int4"},
    }
    lines = [
        line("jlora", name, (error(parts(ours(x, axis=0, **own))[2], x) for x in drawn))
        for name, own in settings.items()
    ]
    for name in ("nf4", "nf4, double"):
        double = name.endswith("double")
        found = (error(of_bitsandbytes(x, double=double)[2], x) for x in drawn)
        lines.append(line("bitsandbytes", name, found))
    for kind, block in (("nf4", 64), ("int8", 512), ("int4", 64)):
        found = (error(of_qwix(x, kind, block, axis=0)[2], x) for x in drawn)
        lines.append(line("qwix", kind, found))
    head = ("of", "kind", "mean", "spread", "least", "most")
    return table(head, lines, right=head[2:])


def golden() -> dict[str, np.ndarray]:
    """Returns blocks, as integers in units of 2^-20, and what bitsandbytes makes of it.

    Beside random blocks there are: zeros, one number, a block of one value, the
    largest number negative, and numbers at the middle of two entries of the table.
    """
    x = np.round(random(0, (40, BLOCK)) * 2**20).astype(np.int32)
    x[0], x[1], x[2] = 0, 0, 12345
    x[1, 7] = -777
    x[3] = -abs(x[3])
    entries = bnb.get_4bit_type("nf4", device="cpu").double().numpy()
    middles = (entries[1:] + entries[:-1]) / 2
    largest = 2**24 - 1
    for row, shift in ((4, -1), (5, 0), (6, 1)):
        near = np.round(middles * largest).astype(np.int32) + shift
        x[row] = np.resize(np.append(near, largest), BLOCK)
    numbers = x.astype(np.float32) / 2**20
    codes, scales, _ = of_bitsandbytes(numbers)
    return {"units": x, "codes": codes, "scales": scales.ravel()}


def main() -> None:
    """Prints the tables, and writes the golden file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args()
    versions = (bitsandbytes.__version__, torch.__version__, qwix.__version__)
    print("bitsandbytes {}, torch {}, qwix {}".format(*versions))
    print(f"\nWhat differs, of {flags.seeds} × {flags.blocks:,} blocks of {BLOCK}\n")
    text, same = compare(flags.blocks, flags.seeds)
    print(text)
    print(f"\nRelative error, {flags.seeds} seeds × {len(SHAPES)} shapes\n")
    print(errors(flags.seeds))
    if flags.write:
        np.savez_compressed(GOLDEN, **golden())
        print(f"\n{GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes")
    sys.exit(not same)


if __name__ == "__main__":
    main()
