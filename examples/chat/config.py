"""The flags of the example."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from examples.sentiment.config import QUANTIZE

DEFAULT_STEPS = 20  # on the default data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is made of; the fields are the flags."""

    model: Path | None = None
    dtype: str | None = None
    quantize: str = "none"
    mesh: str = ""
    fake_devices: int = 0
    remat: bool = False

    data: Path | None = None
    test_data: Path | None = None
    held_out: int | None = None
    length: int = 512
    template: Path | None = None
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    rank: int = 8
    alpha: float = 16.0
    method: str = "lora"
    targets: tuple[str, ...] = ("all-linear",)
    train: tuple[str, ...] = ()

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 2
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    eval_every: int = 0
    save_every: int = 20
    seed: int = 0

    out: Path = Path("runs/chat")
    resume: bool = False
    restart: bool = False
    merged: bool = True
    tensorboard: bool = False
    samples: int = 4
    tokens: int = 32
    cache: Path = Path(platformdirs.user_cache_dir("jlora"))

    def settings(self) -> dict[str, Any]:
        """Returns what a run that goes on must have in common with its beginning."""
        fields = dataclasses.asdict(self)
        return {name: str(fields[name]) for name in fields if name not in _MAY_CHANGE}


_MAY_CHANGE = {
    *("mesh", "fake_devices", "remat", "eval_every", "save_every", "out", "resume"),
    *("restart", "merged", "tensorboard", "samples", "tokens", "cache"),
}


def parse(argv: Sequence[str] | None = None) -> Options:
    """Returns the options in `argv`, by default those of the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m examples.chat",
        description="Fine-tune a language model of the Hub on conversations with LoRA, "
        "and write a PEFT directory. Without --model and --data SmolLM2-135M learns "
        "to write headlines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for name, more in flags.items():
            default = getattr(defaults, name)
            flag = f"--{name.replace('_', '-')}"
            if isinstance(default, bool):
                more = more | {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag, default=default, **more)
    found = vars(parser.parse_args(argv))
    lists = {name: tuple(found[name]) for name in ("targets", "train")}
    options = Options(**found | lists)
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: Options) -> str:
    """Returns what cannot work together, in words; empty if all can."""
    if options.batch_size % options.accumulate:
        return (
            f"--accumulate {options.accumulate} does not divide --batch-size "
            f"{options.batch_size}: it is how many parts a batch is computed in."
        )
    if options.resume and options.restart:
        return "--resume goes on, --restart deletes: choose one."
    if options.quantize != "none" and options.train:
        return "--train needs weights that are not quantised: leave out --quantize."
    return ""


def _number(kind: type, lowest: float) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    read.__name__ = kind.__name__  # argparse names it in errors
    return read


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'write {{"name": value}}, got {text}')
    return found


_COUNT, _NATURAL, _REAL = _number(int, 1), _number(int, 0), _number(float, 0)
_PATH = {"type": Path, "metavar": "PATH"}
_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "model": {
        "model": {**_PATH, "help": "Hub directory; none is SmolLM2-135M-Instruct"},
        "dtype": {
            "choices": ["float32", "bfloat16"],
            "help": "of the base; none is float32 on a CPU, bfloat16 elsewhere",
        },
        "quantize": {"choices": QUANTIZE, "help": "how linear weights are stored"},
        "mesh": {"help": "devices, as in fsdp=4,tensor=2; empty is one"},
        "fake_devices": {"type": _NATURAL, "help": "count the CPU as so many devices"},
        "remat": {"help": "compute layers again in the backward pass: less memory"},
    },
    "data": {
        "data": {**_PATH, "help": "JSON lines; none is BBC headlines"},
        "test_data": {**_PATH, "help": "JSON lines to measure on; none holds some out"},
        "held_out": {
            "type": _COUNT,
            "help": "conversations held out of --data; none is a tenth, at most 64",
        },
        "length": {"type": _COUNT, "help": "tokens of a row; longer ones are cut"},
        "template": {**_PATH, "help": "chat template (Jinja) instead of the model's"},
        "template_args": {
            "type": _json_object,
            "metavar": "JSON",
            "help": 'arguments of the chat template, as {"enable_thinking": false}',
        },
    },
    "adapter": {
        "rank": {"type": _COUNT, "help": "rank of A and B"},
        "alpha": {"type": float, "help": "scale is alpha / rank"},
        "method": {"help": "a method of jlora"},
        "targets": {
            "nargs": "+",
            "metavar": "GLOB",
            "help": "what to adapt: names such as q_proj, globs over paths, all-linear",
        },
        "train": {
            "nargs": "*",
            "metavar": "GLOB",
            "help": "what to train in full: names such as norm, or globs over paths",
        },
    },
    "training": {
        "steps": {
            "type": _COUNT,
            "help": f"training steps; none is --epochs of --data, or {DEFAULT_STEPS} "
            "on the default data",
        },
        "epochs": {"type": _REAL, "help": "passes over the data"},
        "batch_size": {"type": _COUNT, "help": "rows a step"},
        "accumulate": {"type": _COUNT, "help": "parts a batch is computed in"},
        "lr": {"type": _REAL, "help": "highest learning rate"},
        "warmup": {"type": _REAL, "help": "share of the steps until it is reached"},
        "schedule": {"choices": ["cosine", "linear", "constant"], "help": "after that"},
        "clip": {"type": _REAL, "help": "largest norm of a gradient"},
        "weight_decay": {"type": _REAL, "help": "of A and B"},
        "eval_every": {"type": _NATURAL, "help": "steps; 0 is only before and after"},
        "save_every": {"type": _COUNT, "help": "steps between checkpoints"},
        "seed": {"type": _NATURAL, "help": "of adapter, data order and held-out part"},
    },
    "results": {
        "out": {**_PATH, "help": "results and checkpoints go here"},
        "resume": {"help": "go on from the last checkpoint in --out"},
        "restart": {"help": "delete the checkpoints in --out"},
        "merged": {"help": "write the merged model, too"},
        "tensorboard": {"help": "write metrics for TensorBoard (needs tensorboardX)"},
        "samples": {"type": _NATURAL, "help": "held-out prompts to answer"},
        "tokens": {"type": _COUNT, "help": "tokens of such an answer at most"},
        "cache": {**_PATH, "help": "downloads stay here"},
    },
}
