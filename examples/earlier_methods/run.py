"""Trains rows: the rate chosen on the validation part, seeds measured on the test."""

import datetime
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora

from . import sweep
from .methods.lora import config
from .rows import Row
from .task import Task

RESULTS = Path(__file__).parent / "results"
Figures = dict[str, Any]


def run(
    name: str,
    row: Row,
    task: Task,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
) -> Figures:
    """Returns the figures of a row.

    The first seed trains at each rate, in one program. The rate with the lowest
    validation loss is kept, and the other seeds train at that rate, in another. The
    test part is read only then, once for each seed.
    """
    began = time.perf_counter()
    rates = row.rates or rates
    method, params = row.make(), stored(task, row.base)
    plan = sweep.Plan(row.examples, row.steps, row.size, row.head_rate)
    first, rest = seeds[0], list(seeds[1:])
    frozen, tried, losses = sweep.train(
        task, method, params, plan, rates, [first] * len(rates), name=name
    )
    loss, score = sweep.evaluate(task, method, frozen, tried, task.validation)
    best = int(np.nan_to_num(loss, nan=np.inf).argmin())
    kept = sweep.select(tried, best)
    curves = losses[:, best : best + 1]
    if rest:
        _, others, more = sweep.train(
            task, method, params, plan, [rates[best]] * len(rest), rest, name=name
        )
        kept = sweep.join(kept, others)
        curves = np.concatenate([curves, more], axis=1)
    test_loss, test_score = sweep.evaluate(task, method, frozen, kept, task.test)
    trained = sum(x.size for x in jax.tree.leaves(sweep.select(kept, 0)))
    return {
        "row": name,
        "task": task.name,
        "trained": trained,
        "settings": settings(row, rates, seeds),
        "validation": {"loss": _list(loss), "score": _list(score)},
        "rate": rates[best],
        "test": {"loss": _list(test_loss), "score": _list(test_score)},
        "train_loss": [_list(step) for step in curves],
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment(),
    }


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
