"""Measurement: one job over a deployment, from its events to its figures."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lorabbit.events import job_events as ev
from lorabbit.job.spec import JobSpec
from lorabbit.types import TRAIN
from lorabbit_bench.stress import resource_limits
from lorabbit_bench.stress.deployment import Deployment
from lorabbit_bench.stress.resource_limits import LimitReached
from lorabbit_bench.stress.resource_usage import UsageSampler
from lorabbit_cli.api_client import ApiClient

POLL_SECONDS = 2.0
"""Between two looks at the machine's limits, when nothing happens."""
SILENCE_SECONDS = 60.0
"""Without any event for so long, the processors are taken to be too slow for what is asked."""
LOST_SHARE = 0.1
"""Leases that may end for want of processor time, as a share of the clients: a federation bears some."""
LONGEST_JOINING_SECONDS = 240.0
JOIN_POLL_SECONDS = 0.2
Progress = Callable[[str], None]


@dataclass
class RoundTimes:
    """One round as the server's clock saw it."""

    started_ms: int
    updates_seconds: list[float] = field(default_factory=list)
    """From the round's start to each update that counts, ascending."""
    seconds: float | None = None
    """Until the new version; None while the round is open."""
    accepted: int = 0


@dataclass
class EventStats:
    """What a job's events come to."""

    rounds: dict[int, RoundTimes] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    late: int = 0
    lost: int = 0
    bytes_moved: int = 0
    """Payload bytes up and down of the trainings that count."""
    ended: ev.JobEnded | None = None

    def take(self, event: ev.AnyEvent) -> None:
        """Count one event."""
        match event:
            case ev.RoundStarted():
                self.rounds[event.round] = RoundTimes(event.at_ms)
            case ev.UpdateAccepted() if event.phase == TRAIN:
                self.bytes_moved += event.bytes_up + event.bytes_down
                if event.round in self.rounds:
                    current = self.rounds[event.round]
                    current.updates_seconds.append((event.at_ms - current.started_ms) / 1000)
            case ev.UpdateRejected():
                self.refused[event.reason] += 1
            case ev.RoundClosed():
                self.late += int(event.pace.get("late", 0))
                self.refused.update({"too-stale": count} if (count := int(event.pace.get("too_stale", 0))) else {})
                self.rounds[event.round].seconds = event.seconds
                self.rounds[event.round].accepted = event.accepted
            case ev.ClientLost():
                self.lost += 1
            case ev.JobEnded():
                self.ended = event
            case _:
                pass

    @property
    def closed(self) -> list[RoundTimes]:
        """The rounds that became a version."""
        return [times for times in self.rounds.values() if times.seconds is not None]

    @property
    def updates(self) -> int:
        """Updates so far."""
        return sum(len(times.updates_seconds) for times in self.rounds.values())


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one size; times in seconds, memory in MB of 10^6 bytes."""

    clients: int
    payload_mb: float
    spread: str
    joining_seconds: float
    rounds: int
    """That became a version; fewer than asked for where a limit stopped the job."""
    round_p50: float
    round_p99: float
    updates_per_second: float
    mb_per_second: float
    """Payload up and down."""
    first_update: float
    median_update: float
    last_update: float
    refused: int
    late: int
    lost: int
    """Leases that ended: clients silent for longer than the server waits."""
    memory_mb: dict[str, float]
    """Largest of each tier; the clients' is the sum over all of them."""
    cpu_ms_per_update: dict[str, float]
    """Processor milliseconds of each tier for one client's round."""
    stopped: str = ""
    """The limit that ended the job early."""


