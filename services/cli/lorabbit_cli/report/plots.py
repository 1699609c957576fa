"""Plots: figures of a report as inline SVG whose colors the page decides.

matplotlib draws with placeholder colors that are replaced by CSS variables, so that one picture
reads well on a light and on a dark page. Text stays text: it can be selected and read aloud. The
same report gives the same bytes. Nothing goes through pyplot, which would keep global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lorabbit.events.report import ClientRound, Report, Round

INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(12))
CSS = {INK: "currentColor", GRID: "var(--grid)"} | {color: f"var(--c{i})" for i, color in enumerate(SERIES)}
MOST_LINES = 12
"""With more clients than this, a figure shows their spread instead of a line each."""
MOST_MARKERS = 60
"""Longer lines have no dots."""
MOST_BARS = 60
"""The split over labels shows so many clients, the first ones."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorabbit",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def figures(report: Report) -> dict[str, str]:
    """Draw what the report has figures for: title -> SVG, in the order of the page."""
    rounds = report.rounds
    made: dict[str, str] = {}

    def add(title: str, paint: Callable[[Axes], None], *, size: tuple[float, float] = (5.6, 2.9)) -> None:
        made[title] = svg_of(f"f{len(made)}", paint, title, size)

    metric = report.main_metric
    if metric is not None and any(metric in row.metrics for row in rounds):
        add(f"{metric} per round".capitalize(), lambda axes: _scores(axes, rounds, metric))
        add(
            f"{metric} per round and client".capitalize(),
            lambda axes: _per_client(axes, report, metric, lambda c: c.metrics.get(metric)),
        )
    if any(row.train_loss is not None for row in rounds):
        add("Loss per round", lambda axes: _losses(axes, rounds))
        add("Training loss per round and client", lambda axes: _per_client(axes, report, "loss", lambda c: c.loss))
    if rounds:
        add("Payload bytes per round", lambda axes: _bytes(axes, rounds))
        add("Seconds per round", lambda axes: _seconds(axes, rounds))
    if any(report.label_counts.values()):
        bars = min(MOST_BARS, len(report.label_counts))
        which = f"first {bars} clients" if bars < len(report.label_counts) else "client"
        legend = min(len(SERIES), len({label for counts in report.label_counts.values() for label in counts}))
        size = (11.6, max(0.8 + 0.2 * max(bars, 5), 0.3 + 0.18 * legend))
        add(f"Training examples per {which} and label", lambda axes: _labels(axes, report), size=size)
    return made


def svg_of(prefix: str, paint: Callable[[Axes], None], title: str, size: tuple[float, float]) -> str:
    """Draw one figure and turn its placeholder colors into CSS."""
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several figures share one page: their ids must not meet.
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg \1role="img" aria-label="{title}"', svg, count=1)
    for placeholder, css in CSS.items():
        svg = svg.replace(placeholder, css)
    return svg


def _round_axis(axes: Axes, rounds: Sequence[Round]) -> None:
    """Whole rounds from first to last, named once."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    numbers = [row.round for row in rounds]
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], color: str, label: str) -> None:
    """A line through the points that have a value."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if known:
        marker = "o" if len(known) <= MOST_MARKERS else ""
        axes.plot([x for x, _ in known], [y for _, y in known], marker=marker, color=color, label=label)


def _scores(axes: Axes, rounds: Sequence[Round], metric: str) -> None:
    _line(axes, [(row.round, row.metrics.get(metric)) for row in rounds], SERIES[0], "all clients pooled")
    axes.set_ylabel(metric)
    _round_axis(axes, rounds)


def _losses(axes: Axes, rounds: Sequence[Round]) -> None:
    _line(axes, [(row.round, row.train_loss) for row in rounds], SERIES[0], "training")
    _line(axes, [(row.round, row.metrics.get("loss")) for row in rounds], SERIES[1], "test, all clients pooled")
    axes.set_ylabel("loss")
    axes.legend()
    _round_axis(axes, rounds)


