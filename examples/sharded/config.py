"""The flags of the example: the fields of `Options`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any


def flag(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Returns a field that is a flag."""
    words = {"help": text, "choices": choices}
    return dataclasses.field(default=default, metadata=words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is made of."""

    mesh: str = flag("fsdp=-1", "axes of the mesh and their sizes; -1: what is left")
    fake_devices: int = flag(0, "count the CPU as so many, if the platform has fewer")
    distributed: bool = flag(False, "one of several processes: call it on each host")

    layers: int = flag(4, "layers of the decoder")
    width: int = flag(128, "of the residual stream")
    hidden: int = flag(384, "units of a feed-forward part")
    heads: int = flag(8, "query heads")
    kv_heads: int = flag(4, "key and value heads")
    vocab: int = flag(256, "tokens that there are")
    dtype: str = flag("float32", "of the base model", ("float32", "bfloat16"))
    quantize: str = flag("none", "how the base is stored", ("none", "nf4", "int8"))

    rank: int = flag(8, "rank of A and B")
    alpha: float = flag(16.0, "scale is alpha / rank")
    dropout: float = flag(0.0, "share of the inputs of A that is dropped")
    spread: bool = flag(False, "cut A and B over mesh axes that they leave unused")

    steps: int = flag(40, "training steps in all")
    batch: int = flag(32, "rows of a batch, over all devices")
    length: int = flag(32, "tokens of a row")
    lr: float = flag(1e-2, "learning rate")
    seed: int = flag(0, "of the weights, the adapter and the data")

    every: int = flag(10, "steps from one checkpoint to the next")
    resume: bool = flag(False, "go on from the newest checkpoint, on any mesh")
    out: str = flag("runs/sharded", "folder of the results")


def parse(argv: Sequence[str] | None = None) -> Options:
    """Returns the options in `argv`, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sharded",
        description="LoRA of a decoder that lies over the devices of a mesh.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Options):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(
                name, type=field.type, default=field.default, **field.metadata
            )
    options = Options(**vars(parser.parse_args(argv)))
    if options.width % (2 * options.heads) or options.heads % options.kv_heads:
        parser.error(
            f"--width {options.width}, --heads {options.heads}, --kv-heads "
            f"{options.kv_heads}: each head needs an even part of the width, and the "
            "key heads must divide the query heads."
        )
    return options
