"""What peers share: shapes, weights, factors, batches, timing, and the line they print.

Needs only NumPy. A peer is a script beside this file, so it writes `import common`.

The model is a decoder in float32: token and position embeddings, `layers` blocks of
RMSNorm, causal attention with heads of 64 (`q`, `k`, `v`, `o`), RMSNorm and a gelu MLP
(`w1`, `w2`), a last RMSNorm, and the token embedding again as the head. LoRA goes on
the six matrices of each block at a scale of 1; all else is frozen. AdamW trains it to
predict the next token.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 1024
HEAD = 64
MATRICES = ("q", "k", "v", "o", "w1", "w2")
EPSILON = 1e-6  # of RMSNorm
ADAMW = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
WEIGHT_DECAY = 0.01
WARM_UP = 3  # steps that are not timed
BATCHES = 4  # different ones, used in turn

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a run; the same sizes always give the same numbers."""

    width: int = 512
    layers: int = 4
    rank: int = 8
    batch: int = 4
    length: int = 128
    steps: int = 15

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Returns the shapes `(fan in, fan out)` of a block's matrices."""
        d = self.width
        square = dict.fromkeys(("q", "k", "v", "o"), (d, d))
        return {**square, "w1": (d, 4 * d), "w2": (4 * d, d)}

    def weights(self) -> Tree:
        """Returns the pretrained weights: nested dicts of float32 arrays."""
        rng = np.random.default_rng(0)

        def normal(shape: tuple[int, ...], scale: float) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) * np.float32(scale)

        ones = np.ones(self.width, np.float32)
        tree: Tree = {
            "embed": normal((VOCAB, self.width), 0.02),
            "position": normal((self.length, self.width), 0.02),
            "norm": ones,
        }
        for i in range(self.layers):
            tree[f"layer{i}"] = {"norm1": ones, "norm2": ones} | {
                name: normal(shape, shape[0] ** -0.5)
                for name, shape in self.shapes().items()
            }
        return tree

    def factors(self) -> Tree:
        """Returns the first A (random) and B (zero) of each matrix."""
        rng = np.random.default_rng(1)

        def pair(fan_in: int, fan_out: int) -> Tree:
            a = rng.standard_normal((fan_in, self.rank), np.float32)
            return {
                "a": a * np.float32(fan_in**-0.5),
                "b": np.zeros((self.rank, fan_out), np.float32),
            }

        return {
            f"layer{i}": {name: pair(*shape) for name, shape in self.shapes().items()}
            for i in range(self.layers)
        }

    def tokens(self) -> np.ndarray:
        """Returns the batches, `[BATCHES, batch, length + 1]`."""
        shape = (BATCHES, self.batch, self.length + 1)
        return np.random.default_rng(2).integers(0, VOCAB, shape, np.int32)


def find_factor(factors: Tree, path: str) -> np.ndarray:
    """Returns the A or B that a library keeps under `path`, whatever it calls it.

    Examples:
      >>> factors = {"layer0": {"q": {"a": "A", "b": "B"}}}
      >>> find_factor(factors, "['layer0_q']['kernel_lora_b']")
      'B'
    """
    found = re.search(
        rf"(layer\d+)[\W_]+({'|'.join(MATRICES)})(?=\W).*[\W_]([abAB])(?=\W|$)", path
    )
    if not found:
        raise ValueError(f"{path} is not the path of a factor of layer<i>, <matrix>.")
    layer, name, side = found.groups()
    return factors[layer][name][side.lower()]


def measure(step: Callable[[Any], float], batches: Iterable[Any], steps: int) -> Tree:
    """Returns medians over `steps` steps, and the losses of all from the first.

    `step` trains on one batch and gives its loss once all the work is done.
    """
    batches = list(batches)
    wall, cpu, losses = [], [], []
    for i in range(WARM_UP + steps):
        start, start_cpu = time.perf_counter(), time.process_time()
        losses.append(step(batches[i % len(batches)]))
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start)
    return {
        "step_ms": 1e3 * statistics.median(wall[WARM_UP:]),
        "cpu_ms": 1e3 * statistics.median(cpu[WARM_UP:]),
        "losses": losses,
    }


def read_flags() -> Problem:
    """Returns the sizes given on the command line."""
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(Problem):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    return Problem(**vars(parser.parse_args()))


def report(packages: Iterable[str], figures: Tree) -> None:
    """Prints the line that the runner reads; the script's name is the peer's."""
    peer = Path(sys.argv[0]).stem.removeprefix("peer_")
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"peer": peer, "versions": versions, **figures}))