def _per_client(axes: Axes, report: Report, label: str, value: Callable[[ClientRound], float | None]) -> None:
    """A line for each client, or the quartiles and range of many."""
    by_client: dict[str, list[tuple[int, float | None]]] = {}
    for row in report.rounds:
        for part in row.per_client:
            by_client.setdefault(part.client, []).append((row.round, value(part)))
    if len(by_client) <= MOST_LINES:
        order = sorted(by_client, key=lambda name: (name not in report.clients, _index(report.clients, name), name))
        for i, client in enumerate(order):
            _line(axes, by_client[client], SERIES[i % len(SERIES)], client)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _spread(axes, by_client)
    axes.set_ylabel(label)
    _round_axis(axes, report.rounds)


def _index(clients: Sequence[str], name: str) -> int:
    return clients.index(name) if name in clients else len(clients)


def _spread(axes: Axes, by_client: Mapping[str, Sequence[tuple[int, float | None]]]) -> None:
    """Median, quartiles and range over the clients of every round."""
    values: dict[int, list[float]] = {}
    for points in by_client.values():
        for number, value in points:
            if value is not None and math.isfinite(value):
                values.setdefault(number, []).append(value)
    numbers = sorted(values)
    if not numbers:
        return
    ranked = [sorted(values[number]) for number in numbers]

    def at(share: float) -> list[float]:
        return [row[round(share * (len(row) - 1))] for row in ranked]

    axes.fill_between(numbers, at(0.0), at(1.0), color=SERIES[0], alpha=0.15, linewidth=0, label="lowest to highest")
    axes.fill_between(numbers, at(0.25), at(0.75), color=SERIES[0], alpha=0.3, linewidth=0, label="middle half")
    axes.plot(numbers, at(0.5), "o-", color=SERIES[0], label="median")
    axes.legend(loc="best")


def _bytes(axes: Axes, rounds: Sequence[Round]) -> None:
    numbers = [row.round for row in rounds]
    axes.bar([n - 0.2 for n in numbers], [row.bytes_up for row in rounds], 0.38, color=SERIES[0], label="up")
    axes.bar([n + 0.2 for n in numbers], [row.bytes_down for row in rounds], 0.38, color=SERIES[1], label="down")
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.grid(visible=False, axis="x")
    _round_axis(axes, rounds)


def _seconds(axes: Axes, rounds: Sequence[Round]) -> None:
    numbers = [row.round for row in rounds]
    rest = [max(0.0, row.seconds - row.aggregate_seconds) for row in rounds]
    axes.bar(numbers, rest, 0.7, color=SERIES[0], label="training and transfer")
    axes.bar(numbers, [row.aggregate_seconds for row in rounds], 0.7, bottom=rest, color=SERIES[1], label="aggregate")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.grid(visible=False, axis="x")
    _round_axis(axes, rounds)


def _labels(axes: Axes, report: Report) -> None:
    """Stacked bars, one for each client, first client on top."""
    clients = [client for client in report.clients if client in report.label_counts] or list(report.label_counts)
    clients = clients[:MOST_BARS]
    totals: dict[str, int] = {}
    for counts in report.label_counts.values():
        for label, number in counts.items():
            totals[label] = totals.get(label, 0) + number
    labels = sorted(totals, key=lambda label: (-totals[label], label))
    named, rest = (labels, []) if len(labels) <= len(SERIES) else (labels[: len(SERIES) - 1], labels[len(SERIES) - 1 :])
    groups = [(label, [label]) for label in named] + ([(f"{len(rest)} others", rest)] if rest else [])
    left = [0] * len(clients)
    for i, (title, members) in enumerate(groups):
        widths = [sum(report.label_counts[client].get(member, 0) for member in members) for client in clients]
        axes.barh(range(len(clients)), widths, 0.75, left=left, color=SERIES[i], label=title)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(clients)), clients, fontsize=8)
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_xlabel("training examples")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
