"""Metrics of one finished run, as a comparison uses them.

All of it is in the run's report, but the modelled time, which puts a link and a device of the sweep
file in place of this machine: a round then lasts as long as its slowest client takes to receive, to
compute and to send, and the server to aggregate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from lorabbit.events.report import ClientRound, Report, Round
from lorabbit.metrics import is_better, lower_is_better
from lorabbit_bench.compare.cache import RunOutcome
from lorabbit_bench.compare.sweep import ComputeDevice, NetworkLink, RunSpec

BITS = 8
LAST_SCORES = 3
"""A plateau is the mean of so many last scores."""


class ScoredRound(BaseModel):
    """A scored round: its score, and what was spent up to its end."""

    round: int
    score: float
    bytes_up: int
    bytes_down: int
    seconds: float
    """Of the rounds, on the machine that ran it."""
    client_seconds: float
    """Of training, all clients together."""
    flops: float | None = None
    """Counted operations of training, all clients together; None where they were not counted."""
    modelled_seconds: float | None = None

    @property
    def bytes(self) -> int:
        """Payload in both directions."""
        return self.bytes_up + self.bytes_down


class RunMetrics(BaseModel):
    """One run's figures."""

    case: str
    label: str
    seed: int
    key: str
    job: str
    metric: str
    lower_is_better: bool
    final: float | None
    best: float | None
    best_round: int
    client_scores: dict[str, float]
    """Of the last round in which each client was scored."""
    rounds: int
    trainable: int
    base_parameters: int
    bytes_up: int
    bytes_down: int
    overhead: int
    bytes_by_role: dict[str, int]
    client_seconds: float
    flops: float | None = None
    parameters_up: int | None = None
    seconds: float
    modelled_seconds: float | None
    peak_memory_bytes: int | None
    peak_gpu_bytes: int | None
    facts: dict[str, float]
    """What the method told of its last round, as far as it is numbers."""
    curve: list[ScoredRound]
    sources: str = ""
    workers: int = 1

    @property
    def client_mean(self) -> float | None:
        """Mean score of the clients, each with the same weight."""
        scores = list(self.client_scores.values())
        return sum(scores) / len(scores) if scores else None

    @property
    def plateau(self) -> float | None:
        """Mean of the last scores."""
        last = [point.score for point in self.curve[-LAST_SCORES:]]
        return sum(last) / len(last) if last else None

    def reaches(self, target: float) -> ScoredRound | None:
        """The first scored round that is at least as good as `target`; None when there is none."""
        for point in self.curve:
            if not is_better(self.metric, target, point.score):
                return point
        return None


def run_metrics(  # noqa: PLR0913 - the parts of a run, and of the model of time
    planned: RunSpec,
    report: Report,
    outcome: RunOutcome,
    *,
    metric: str | None = None,
    link: NetworkLink | None = None,
    device: ComputeDevice | None = None,
) -> RunMetrics:
    """Read a run's figures; `metric` is the report's main one when None. Times are modelled when a link is given."""
    metric = metric or report.main_metric or "loss"
    begun = [*([report.preparation] if report.preparation else []), *report.rounds]
    last = report.rounds[-1] if report.rounds else None
    times = [round_seconds(row, report.clients, link, device or ComputeDevice()) for row in begun] if link else None
    return RunMetrics(
        case=planned.case,
        label=planned.label,
        seed=planned.seed,
        key=outcome.key,
        job=planned.spec.name,
        metric=metric,
        lower_is_better=lower_is_better(metric),
        **_scores(report, metric),
        rounds=len(report.rounds),
        trainable=report.adapter.parameters,
        base_parameters=report.base.parameters,
        bytes_up=sum(row.bytes_up for row in begun),
        bytes_down=sum(row.bytes_down for row in begun),
        overhead=sum(row.overhead_up + row.overhead_down for row in begun),
        bytes_by_role=dict(report.bytes_by_role),
        client_seconds=sum(part.seconds for row in begun for part in row.per_client),
        flops=_flops(part for row in begun for part in row.per_client),
        parameters_up=sum(part.parameters_up for row in begun for part in row.per_client) or None,
        seconds=sum(row.seconds for row in begun),
        modelled_seconds=sum(times) if times is not None else None,
        peak_memory_bytes=outcome.peak_memory_bytes,
        peak_gpu_bytes=outcome.peak_gpu_bytes,
        facts=_numbers(last),
        curve=curve(begun, metric, times),
        sources=outcome.sources,
        workers=outcome.workers,
    )


def _scores(report: Report, metric: str) -> dict[str, object]:
    """Final and best score, and each client's last one."""
    scored = [row for row in report.rounds if metric in row.metrics]
    choose = min if lower_is_better(metric) else max
    best = choose(scored, key=lambda row: row.metrics[metric], default=None)
    clients = {p.client: p.metrics[metric] for row in scored for p in row.per_client if metric in p.metrics}
    return {
        "final": scored[-1].metrics[metric] if scored else None,
        "best": best.metrics[metric] if best else None,
        "best_round": best.round if best else 0,
        "client_scores": clients,
    }


def _flops(parts: Iterable[ClientRound]) -> float | None:
    """Sum of counted operations; None where a training was not counted."""
    counts = [part.flops for part in parts if part.steps or part.flops]
    return math.fsum(counts) if counts and all(counts) else None


def _numbers(row: Round | None) -> dict[str, float]:
    facts = row.facts if row is not None else {}
    return {
        name: float(value)
        for name, value in facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def curve(begun: Iterable[Round], metric: str, times: Sequence[float] | None) -> list[ScoredRound]:
    """Every scored round with what was spent up to its end, the preparation included."""
    points = []
    parts: list[ClientRound] = []
    up = down = 0
    seconds = client_seconds = modelled = 0.0
    for number, row in enumerate(begun):
        up, down = up + row.bytes_up, down + row.bytes_down
        seconds += row.seconds
        parts += row.per_client
        client_seconds += sum(part.seconds for part in row.per_client)
        modelled += times[number] if times is not None else 0.0
        if metric in row.metrics and row.round > 0:
            points.append(
                ScoredRound(
                    round=row.round,
                    score=row.metrics[metric],
                    bytes_up=up,
                    bytes_down=down,
                    seconds=seconds,
                    client_seconds=client_seconds,
                    flops=_flops(parts),
                    modelled_seconds=modelled if times is not None else None,
                )
            )
    return points


def round_seconds(row: Round, clients: Sequence[str], link: NetworkLink, device: ComputeDevice) -> float:
    """Seconds that a round would take over this link and these devices.

    The slowest client's ``latency + down / down_mbit + compute / speed + up / up_mbit + latency``, bytes with their
    overhead, and the server's aggregation as measured. Compute is the counted operations over the device's rate where
    both are known, else the seconds measured here times its factor. Scoring is not counted, but what is read for it is.
    """
    places = {client: place for place, client in enumerate(clients)}
    slowest = 0.0
    for part in row.per_client:
        if row.cohort and part.client not in row.cohort:
            continue  # it was only scored
        speed = device.client_speeds[places.get(part.client, 0) % len(device.client_speeds)]
        down = BITS * (part.bytes_down + part.overhead_down) / (link.down_mbit * 1e6)
        up = BITS * (part.bytes_up + part.overhead_up) / (link.up_mbit * 1e6)
        here = part.seconds * device.seconds_factor
        compute = (part.flops / (device.gflops * 1e9) if device.gflops and part.flops else here) / speed
        slowest = max(slowest, 2 * link.latency_ms / 1000 + down + compute + up)
    return slowest + row.aggregate_seconds
