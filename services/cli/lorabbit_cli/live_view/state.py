"""State of the live view, computed from a job's event log.

It is cheap on purpose (an embedded run feeds thousands of events) and knows no clock and no
terminal: the same events give the same state, whoever renders it. Evaluation of round t overlaps
with the training of round t + 1, so a client may hold several tasks at once.

Rows: what the live view knows of one client, one round, and one line told.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lorabbit.events import job_events as ev
from lorabbit.job.schedules import takes_late
from lorabbit.job.spec import JobSpec
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN
from lorabbit_cli.formatting import bytes_text, count_text, duration_text, fact_text, score_text

Level: TypeAlias = Literal["info", "warning", "error"]
STATES = {TRAIN: "training", EVALUATE: "evaluating", INITIALIZE: "initialising"}


@dataclass(slots=True)
class ClientRow:
    """What is known of one client. `tasks` maps (phase, round) to the fraction done, None before it began."""

    client: str
    tasks: dict[tuple[str, int], float | None] = field(default_factory=dict)
    active: tuple[str, int] | None = None
    """The task that reported last."""
    lost: bool = False
    loss: float | None = None
    score: float | None = None
    examples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rejected: int = 0

    @property
    def current(self) -> tuple[str, int] | None:
        """The task at work: the one that reported last, else the oldest."""
        if self.active in self.tasks:
            return self.active
        return next(iter(self.tasks), None)

    @property
    def state(self) -> str:
        """idle, waiting, training, evaluating, initializing, lost, or the name of a method's own phase."""
        if self.lost:
            return "lost"
        current = self.current
        if current is None:
            return "idle"
        if self.tasks[current] is None and current[0] != INITIALIZE:
            return "waiting"
        return STATES.get(current[0], current[0])

    @property
    def fraction(self) -> float:
        """How far the current task is, 0 without one."""
        current = self.current
        return 0.0 if current is None else self.tasks[current] or 0.0


@dataclass(slots=True)
class RoundRow:
    """What is known of one round; bytes are payload bytes."""

    number: int
    cohort: int = 0
    started_ms: int = 0
    accepted: int = 0
    rejected: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers that the method tells of the round."""
    closed: bool = False
    told: bool = False
    """Its line was written."""
    loss_sum: float = 0.0
    loss_weight: int = 0

    @property
    def train_loss(self) -> float | None:
        """Mean training loss so far, weighted by examples."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None


@dataclass(frozen=True, slots=True)
class Note:
    """A line for people; `level` is info, warning or error."""

    at_ms: int
    text: str
    level: Level = "info"


Status = Literal["queued", "running", "done", "failed", "cancelled"]
Lines: TypeAlias = list[tuple[str, Level]]
KEPT_NOTES = 50
TOLD = ("aggregation_error", "rank")
"""What methods tell of a round that goes into its line."""
TOLD_UNLESS_ZERO = ("late", "too_stale", "staleness_mean", "staleness_max")
"""What is told of a round that does not wait for everybody."""
QUIET_FROM = 20
"""Populations above this do not get a line for every client that joins."""


