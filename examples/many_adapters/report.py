"""The tables and the plot of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora._tables import table

from .data import TASKS


def quality(before: np.ndarray, after: np.ndarray) -> str:
    """Returns held-out loss and share of right tokens, before and after, as a table."""
    head = ("task", "base loss", "loss", "base right", "right")
    lines = [
        (
            task,
            *(f"{x:.2f}" for x in (b[0], a[0])),
            *(f"{x:.0%}" for x in (b[1], a[1])),
        )
        for task, b, a in zip(TASKS, before, after, strict=True)
    ]
    return table(head, lines, right=head[1:])


def speed(rates: dict[str, float]) -> str:
    """Returns tokens a second as a table, beside the merged model's."""
    head = ("model", "tokens/s", "of merged")
    lines = [
        (name, f"{rate:.1f}", f"{rate / rates['merged']:.2f}")
        for name, rate in rates.items()
    ]
    return table(head, lines, right=head[1:])


def write(out: Path, losses: np.ndarray, text: str, figures: dict[str, Any]) -> None:
    """Writes `results.md`, `results.json` and `curves.png`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    _plot(out / "curves.png", losses, TASKS)


def _plot(path: Path, losses: np.ndarray, names: Sequence[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, own in zip(names, losses.T, strict=True):
        axes.plot(own, label=name)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(path, dpi=150)
