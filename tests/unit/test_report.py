"""The report is a fold of the event log, and its schema is a contract."""

from __future__ import annotations

import jsonschema
import pytest

from lorabbit.events import job_events as ev
from lorabbit.events.report import Report, begin, fold, report_schema
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics

SPEC = JobSpec(name="job", seed=3, method={"name": "fedprox", "mu": 0.1}, clients=2)
FACTS = {
    "base_parameters": 1000,
    "adapter_parameters": 40,
    "rank": 4,
    "main_metric": "accuracy",
    "versions": {"torch": "2"},
    "label_counts": {"yes": 3, "no": 1},
}


def trained(round_number, client, n, loss, **what):
    return ev.UpdateAccepted(
        **{
            "at_ms": 2_000,
            "round": round_number,
            "client": client,
            "phase": "train",
            "metrics": Metrics(num_examples=n, loss=loss, steps=5, seconds=1.5),
            "sha256": "5" * 64,
            "bytes_up": 100,
            "bytes_down": 50,
            "overhead_up": 3,
            "overhead_down": 4,
            **what,
        }
    )


def scored(round_number, client, accuracy):
    values = Metrics(num_examples=5, loss=0.25, values={"accuracy": accuracy})
    return trained(round_number, client, 0, None, phase="evaluate", metrics=values, sha256=None, bytes_up=0)


def closed(number, sha):
    return ev.RoundClosed(at_ms=3_000, round=number, accepted=2, sha256=sha * 64, seconds=1.5, aggregate_seconds=0.1)


def evaluated(number, accuracy, loss=0.5):
    return ev.RoundEvaluated(at_ms=4_000, round=number, metrics={"accuracy": accuracy, "loss": loss})


START = [
    ev.JobSubmitted(at_ms=1_000),
    ev.JobStarted(at_ms=1_000, clients=("client-1", "client-2")),
    ev.AdapterInitialized(
        at_ms=1_500,
        client="client-1",
        sha256="0" * 64,
        size_bytes=160,
        parameters=40,
        base_sha256="b" * 64,
        facts=FACTS,
    ),
]


def report(*events):
    return fold(begin("job-2", SPEC), [*START, *events])


def test_a_report_begins_with_what_the_job_says():
    started = report()

    assert (started.job, started.seed, started.method) == ("job-2", 3, {"name": "fedprox", "mu": 0.1})
    assert started.clients == ["client-1", "client-2"]
    assert started.base.model_dump() == {"parameters": 1000, "sha256": "b" * 64}
    assert started.adapter.model_dump() == {"sha256": "0" * 64, "bytes": 160, "parameters": 40, "rank": 4}
    assert (started.main_metric, started.versions) == ("accuracy", {"torch": "2"})
    assert started.label_counts == {"client-1": {"yes": 3, "no": 1}}


def test_a_round_adds_its_clients_up_in_partition_order():
    made = report(
        ev.RoundStarted(at_ms=1_600, round=1, cohort=("client-1", "client-2")),
        trained(1, "client-2", 3, 2.0),
        trained(1, "client-1", 1, 6.0),
        closed(1, "a"),
    )

    (only,) = made.rounds
    assert [c.client for c in only.per_client] == ["client-1", "client-2"]
    assert only.train_loss == pytest.approx((1 * 6.0 + 3 * 2.0) / 4)
    assert (only.bytes_up, only.bytes_down, only.overhead_up, only.overhead_down) == (200, 100, 6, 8)
    assert (only.accepted, only.seconds, only.sha256) == (2, 1.5, "a" * 64)
    assert made.adapter.sha256 == "a" * 64


def test_scores_stand_beside_their_client_and_their_bytes_count():
    made = report(
        ev.RoundStarted(round=1, cohort=("client-1",)), trained(1, "client-1", 1, 6.0), scored(1, "client-2", 0.5)
    )

    first, second = made.rounds[0].per_client
    assert (first.loss, first.metrics, first.steps) == (6.0, {}, 5)
    assert (second.num_examples, second.metrics) == (0, {"accuracy": 0.5, "loss": 0.25})
    assert made.rounds[0].bytes_down == 100


