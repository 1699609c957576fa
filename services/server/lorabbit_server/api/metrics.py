"""Metrics for Prometheus, counted from the events that jobs commit; no label grows with the clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorabbit.events import job_events as ev
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN

SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)


class ServerMetrics:
    """One server's metrics."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        self._updates = Counter(
            "lorabbit_updates", "Results by phase and outcome", ["phase", "outcome"], registry=self.registry
        )
        self._rejected = Counter("lorabbit_updates_rejected", "Results that were refused", registry=self.registry)
        self._bytes = Counter("lorabbit_bytes", "Bytes on the wire", ["direction", "kind"], registry=self.registry)
        self._jobs = Counter("lorabbit_jobs", "Jobs that ended", ["status"], registry=self.registry)
        self._round_seconds = Histogram(
            "lorabbit_round_seconds",
            "From asking the cohort to the new version",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._aggregate_seconds = Histogram(
            "lorabbit_aggregate_seconds", "Folding a round's updates", buckets=SECONDS, registry=self.registry
        )
        self._tasks = Counter("lorabbit_tasks_sent", "Tasks sent, by phase", ["phase"], registry=self.registry)
        self._lost = Counter("lorabbit_clients_lost", "Leases that ended", registry=self.registry)
        self._aside = Counter("lorabbit_clients_excluded", "Clients that jobs ask no more", registry=self.registry)
        self._clients = Gauge("lorabbit_clients_connected", "Clients that are here", registry=self.registry)
        self._wanted = Gauge("lorabbit_clients_required", "Clients that the job asks for", registry=self.registry)
        self._refused = Gauge(
            "lorabbit_messages_refused",
            "Messages, chunks and offers that were refused",
            ["reason"],
            registry=self.registry,
        )
        self._requests = Counter(
            "lorabbit_requests_refused",
            "HTTP requests that were refused before they were handled",
            ["reason"],
            registry=self.registry,
        )
        self._leading = Gauge("lorabbit_leader", "1 while this server holds the lease", registry=self.registry)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Export what is known to come: Prometheus sees no increase in a series that appears with its first value."""
        for status in get_args(ev.JobEnded.model_fields["status"].annotation):
            self._jobs.labels(status)
        for phase in (INITIALIZE, TRAIN, EVALUATE):
            self._tasks.labels(phase)
            self._updates.labels(phase, "accepted")
        for direction in ("up", "down"):
            for kind in ("payload", "overhead"):
                self._bytes.labels(direction, kind)

    def on_event(self, _job: str, event: ev.AnyEvent) -> None:
        """Count a committed event."""
        match event:
            case ev.UpdateAccepted():
                self._updates.labels(event.phase, "accepted").inc()
                self._bytes.labels("up", "payload").inc(event.bytes_up)
                self._bytes.labels("down", "payload").inc(event.bytes_down)
                self._bytes.labels("up", "overhead").inc(event.overhead_up)
                self._bytes.labels("down", "overhead").inc(event.overhead_down)
            case ev.UpdateRejected():
                self._updates.labels("any", event.reason).inc()
                self._rejected.inc()
            case ev.RoundClosed():
                self._round_seconds.observe(event.seconds)
                self._aggregate_seconds.observe(event.aggregate_seconds)
            case ev.TaskSent():
                self._tasks.labels(event.phase).inc()
            case ev.ClientLost():
                self._lost.inc()
            case ev.ClientSetAside():
                self._aside.inc()
            case ev.JobEnded():
                self._jobs.labels(event.status).inc()
            case _:
                pass

    def note_clients(self, present: int, *, wanted: int | None) -> None:
        """Take down how many clients are here and are asked for; None leaves what was known."""
        self._clients.set(present)
        if wanted is not None:
            self._wanted.set(wanted)

    def note_refused(self, refused: Mapping[str, int]) -> None:
        """Take down how many messages and chunks were refused, by reason; reasons are a fixed set of words."""
        for reason, number in refused.items():
            self._refused.labels(reason).set(number)

    def count_refused_request(self, reason: str) -> None:
        """Count an HTTP request that was refused; reasons are a fixed set of words. Safe to call from any thread."""
        self._requests.labels(reason).inc()

    def text(self, *, is_leading: bool) -> bytes:
        """Render everything in Prometheus' text format."""
        self._leading.set(int(is_leading))
        return generate_latest(self.registry)
