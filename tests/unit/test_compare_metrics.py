"""What a comparison reads off reports, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from lorabbit.events.report import AdapterFacts, ClientRound, Report, Round
from lorabbit.job.spec import JobSpec
from lorabbit_bench.compare.cache import RunOutcome
from lorabbit_bench.compare.metrics import RunMetrics, round_seconds, run_metrics
from lorabbit_bench.compare.statistics import bootstrap, paired_t, spread
from lorabbit_bench.compare.sweep import ComputeDevice, NetworkLink, RunSpec

CLIENTS = ["a", "b"]


def part(client: str, **values: float) -> ClientRound:
    known = {"num_examples": 10, "steps": 2, **values}
    return ClientRound.model_validate({"client": client, **known})


def report(scores: list[float | None], metric: str = "accuracy") -> Report:
    """Rounds of 2 clients, 100 bytes up and 50 down each, 1 and 3 seconds; aggregation takes half a second."""
    rounds = []
    for number, score in enumerate(scores, start=1):
        clients = [
            ClientRound(
                client=name, num_examples=10, seconds=seconds, steps=2, bytes_up=100, bytes_down=50,
                metrics={} if score is None else {metric: score + offset},
            )
            for name, seconds, offset in (("a", 1.0, -0.1), ("b", 3.0, 0.1))
        ]  # fmt: skip
        rounds.append(
            Round(
                round=number, cohort=CLIENTS, accepted=2, bytes_up=200, bytes_down=100, overhead_up=4, overhead_down=2,
                seconds=5.0, aggregate_seconds=0.5, metrics={} if score is None else {metric: score},
                per_client=clients, facts={"aggregation_error": 0.25 * number, "phase": "x"},
            )
        )  # fmt: skip
    return Report(
        job="x", status="done", main_metric=metric, clients=CLIENTS, rounds=rounds, adapter=AdapterFacts(parameters=42)
    )


def measured(scores: list[float | None], metric: str = "accuracy", **more: object) -> RunMetrics:
    planned = RunSpec("all", "x", 0, JobSpec())
    return run_metrics(planned, report(scores, metric), RunOutcome(key="k", status="done"), **more)  # type: ignore[arg-type]


def test_totals_are_sums_over_the_rounds() -> None:
    found = measured([0.5, 0.6, 0.7])

    assert (found.bytes_up, found.bytes_down, found.overhead) == (600, 300, 18)
    assert (found.seconds, found.client_seconds, found.trainable) == (15.0, 12.0, 42)


def test_what_prepared_the_job_counts_before_the_first_round() -> None:
    prepared = report([0.5])
    prepared.preparation = Round(
        round=0, cohort=CLIENTS, bytes_up=1000, bytes_down=7, seconds=2.0, per_client=[part("a", seconds=2.0)]
    )

    found = run_metrics(RunSpec("all", "x", 0, JobSpec()), prepared, RunOutcome(key="k", status="done"))

    assert (found.bytes_up, found.bytes_down, found.client_seconds, found.rounds) == (1200, 107, 6.0, 1)
    assert [(p.round, p.bytes_up, p.seconds) for p in found.curve] == [(1, 1200, 7.0)]


def test_the_final_score_is_the_last_one_and_the_best_one_is_the_highest() -> None:
    found = measured([0.5, 0.9, 0.7])

    assert (found.final, found.best, found.best_round) == (0.7, 0.9, 2)


def test_the_best_loss_is_the_lowest() -> None:
    found = measured([2.0, 1.0, 1.5], "loss")

    assert (found.best, found.best_round) == (1.0, 2)


def test_a_target_is_reached_in_the_first_round_that_is_as_good() -> None:
    found = measured([0.5, None, 0.8, 0.7])

    point = found.reaches(0.8)

    assert point is not None
    assert (point.round, point.bytes, point.seconds, point.client_seconds) == (3, 900, 15.0, 12.0)


def test_a_target_that_is_never_met_is_not_reached() -> None:
    assert measured([0.5, 0.6]).reaches(0.61) is None


def test_a_target_of_a_loss_is_met_from_above() -> None:
    point = measured([2.0, 1.0], "loss").reaches(1.0)

    assert point is not None
    assert point.round == 2


def test_a_plateau_is_the_mean_of_the_last_three_scores() -> None:
    assert measured([0.1, 0.5, 0.6, 0.7]).plateau == pytest.approx(0.6)


def test_the_clients_scores_are_those_of_the_last_scored_round() -> None:
    found = measured([0.5, 0.8, None])

    assert found.client_scores == pytest.approx({"a": 0.7, "b": 0.9})
    assert found.client_mean == pytest.approx(0.8)


def test_facts_are_the_numbers_of_the_last_round() -> None:
    assert measured([0.5, 0.6]).facts == {"aggregation_error": 0.5}


def test_a_modelled_round_lasts_as_long_as_its_slowest_client() -> None:
    # a: 0.02 + 8e6 bits / 8 Mbit/s + 1 s x 10 + 16e6 / 4 Mbit/s = 0.02 + 1 + 10 + 4; b the same with 3 s at speed 2.
    row = Round(
        round=1, cohort=CLIENTS, aggregate_seconds=0.5,
        per_client=[
            part("a", seconds=1.0, bytes_up=2_000_000, bytes_down=1_000_000),
            part("b", seconds=3.0, bytes_up=2_000_000, bytes_down=1_000_000),
        ],
    )  # fmt: skip
    link = NetworkLink(up_mbit=4, down_mbit=8, latency_ms=10)

    assert round_seconds(row, CLIENTS, link, ComputeDevice(seconds_factor=10, client_speeds=(1, 2))) == pytest.approx(
        20.52
    )
    assert round_seconds(row, CLIENTS, link, ComputeDevice(seconds_factor=10, client_speeds=(1, 4))) == pytest.approx(
        15.52
    )


def test_overhead_takes_its_time_on_the_link() -> None:
    row = Round(round=1, cohort=["a"], per_client=[part("a", overhead_up=1_000_000, overhead_down=1_000_000)])

    assert round_seconds(row, CLIENTS, NetworkLink(up_mbit=8, down_mbit=4), ComputeDevice()) == pytest.approx(3.0)


def test_a_client_that_was_only_scored_holds_up_no_modelled_round() -> None:
    row = Round(round=1, cohort=["a"], per_client=[part("a", seconds=1.0), part("b", seconds=50.0)])

    assert round_seconds(row, CLIENTS, NetworkLink(up_mbit=1, down_mbit=1), ComputeDevice()) == pytest.approx(1.0)


def test_modelled_time_adds_up_over_the_rounds() -> None:
    found = measured([0.5, 0.6], link=NetworkLink(up_mbit=0.0008, down_mbit=0.0004))

    # Each round: 50 bytes at 50 a second, 3 seconds, 100 bytes at 100 a second, half a second.
    assert [point.modelled_seconds for point in found.curve] == pytest.approx([5.5, 11.0])
    assert found.modelled_seconds == pytest.approx(11.0)


def test_no_time_is_modelled_without_a_link() -> None:
    assert measured([0.5]).modelled_seconds is None


def test_the_deviation_is_the_samples() -> None:
    found = spread([1.0, 2.0, 4.0])

    assert found is not None
    assert (found.mean, found.sd) == (pytest.approx(7 / 3), pytest.approx(1.5275252))


def test_one_value_has_no_deviation() -> None:
    found = spread([1.0])

    assert found is not None
    assert found.sd is None


def test_students_interval_of_three_differences() -> None:
    # mean 2, sd 1, t(0.975; 2) = 4.302653: half width 4.302653 / sqrt(3) = 2.484138.
    found = paired_t([1.0, 2.0, 3.0])

    assert found is not None
    assert (found.low, found.high, found.n) == (pytest.approx(-0.484138), pytest.approx(4.484138), 3)
    assert not found.excludes_zero


def test_one_seed_has_no_interval() -> None:
    assert paired_t([1.0]) is None


def test_a_bootstrap_of_equal_differences_is_that_difference() -> None:
    found = bootstrap([[0.25] * 6, [0.25] * 6])

    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 12)


def test_a_bootstrap_of_one_seed_has_the_normal_width_of_its_clients() -> None:
    # 400 values of +-1: the mean of a draw has a standard deviation of 1 / 20.
    found = bootstrap([[-1.0, 1.0] * 200])

    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.1)


def test_a_bootstrap_gives_the_same_interval_again() -> None:
    groups = [[0.1, 0.5, -0.2, 0.3, 0.0], [0.2, 0.4, -0.1, 0.2, 0.1]]

    assert bootstrap(groups) == bootstrap(groups)


def test_few_clients_have_no_bootstrap() -> None:
    assert bootstrap([[0.1, 0.2, 0.3, 0.4]]) is None


def test_operations_and_numbers_sent_are_sums_and_unknown_where_a_training_was_not_counted() -> None:
    counted = report([0.5, 0.6])
    for round_ in counted.rounds:
        round_.per_client[0].flops, round_.per_client[1].flops = 3e9, 4e9
        round_.per_client[0].parameters_up, round_.per_client[1].parameters_up = 10, 11
    planned, outcome = RunSpec("all", "x", 0, JobSpec()), RunOutcome(key="k", status="done")

    found = run_metrics(planned, counted, outcome)
    counted.rounds[1].per_client[0].flops = 0.0
    partly = run_metrics(planned, counted, outcome)

    assert (found.flops, found.parameters_up, [p.flops for p in found.curve]) == (1.4e10, 42, [7e9, 1.4e10])
    assert (partly.flops, [p.flops for p in partly.curve]) == (None, [7e9, None])


def test_a_device_with_a_rate_computes_for_as_long_as_its_counted_operations_take() -> None:
    row = report([0.5]).rounds[0]
    link = NetworkLink(up_mbit=1e9, down_mbit=1e9)
    row.per_client[0].flops, row.per_client[1].flops = 8e9, 2e9

    # client-a: 8e9 operations at 2e9 a second; client-b: 2e9 at 1e9. Measured seconds no longer count.
    found = round_seconds(row, CLIENTS, link, ComputeDevice(gflops=2.0, client_speeds=(1.0, 0.5)))

    assert found == pytest.approx(4.0 + 0.5)
