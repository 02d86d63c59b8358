"""The flags of the example."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import platformdirs

QUANTIZE = ("none", "nf4", "int8")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is made of; the fields are the flags."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    method: str
    epochs: int
    steps: int | None
    batch_size: int
    lr: float
    head_lr: float
    full: bool
    full_lr: float
    dtype: str
    quantize: str
    seed: int
    resume: bool
    out: Path
    cache: Path


def parse(argv: Sequence[str] | None = None) -> Options:
    """Returns the options in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sentiment",
        description="Fine-tune MiniLM-L6 with LoRA to tell good from bad reviews.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    lora = parser.add_argument_group("adapter")
    lora.add_argument("--rank", type=int, default=8, help="rank of A and B")
    lora.add_argument("--alpha", type=float, default=16.0, help="scale is alpha / rank")
    lora.add_argument(
        "--targets",
        nargs="+",
        default=["**/attention/{query,value}/kernel"],
        metavar="GLOB",
        help="weights to adapt: globs over parameter paths, or all-linear",
    )
    lora.add_argument("--method", default="lora", help="a method of jlora")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=2, help="passes over the data")
    train.add_argument("--steps", type=int, help="stop here, for a quick look")
    train.add_argument("--batch-size", type=int, default=32, help="sentences a step")
    train.add_argument("--lr", type=float, default=1e-3, help="of the adapter")
    train.add_argument("--head-lr", type=float, default=1e-2, help="of the head")
    train.add_argument("--full", action="store_true", help="train all weights as well")
    train.add_argument("--full-lr", type=float, default=5e-5, help="for --full")
    train.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the computation; weights are float32",
    )
    train.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="none",
        help="how the frozen linear weights are stored",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and data order")

    files = parser.add_argument_group("files")
    files.add_argument("--resume", action="store_true", help="go on from --out")
    files.add_argument(
        "--out", type=Path, default=Path("runs/sentiment"), help="results go here"
    )
    files.add_argument(
        "--cache",
        type=Path,
        default=Path(platformdirs.user_cache_dir("jlora")),
        help="downloads stay here",
    )
    flags = vars(parser.parse_args(argv))
    if flags["full"] and flags["quantize"] != "none":
        parser.error("--full trains all weights, and codes cannot be trained.")
    return Options(**flags | {"targets": tuple(flags["targets"])})
