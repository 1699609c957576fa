"""Plots of a comparison: score against rounds, payload and time, one line for each run.

The same drawing goes into the page (as SVG whose colors the page decides) and into PNG files (in fixed
colors on white). A line is the mean over the seeds, the band around it one standard deviation.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lorabbit_bench.compare.results import CaseResult, CurvePoint
from lorabbit_cli.report.plots import GRID, INK, MOST_MARKERS, SERIES, STYLE, svg_of

SIZE = (5.8, 3.4)
DOTS_PER_INCH = 150
LIGHT = (
    "#2f6fde", "#e07b25", "#1f9d73", "#c2408f", "#8a63d2", "#b38a00", "#1797b5", "#d4504c", "#6c8f2b", "#7a6a5d",
    "#4f5fa8", "#9aa3b2",
)  # fmt: skip
"""The page's colors on white."""
DASHES = ("-", "--", ":", "-.")
PNG_STYLE: dict[Any, Any] = {
    name: {INK: "#1d2330", GRID: "#d9dde5"}.get(value, value) if isinstance(value, str) else value
    for name, value in STYLE.items()
}
Across = Callable[[CurvePoint], float | None]


def axes_of(case: CaseResult) -> dict[str, Across]:
    """What the score can be drawn against: name -> value of a mark."""
    found: dict[str, Across] = {"rounds": lambda mark: mark.round, "bytes": lambda mark: mark.bytes}
    found["seconds"] = lambda mark: mark.seconds
    if any(mark.modelled_seconds is not None for row in case.rows for mark in row.curve):
        found["modelled seconds"] = lambda mark: mark.modelled_seconds
    return found


def figures(case: CaseResult, prefix: str) -> dict[str, str]:
    """Draw a case for the page: title -> SVG; `prefix` keeps ids of several cases apart."""
    if not any(row.curve for row in case.rows):
        return {}
    return {
        f"{case.metric} against {name}".capitalize(): svg_of(
            f"{prefix}{number}",
            partial(_paint, case, name, across, SERIES),
            f"{case.name}: {case.metric}, {name}",
            SIZE,
        )
        for number, (name, across) in enumerate(axes_of(case).items())
    }


def pictures(case: CaseResult) -> Mapping[str, bytes]:
    """Draw a case for files: what the score is drawn against -> PNG."""
    if not any(row.curve for row in case.rows):
        return {}
    return {name: _png(partial(_paint, case, name, across, LIGHT)) for name, across in axes_of(case).items()}


def _png(paint: Callable[[Axes], None]) -> bytes:
    with rc_context(PNG_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        paint(figure.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


def _paint(case: CaseResult, name: str, across: Across, colors: tuple[str, ...], axes: Axes) -> None:
    """A line for each run, with its band."""
    values: list[float] = []
    for number, row in enumerate(case.rows):
        known = [(x, mark) for mark in row.curve if (x := across(mark)) is not None]
        if not known:
            continue
        color, dash = colors[number % len(colors)], DASHES[number // len(colors) % len(DASHES)]
        places, means = [x for x, _ in known], [mark.score.mean for _, mark in known]
        values += places
        marker = "o" if len(known) <= MOST_MARKERS else ""
        axes.plot(places, means, color=color, linestyle=dash, marker=marker, markersize=2.5, label=row.label)
        spreads = [mark.score.sd or 0.0 for _, mark in known]
        if any(spreads):
            low = [mean - sd for mean, sd in zip(means, spreads, strict=True)]
            high = [mean + sd for mean, sd in zip(means, spreads, strict=True)]
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    if case.target is not None:
        axes.axhline(case.target, color=INK if colors is SERIES else "#5c6577", linewidth=0.8, linestyle=":")
    axes.set_ylabel(case.metric)
    _across_axis(axes, name, values)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _across_axis(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Name the axis; bytes and seconds span orders of magnitude between runs."""
    axes.set_xlabel({"rounds": "round", "bytes": "payload, both directions"}.get(name, name))
    if name == "rounds":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    above = [x for x in values if x > 0]
    if len(above) == len(values) and max(above) / min(above) > 20:  # noqa: PLR2004 - short runs could not be read
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    if name == "bytes":
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
