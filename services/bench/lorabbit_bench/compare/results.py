"""Results: the figures of all runs of a comparison, brought together over seeds and against the reference.

This is `comparison.json`, and all that tables, pages and plots show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Literal

from pydantic import BaseModel, Field

from lorabbit_bench.compare.metrics import RunMetrics, ScoredRound
from lorabbit_bench.compare.statistics import Interval, Spread, bootstrap, paired_t, spread
from lorabbit_bench.compare.sweep import ComputeDevice, NetworkLink, ScoreTarget, Sweep

SPREADS = (
    "final", "best", "plateau", "client_mean", "parameters_up", "bytes_up", "bytes_down", "overhead", "client_seconds",
    "flops", "seconds", "modelled_seconds", "peak_memory_bytes", "peak_gpu_bytes",
)  # fmt: skip
"""Measures of a run that a row holds with their spread."""


class CurvePoint(BaseModel):
    """A round of a run's curve over seeds: mean score and mean of what was spent."""

    round: int
    score: Spread
    bytes: float
    seconds: float
    modelled_seconds: float | None = None


class TimeToTarget(BaseModel):
    """What it took to reach the target, over the seeds that did; the others are `of` less `seeds`."""

    seeds: int
    of: int
    rounds: Spread | None = None
    bytes: Spread | None = None
    seconds: Spread | None = None
    client_seconds: Spread | None = None
    flops: Spread | None = None
    modelled_seconds: Spread | None = None
    bytes_share: float | None = None
    """Of the reference's; None unless both reached the target with every seed."""
    seconds_share: float | None = None
    """Of the reference's modelled time, or the measured one where none is modelled."""


class Difference(BaseModel):
    """A run's score less the reference's, paired by seed (and client); positive means a higher score."""

    pairs: int
    mean: float
    over_seeds: Interval | None = None
    over_clients: Interval | None = None


class RunRow(BaseModel):
    """One run over its seeds."""

    label: str
    method: str = ""
    seeds: list[int]
    failed: dict[int, str] = Field(default_factory=dict)
    """Seed -> why that run is missing."""
    final: Spread | None = None
    best: Spread | None = None
    plateau: Spread | None = None
    client_mean: Spread | None = None
    trainable: int | None = None
    base_parameters: int | None = None
    bytes_up: Spread | None = None
    bytes_down: Spread | None = None
    overhead: Spread | None = None
    payload_share: float | None = None
    """Payload bytes of both directions, as a share of the reference's."""
    upload_share: float | None = None
    parameters_up: Spread | None = None
    client_seconds: Spread | None = None
    flops: Spread | None = None
    seconds: Spread | None = None
    modelled_seconds: Spread | None = None
    peak_memory_bytes: Spread | None = None
    peak_gpu_bytes: Spread | None = None
    facts: dict[str, Spread] = Field(default_factory=dict)
    to_target: TimeToTarget | None = None
    difference: Difference | None = None
    curve: list[CurvePoint] = Field(default_factory=list)


class CaseResult(BaseModel):
    """All runs of one case."""

    name: str
    metric: str
    lower_is_better: bool
    target: float | None
    rows: list[RunRow]


class Comparison(BaseModel):
    """A whole comparison."""

    name: str
    about: str
    reference: str
    score: Literal["final", "best"]
    seeds: list[int]
    target: ScoreTarget | None
    link: NetworkLink | None
    device: ComputeDevice | None
    versions: dict[str, str | None]
    cases: list[CaseResult]
    runs: list[RunMetrics]
    notes: list[str] = Field(default_factory=list)


def compare(
    sweep: Sweep, measures: Sequence[RunMetrics], failed: Mapping[str, str], versions: Mapping[str, str | None]
) -> Comparison:
    """Bring together the measures of the runs that are done; `failed` says by a run's name why it is not."""
    return Comparison(
        name=sweep.name,
        about=sweep.about,
        reference=sweep.reference,
        score=sweep.score,
        seeds=list(sweep.seeds),
        target=sweep.target,
        link=sweep.link,
        device=sweep.device,
        versions=dict(versions),
        cases=[_case(sweep, case, [m for m in measures if m.case == case], failed) for case in sweep.cases],
        runs=list(measures),
        notes=_notes(measures, failed),
    )


def _notes(measures: Sequence[RunMetrics], failed: Mapping[str, str]) -> list[str]:
    """What a reader must know before the figures."""
    notes = [f"{name} is missing: {reason}" for name, reason in failed.items()]
    if len({m.sources for m in measures}) > 1:
        notes.append("Not all runs were made by the same state of the code; `--fresh` makes them again.")
    if len({m.workers for m in measures}) > 1:
        notes.append("Not all runs had the same number of training processes: measured seconds are not comparable.")
    return notes


def _case(sweep: Sweep, case: str, measures: Sequence[RunMetrics], failed: Mapping[str, str]) -> CaseResult:
    """Bring together one case."""
    by_label = {label: {m.seed: m for m in measures if m.label == label} for label in sweep.labels}
    reference = by_label[sweep.reference]
    of_one = sweep.target is not None and sweep.target.of == "reference"
    target = target_of(sweep.target, [reference] if of_one else list(by_label.values()))
    rows = []
    for label in sweep.labels:
        missing = {seed: failed[f"{case}/{label}/{seed}"] for seed in sweep.seeds if f"{case}/{label}/{seed}" in failed}
        row = _row(label, by_label[label], missing, target)
        row.method = next((p.spec.method.name for p in sweep.planned if p.label == label and p.case == case), "")
        if label != sweep.reference:
            row.difference = difference(by_label[label], reference, sweep.score)
        rows.append(row)
    _add_shares(rows, next(row for row in rows if row.label == sweep.reference))
    one = measures[0] if measures else None
    return CaseResult(
        name=case,
        metric=one.metric if one else "",
        lower_is_better=one.lower_is_better if one else False,
        target=target,
        rows=rows,
    )


