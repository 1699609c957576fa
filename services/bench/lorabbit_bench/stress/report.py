"""Results of a stress test: JSON, Markdown tables and a picture, whole after every measurement.

Scaling cost: how cost and memory change from the smallest to the largest number of clients.

Cost that grows linearly is a cost for one client that stays; memory that does not depend on the number
of clients stays too. Both ends are compared for each payload.

The picture of a stress test: rounds, cost and memory against the number of clients.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorabbit import __version__
from lorabbit_bench.compare.plots import DOTS_PER_INCH, LIGHT, PNG_STYLE
from lorabbit_bench.stress.measurement import Measurement
from lorabbit_bench.stress.resource_usage import TIERS
from lorabbit_bench.stress.runner import StressRunner


@dataclass(frozen=True, slots=True)
class ScalingCost:
    """One payload, at its smallest and its largest size."""

    payload_mb: float
    clients: tuple[int, int]
    cpu_ms: tuple[float, float]
    """Processor milliseconds of all tiers for one client's round."""
    seconds_per_client: tuple[float, float]
    """Of a round's median time."""
    server_mb: tuple[float, float]

    @property
    def cpu_times(self) -> float:
        """By how much the cost of one client's round is larger at the largest size; 1 is linear growth."""
        return self.cpu_ms[1] / self.cpu_ms[0] if self.cpu_ms[0] else 0.0


def scaling_cost(rows: Sequence[Measurement]) -> list[ScalingCost]:
    """Compare the ends of every payload that was measured at two sizes or more."""
    found = []
    for payload in sorted({row.payload_mb for row in rows}):
        of_it = sorted((row for row in rows if row.payload_mb == payload), key=lambda row: row.clients)
        if len(of_it) > 1:
            found.append(_between(payload, of_it[0], of_it[-1]))
    return found


def _between(payload: float, small: Measurement, large: Measurement) -> ScalingCost:
    def cpu(row: Measurement) -> float:
        return sum(row.cpu_ms_per_update.values())

    return ScalingCost(
        payload,
        (small.clients, large.clients),
        (cpu(small), cpu(large)),
        (small.round_p50 / small.clients, large.round_p50 / large.clients),
        (small.memory_mb.get("server", 0.0), large.memory_mb.get("server", 0.0)),
    )


SIZE = (10.0, 7.0)
Value = Callable[[Measurement], float | None]


def render(rows: Sequence[Measurement]) -> bytes:
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


def _by_payload(axes: Axes, rows: Sequence[Measurement], value: Value, label: str, *, log: bool = False) -> None:
    """A line for each payload."""
    for number, payload in enumerate(sorted({row.payload_mb for row in rows})):
        of_it = sorted((row for row in rows if row.payload_mb == payload), key=lambda row: row.clients)
        name = f"{payload:g} MB" if payload else "tiny BERT"
        _line(axes, of_it, value, name, LIGHT[number % len(LIGHT)])
    _axes(axes, label, log=log)


def _by_tier(axes: Axes, rows: Sequence[Measurement]) -> None:
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
    def value(row: Measurement) -> float | None:
        memory = row.memory_mb.get(tier)
        return memory / row.clients if memory is not None and tier == "clients" else memory

    return value


def _line(axes: Axes, rows: Sequence[Measurement], value: Value, label: str, color: str) -> None:
    known = [(row.clients, found) for row in rows if (found := value(row)) is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], color=color, marker="o", label=label)


