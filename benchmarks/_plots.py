"""Plots as SVG that are readable on light and dark pages: a white sheet with round corners."""

from pathlib import Path
from typing import Any

# Told apart without colour too.
_MARKERS = "os^vDPX*<>"
_COLOURS = ("#7f7f7f", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_OURS = ("#0b3d91", "#4f83cc")


def draw(plot: dict[str, Any], target: Path) -> None:
    """Draw *plot*, as the JSON of a run has it, into *target*."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same run gives the same file, and text stays text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9}):
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        figure.patch.set_visible(False)
        figure.add_artist(_sheet(figure))
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        _lines(axes, plot["lines"])
        _dress(axes, plot)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


def _sheet(figure: Any) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (0.02, 0.02),
        0.96,
        0.96,
        boxstyle="round,pad=0.02,rounding_size=0.03",
        transform=figure.transFigure,
        facecolor="white",
        edgecolor="#d0d7de",
        zorder=-1,
    )


def _lines(axes: Any, lines: dict[str, Any]) -> None:
    colours = {True: iter(_OURS), False: iter(_COLOURS)}
    for (name, points), marker in zip(lines.items(), _MARKERS, strict=False):
        ours = name.startswith("sessionscope")
        middle = [spread["median"] for _, spread in points]
        below = [spread["median"] - spread["low"] for _, spread in points]
        above = [spread["high"] - spread["median"] for _, spread in points]
        axes.errorbar(
            [x for x, _ in points],
            middle,
            yerr=[below, above] if any(below + above) else None,
            label=name,
            color=next(colours[ours]),
            marker=marker,
            markersize=4,
            linewidth=2.2 if ours else 1.1,
            elinewidth=0.8,
            capsize=2,
            zorder=3 if ours else 2,
        )


def _dress(axes: Any, plot: dict[str, Any]) -> None:
    ticks = sorted({x for points in plot["lines"].values() for x, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(plot["title"])
    axes.set_xlabel(plot["x"])
    axes.set_ylabel(plot["y"])
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