def await_clients(federation: Deployment, clients: int, progress: Progress) -> float:
    """Wait until the server knows every client; returns the seconds it took. Raises LimitReached."""
    began = moved = time.monotonic()
    known = -1
    with federation.connect() as server:
        while True:
            federation.check()
            resource_limits.watch()
            here = sum(1 for client in server.clients() if client["present"])
            now = time.monotonic()
            if here >= clients:
                return now - began
            if here != known:
                known, moved = here, now
                progress(f"{here} of {clients} clients are there")
            if now - moved > SILENCE_SECONDS or now - began > LONGEST_JOINING_SECONDS:
                raise LimitReached(f"processors: after {now - began:.0f} s only {here} of {clients} clients had joined")
            time.sleep(JOIN_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class MeasuredJob:
    """What happened while a job ran, what it used, and the limit that stopped it, if one did."""

    tally: EventStats
    peaks_mb: dict[str, float]
    cpu_seconds: dict[str, float]
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class MeasurementRun:
    """One job over a federation."""

    federation: Deployment
    spec: JobSpec
    time_limit_seconds: float
    may_leave: bool
    """Clients leave on purpose, so that the end of a lease says nothing about the machine."""
    progress: Progress

    def run(self) -> MeasuredJob:
        """Run the job to its end or to a limit."""
        tally, stopped = EventStats(), ""
        with self.federation.connect() as server, UsageSampler(self.federation.meter) as sampler:
            job = server.submit(self.spec)
            try:
                self._follow(server, job, tally)
            except LimitReached as limit:
                stopped = str(limit)
                server.cancel(job)
        if tally.ended is not None and tally.ended.status != "done":
            stopped = f"the job failed: {tally.ended.reason}"
        return MeasuredJob(tally, sampler.peaks_mb, sampler.cpu_seconds, stopped)

    def _follow(self, server: ApiClient, job: str, tally: EventStats) -> None:
        """Take a job's events until its end; raises LimitReached, and then the job still runs."""
        began = moved = time.monotonic()
        cursor = ""
        while tally.ended is None:
            found, cursor = server.events(job, cursor, wait_seconds=POLL_SECONDS, progress=False)
            for event in found:
                tally.take(event)
            now = time.monotonic()
            moved = now if found else moved
            self.federation.check()
            resource_limits.watch()
            done = f"{len(tally.closed)} of {self.spec.rounds} rounds"
            if tally.ended is None and now - began > self.time_limit_seconds:
                raise LimitReached(f"time: {done} in {self.time_limit_seconds:g} s (--time-limit)")
            if tally.lost > LOST_SHARE * self.spec.clients and not self.may_leave:
                raise LimitReached(f"processors: {tally.lost} leases ended of clients that were running; {done}")
            if now - moved > SILENCE_SECONDS:
                why = server.ready() or f"{tally.updates} updates so far"
                raise LimitReached(f"processors: nothing happened for {SILENCE_SECONDS:.0f} s after {done}; {why}")
            self.progress(f"{done}, {tally.updates} updates")


def row_of(
    measured: MeasuredJob, spec: JobSpec, *, payload_mb: float, spread: str, joining_seconds: float
) -> Measurement | None:
    """Put the figures together; None when not one round became a version."""
    tally, closed = measured.tally, measured.tally.closed
    if not closed:
        return None
    seconds = [times.seconds or 0.0 for times in closed]
    total, accepted = max(sum(seconds), 1e-3), sum(times.accepted for times in closed)
    updates = max(1, tally.updates)
    heard = [times.updates_seconds for times in closed if times.updates_seconds]
    return Measurement(
        clients=spec.clients,
        payload_mb=payload_mb,
        spread=spread,
        joining_seconds=joining_seconds,
        rounds=len(closed),
        round_p50=float(np.quantile(seconds, 0.5)),
        round_p99=float(np.quantile(seconds, 0.99)),
        updates_per_second=accepted / total,
        mb_per_second=tally.bytes_moved / 1e6 / total * accepted / updates,
        first_update=statistics.median(times[0] for times in heard),
        median_update=statistics.median(statistics.median(times) for times in heard),
        last_update=statistics.median(times[-1] for times in heard),
        refused=tally.refused.total(),
        late=tally.late,
        lost=tally.lost,
        memory_mb=measured.peaks_mb,
        cpu_ms_per_update={tier: 1000 * spent / updates for tier, spent in measured.cpu_seconds.items()},
        stopped=measured.stopped,
    )
