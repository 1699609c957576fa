"""Stress tests before anything is started: what is asked, how clients behave, what the machine bears."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorabbit.errors import BadInput
from lorabbit.events import job_events as ev
from lorabbit.protocol.messages import Metrics
from lorabbit_bench.stress import process_deployment
from lorabbit_bench.stress.measurement import EventStats, MeasuredJob, Measurement, row_of
from lorabbit_bench.stress.plan import StressPlan, read_clients, read_payloads, read_plan
from lorabbit_bench.stress.report import render, scaling_cost
from lorabbit_bench.stress.resource_limits import LimitReached, ResourceDemand, check
from lorabbit_bench.stress.traces import LONGEST_AWAY, SHORTEST_AWAY, ClientTraces, read_slowness
from lorabbit_cli.__main__ import app

ROOT = Path(__file__).parents[2]


def plan(tmp_path: Path, **changes: object) -> StressPlan:
    options: dict[str, object] = {
        "clients": "10,5",
        "payload": "0.3,4MB",
        "rounds": 2,
        "train": "null",
        "churn": 0.0,
        "slow": "none",
        "quorum": 1.0,
        "time_limit": 60.0,
        "per_process": None,
        "seed": 3,
        "out": tmp_path,
    }
    return read_plan(**{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--clients", "ten"], "--clients: 'ten' is no list of whole numbers above 0 such as 10,50,100"),
        (["--clients", "0,5"], "--clients: '0,5' is no list of whole numbers above 0"),
        (["--on", "moon"], "--on: 'moon' is none of compose, docker, kubernetes, processes"),
        (["--on", "docker", "--churn", "0.1"], "only --on processes simulates clients"),
        (["--on", "docker", "--configured"], "--on docker uses the services of the deployment"),
        (["--payload", "four"], "--payload: 'four' is no list of sizes"),
        (["--payload", "0MB"], "--payload: 0MB is no size of an adapter"),
        (["--payload", "4MB", "--train", "real"], "--payload: with --train real the model decides the size"),
        (["--train", "some"], "--train: 'some' is neither null nor real"),
        (["--churn", "1"], "--churn: 1 is no probability"),
        (["--quorum", "0"], "--quorum: 0 is no share"),
        (["--slow", "often"], "--slow: 'often' is no distribution"),
        (["--slow", "uniform:2:1"], "--slow: 'uniform:2:1' does not read as uniform:LOW:HIGH"),
        (["--slow", "exponential:-1"], "--slow: 'exponential:-1' does not read as exponential:MEAN"),
        (["--out", __file__], "is a file; name a folder"),
    ],
)
def test_a_bad_option_is_one_sentence_and_starts_nothing(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["stress", *options])

    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_sizes_are_measured_from_the_smallest_on_and_once() -> None:
    assert read_clients("100,10,50,10") == (10, 50, 100)


def test_a_unit_holds_for_the_numbers_before_it() -> None:
    assert read_payloads("0.3,4,16MB") == (0.3, 4.0, 16.0)
    assert read_payloads("300KB,4MB") == (0.3, 4.0)
    assert read_payloads("2") == (2.0,)


def test_many_clients_share_processes_and_few_do_not(tmp_path: Path) -> None:
    assert [plan(tmp_path).clients_per_process(n) for n in (1, 100, 101, 1000)] == [1, 1, 2, 10]
    assert plan(tmp_path, per_process=7).clients_per_process(3) == 7


def test_the_job_of_a_size_asks_all_its_clients_and_waits_for_the_quorum(tmp_path: Path) -> None:
    spec = plan(tmp_path).job(5, 0.3)
    assert (spec.clients, spec.cohort_size, spec.model.name, spec.schedule) == (5, 5, "null:0.3MB", "sync")

    part = plan(tmp_path, quorum=0.6).job(5, 0.3).schedule
    assert not isinstance(part, str)
    assert (part.kind, getattr(part, "quorum", None)) == ("quorum", 0.6)


def test_a_real_job_names_a_model_instead_of_a_size(tmp_path: Path) -> None:
    real = plan(tmp_path, train="real", payload=None)

    assert real.payloads_mb == (0.0,)
    assert real.job(5, 0.0).model.name == "tiny:bert"


@pytest.mark.parametrize("slow", ["uniform:1:2", "exponential:0.5", "lognormal:0.5:1", "pareto:0.1:2"])
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(slow: str) -> None:
    def steps(seed: int) -> list[object]:
        trace = ClientTraces(seed, 0.3, read_slowness(slow))
        return [trace.step(client, number) for client in range(20) for number in range(1, 4)]

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)


def test_a_client_is_as_fast_in_every_round_and_among_any_number_of_others() -> None:
    trace = ClientTraces(0, 0.5, read_slowness("lognormal:0.5:1"))

    for client in range(10):
        assert len({trace.step(client, number).train_seconds for number in range(1, 9)}) == 1


def test_the_drawn_speeds_follow_the_distribution() -> None:
    drawn = [ClientTraces(0, 0, read_slowness("lognormal:0.5:1")).train_seconds(client) for client in range(2000)]

    assert statistics.median(drawn) == pytest.approx(0.5, rel=0.1)
    assert ClientTraces(0, 0, read_slowness("none")).train_seconds(0) == 0.0


def test_clients_leave_as_often_as_asked_and_come_back() -> None:
    trace = ClientTraces(5, 0.2, read_slowness("none"))
    steps = [trace.step(client, number) for client in range(500) for number in range(1, 5)]
    away = [step.away_seconds for step in steps if step.away_seconds is not None]

    assert len(away) / len(steps) == pytest.approx(0.2, abs=0.03)
    assert all(SHORTEST_AWAY <= seconds <= LONGEST_AWAY for seconds in away)
    assert all(ClientTraces(5, 0.0, read_slowness("none")).step(c, 1).away_seconds is None for c in range(50))


@pytest.mark.parametrize(
    ("demand", "descriptors", "sentence"),
    [
        (ResourceDemand(10**6, 0.3), 10**9, "memory: 1000000 clients need about"),
        (
            ResourceDemand(100, 0.3),
            500,
            "file descriptors: the broker needs about 600 for 100 clients, and may open 500",
        ),
        (ResourceDemand(100, 10**7), 10**6, "disk: 100 clients with 1e+07 MB each need up to"),
        (ResourceDemand(10**8, 0.3, mb_per_client=0), 10**12, "threads: 100000000 clients need about"),
    ],
)
def test_what_the_machine_does_not_bear_is_named(
    tmp_path: Path, demand: ResourceDemand, descriptors: int, sentence: str
) -> None:
    with pytest.raises(LimitReached) as reached:
        check(demand, tmp_path, descriptors=descriptors)

    assert str(reached.value).startswith(sentence)


@pytest.mark.parametrize(("descriptors", "is_enough"), [(104, False), (10**6, True)])
def test_a_measurement_is_let_through_where_the_machine_bears_it(
    tmp_path: Path, descriptors: int, *, is_enough: bool
) -> None:
    try:
        check(ResourceDemand(1, 0.001), tmp_path, descriptors=descriptors)
        was_enough = True
    except LimitReached:
        was_enough = False

    assert was_enough is is_enough


def told(*, rounds: int = 2, clients: int = 3) -> EventStats:
    tally = EventStats()
    for number in range(1, rounds + 1):
        start = number * 10_000
        tally.take(ev.RoundStarted(at_ms=start, round=number, cohort=tuple(f"client-{n}" for n in range(clients))))
        for client in range(clients):
            tally.take(
                ev.UpdateAccepted(
                    at_ms=start + 1000 * (client + 1),
                    round=number,
                    client=f"client-{client}",
                    phase="train",
                    metrics=Metrics(num_examples=1),
                    sha256=None,
                    bytes_up=300_000,
                    bytes_down=200_000,
                    overhead_up=0,
                    overhead_down=0,
                )
            )
        tally.take(
            ev.RoundClosed(
                at_ms=start + 4000,
                round=number,
                accepted=clients,
                sha256="",
                seconds=4.0,
                aggregate_seconds=0.1,
                pace={"late": 2, "too_stale": 1},
            )
        )
    tally.take(ev.UpdateRejected(at_ms=1, round=1, client="client-0", reason="names", detail=""))
    tally.take(ev.ClientLost(at_ms=1, client="client-0"))
    return tally


def row(tmp_path: Path, tally: EventStats, *, clients: int = 3, stopped: str = "") -> Measurement | None:
    memory, cpu = {"server": 70.0, "clients": 30.0 * clients}, {"server": 0.06, "clients": 0.12}
    measured = MeasuredJob(tally, memory, cpu, stopped)
    return row_of(measured, plan(tmp_path).job(clients, 0.3), payload_mb=0.3, spread="here", joining_seconds=1.0)


def test_the_figures_of_a_size_follow_from_its_events(tmp_path: Path) -> None:
    found = row(tmp_path, told())

    assert found is not None
    assert (found.rounds, found.round_p50, found.updates_per_second) == (2, 4.0, 6 / 8)
    assert found.mb_per_second == pytest.approx(6 * 0.5 / 8)
    assert (found.first_update, found.median_update, found.last_update) == (1.0, 2.0, 3.0)
    assert (found.refused, found.late, found.lost) == (3, 4, 1)
    assert found.cpu_ms_per_update == {"server": pytest.approx(10.0), "clients": pytest.approx(20.0)}


def test_a_size_of_which_no_round_was_closed_has_no_figures(tmp_path: Path) -> None:
    tally = EventStats()
    tally.take(ev.RoundStarted(at_ms=0, round=1, cohort=("client-0",)))

    assert row(tmp_path, tally, stopped="time") is None


def test_growth_compares_the_ends_of_each_payload(tmp_path: Path) -> None:
    small, large = row(tmp_path, told()), row(tmp_path, told(clients=6), clients=6)
    assert small is not None
    assert large is not None

    (found,) = scaling_cost([large, small])

    assert found.clients == (3, 6)
    assert found.cpu_times == pytest.approx(0.5)
    assert scaling_cost([small]) == []


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    small, large = row(tmp_path, told()), row(tmp_path, told(clients=6), clients=6)

    assert render([each for each in (small, large) if each is not None]).startswith(b"\x89PNG")


def test_a_private_rabbitmq_is_set_as_the_shipped_one() -> None:
    shipped = (ROOT / "services/rabbitmq/rabbitmq.conf").read_text(encoding="utf-8")
    settings = {line for line in shipped.splitlines() if line and not line.startswith("#")}

    assert settings - {"log.console.level = warning"} == set(process_deployment.RABBITMQ_SETTINGS.splitlines())


def test_a_payload_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="--payload: '1,,2' is no list of sizes"):
        read_payloads("1,,2")
