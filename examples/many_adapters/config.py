"""The flags of the example."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from examples.sentiment.config import QUANTIZE


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is made of; the fields are the flags."""

    rank: int
    alpha: float
    lr: float
    steps: int
    batch_size: int
    test: int
    rows: int
    tokens: int
    dtype: str
    quantize: str
    seed: int
    out: Path
    cache: Path


def parse(argv: Sequence[str] | None = None) -> Options:
    """Returns the options in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.many_adapters",
        description="Train three adapters of SmolLM2 in one program, serve them in one "
        "batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rank", type=int, default=8, help="rank of A and B")
    add("--alpha", type=float, default=16.0, help="scale is alpha / rank")
    add("--lr", type=float, default=2e-3, help="learning rate of each adapter")
    add("--steps", type=int, default=40, help="training steps")
    add("--batch-size", type=int, default=4, help="examples a step, for each task")
    add("--test", type=int, default=32, help="held-out examples of each task")
    add("--rows", type=int, default=16, help="rows of the batch that is timed")
    add("--tokens", type=int, default=14, help="tokens to write")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the base model; adapters are float32",
    )
    add(
        "--quantize",
        choices=(*QUANTIZE, "file"),
        default="none",
        help="how the base's linear weights are stored; file: the codes of the GGUF "
        "file as they are, nothing is widened",
    )
    add("--seed", type=int, default=0, help="of adapters and data order")
    add("--out", type=Path, default=Path("runs/many_adapters"), help="results go here")
    add(
        "--cache",
        type=Path,
        default=Path(platformdirs.user_cache_dir("jlora")),
        help="downloads stay here",
    )
    return Options(**vars(parser.parse_args(argv)))