def _axes(axes: Axes, label: str, *, log: bool) -> None:
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("clients")
    axes.set_ylabel(label)
    axes.legend()


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class StressResults:
    """What a stress test has found so far."""

    def __init__(self, work: StressRunner, on: str) -> None:
        """Report on this work; `on` says where the federation runs."""
        self._work, self._on = work, on
        self._command = shlex.join(["lorabbit", *sys.argv[1:]])

    def write(self) -> None:
        """Write stress.json, stress.md and, where there is something to draw, stress.png."""
        out = self._work.plan.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "stress.json").write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (out / "stress.md").write_text(self.text(), encoding="utf-8")
        if self._work.rows:
            (out / "stress.png").write_bytes(render(self._work.rows))

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        plan = self._work.plan
        options = {
            **asdict(plan), "slow": str(plan.slow), "out": str(plan.out), "on": self._on,
        }  # fmt: skip
        return {
            "command": self._command,
            "lorabbit": __version__,
            "machine": machine(),
            "options": options,
            "rows": [asdict(row) for row in self._work.rows],
            "growth": [asdict(each) for each in scaling_cost(self._work.rows)],
            "limits": self._work.reached,
        }

    def text(self) -> str:
        """The tables as Markdown."""
        rows = self._work.rows
        facts = ", ".join(f"{name} {value}" for name, value in machine().items())
        parts = [f"# Stress test on {self._on}", f"`{self._command}`", f"LoRAbbit {__version__}, {facts}."]
        if rows:
            most = max(row.clients for row in rows)
            parts.append(f"Most clients at the same time: {most:,} ({max(rows, key=lambda r: r.clients).spread}).")
            for title, table in (("Time", _time(rows)), ("Memory", _memory(rows)), ("Processors", _cpu(rows))):
                parts += [f"## {title}", _markdown(table)]
            found = _growth(rows)
            parts += ["## Growth with the number of clients", _markdown(found)] if found[1] else []
        parts.append("## Limits")
        parts.append("\n".join(f"- {each}" for each in self._work.reached) or "No limit was met.")
        return "\n\n".join(parts) + "\n"


def machine() -> dict[str, str]:
    """Name what the figures depend on."""
    return {
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "python": platform.python_version(),
    }


def _time(rows: Sequence[Measurement]) -> Table:
    head = (
        "clients", "MB", "rounds", "round p50, s", "p99, s", "updates/s", "MB/s", "first update, s", "median", "last",
        "refused", "late", "leases lost", "joining, s",
    )  # fmt: skip
    return head, [
        (
            f"{r.clients}", f"{r.payload_mb:g}", f"{r.rounds}", _figure(r.round_p50), _figure(r.round_p99),
            _figure(r.updates_per_second), _figure(r.mb_per_second), _figure(r.first_update),
            _figure(r.median_update), _figure(r.last_update), f"{r.refused}", f"{r.late}", f"{r.lost}",
            _figure(r.joining_seconds),
        )
        for r in rows
    ]  # fmt: skip


def _memory(rows: Sequence[Measurement]) -> Table:
    head = ("clients", "MB", "server, MB", "broker, MB", "store, MB", "clients, MB", "one client, MB", "spread over")
    return head, [
        (
            f"{r.clients}",
            f"{r.payload_mb:g}",
            *(_figure(r.memory_mb.get(tier)) for tier in TIERS),
            _figure(r.memory_mb["clients"] / r.clients if "clients" in r.memory_mb else None),
            r.spread,
        )
        for r in rows
    ]


def _cpu(rows: Sequence[Measurement]) -> Table:
    head = ("clients", "MB", *(f"{tier}, ms" for tier in TIERS), "all, ms for one client's round")
    return head, [
        (
            f"{r.clients}",
            f"{r.payload_mb:g}",
            *(_figure(r.cpu_ms_per_update.get(tier)) for tier in TIERS),
            _figure(sum(r.cpu_ms_per_update.values())),
        )
        for r in rows
    ]


def _growth(rows: Sequence[Measurement]) -> Table:
    head = (
        "MB", "clients from", "to", "CPU ms for one client's round, from", "to", "times",
        "round s for one client, from", "to", "server MB, from", "to",
    )  # fmt: skip
    return head, [
        (
            f"{g.payload_mb:g}", f"{g.clients[0]}", f"{g.clients[1]}", _figure(g.cpu_ms[0]), _figure(g.cpu_ms[1]),
            _figure(g.cpu_times), _figure(g.seconds_per_client[0]), _figure(g.seconds_per_client[1]),
            _figure(g.server_mb[0]), _figure(g.server_mb[1]),
        )
        for g in scaling_cost(rows)
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    """Write a number with three digits; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _markdown(table: Table) -> str:
    head, rows = table
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
