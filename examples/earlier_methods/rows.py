"""The rows of every table: which method, and what differs from the common settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

from . import methods
from .methods import Method
from .task import DECODER, ENCODER

RATES = (4e-5, 2e-4, 1e-3, 5e-3, 2.5e-2)
LORA_RATES = RATES[2:]  # at lower rates LoRA changes nothing in so few steps
SEEDS = (0, 1, 2)
HEAD_RATE = 1e-2
LORA = "LoRA, rank 8"
FULL = "full fine-tuning"
ALL = "layers/{query,key,value,output,up,down}/kernel"
DECODER_ALL = (ALL, "layers/gate/kernel")
ATTENTION = "layers/{query,key,value,output}/kernel"
MLP = "layers/{up,down}/kernel"
_ALL = (
    "methods",
    "weights",
    "alpha",
    "rank",
    "epochs",
    "batch",
    "data",
    "start",
    "base",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to fine-tune, and the settings it is tuned in.

    Attributes:
      make: makes the method.
      tables: in which tables the row stands.
      task: `"encoder"` or `"decoder"`.
      steps: optimizer steps.
      size: examples a step.
      examples: how many to learn from.
      base: how the frozen linear weights are stored; `"float32"`, or a kind of
        `jlora.quantize`.
      head_rate: the head's learning rate; None is the tuned one.
      rates: the learning rates that are tried; None is those of all rows.
    """

    make: Callable[[], Method]
    tables: tuple[str, ...]
    task: str = ENCODER
    steps: int = 40
    size: int = 16
    examples: int = 640
    base: str = "float32"
    head_rate: float | None = HEAD_RATE
    rates: tuple[float, ...] | None = None


def _lora(*tables: str, **changes: Any) -> Row:
    own = {k: v for k, v in changes.items() if k not in _FIELDS}
    fields = {k: v for k, v in changes.items() if k in _FIELDS}
    if "methods" not in tables:
        fields["rates"] = LORA_RATES
    return Row(lambda: methods.lora(**own), tables, **fields)


_FIELDS = {field.name for field in dataclasses.fields(Row)}


def _writes(make: Callable[[], Method]) -> Row:
    return Row(
        make,
        ("methods",),
        DECODER,
        steps=20,
        size=4,
        examples=256,
        head_rate=None,
        rates=RATES[1:],
    )


ENCODER_ROWS = {
    "head only": Row(methods.head_only, ("methods",), rates=(HEAD_RATE,)),
    LORA: _lora(*_ALL),
    FULL: Row(methods.full, ("methods", "data")),
    "adapters, Houlsby": Row(lambda: methods.houlsby(8), ("methods",)),
    "adapters, Pfeiffer": Row(lambda: methods.pfeiffer(16), ("methods",)),
    "prefix": Row(lambda: methods.prefix(16), ("methods",)),
    "prompt": Row(lambda: methods.prompt(16), ("methods",)),
    "BitFit": Row(methods.bitfit, ("methods",)),
    "IA3": Row(methods.ia3, ("methods",)),
    "DoRA, rank 8": Row(methods.dora, ("methods",)),
    "LoRA, rank 1": _lora("rank", rank=1),
    "LoRA, rank 64": _lora("rank", "alpha", rank=64),
    "rsLoRA, rank 64": _lora("rank", "alpha", rank=64, rslora=True),
    "all linear, rank 2": _lora("weights", rank=2, targets=ALL),
    "alpha 64, rank 64": _lora("alpha", rank=64, alpha=64),
    "PiSSA": _lora("start", init="pissa"),
    "base in nf4": _lora("base", base="nf4"),
    "rank 1, 160 sentences": _lora("data", rank=1, examples=160, steps=20),
    "rank 64, 160 sentences": _lora("data", rank=64, examples=160, steps=20),
    "batches of 32": _lora("batch", size=32, steps=20),
    "base in int8": _lora("base", base="int8"),
    "attention, rank 4": _lora("weights", rank=4, targets=ATTENTION),
    "2 epochs": _lora("epochs", steps=80),
    "batches of 8": _lora("batch", size=8, steps=80),
    "rank 1, 1920 sentences": _lora("data", rank=1, examples=1920, steps=120),
    "rank 64, 1920 sentences": _lora("data", rank=64, examples=1920, steps=120),
    "alpha 8, rank 8": _lora("alpha", alpha=8),
    "MLP, rank 3": _lora("weights", rank=3, targets=MLP),
    "queries, rank 16": _lora("weights", rank=16, targets="layers/query/kernel"),
    "LoRA, rank 16": _lora("rank", rank=16),
    "rsLoRA, rank 1": _lora("rank", rank=1, rslora=True),
    "orthogonal": _lora("start", init="orthogonal"),
    "OLoRA": _lora("start", init="olora"),
    "full, 160 sentences": Row(methods.full, ("data",), examples=160, steps=20),
    "full, 1920 sentences": Row(methods.full, ("data",), examples=1920, steps=120),
    "prefix, reparametrised": Row(lambda: methods.through(16, 96), ("methods",)),
}
DECODER_ROWS = {
    LORA: _writes(lambda: methods.lora(head=False)),
    "LoRA, all linear, rank 8": _writes(
        lambda: methods.lora(head=False, targets=DECODER_ALL)
    ),
    "LoRA, all linear, rank 2": _writes(
        lambda: methods.lora(2, 4, head=False, targets=DECODER_ALL)
    ),
    FULL: _writes(lambda: methods.full(("layers/**", "norm"))),
    "adapters, Houlsby": _writes(lambda: methods.houlsby(6)),
    "prefix": _writes(lambda: methods.prefix(16)),
    "prompt": _writes(lambda: methods.prompt(16)),
    "IA3": _writes(methods.ia3),
    "adapters, Pfeiffer": _writes(lambda: methods.pfeiffer(13)),
    "DoRA, rank 8": _writes(lambda: methods.dora(head=False)),
    "prefix, reparametrised": _writes(lambda: methods.through(16, 96)),
}
ROWS = {ENCODER: ENCODER_ROWS, DECODER: DECODER_ROWS}
TABLES = sorted({t for rows in ROWS.values() for r in rows.values() for t in r.tables})
