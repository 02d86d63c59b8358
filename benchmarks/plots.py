"""The plots of docs/performance.md."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import common, floor, growth, learnt
from .page import COLORS

# Readable on a light and on a dark page: the figures bring their own ground.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jlora",
    "font.family": "sans-serif",
    "figure.facecolor": "#f8fafc",
    "axes.facecolor": "#f8fafc",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#0f172a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e2e8f0",
    "text.color": "#0f172a",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
}


def multiples(axes: Axes, cases: Sequence[common.Figures]) -> None:
    """Draws step times as multiples of the floor, a group of bars for each model."""
    names = [n for n in common.STEPS if n not in (common.FLOOR, common.STRICT)]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        widths = []
        for case in cases:
            rows = case["training"]
            low, own = common.row_of(rows, common.FLOOR), common.row_of(rows, name)
            widths.append(own["seconds"] / low["seconds"])
        places = [y + (i - (len(names) - 1) / 2) * height for y in range(len(cases))]
        bars = axes.barh(places, widths, height, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(cases)), [floor.label(case["case"]) for case in cases])
    axes.invert_yaxis()
    axes.axvline(1, color=COLORS[common.FLOOR], linestyle="--", label="floor")
    axes.set_xlabel("step time as a multiple of the floor")


def floor_plot(found: common.Figures) -> Figure | None:
    """Returns the plot of step times, if steps were timed."""
    cases = [c for c in found["cases"] if "seconds" in c["training"][0]]
    if not cases:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.9 * len(cases)), layout="constrained")
    multiples(figure.subplots(), cases)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def tpu_plot(found: common.Figures) -> Figure:
    """Returns the plot of bytes moved and of peak memory."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = found["rows"]
    names = [row["step"] for row in rows]
    for axes, field, unit, text in (
        (left, "bytes", 1e9, "GB moved"),
        (right, "peak_bytes", 2**30, "peak GiB"),
    ):
        values = [row[field] / unit for row in rows]
        bars = axes.barh(names, values, color=[COLORS[name] for name in names])
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set_xlabel(text)
    left.invert_yaxis()
    return figure


def growth_plot(found: common.Figures) -> Figure:
    """Returns a panel for each figure and axis, in logarithms."""
    rows = found["rows"]
    fields = [f for f in growth.FIELDS if f in rows[0]]
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(
        figsize=(2.4 * len(names), 1.9 * len(fields) + 0.5), layout="constrained"
    )
    panels = figure.subplots(len(fields), len(names), squeeze=False, sharex="col")
    for i, field in enumerate(fields):
        for axes, axis in zip(panels[i], names, strict=True):
            for step in (common.FLOOR, common.JLORA, growth.ADDED):
                values, cost = growth.curve(rows, axis, step, field)
                shown = [c if c > 0 else float("nan") for c in cost]
                axes.loglog(values, shown, "o-", ms=3, color=COLORS[step], label=step)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(visible=True)
        panels[i][0].set_ylabel(growth.FIELDS[field])
    for axes, axis in zip(panels[-1], names, strict=True):
        axes.set_xlabel(axis)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


PLOTS: dict[str, Callable[[Any], Figure | None]] = {
    "floor": floor_plot,
    "tpu": tpu_plot,
    "growth": growth_plot,
    "quality": learnt.plot,
}
