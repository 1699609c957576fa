"""The fold behind the live view."""

from __future__ import annotations

import pytest
from doubles_events import (
    START_MS,
    accuracy,
    examples,
    loss,
    name,
    one_round,
    opening,
    pooled_accuracy,
    pooled_loss,
    sample_log,
    sample_spec,
)

from lorabbit.events import job_events as ev
from lorabbit.types import EVALUATE, TRAIN
from lorabbit_cli.live_view.state import JobProgress, Note


def fold(progress: JobProgress, log: list[ev.AnyEvent]) -> list[Note]:
    return [note for event in log for note in progress.apply(event)]


def test_a_whole_log_leaves_every_figure_of_the_run():
    progress = JobProgress(sample_spec())

    fold(progress, sample_log())

    assert progress.status == "done"
    assert progress.scores == pytest.approx([pooled_accuracy(t, 3) for t in (1, 2, 3)])
    assert progress.rounds[2].train_loss == pytest.approx(pooled_loss(2, 3))
    assert (progress.bytes_up, progress.bytes_down) == (9000, 9000)
    assert progress.overhead_bytes == 100 * 2 * 3 * 3
    second = progress.clients[name(1)]
    assert second.examples == examples(1)
    assert second.loss == pytest.approx(loss(3, 1))
    assert second.score == pytest.approx(accuracy(3, 1))
    assert second.state == "idle"


def test_a_client_shows_the_task_that_it_reports_on():
    progress = JobProgress(sample_spec())
    fold(progress, [*opening(), *one_round(1)[:4]])
    assert progress.clients[name(0)].state == "waiting"

    progress.apply(ev.TaskProgressed(at_ms=START_MS, round=1, client=name(0), phase=TRAIN, fraction=0.1))
    assert progress.clients[name(0)].state == "training"

    progress.apply(ev.TaskSent(at_ms=START_MS, round=1, client=name(0), phase=EVALUATE, attempt=1))
    progress.apply(ev.TaskProgressed(at_ms=START_MS, round=1, client=name(0), phase=EVALUATE, fraction=0.25))

    row = progress.clients[name(0)]
    assert row.state == "evaluating"
    assert row.fraction == 0.25


def test_training_and_evaluation_of_one_client_do_not_mix():
    progress = JobProgress(sample_spec())
    fold(progress, [*opening(), *one_round(1)])
    fold(progress, one_round(2)[:4])
    fold(progress, [ev.TaskSent(at_ms=START_MS, round=1, client=name(0), phase=EVALUATE, attempt=1)])

    progress.apply(ev.TaskProgressed(at_ms=START_MS, round=2, client=name(0), phase=TRAIN, fraction=0.5, loss=0.1))

    assert progress.clients[name(0)].state == "training"
    assert progress.round_fraction() == pytest.approx(0.5 / 3)


def test_the_evaluation_of_a_round_does_not_count_as_its_training():
    progress = JobProgress(sample_spec())
    fold(progress, [*opening(), ev.RoundStarted(at_ms=START_MS, round=1, cohort=(name(0),))])

    progress.apply(ev.TaskSent(at_ms=START_MS, round=1, client=name(1), phase=EVALUATE, attempt=1))
    progress.apply(ev.TaskProgressed(at_ms=START_MS, round=1, client=name(1), phase=EVALUATE, fraction=0.9))

    assert progress.round_fraction() == 0.0


def test_a_lost_client_is_shown_as_lost_until_it_comes_back():
    progress = JobProgress(sample_spec())
    fold(progress, opening())

    notes = progress.apply(ev.ClientLost(at_ms=START_MS, client=name(2)))
    assert progress.clients[name(2)].state == "lost"
    assert notes[0].level == "warning"

    progress.apply(ev.ClientJoined(at_ms=START_MS, client=name(2), device="cpu"))
    assert progress.clients[name(2)].state == "idle"


def test_refused_updates_are_counted_by_reason_and_told():
    progress = JobProgress(sample_spec())
    fold(progress, [*opening(), *one_round(1)[:1]])

    refused = ev.UpdateRejected(at_ms=START_MS, round=1, client=name(0), reason="not-finite", detail="NaN in lora_B")
    notes = fold(progress, [refused, refused])

    assert progress.rejected == {"not-finite": 2}
    assert progress.rounds[1].rejected == 2
    assert "NaN in lora_B" in notes[0].text


def test_every_scored_round_is_told_in_one_line_with_its_main_metric():
    progress = JobProgress(sample_spec(rounds=2))

    notes = fold(progress, sample_log(rounds=2))

    lines = [note.text for note in notes if note.text.startswith("round ")]
    assert len(lines) == 2
    assert lines[0].startswith("round 1/2, train loss")
    assert f"accuracy {pooled_accuracy(1, 3):.4f}" in lines[0]
    assert "3/3 updates" in lines[0]
    assert "up 3.0 kB" in lines[0]