def target_of(target: ScoreTarget | None, runs: Sequence[Mapping[int, RunMetrics]]) -> float | None:
    """The score to be reached: the one stated, or a share of the worst plateau among `runs` (the mean over seeds)."""
    if target is None or target.value is not None:
        return target.value if target else None
    assert target.share is not None  # noqa: S101 - one of both is there
    of_runs = [spread([m.plateau for m in seeds.values() if m.plateau is not None]) for seeds in runs]
    plateaus = [over.mean for over in of_runs if over is not None]
    if not plateaus:
        return None
    lower = next(m.lower_is_better for seeds in runs for m in seeds.values())
    return max(plateaus) / target.share if lower else min(plateaus) * target.share


def _row(label: str, runs: Mapping[int, RunMetrics], failed: dict[int, str], target: float | None) -> RunRow:
    """Bring together the seeds of one run."""

    def over(value: Callable[[RunMetrics], float | None]) -> Spread | None:
        return spread([found for m in runs.values() if (found := value(m)) is not None])

    one = next(iter(runs.values()), None)
    names = [name for name in (one.facts if one else {}) if all(name in m.facts for m in runs.values())]
    of_facts = {name: spread([m.facts[name] for m in runs.values()]) for name in names}
    return RunRow(
        label=label,
        seeds=list(runs),
        failed=failed,
        trainable=one.trainable if one else None,
        base_parameters=one.base_parameters if one else None,
        facts={name: found for name, found in of_facts.items() if found is not None},
        to_target=_reached(list(runs.values()), target) if target is not None and runs else None,
        curve=_curve(list(runs.values())),
        **{name: over(attrgetter(name)) for name in SPREADS},
    )


def _reached(runs: Sequence[RunMetrics], target: float) -> TimeToTarget:
    points = [point for m in runs if (point := m.reaches(target)) is not None]

    def over(value: Callable[[ScoredRound], float | None]) -> Spread | None:
        return spread([found for point in points if (found := value(point)) is not None])

    return TimeToTarget(
        seeds=len(points),
        of=len(runs),
        rounds=over(lambda p: p.round),
        bytes=over(lambda p: p.bytes),
        seconds=over(lambda p: p.seconds),
        client_seconds=over(lambda p: p.client_seconds),
        flops=over(lambda p: p.flops),
        modelled_seconds=over(lambda p: p.modelled_seconds),
    )


def _curve(runs: Sequence[RunMetrics]) -> list[CurvePoint]:
    """Rounds that were scored with every seed."""
    by_round = [{point.round: point for point in m.curve} for m in runs]
    shared = set.intersection(*(set(points) for points in by_round)) if by_round else set()
    marks = []
    for number in sorted(shared):
        points = [points[number] for points in by_round]
        modelled = [p.modelled_seconds for p in points if p.modelled_seconds is not None]
        score = spread([p.score for p in points])
        if score is not None:
            marks.append(
                CurvePoint(
                    round=number,
                    score=score,
                    bytes=sum(p.bytes for p in points) / len(points),
                    seconds=sum(p.seconds for p in points) / len(points),
                    modelled_seconds=sum(modelled) / len(modelled) if modelled else None,
                )
            )
    return marks


def difference(
    runs: Mapping[int, RunMetrics], reference: Mapping[int, RunMetrics], score: Literal["final", "best"]
) -> Difference | None:
    """Subtract the reference, seed by seed, and for final scores client by client."""

    def of(m: RunMetrics) -> float | None:
        return m.final if score == "final" else m.best

    pairs = [(runs[seed], reference[seed]) for seed in runs if seed in reference]
    known = [a - b for m, r in pairs if (a := of(m)) is not None and (b := of(r)) is not None]
    over = spread(known)
    if over is None:
        return None
    clients = [
        [m.client_scores[client] - r.client_scores[client] for client in m.client_scores if client in r.client_scores]
        for m, r in pairs
    ]
    return Difference(
        pairs=len(known),
        mean=over.mean,
        over_seeds=paired_t(known),
        over_clients=bootstrap(clients) if score == "final" else None,
    )


def _add_shares(rows: Sequence[RunRow], reference: RunRow) -> None:
    """State payload, and what it took to reach the target, as shares of the reference's."""
    whole = _payload(reference)
    for row in rows:
        own = _payload(row)
        row.payload_share = own / whole if own is not None and whole else None
        row.upload_share = _share(row.bytes_up, reference.bytes_up)
        mine, its = row.to_target, reference.to_target
        if mine and its and mine.seeds == mine.of and its.seeds == its.of:
            mine.bytes_share = _share(mine.bytes, its.bytes)
            mine.seconds_share = (
                _share(mine.modelled_seconds, its.modelled_seconds)
                if its.modelled_seconds
                else _share(mine.seconds, its.seconds)
            )


def _payload(row: RunRow) -> float | None:
    return row.bytes_up.mean + row.bytes_down.mean if row.bytes_up and row.bytes_down else None


def _share(part: Spread | None, whole: Spread | None) -> float | None:
    return part.mean / whole.mean if part is not None and whole is not None and whole.mean else None
