"""Report: the contract of `report.json`, and the fold that makes it from a job's event log.

The server writes it after every round, so a report exists however a job ends.

Which of two versions scored better.

Counting, over a run, what a defense did to each client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr

from lorabbit.events import job_events as ev
from lorabbit.job.spec import JobSpec
from lorabbit.metrics import is_better
from lorabbit.protocol.messages import Metrics
from lorabbit.types import EVALUATE


def is_new_best(metrics: Mapping[str, float], best: Mapping[str, float] | None, *, metric: str | None) -> bool:
    """Compare with the best so far on the main metric, or else the loss; `best` is None before the first score."""
    name = metric if metric is not None and metric in metrics else "loss"
    if name not in metrics:
        return best is None
    if best is None or name not in best:
        return True
    return is_better(name, metrics[name], best[name])


COUNTED = ("clipped", "left_out")


def count_defense(counts: dict[str, dict[str, int]], facts: Mapping[str, JsonValue]) -> None:
    """Add one round's `robust` facts to counts by client and by what happened."""
    told = facts.get("robust")
    if not isinstance(told, dict):
        return
    for what in COUNTED:
        clients = told.get(what)
        for client in clients if isinstance(clients, list) else ():
            mine = counts.setdefault(str(client), {})
            mine[what] = mine.get(what, 0) + 1


class ReportPart(BaseModel):
    """Base of every part of a report; `update` by assignment while folding."""

    model_config = ConfigDict(extra="forbid")


class ClientRound(ReportPart):
    """One client's work in one round. `metrics` score the adapter of this round on its test split.

    `flops` are counted from the sizes of its products of matrices, 0: not counted; `parameters_up` are numbers sent.
    """

    client: str
    num_examples: int
    loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    flops: float = 0.0
    parameters_up: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    overhead_up: int = 0
    overhead_down: int = 0
    coding: str = Field(default="fp32", description="how its update was written for the wire")


class Round(ReportPart):
    """One round; bytes are payload bytes over all its clients, evaluation included."""

    round: int
    cohort: list[str]
    accepted: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    overhead_up: int = 0
    overhead_down: int = 0
    seconds: float = 0.0
    aggregate_seconds: float = 0.0
    train_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What the method tells of the round, such as aggregation_error and rank; and, where rounds do not wait for
    everybody, late, too_stale, staleness_mean and staleness_max."""
    bytes_by_role: dict[str, int] = Field(default_factory=dict)
    """`bytes_down` by the role of the payload."""
    per_client: list[ClientRound] = Field(default_factory=list)
    sha256: str | None = None


class Final(ReportPart):
    """The last adapter's scores."""

    metrics: dict[str, float] = Field(default_factory=dict)


class Best(ReportPart):
    """The round whose adapter scored best on the job's main metric."""

    round: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)


class AdapterFacts(ReportPart):
    """The exported adapter."""

    sha256: str = ""
    bytes: int = 0
    parameters: int = 0
    rank: int | None = None


class BaseFacts(ReportPart):
    """The frozen base model."""

    parameters: int = 0
    sha256: str | None = None


class Report(ReportPart):
    """One run, whole."""

    job: str
    status: Literal["running", "done", "failed", "cancelled"] = "running"
    reason: str = ""
    method: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int = 0
    main_metric: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    clients: list[str] = Field(default_factory=list)
    label_counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    """client -> label -> training examples, where the task has labels."""
    guarded: dict[str, dict[str, int]] = Field(default_factory=dict)
    """client -> `clipped` or `left_out` -> rounds in which the job's defense did that to its update."""
    set_aside: dict[str, str] = Field(default_factory=dict)
    """client -> why it was asked no more."""
    seconds: float = 0.0
    preparation: Round | None = None
    """Round 0, where the method has one; `rounds` are without it."""
    rounds: list[Round] = Field(default_factory=list)
    bytes_by_role: dict[str, int] = Field(default_factory=dict)
    """Payload bytes that clients read, by role, preparation included."""
    final: Final = Field(default_factory=Final)
    best: Best = Field(default_factory=Best)
    adapter: AdapterFacts = Field(default_factory=AdapterFacts)
    base: BaseFacts = Field(default_factory=BaseFacts)
    _started_ms: int = PrivateAttr(default=0)

    def round_of(self, number: int) -> Round | None:
        """The round of a number, 0 for the preparation; None before it began."""
        if number == 0:
            return self.preparation
        return self.rounds[number - 1] if 0 < number <= len(self.rounds) else None


def begin(job: str, spec: JobSpec) -> Report:
    """Return the report of a job of which nothing has happened yet."""
    return Report(
        job=job,
        method={"name": spec.method.name, **spec.method.settings},
        seed=spec.seed,
        main_metric=spec.evaluation.metric,
    )


def fold(report: Report, events: Iterable[ev.AnyEvent]) -> Report:
    """Fold events, in order, into a report; returns the same object."""
    for event in events:
        if event.at_ms and not isinstance(event, ev.TaskProgressed):
            report._started_ms = report._started_ms or event.at_ms  # noqa: SLF001 - its own fold
            report.seconds = (event.at_ms - report._started_ms) / 1000  # noqa: SLF001
        step = _STEPS.get(type(event))
        if step is not None:
            step(report, event)
    return report


def report_schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "report.json"}


def _clients(report: Report, event: ev.JobStarted | ev.ClientJoined) -> None:
    later = [] if isinstance(event, ev.JobStarted) or event.index is None else [event.client]
    report.clients += event.clients if isinstance(event, ev.JobStarted) else later


