"""What a person sees: stages with their wall time, the table and the curves."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .loop import History

SMOOTHING = 0.9


class Row(NamedTuple):
    """One line of the final table."""

    name: str
    trained: int
    total: int
    accuracy: float
    seconds: float
    size: int
    model_size: int


@contextlib.contextmanager
def stage(title: str, times: dict[str, float]) -> Iterator[None]:
    """Prints `title`, then how long the block took, which goes into `times`."""
    print(f"\n── {title}", flush=True)
    start = time.perf_counter()
    yield
    times[title] = time.perf_counter() - start
    print(f"   {times[title]:.1f} s", flush=True)


def table(rows: Sequence[Row]) -> str:
    """Returns the comparison of runs as a Markdown table."""
    head = ("", "trained", "share", "test accuracy", "seconds", "adapter", "model")
    lines = [head] + [
        (
            row.name,
            f"{row.trained:,}",
            f"{row.trained / row.total:.3%}",
            f"{row.accuracy:.3f}",
            f"{row.seconds:.1f}",
            megabytes(row.size),
            megabytes(row.model_size),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * (width - 1) + ":" for width in widths))
    return "\n".join(
        "| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines
    )


def megabytes(count: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def plot(histories: dict[str, History], file: Path) -> None:
    """Draws loss and accuracy of each run over the steps into `file`.

    Thin lines are single batches, thick ones their running mean, dots the test set.
    """
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    loss, accuracy = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        color = f"C{index}"
        steps = [point.step for point in history.train]
        raw = np.array([point.loss for point in history.train])
        loss.plot(steps, raw, color=color, alpha=0.2, linewidth=0.8)
        loss.plot(steps, running_mean(raw), color=color, label=name)
        tested = [point.step for point in history.test]
        dots = [point.accuracy for point in history.test]
        accuracy.plot(tested, dots, "o-", color=color, markersize=4, label=name)
    _dress(loss, "Training loss", "cross-entropy")
    _dress(accuracy, "Test accuracy", "share of sentences")
    figure.suptitle("MiniLM-L6 on the sentiment of Amazon review sentences")
    figure.savefig(file)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the exponential running mean, unbiased at the start."""
    weights = SMOOTHING ** np.arange(len(values))
    sums = np.convolve(values, weights)[: len(values)]
    return sums / np.cumsum(weights)


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
