"""Results of a stress test: JSON, Markdown tables and a picture, whole after every measurement."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import psutil

from lorabbit import __version__
from lorabbit_cli.stress.growth import growth
from lorabbit_cli.stress.measure import Row
from lorabbit_cli.stress.usage import TIERS
from lorabbit_cli.stress.work import Work

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


class Results:
    """What a stress test has found so far."""

    def __init__(self, work: Work, on: str) -> None:
        """Report on this work; `on` says where the federation runs."""
        self._work, self._on = work, on
        self._command = shlex.join(["lorabbit", *sys.argv[1:]])

    def write(self) -> None:
        """Write stress.json, stress.md and, where there is something to draw, stress.png."""
        from lorabbit_cli.stress.picture import draw  # noqa: PLC0415 - matplotlib, once there is a result

        out = self._work.plan.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "stress.json").write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (out / "stress.md").write_text(self.text(), encoding="utf-8")
        if self._work.rows:
            (out / "stress.png").write_bytes(draw(self._work.rows))

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
            "growth": [asdict(each) for each in growth(self._work.rows)],
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


def _time(rows: Sequence[Row]) -> Table:
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


def _memory(rows: Sequence[Row]) -> Table:
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


def _cpu(rows: Sequence[Row]) -> Table:
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


def _growth(rows: Sequence[Row]) -> Table:
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
        for g in growth(rows)
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
