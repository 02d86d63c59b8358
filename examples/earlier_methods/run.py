"""Trains rows: the rate chosen on the validation part, seeds measured on the test."""

import datetime
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jlora

from . import sweep
from .methods.lora import config
from .rows import Row
from .task import Task

RESULTS = Path(__file__).parent / "results"
FURTHER = 3  # rates beyond the grid
Figures = dict[str, Any]


class Tried(NamedTuple):
    """A trained member: its rate, what the validation part says, losses, and trees."""

    rate: float
    loss: float
    score: float
    curve: np.ndarray
    trained: Any


def run(
    name: str,
    row: Row,
    task: Task,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Figures:
    """Returns the figures of a row.

    The first seed trains at each rate, in one program, and at further ones while the
    best is at an end of the grid. The rate with the lowest validation loss is kept, and
    the other seeds train at that rate, in another program. The test part is read only
    then, once for each seed.
    """
    began = time.perf_counter()
    method, params = row.make(), stored(task, row.base)
    plan = sweep.Plan(row.examples, row.steps, row.size, row.head_rate)
    first, rest = seeds[0], list(seeds[1:])

    def train(rates: Sequence[float], seeds: Sequence[int]) -> tuple[Any, list[Tried]]:
        frozen, members, losses = sweep.train(
            task, method, params, plan, rates, seeds, name=name
        )
        loss, score = sweep.evaluate(task, method, frozen, members, task.validation)
        each = zip(rates, _list(loss), _list(score), losses.T, strict=True)
        return frozen, [
            Tried(*own, sweep.select(members, i)) for i, own in enumerate(each)
        ]

    rates = row.rates or rates
    frozen, tried = train(rates, [first] * len(rates))
    while further := next_rate(tried, len(rates)):
        tried = sorted([*tried, *train([further], [first])[1]], key=lambda t: t.rate)
    best = lowest(tried)
    kept = [best, *(train([best.rate] * len(rest), rest)[1] if rest else ())]
    members = sweep.join(*(own.trained for own in kept))
    test_loss, test_score = sweep.evaluate(task, method, frozen, members, task.test)
    return {
        "row": name,
        "task": task.name,
        "trained": sum(x.size for x in jax.tree.leaves(best.trained)),
        "settings": settings(row, rates, seeds),
        "rates": [own.rate for own in tried],
        "validation": {
            "loss": [own.loss for own in tried],
            "score": [own.score for own in tried],
        },
        "rate": best.rate,
        "test": {"loss": _list(test_loss), "score": _list(test_score)},
        "train_loss": [
            _list(step) for step in zip(*(own.curve for own in kept), strict=True)
        ],
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


def lowest(tried: Sequence[Tried]) -> Tried:
    """Returns the member with the lowest validation loss; one that diverged has NaN."""
    return min(tried, key=lambda own: float(np.nan_to_num(own.loss, nan=np.inf)))


def next_rate(tried: Sequence[Tried], started: int) -> float | None:
    """Returns a rate beyond the grid if the best one is at its end, or None.

    Args:
      tried: members in the order of their rates.
      started: how many rates the grid had; at most `FURTHER` more are tried.
    """
    if started < 2 or len(tried) >= started + FURTHER:
        return None
    best, rates = lowest(tried).rate, [own.rate for own in tried]
    if best == rates[-1]:
        return float(f"{best * rates[-1] / rates[-2]:.3g}")
    if best == rates[0]:
        return float(f"{best * rates[0] / rates[1]:.3g}")
    return None


def stored(task: Task, base: str) -> Any:
    """Returns the parameters with linear weights as they are, or quantised."""
    if base == "float32":
        return task.params
    some = task.train.first(2)
    linear = config(1, 1, targets="all-linear", head="head" in task.params)
    plan = jlora.plan(task.model, task.params, some.x, some.mask, config=linear)
    return jlora.quantize(task.params, plan, kind=base)


def settings(row: Row, rates: Sequence[float], seeds: Sequence[int]) -> Figures:
    """Returns what a row was trained with; a row of other settings runs again."""
    names = ("steps", "size", "examples", "base", "head_rate")
    return {
        **{name: getattr(row, name) for name in names},
        "rates": list(row.rates or rates),
        "seeds": list(seeds),
    }


def read(path: Path) -> list[Figures]:
    """Returns the rows of a file of JSON lines; a line that was cut is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def missing(
    rows: dict[str, Row],
    found: Sequence[Figures],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Iterator[tuple[str, Row]]:
    """Yields the rows that a file of figures does not hold with their settings."""
    done = {f["row"]: f["settings"] for f in found}
    for name, row in rows.items():
        if done.get(name) != settings(row, rates, seeds):
            yield name, row


def write(path: Path, found: Sequence[Figures]) -> None:
    """Writes rows as JSON lines; the file is whole before and after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(f) + "\n" for f in found))
    part.replace(path)


def environment() -> Figures:
    """Returns what the figures depend on beside the settings."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "jax": jax.__version__,
        "jlora": jlora.__version__,
        "device": jax.devices()[0].device_kind,
        "processor": names[0] if names else platform.processor(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _list(values: Any) -> list[float]:
    return [round(float(x), 5) for x in values]
