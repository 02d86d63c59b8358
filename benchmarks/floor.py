"""What does a LoRA training step cost beside the frozen model's floor?"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax

import jlora

from . import common, models

# What a default run covers: kind, width, layers, dtype, rank.
DEFAULT = (
    ("linen", 256, 4, "float32", 8),
    ("linen", 512, 4, "float32", 8),
    ("linen", 1024, 2, "float32", 8),
    ("linen", 2048, 2, "float32", 8),
    ("nnx", 1024, 2, "float32", 8),
    ("scan", 512, 4, "float32", 8),
    ("conv", 256, 4, "float32", 8),
    ("linen", 512, 4, "bfloat16", 8),
    ("linen", 512, 4, "float32", 4),
    ("linen", 512, 4, "float32", 64),
    ("linen", 1024, 2, "float32", 4),
    ("linen", 1024, 2, "float32", 64),
    ("linen", 1024, 2, "bfloat16", 8),
)
LAYERS = {256: 4, 512: 4, 1024: 2, 2048: 2}


def training(model: models.Model, rank: int, rounds: int) -> list[common.Figures]:
    """Returns a row for each training step."""
    steps = common.training_steps(model, rank)
    return [
        {"step": name, **own} for name, own in common.measure(steps, rounds).items()
    ]


def inference(model: models.Model, rank: int, rounds: int) -> common.Figures:
    """Returns whether merged parameters give the base's program, and times."""
    params, (x, _) = common.example(model)
    # As a checkpoint is restored: `merge` places weights too, and the HLO says so.
    params = jax.device_put(params, jax.devices()[0])
    trainable = common.filled(common.adapter(model, params, x, rank))
    merged = jlora.merge(params, trainable)
    programs = {
        "base": compiled(model.apply, params, x),
        "merged": compiled(model.apply, merged, x),
        "unmerged": compiled(jlora.apply_lora(model.apply), params, trainable, x),
    }
    args = {"base": (params, x), "unmerged": (params, trainable, x)}
    runs = {name: functools.partial(programs[name], *own) for name, own in args.items()}
    return {
        "same_program": unnamed(programs["base"]) == unnamed(programs["merged"]),
        "seconds": common.interleaved(runs, rounds),
    }


def compiled(fn: Any, *args: Any) -> Any:
    """Returns `fn` compiled for `args`, each time from the start."""
    return jax.jit(lambda *args: fn(*args)).lower(*args).compile()


def unnamed(program: Any) -> str:
    """Returns a program's optimised HLO with names numbered as they come."""
    text = re.sub(r", metadata=\{[^}]*\}", "", program.as_text())
    text = text.partition("\n\nFileNames")[0]  # tables of source lines
    numbers: dict[str, str] = {}
    return re.sub(
        r"%?[A-Za-z_][\w.-]*\.\d+",
        lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"),
        text,
    )


def columns(rows: Sequence[common.Figures]) -> common.Columns:
    """Returns the rows of one model for a table, with multiples of the floor."""
    floor = common.row_of(rows, common.FLOOR)
    units = {
        "GFLOP": ("flops", 1e9),
        "GB moved": ("bytes", 1e9),
        "temp MiB": ("temp_bytes", 2**20),
        "peak MiB": ("peak_bytes", 2**20),
        "optimizer MiB": ("optimizer_bytes", 2**20),
    }
    head = ("step", "ms", "× floor", *units, "temp × floor")
    lines = [
        (
            row["step"],
            common.fixed(row.get("seconds"), 0, 1e-3),
            common.ratio(row, floor, "seconds"),
            *(common.fixed(row[field], 2, unit) for field, unit in units.values()),
            common.ratio(row, floor, "temp_bytes"),
        )
        for row in rows
    ]
    return head, lines


def label(case: common.Figures) -> str:
    """Returns what a model is, in words."""
    return (
        f"{case['kind']}, width {case['width']}, {case['layers']} layers, "
        f"{case['dtype']}, rank {case['rank']}"
    )


def cases(options: argparse.Namespace) -> list[tuple[str, models.Size, int]]:
    """Returns the models that the flags ask for, and their ranks."""
    if options.kind or options.width or options.dtype or options.rank:
        chosen = [
            (kind, width, options.layers or LAYERS.get(width, 2), dtype, rank)
            for kind in options.kind or ("linen",)
            for width in options.width or (512,)
            for dtype in options.dtype or ("float32",)
            for rank in options.rank or (8,)
        ]
    else:
        chosen = DEFAULT
    size = models.Size(batch=options.batch, length=options.length)
    return [
        (kind, dataclasses.replace(size, width=width, layers=layers, dtype=dtype), rank)
        for kind, width, layers, dtype, rank in chosen
    ]


def main() -> None:
    """Compares the steps on each model, and inference beside."""
    parser = common.parser("floor", __doc__)
    parser.add_argument("--kind", nargs="*", choices=models.KINDS)
    parser.add_argument("--width", nargs="*", type=int)
    parser.add_argument("--dtype", nargs="*", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", nargs="*", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10, help="0: do not time")
    options = parser.parse_args()
    found = []
    for kind, size, rank in cases(options):
        model = models.KINDS[kind](size)
        rows = training(model, rank, options.rounds)
        use = inference(model, rank, options.rounds)
        case = {"kind": kind, "rank": rank, **dataclasses.asdict(size)}
        print(f"\n{label(case)}\n{common.show(columns(rows))}")
        print(f"merged: {'the' if use['same_program'] else 'NOT the'} base's HLO")
        if use["seconds"]:
            ratio = use["seconds"]["unmerged"] / use["seconds"]["base"]
            print(f"unmerged inference: {ratio:.2f} × base", flush=True)
        found.append({"case": case, "training": rows, "inference": use})
        # After each, so that a run that is cut short is not lost.
        common.write(options.json, common.environment(), cases=found)


if __name__ == "__main__":
    main()
