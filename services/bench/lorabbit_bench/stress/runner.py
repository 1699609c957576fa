"""Every size of a plan in turn, until all are measured or the machine gives no more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.status import Status

from lorabbit_bench.stress import resource_limits
from lorabbit_bench.stress.deployment import Deployment
from lorabbit_bench.stress.measurement import Measurement, MeasurementRun, await_clients, row_of
from lorabbit_bench.stress.plan import StressPlan
from lorabbit_bench.stress.resource_limits import LimitReached, ResourceDemand
from lorabbit_cli.formatting import duration_text

DeploymentFactory = Callable[[StressPlan, int], Deployment]
"""Prepares a federation of so many clients."""


@dataclass
class StressRunner:
    """One stress test; `rows` and `reached` grow as it goes."""

    plan: StressPlan
    launch: DeploymentFactory
    console: Console
    on_row: Callable[[], None] = lambda: None
    """Called after each measurement, so that what is known can be kept."""
    rows: list[Measurement] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    """The limits that were met, each with the size that met it."""

    def run(self) -> None:
        """Measure sizes in ascending order; a payload that met a limit is not tried with more clients."""
        descriptors = resource_limits.raise_descriptors()
        payloads = list(self.plan.payloads_mb)
        per_client = resource_limits.FIRST_GUESS_MB
        for clients in self.plan.clients:
            folder = Path(tempfile.gettempdir())
            try:
                for payload in payloads:
                    resource_limits.check(ResourceDemand(clients, payload, per_client), folder, descriptors=descriptors)
            except LimitReached as limit:
                self._record_limit(clients, payload, limit)
                payloads = [each for each in payloads if each < payload]
            if not payloads:
                return
            payloads = self._measure_size(clients, payloads)
            per_client = self._mb_per_client() or per_client
            if not payloads:
                return

    def _measure_size(self, clients: int, payloads: list[float]) -> list[float]:
        """Measure one number of clients with every payload; returns the payloads that met no limit."""
        federation = self.launch(self.plan, clients)
        with Status(f"{clients} clients: starting", console=self.console) as status:
            try:
                federation.start()

                def progress(text: str) -> None:
                    status.update(f"{clients} clients: {text}")

                joining = await_clients(federation, clients, progress)
                for number, payload in enumerate(payloads):
                    if self._measure(federation, clients, payload, joining, progress):
                        return payloads[:number]
            except LimitReached as limit:
                self._record_limit(clients, payloads[0], limit)
                return []
            finally:
                status.update(f"{clients} clients: stopping")
                federation.close()
        return payloads

    def _measure(
        self, federation: Deployment, clients: int, payload: float, joining: float, progress: Callable[[str], None]
    ) -> bool:
        """Measure one size; tells whether it met a limit."""
        spec = self.plan.job(clients, payload)
        measurement = MeasurementRun(
            federation, spec, self.plan.time_limit_seconds, may_leave=self.plan.churn > 0, progress=progress
        )
        measured = measurement.run()
        row = row_of(measured, spec, payload_mb=payload, spread=federation.description, joining_seconds=joining)
        size = f"{clients} clients, {payload:g} MB" if payload else f"{clients} clients"
        if row is not None:
            self.rows.append(row)
            self._say(
                f"{size}: {duration_text(row.round_p50)} a round, {row.updates_per_second:.1f} updates/s, "
                f"{row.mb_per_second:.1f} MB/s"
            )
            self.on_row()
        if measured.stopped:
            self._record_limit(clients, payload, measured.stopped)
        return bool(measured.stopped)

    def _record_limit(self, clients: int, payload: float, limit: object) -> None:
        size = f"{clients} clients with {payload:g} MB" if payload else f"{clients} clients"
        self.reached.append(f"{size}: {limit}")
        self._say(f"limit at {self.reached[-1]}")

    def _mb_per_client(self) -> float | None:
        """Memory that the last size took for each client, the broker's share included; None where nobody knows."""
        last = self.rows[-1] if self.rows else None
        if last is None or "clients" not in last.memory_mb:
            return None
        return (last.memory_mb["clients"] + last.memory_mb.get("broker", 0.0)) / last.clients

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