def _adapter_initialized(report: Report, event: ev.AdapterInitialized) -> None:
    """Take over what the first client found out about model and adapter."""
    facts = event.facts
    parameters, rank = facts.get("adapter_parameters", event.parameters), facts.get("rank")
    report.adapter = AdapterFacts(
        sha256=event.sha256,
        bytes=event.size_bytes,
        parameters=parameters if isinstance(parameters, int) else event.parameters,
        rank=rank if isinstance(rank, int) else None,
    )
    base = facts.get("base_parameters")
    report.base = BaseFacts(parameters=base if isinstance(base, int) else 0, sha256=event.base_sha256)
    metric, versions = facts.get("main_metric"), facts.get("versions")
    if report.main_metric is None and isinstance(metric, str):
        report.main_metric = metric
    if isinstance(versions, dict):
        report.versions = {name: str(version) for name, version in sorted(versions.items())}
    _label_counts(report, event.client, facts)


def _label_counts(report: Report, client: str, facts: Mapping[str, JsonValue]) -> None:
    """Note a client's own label counts."""
    counts = facts.get("label_counts")
    if isinstance(counts, dict) and all(isinstance(n, int) for n in counts.values()):
        report.label_counts[client] = {label: n for label, n in counts.items() if isinstance(n, int)}


def _round_started(report: Report, event: ev.RoundStarted) -> None:
    begun = Round(round=event.round, cohort=list(event.cohort))
    if event.round == 0:
        report.preparation = begun
    else:
        report.rounds.append(begun)


def _update_accepted(report: Report, event: ev.UpdateAccepted) -> None:
    """Count a result's bytes, and what it says of its client."""
    _label_counts(report, event.client, event.metrics.facts)
    round_ = report.round_of(event.round)
    if round_ is None:
        return
    entry = next((c for c in round_.per_client if c.client == event.client), None)
    if entry is None:
        entry = ClientRound(client=event.client, num_examples=0)
        round_.per_client.append(entry)
    for part in (round_, entry):
        for name in ("bytes_up", "bytes_down", "overhead_up", "overhead_down"):
            setattr(part, name, getattr(part, name) + getattr(event, name))
    for totals in (round_.bytes_by_role, report.bytes_by_role):
        for role, number in event.bytes_by_role.items():
            totals[role] = totals.get(role, 0) + number
    if event.phase == EVALUATE:
        entry.metrics = _scores(event.metrics)
        return
    told = event.metrics
    entry.num_examples, entry.loss, entry.seconds, entry.steps = told.num_examples, told.loss, told.seconds, told.steps
    entry.flops, entry.parameters_up, entry.coding = told.flops, told.parameters, event.coding


def _in_partition_order(report: Report, round_: Round) -> None:
    """Sort a round's clients, which were noted as they answered."""
    places = {client: place for place, client in enumerate(report.clients)}
    round_.per_client.sort(key=lambda c: places.get(c.client, len(places)))


def _scores(metrics: Metrics) -> dict[str, float]:
    """A client's scores, the loss among them."""
    return dict(metrics.values) if metrics.loss is None else {"loss": metrics.loss, **metrics.values}


def _update_rejected(report: Report, event: ev.UpdateRejected) -> None:
    if (round_ := report.round_of(event.round)) is not None:
        round_.rejected[event.reason] = round_.rejected.get(event.reason, 0) + 1


def _round_closed(report: Report, event: ev.RoundClosed) -> None:
    round_ = report.round_of(event.round)
    if round_ is not None:
        round_.accepted = event.accepted
        round_.seconds = event.seconds
        round_.aggregate_seconds = event.aggregate_seconds
        round_.sha256 = event.sha256
        round_.facts = {**event.facts, **event.pace}
        count_defense(report.guarded, event.facts)
        _in_partition_order(report, round_)
        trained = [(c.num_examples, c.loss) for c in round_.per_client if c.loss is not None and c.num_examples]
        total = sum(n for n, _ in trained)
        mean = sum(n * loss for n, loss in trained) / total if total else math.nan
        round_.train_loss = mean if math.isfinite(mean) else None
    report.adapter.sha256 = event.sha256


def _round_evaluated(report: Report, event: ev.RoundEvaluated) -> None:
    """Note the scores of a version, and whether it is the best or the last so far."""
    round_ = report.round_of(event.round)
    if round_ is not None:
        round_.metrics = dict(event.metrics)
        _in_partition_order(report, round_)
    if all(not r.metrics for r in report.rounds if r.round > event.round):
        report.final = Final(metrics=dict(event.metrics))
    if is_new_best(event.metrics, report.best.metrics if report.best.round else None, metric=report.main_metric):
        report.best = Best(round=event.round, metrics=dict(event.metrics))


def _client_set_aside(report: Report, event: ev.ClientSetAside) -> None:
    report.set_aside[event.client] = event.reason


def _job_ended(report: Report, event: ev.JobEnded) -> None:
    report.status, report.reason = event.status, event.reason


_STEPS: dict[type[ev.Event], Callable[[Report, Any], None]] = {
    ev.JobStarted: _clients,
    ev.ClientJoined: _clients,
    ev.AdapterInitialized: _adapter_initialized,
    ev.RoundStarted: _round_started,
    ev.UpdateAccepted: _update_accepted,
    ev.UpdateRejected: _update_rejected,
    ev.RoundClosed: _round_closed,
    ev.RoundEvaluated: _round_evaluated,
    ev.ClientSetAside: _client_set_aside,
    ev.JobEnded: _job_ended,
}