class JobProgress:
    """State of one job as told by its events; feed them in order to `apply`."""

    def __init__(self, spec: JobSpec | None = None) -> None:
        """Start with nothing known but, maybe, the job."""
        self.spec = spec
        self.status: Status = "queued"
        self.reason = ""
        self.main_metric: str | None = spec.evaluation.metric if spec else None
        self.clients: dict[str, ClientRow] = {}
        self.rounds: dict[int, RoundRow] = {}
        self.current: RoundRow | None = None
        self.started_ms: int | None = None
        self.last_ms = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.overhead_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.notes: deque[Note] = deque(maxlen=KEPT_NOTES)

    # ---- questions ----
    @property
    def scores(self) -> list[float]:
        """The main metric of every scored round, in order."""
        key = self.main_metric
        return [row.metrics[key] for row in self.rounds.values() if key is not None and key in row.metrics]

    def states(self) -> Counter[str]:
        """How many clients are in which state."""
        return Counter(row.state for row in self.clients.values())

    def round_fraction(self) -> float:
        """How much of the open round's training is done, over its cohort."""
        if self.current is None or not self.current.cohort:
            return 0.0
        at_work = sum(
            done or 0.0
            for row in self.clients.values()
            for (phase, number), done in row.tasks.items()
            if number == self.current.number and phase != EVALUATE
        )
        return min(1.0, (self.current.accepted + at_work) / self.current.cohort)

    def elapsed_seconds(self, now_ms: int) -> float:
        """Time since the job started; stops when it ends."""
        if self.started_ms is None:
            return 0.0
        end = self.last_ms if self.status in {"done", "failed", "cancelled"} else max(now_ms, self.last_ms)
        return (end - self.started_ms) / 1000

    def seconds_left(self, now_ms: int) -> float | None:
        """Estimate from the latest rounds, or from the open one while there is no other; None while unknown."""
        if self.spec is None or self.status != "running" or self.current is None:
            return None
        closed = [row.seconds for row in self.rounds.values() if row.closed and row.number][-3:]
        spent = max(0.0, (now_ms - self.current.started_ms) / 1000)
        if not closed:
            fraction = self.round_fraction()
            return spent / fraction * self.spec.rounds - spent if fraction > 0.05 else None  # noqa: PLR2004 - too early
        mean = sum(closed) / len(closed)
        todo = self.spec.rounds - self.current.number
        open_part = 0.0 if self.current.closed else max(0.0, mean - spent)
        return open_part + todo * mean

    # ---- the fold ----
    def apply(self, event: ev.AnyEvent) -> list[Note]:
        """Take in one event; returns the lines worth telling people."""
        self.last_ms = max(self.last_ms, event.at_ms)
        notes = [Note(event.at_ms, text, level) for text, level in self._fold(event)]
        self.notes.extend(notes)
        return notes

    def _fold(self, event: ev.AnyEvent) -> Lines:
        match event:
            case ev.TaskProgressed():
                self._progressed(event)
            case ev.TaskSent():
                return self._sent(event)
            case ev.UpdateAccepted():
                self._accepted(event)
            case ev.UpdateRejected():
                return self._rejected(event)
            case ev.RoundStarted():
                self._round_started(event)
            case ev.RoundClosed():
                return self._round_closed(event)
            case ev.RoundEvaluated():
                self._round(event.round).metrics = dict(event.metrics)
                return self._tell(event.round)
            case _:
                return self._about_the_job(event)
        return []

    def _about_the_job(self, event: ev.AnyEvent) -> Lines:
        lines: Lines = []
        match event:
            case ev.JobSubmitted():
                lines = [("job queued", "info")]
            case ev.JobStarted():
                self.status = "running"
                self.started_ms = event.at_ms
                for client in event.clients:
                    self._client(client)
                lines = [(f"job started with {count_text(len(event.clients), 'client')}", "info")]
            case ev.AdapterInitialized():
                lines = [(self._initialized(event), "info")]
            case ev.ClientJoined():
                lines = self._joined(event)
            case ev.ClientLost():
                self._client(event.client).lost = True
                lines = [(f"{event.client} is lost: its lease ended", "warning")]
            case ev.ClientSetAside():
                self._client(event.client).lost = True
                lines = [(f"{event.client} is set aside: {event.reason}", "warning")]
            case ev.JobEnded():
                lines = self._ended(event)
        return lines

    def _client(self, client: str) -> ClientRow:
        return self.clients.setdefault(client, ClientRow(client))

    def _round(self, number: int) -> RoundRow:
        return self.rounds.setdefault(number, RoundRow(number))

    def _sent(self, event: ev.TaskSent) -> Lines:
        row = self._client(event.client)
        row.tasks[event.phase, event.round] = None
        if event.attempt == 1:
            return []
        return [(f"{event.client} is asked again for round {event.round} (attempt {event.attempt})", "warning")]

    def _progressed(self, event: ev.TaskProgressed) -> None:
        row = self._client(event.client)
        row.lost = False
        row.active = (event.phase, event.round)
        row.tasks[row.active] = event.fraction
        if event.loss is not None and event.phase != EVALUATE:
            row.loss = event.loss

    def _accepted(self, event: ev.UpdateAccepted) -> None:
        row = self._client(event.client)
        row.lost = False
        # A client has one training at a time, which may have started in an earlier round than it counts in.
        done = [key for key in row.tasks if key[0] == event.phase and (key[1] == event.round or key[0] != EVALUATE)]
        for key in done:
            del row.tasks[key]
        if event.phase == INITIALIZE:
            # Bytes are those of rounds, here as in the report.
            return
        row.bytes_up += event.bytes_up
        row.bytes_down += event.bytes_down
        self.bytes_up += event.bytes_up
        self.bytes_down += event.bytes_down
        self.overhead_bytes += event.overhead_up + event.overhead_down
        number = self._round(event.round)
        number.bytes_up += event.bytes_up
        number.bytes_down += event.bytes_down
        if event.phase == EVALUATE:
            if self.main_metric is not None:
                row.score = event.metrics.values.get(self.main_metric, row.score)
            return
        number.accepted += 1
        row.examples = event.metrics.num_examples
        if event.metrics.loss is not None:
            row.loss = event.metrics.loss
            number.loss_sum += event.metrics.loss * event.metrics.num_examples
            number.loss_weight += event.metrics.num_examples

    def _rejected(self, event: ev.UpdateRejected) -> Lines:
        row = self._client(event.client)
        row.rejected += 1
        self.rejected[event.reason] += 1
        self._round(event.round).rejected += 1
        return [
            (f"refused an update of {event.client} in round {event.round}: {event.reason}: {event.detail}", "warning")
        ]

    def _round_started(self, event: ev.RoundStarted) -> None:
        row = self._round(event.round)
        row.cohort = len(event.cohort)
        row.started_ms = event.at_ms
        self.current = row

    def _round_closed(self, event: ev.RoundClosed) -> Lines:
        row = self._round(event.round)
        row.closed = True
        row.accepted = event.accepted
        row.seconds = event.seconds
        told = {**event.facts, **event.pace}
        row.facts = {name: fact for name, fact in told.items() if isinstance(fact, int | float)}
        goes_on = self.spec is not None and takes_late(self.spec.schedule)
        for client in () if goes_on else self.clients.values():
            for key in [key for key in client.tasks if key[1] == event.round and key[0] != EVALUATE]:
                del client.tasks[key]
        scored = event.round > 0 and (self.spec is None or self.spec.evaluates(event.round))
        return [] if scored else self._tell(event.round)

    def _tell(self, number: int) -> Lines:
        row = self._round(number)
        row.told = True
        return [(self.round_line(row), "info")]

    def round_line(self, row: RoundRow) -> str:
        """One round as one line."""
        of = f"/{self.spec.rounds}" if self.spec else ""
        parts = [f"round {row.number}{of}" if row.number else "preparation"]
        if row.train_loss is not None:
            parts.append(f"train loss {score_text(row.train_loss)}")
        first = [self.main_metric] if self.main_metric in row.metrics else []
        names = [*first, *(name for name in row.metrics if name != self.main_metric)]
        parts += [f"{name} {score_text(row.metrics[name])}" for name in names[:4] if name is not None]
        parts += [f"{name} {fact_text(row.facts[name])}" for name in TOLD if name in row.facts]
        parts += [f"{name} {fact_text(row.facts[name])}" for name in TOLD_UNLESS_ZERO if row.facts.get(name)]
        parts.append(f"{row.accepted}/{row.cohort} updates")
        if row.rejected:
            parts.append(f"{row.rejected} refused")
        parts.append(duration_text(row.seconds))
        parts.append(f"up {bytes_text(row.bytes_up)}")
        parts.append(f"down {bytes_text(row.bytes_down)}")
        return ", ".join(parts)

    def _initialized(self, event: ev.AdapterInitialized) -> str:
        metric = event.facts.get("main_metric")
        if self.main_metric is None and isinstance(metric, str):
            self.main_metric = metric
        base = event.facts.get("base_parameters")
        of = f" beside {base:,} frozen ones" if isinstance(base, int) and base else ""
        trained = f"{event.parameters:,} trained parameters{of}"
        return f"{event.client} built the model: {trained}, {bytes_text(event.size_bytes)}"

    def _joined(self, event: ev.ClientJoined) -> Lines:
        known = self.clients.get(event.client)
        if known is None:
            self._client(event.client)
            many = self.spec is not None and self.spec.clients > QUIET_FROM
            return [] if many else [(f"{event.client} joined ({event.device})", "info")]
        known.lost = False
        return [(f"{event.client} is back ({event.device})", "info")]

    def _ended(self, event: ev.JobEnded) -> Lines:
        self.status = event.status
        self.reason = event.reason
        lines: Lines = []
        for row in self.rounds.values():
            if row.closed and not row.told:
                lines += self._tell(row.number)
        for client in self.clients.values():
            client.tasks.clear()
        why = f": {event.reason}" if event.reason else ""
        return [*lines, (f"job {event.status}{why}", "info" if event.status == "done" else "error")]