def test_a_round_that_is_not_scored_is_told_when_it_closes():
    spec = sample_spec(rounds=4).model_copy(
        update={"evaluation": sample_spec().evaluation.model_copy(update={"every": 2})}
    )
    progress = JobProgress(spec)
    fold(progress, opening())

    log = [event for event in one_round(1) if not isinstance(event, ev.RoundEvaluated)]
    notes = fold(progress, log)

    assert [note.text.split(",")[0] for note in notes] == ["round 1/4"]


def test_a_round_whose_scores_never_came_is_told_when_the_job_ends():
    progress = JobProgress(sample_spec())
    fold(progress, opening())
    fold(progress, [event for event in one_round(1) if not isinstance(event, ev.RoundEvaluated)])

    notes = fold(progress, [ev.JobEnded(at_ms=START_MS, status="failed", reason="every client is gone", exit_code=1)])

    assert [note.text.split(",")[0] for note in notes] == ["round 1/3", "job failed: every client is gone"]
    assert notes[-1].level == "error"


def test_time_left_is_the_mean_of_the_latest_rounds_times_the_rounds_to_go():
    progress = JobProgress(sample_spec(rounds=10))
    fold(progress, [*opening(), *one_round(1), *one_round(2)])
    start_of_third = START_MS + 4000
    progress.apply(ev.RoundStarted(at_ms=start_of_third, round=3, cohort=(name(0),)))

    left = progress.seconds_left(start_of_third + 500)

    assert left == pytest.approx(1.5 + 7 * 2.0)


def test_time_left_in_the_first_round_comes_from_how_far_it_is():
    progress = JobProgress(sample_spec(clients=2, rounds=4))
    fold(progress, opening(clients=2))
    assert progress.seconds_left(START_MS) is None

    fold(progress, [event for event in one_round(1, clients=2) if event.at_ms <= START_MS + 1000])

    assert progress.seconds_left(START_MS + 1000) == pytest.approx(2.0 * 4 - 1.0)


def test_the_clock_stops_when_the_job_ends():
    progress = JobProgress(sample_spec())
    fold(progress, sample_log())

    assert progress.elapsed_seconds(START_MS + 10**9) == 6.0


def test_a_big_population_is_not_told_one_by_one():
    progress = JobProgress(sample_spec(clients=30))

    notes = fold(progress, opening(clients=30))

    assert not [note for note in notes if "joined" in note.text]


def test_a_preparation_is_told_by_its_name_when_it_closes():
    progress = JobProgress(sample_spec())
    progress.apply(ev.RoundStarted(at_ms=START_MS, round=0, cohort=("client-1", "client-2")))

    closed = ev.RoundClosed(at_ms=START_MS, round=0, accepted=2, sha256="0" * 64, seconds=1.0, aggregate_seconds=0.1)
    (note,) = progress.apply(closed)

    assert note.text.startswith("preparation, 2/2 updates")


def test_the_line_of_a_round_tells_aggregation_error_and_rank():
    progress = JobProgress(sample_spec())
    told = {"rank": 4, "aggregation_error": 0.125, "rule": "svd"}

    log = [
        event.model_copy(update={"facts": told}) if event.kind == "round-closed" else event for event in one_round(1)
    ]
    lines = [note.text for note in fold(progress, log)]

    assert "aggregation_error 0.125, rank 4, " in lines[-1]


def test_the_line_of_a_round_that_does_not_wait_tells_who_was_late_and_how_old_updates_were():
    progress = JobProgress(sample_spec())
    pace = {"late": 2, "too_stale": 0, "staleness_mean": 0.5, "staleness_max": 3}
    closed = ev.RoundClosed(
        at_ms=START_MS, round=0, accepted=2, sha256="0" * 64, seconds=1.0, aggregate_seconds=0.1, pace=pace
    )

    (line,) = [note.text for note in fold(progress, [closed])]

    assert "late 2, staleness_mean 0.5, staleness_max 3" in line
    assert "too_stale" not in line


def test_a_training_that_counts_in_a_later_round_than_it_began_in_is_no_longer_under_way():
    progress = JobProgress(sample_spec())
    began = ev.TaskSent(at_ms=START_MS, round=1, client=name(0), phase=TRAIN, attempt=1)
    accepted = next(e for e in sample_log() if isinstance(e, ev.UpdateAccepted) and e.phase == TRAIN)

    fold(progress, [began, accepted.model_copy(update={"round": 3, "client": name(0)})])

    assert progress.clients[name(0)].tasks == {}
