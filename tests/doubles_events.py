"""A made-up run, as an event log and as its report: figures follow formulas, nothing was trained.

Client k of K holds 100 + 10 k training examples. In round t it trains to loss 2 / (t + k + 1), its
adapter scores accuracy 1 - 1 / (t + k + 2) on 10 test examples, and it moves 1,000 bytes each way.
"""

from __future__ import annotations

from lorabbit.events import job_events as ev
from lorabbit.events.report import AdapterFacts, BaseFacts, Best, ClientRound, Final, Report, Round
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN

SHA = "ab" * 32
START_MS = 1_700_000_000_000
ROUND_MS = 2_000
LABELS = ("networking", "numbers", "text")


def examples(k: int) -> int:
    return 100 + 10 * k


def loss(t: int, k: int) -> float:
    return 2 / (t + k + 1)


def accuracy(t: int, k: int) -> float:
    return 1 - 1 / (t + k + 2)


def pooled_accuracy(t: int, clients: int) -> float:
    return sum(accuracy(t, k) for k in range(clients)) / clients


def pooled_loss(t: int, clients: int) -> float:
    return sum(loss(t, k) * examples(k) for k in range(clients)) / sum(examples(k) for k in range(clients))


def name(k: int) -> str:
    return f"client-{k + 1}"


def sample_spec(*, clients: int = 3, rounds: int = 3) -> JobSpec:
    return JobSpec(name="sample", clients=clients, rounds=rounds)


def opening(*, clients: int = 3) -> list[ev.AnyEvent]:
    joined: list[ev.AnyEvent] = [ev.ClientJoined(at_ms=START_MS, client=name(k), device="cpu") for k in range(clients)]
    return [
        ev.JobSubmitted(at_ms=START_MS),
        *joined,
        ev.JobStarted(at_ms=START_MS, clients=tuple(name(k) for k in range(clients))),
        ev.TaskSent(at_ms=START_MS, round=0, client=name(0), phase=INITIALIZE, attempt=1),
        ev.AdapterInitialized(
            at_ms=START_MS,
            client=name(0),
            sha256=SHA,
            size_bytes=1000,
            parameters=250,
            base_sha256=None,
            facts={"main_metric": "accuracy", "base_parameters": 5000, "rank": 8},
        ),
        _accepted(0, 0, INITIALIZE, START_MS),
    ]


def _accepted(t: int, k: int, phase: str, at_ms: int) -> ev.UpdateAccepted:
    metrics = {
        INITIALIZE: Metrics(num_examples=0),
        TRAIN: Metrics(num_examples=examples(k), loss=loss(t, k), steps=5, seconds=1.0),
        EVALUATE: Metrics(num_examples=10, loss=loss(t, k), values={"accuracy": accuracy(t, k)}),
    }[phase]
    moved = 1000 if phase == TRAIN else 0
    return ev.UpdateAccepted(
        at_ms=at_ms,
        round=t,
        client=name(k),
        phase=phase,
        metrics=metrics,
        sha256=SHA if phase == TRAIN else None,
        bytes_up=moved,
        bytes_down=moved,
        overhead_up=50,
        overhead_down=50,
    )


def one_round(t: int, *, clients: int = 3) -> list[ev.AnyEvent]:
    at = START_MS + (t - 1) * ROUND_MS
    end = at + ROUND_MS
    who = tuple(name(k) for k in range(clients))
    log: list[ev.AnyEvent] = [ev.RoundStarted(at_ms=at, round=t, cohort=who)]
    log += [ev.TaskSent(at_ms=at, round=t, client=c, phase=TRAIN, attempt=1) for c in who]
    log += [
        ev.TaskProgressed(at_ms=at + 1000, round=t, client=name(k), phase=TRAIN, fraction=0.5, loss=loss(t, k))
        for k in range(clients)
    ]
    log += [_accepted(t, k, TRAIN, end) for k in range(clients)]
    log.append(
        ev.RoundClosed(
            at_ms=end, round=t, accepted=clients, sha256=SHA, seconds=ROUND_MS / 1000, aggregate_seconds=0.01
        )
    )
    log += [ev.TaskSent(at_ms=end, round=t, client=c, phase=EVALUATE, attempt=1) for c in who]
    log += [_accepted(t, k, EVALUATE, end) for k in range(clients)]
    pooled = {"accuracy": pooled_accuracy(t, clients), "loss": pooled_loss(t, clients)}
    return [*log, ev.RoundEvaluated(at_ms=end, round=t, metrics=pooled)]


def sample_log(*, clients: int = 3, rounds: int = 3) -> list[ev.AnyEvent]:
    log = opening(clients=clients)
    for t in range(1, rounds + 1):
        log += one_round(t, clients=clients)
    return [*log, ev.JobEnded(at_ms=START_MS + rounds * ROUND_MS, status="done")]


def _client_round(t: int, k: int) -> ClientRound:
    return ClientRound(
        client=name(k),
        num_examples=examples(k),
        loss=loss(t, k),
        metrics={"accuracy": accuracy(t, k)},
        seconds=1.0 + 0.1 * k,
        steps=5,
        bytes_up=1000,
        bytes_down=1000,
        overhead_up=100,
        overhead_down=100,
    )


def _round(t: int, clients: int) -> Round:
    return Round(
        round=t,
        cohort=[name(k) for k in range(clients)],
        accepted=clients,
        rejected={"not-finite": 1} if t == 2 else {},
        bytes_up=1000 * clients,
        bytes_down=1000 * clients,
        overhead_up=100 * clients,
        overhead_down=100 * clients,
        seconds=ROUND_MS / 1000,
        aggregate_seconds=0.01,
        train_loss=pooled_loss(t, clients),
        metrics={"accuracy": pooled_accuracy(t, clients), "loss": pooled_loss(t, clients)},
        per_client=[_client_round(t, k) for k in range(clients)],
        sha256=SHA,
    )


def sample_report(*, clients: int = 3, rounds: int = 3) -> Report:
    """The report of `sample_log`, with label counts that differ between clients."""
    folded = [_round(t, clients) for t in range(1, rounds + 1)]
    labels = {name(k): {label: 10 * (1 + (k + i) % 3) for i, label in enumerate(LABELS)} for k in range(clients)}
    return Report(
        job="sample",
        status="done",
        method={"name": "fedavg"},
        seed=7,
        main_metric="accuracy",
        versions={"lorabbit": "0.1.0", "python": "3.11"},
        clients=[name(k) for k in range(clients)],
        label_counts=labels,
        seconds=rounds * ROUND_MS / 1000,
        rounds=folded,
        final=Final(metrics=folded[-1].metrics if folded else {}),
        best=Best(round=rounds, metrics=folded[-1].metrics) if folded else Best(),
        adapter=AdapterFacts(sha256=SHA, bytes=1000, parameters=250, rank=8),
        base=BaseFacts(parameters=5000, sha256=None),
    )
