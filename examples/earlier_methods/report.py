"""Tables of the result files, for the console and for the documents."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._tables import table

from .rows import DECODER, ENCODER, ROWS
from .run import Figures, read

TITLES = {
    "methods": "Methods",
    "weights": "Which weights, at about equal parameters",
    "alpha": "Alpha",
    "rank": "Rank",
    "epochs": "Epochs",
    "batch": "Batch size",
    "data": "Data against rank",
    "start": "Initialisations",
    "base": "Quantised base",
}
SCORES = {ENCODER: "test accuracy", DECODER: "right tokens"}
Columns = tuple[tuple[str, ...], list[tuple[str, ...]]]


def rows_of(results: Path, task: str, name: str) -> list[Figures]:
    """Returns the figures of a table's rows that the file has, in the table's order."""
    found = {f["row"]: f for f in read(results / f"{task}.jsonl")}
    wanted = [row for row, own in ROWS[task].items() if name in own.tables]
    return [found[row] for row in wanted if row in found]


def columns(found: Sequence[Figures]) -> Columns:
    """Returns one line a row: parameters, the chosen rate, and what the test gave."""
    score = SCORES[found[0]["task"]] if found else "score"
    head = ("row", "trained", "rate", score, "seeds", "test loss", "validation loss")
    return head, [
        (
            f["row"],
            f"{f['trained']:,}",
            rate(f),
            mean_and_error(f["test"]["score"]),
            " / ".join(f"{x:.3f}" for x in f["test"]["score"]),
            mean_and_error(f["test"]["loss"]),
            f"{lowest(f):.3f}",
        )
        for f in found
    ]


def rate_columns(found: Sequence[Figures]) -> Columns:
    """Returns the first seed's validation loss at each rate, for rows with a grid."""
    tuned = [f for f in found if len(f["rates"]) > 1]
    rates = sorted({rate for f in tuned for rate in f["rates"]})

    def line(figures: Figures) -> tuple[str, ...]:
        found = dict(zip(figures["rates"], figures["validation"]["loss"], strict=True))
        best = lowest(figures)
        cells = (_marked(found[x], best) if x in found else "–" for x in rates)
        return figures["row"], *cells

    return ("row", *(f"{x:g}" for x in rates)), [line(f) for f in tuned]


def rate(figures: Figures) -> str:
    """Returns the chosen rate, with a mark if it lies at an end of those tried."""
    rates, chosen = figures["rates"], figures["rate"]
    at_end = len(rates) > 1 and chosen in (rates[0], rates[-1])
    return f"{chosen:g}{' *' if at_end else ''}"


def lowest(figures: Figures) -> float:
    """Returns the validation loss at the chosen rate."""
    at = figures["rates"].index(figures["rate"])
    return figures["validation"]["loss"][at]


def mean_and_error(values: Sequence[float]) -> str:
    """Returns the mean and its standard error over seeds.

    Examples:
      >>> mean_and_error([0.82, 0.84, 0.86])
      '0.840 ± 0.012'
    """
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def text(results: Path, tables: Sequence[str]) -> str:
    """Returns the tables that there are figures for, as plain text."""
    parts = []
    for name in TITLES:
        for task in ROWS:
            found = rows_of(results, task, name) if name in tables else []
            if found:
                head, lines = columns(found)
                parts.append(f"{TITLES[name]}, {task}")
                parts.append(table(head, lines, right=head[1:]))
    return "\n\n".join(parts)


def _marked(value: float, best: float) -> str:
    if value != value:
        return "diverged"
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def settings(figures: Figures) -> str:
    """Returns what a row was trained with, in words."""
    own: dict[str, Any] = figures["settings"]
    what = "sentences" if figures["task"] == ENCODER else "stories"
    return (
        f"{own['steps']} steps of {own['size']} {what} out of {own['examples']}, "
        f"the seeds {', '.join(map(str, own['seeds']))}"
    )