def test_refusals_are_counted_by_reason():
    refusal = ev.UpdateRejected(round=1, client="client-1", reason="not-finite", detail="NaN")

    made = report(ev.RoundStarted(round=1, cohort=("client-1",)), refusal, refusal)

    assert made.rounds[0].rejected == {"not-finite": 2}


def test_the_best_round_is_the_first_with_the_highest_main_metric_and_the_final_one_the_last():
    rounds = [ev.RoundStarted(round=number, cohort=("client-1",)) for number in (1, 2, 3)]

    made = report(*rounds, evaluated(1, 0.5), evaluated(2, 0.9), evaluated(3, 0.9, loss=0.1))

    assert (made.best.round, made.best.metrics["accuracy"]) == (2, 0.9)
    assert made.final.metrics == {"accuracy": 0.9, "loss": 0.1}


def test_of_a_loss_the_lowest_is_the_best():
    spec = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"metric": "loss"})})
    rounds = [ev.RoundStarted(round=number, cohort=("client-1",)) for number in (1, 2)]

    made = fold(begin("j", spec), [*START, *rounds, evaluated(1, 0.9, loss=0.3), evaluated(2, 0.1, loss=0.2)])

    assert (made.main_metric, made.best.round) == ("loss", 2)


def test_a_report_says_how_a_job_ended_and_how_long_it_took():
    made = report(ev.JobEnded(at_ms=61_000, status="failed", reason="no luck", exit_code=1))

    assert (made.status, made.reason, made.seconds) == ("failed", "no luck", 60.0)


def test_what_happened_before_the_first_round_is_in_no_round():
    assert report(trained(0, "client-1", 1, 1.0, phase="initialise")).rounds == []


def test_folding_event_by_event_is_the_same_as_folding_at_once():
    events = [
        ev.RoundStarted(at_ms=1_600, round=1, cohort=("client-1",)),
        trained(1, "client-1", 1, 6.0),
        closed(1, "a"),
        scored(1, "client-1", 0.5),
        evaluated(1, 0.5),
    ]
    stepwise = begin("job-2", SPEC)
    for event in [*START, *events]:
        fold(stepwise, [event])

    assert stepwise == report(*events)


def test_a_report_survives_its_file_and_holds_to_its_published_schema():
    made = report(ev.RoundStarted(round=1, cohort=("client-1",)), trained(1, "client-1", 1, 6.0), closed(1, "a"))

    text = made.model_dump_json()

    assert Report.model_validate_json(text).model_dump() == made.model_dump()
    jsonschema.validate(made.model_dump(mode="json"), report_schema())


def test_a_preparation_is_told_apart_from_the_rounds():
    begun = ev.RoundStarted(at_ms=1_600, round=0, cohort=("client-1", "client-2"))
    made = fold(begin("job", SPEC), [*START, begun, trained(0, "client-1", 3, 0.5), closed(0, "0")])

    assert made.rounds == []
    assert (made.preparation.round, made.preparation.bytes_up, made.preparation.sha256) == (0, 100, "0" * 64)


def test_bytes_down_are_added_up_by_role_over_rounds_and_preparation():
    begun = [ev.RoundStarted(at_ms=1_600, round=number, cohort=("client-1",)) for number in (0, 1)]
    read = [trained(0, "client-1", 3, 0.5, bytes_by_role={"base": 50})]
    read += [trained(1, "client-1", 3, 0.5, bytes_by_role={"base": 20, "adapter": 30})]
    made = fold(begin("job", SPEC), [*START, *begun, *read])

    assert made.rounds[0].bytes_by_role == {"base": 20, "adapter": 30}
    assert made.bytes_by_role == {"base": 70, "adapter": 30}


def test_what_a_method_tells_of_a_round_stands_in_it():
    told = closed(1, "a").model_copy(update={"facts": {"rank": 4, "aggregation_error": 0.125}})
    made = fold(begin("job", SPEC), [*START, ev.RoundStarted(round=1, cohort=("client-1",)), told])

    assert made.rounds[0].facts == {"rank": 4, "aggregation_error": 0.125}
