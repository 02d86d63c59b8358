"""The plots of docs/performance.md."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import common, floor, growth, quality

COLORS = {
    common.FLOOR: "#64748b",
    common.STRICT: "#94a3b8",
    common.JLORA: "#ea580c",
    growth.ADDED: "#0d9488",
    "side path, autodiff": "#2563eb",
    "merge on the fly": "#7c3aed",
    "full fine-tune": "#0f172a",
}
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


def quality_plot(found: common.Figures) -> Figure:
    """Returns test accuracy of each run, and the training loss of some."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    table = quality.rows(found["results"])
    for i, row in enumerate(table):
        baseline = row["group"] == "baseline"
        color = COLORS["full fine-tune" if baseline else common.JLORA]
        left.plot([min(row["each"]), max(row["each"])], [i, i], color="#94a3b8")
        left.plot(row["accuracy"], i, "o", color=color, ms=5)
    left.set_yticks(
        range(len(table)), [f"{r['run']} ({r['trained']:,})" for r in table], fontsize=7
    )
    left.invert_yaxis()
    left.set_xlabel("test accuracy, mean and range of seeds")
    for name, color in (
        ("head only", COLORS["merge on the fly"]),
        ("full fine-tune", COLORS["full fine-tune"]),
        ("LoRA, rank 8, q and v", COLORS[common.JLORA]),
        ("DoRA, rank 8, q and v", COLORS["side path, autodiff"]),
        ("PiSSA, rank 8, q and v", COLORS[growth.ADDED]),
    ):
        own = [r["train_loss"] for r in found["results"] if r["run"] == name]
        if own:
            mean = [sum(step) / len(step) for step in zip(*own, strict=True)]
            smooth = [
                sum(mean[max(0, i - 9) : i + 1]) / min(i + 1, 10)
                for i in range(len(mean))
            ]
            right.plot(smooth, color=color, label=name)
    right.set_xlabel("step")
    right.set_ylabel("training loss, mean of ten steps")
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.grid(visible=True)
    return figure


PLOTS: dict[str, Callable[[Any], Figure | None]] = {
    "floor": floor_plot,
    "tpu": tpu_plot,
    "growth": growth_plot,
    "quality": quality_plot,
}
