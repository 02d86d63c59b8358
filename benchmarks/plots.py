"""The plots of the pages with figures."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import common, floor, growth, scale
from .page import COLORS

# What each colour becomes where the reader prefers a dark page.
DARK = {
    "#f8fafc": "#1e293b",
    "#0f172a": "#f1f5f9",
    "#475569": "#cbd5e1",
    "#e2e8f0": "#334155",
    "#94a3b8": "#64748b",
    COLORS[common.FLOOR]: "#94a3b8",
    COLORS[common.JLORA]: "#fb923c",
    COLORS[growth.ADDED]: "#2dd4bf",
    COLORS["side path, autodiff"]: "#60a5fa",
    COLORS["merge on the fly"]: "#a78bfa",
}
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


def grouped_bars(
    axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float]]
) -> None:
    """Draws a group of bars for each label, a bar for each of the named series."""
    height = 0.8 / len(series)
    for i, (name, widths) in enumerate(series.items()):
        places = [y + (i - (len(series) - 1) / 2) * height for y in range(len(labels))]
        bars = axes.barh(places, widths, height, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()


def floor_plot(found: common.Figures) -> Figure | None:
    """Returns the plot of step times as multiples of the floor, if steps were timed."""
    cases = [c for c in found["cases"] if "seconds" in c["training"][0]]
    if not cases:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.9 * len(cases)), layout="constrained")
    axes = figure.subplots()
    names = [n for n in common.STEPS if n not in (common.FLOOR, common.STRICT)]

    def seconds(case: common.Figures, name: str) -> float:
        return common.row_of(case["training"], name)["seconds"]

    times = {
        n: [seconds(c, n) / seconds(c, common.FLOOR) for c in cases] for n in names
    }
    grouped_bars(axes, [floor.label(c["case"]) for c in cases], times)
    axes.axvline(1, color=COLORS[common.FLOOR], linestyle="--", label="floor")
    axes.set_xlabel("step time as a multiple of the floor")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    return figure


def scale_plot(found: common.Figures) -> Figure:
    """Returns the plot of peak memory on each chip."""
    groups = scale.grouped(found["rows"])
    figure = Figure(figsize=(9, 1.2 + 0.9 * len(groups)), layout="constrained")
    axes = figure.subplots()

    def peak(rows: Sequence[common.Figures], name: str) -> float:
        own = [row["peak_bytes"] for row in rows if row["step"] == name]
        return own[0] / scale.GIB if own and own[0] else float("nan")

    compiled = [n for n in scale.STEPS if any(n == r["step"] for r in found["rows"])]
    peaks = {n: [peak(rows, n) for rows in groups.values()] for n in compiled}
    grouped_bars(axes, [name.split(",")[0] for name in groups], peaks)
    axes.set_xlabel("peak memory of a chip, GiB")
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


def svg(figure: Figure) -> str:
    """Returns a figure as SVG, whose colours follow a light or a dark scheme."""
    file = io.StringIO()
    # Without a date, the same figures give the same file.
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    for color in DARK:
        text = text.replace(f": {color}", f": var(--{color[1:]}, {color})")
    dark = " ".join(f"--{old[1:]}: {new};" for old, new in DARK.items())
    rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return text.replace("</style>", f"\n{rule}</style>", 1)


PLOTS: dict[str, Callable[[Any], Figure | None]] = {
    "floor": floor_plot,
    "tpu": tpu_plot,
    "growth": growth_plot,
    "scale": scale_plot,
}
