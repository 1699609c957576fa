"""The picture of a stress test: rounds, cost and memory against the number of clients."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorabbit_cli.compare_plots import DOTS_PER_INCH, LIGHT, PNG_STYLE
from lorabbit_cli.stress.measure import Row
from lorabbit_cli.stress.usage import TIERS

SIZE = (10.0, 7.0)
Value = Callable[[Row], float | None]


def draw(rows: Sequence[Row]) -> bytes:
    """Draw four panels as one PNG."""
    with rc_context(PNG_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2)
        _by_payload(panels[0][0], rows, lambda row: row.round_p50, "seconds a round, median", log=True)
        _by_payload(panels[0][1], rows, lambda row: row.updates_per_second, "updates a second")
        _by_payload(
            panels[1][0], rows, lambda row: sum(row.cpu_ms_per_update.values()), "CPU ms for one client's round"
        )
        _by_tier(panels[1][1], rows)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


def _by_payload(axes: Axes, rows: Sequence[Row], value: Value, label: str, *, log: bool = False) -> None:
    """A line for each payload."""
    for number, payload in enumerate(sorted({row.payload_mb for row in rows})):
        of_it = sorted((row for row in rows if row.payload_mb == payload), key=lambda row: row.clients)
        name = f"{payload:g} MB" if payload else "tiny BERT"
        _line(axes, of_it, value, name, LIGHT[number % len(LIGHT)])
    _axes(axes, label, log=log)


def _by_tier(axes: Axes, rows: Sequence[Row]) -> None:
    """Memory at the smallest payload: a line for each tier, and the clients' for one of them."""
    smallest = min(row.payload_mb for row in rows)
    of_it = sorted((row for row in rows if row.payload_mb == smallest), key=lambda row: row.clients)
    for number, tier in enumerate(TIERS):
        if not any(tier in row.memory_mb for row in of_it):
            continue
        share = tier == "clients"
        _line(axes, of_it, _memory_of(tier), "one client" if share else tier, LIGHT[number])
    _axes(axes, f"memory, MB, at {smallest:g} MB" if smallest else "memory, MB", log=True)


def _memory_of(tier: str) -> Value:
    def value(row: Row) -> float | None:
        memory = row.memory_mb.get(tier)
        return memory / row.clients if memory is not None and tier == "clients" else memory

    return value


def _line(axes: Axes, rows: Sequence[Row], value: Value, label: str, colour: str) -> None:
    known = [(row.clients, found) for row in rows if (found := value(row)) is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], color=colour, marker="o", label=label)


def _axes(axes: Axes, label: str, *, log: bool) -> None:
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("clients")
    axes.set_ylabel(label)
    axes.legend()
