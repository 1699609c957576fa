"""Every method and every aggregation under every schedule: a run that can be made again to the bit, or a refusal.

A whole server, and clients that do each method's own client half on a loss that can be solved on paper. Methods
with models of their own run in step alone, and with real models: see test_personal_runs.py.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, get_args

import pytest
from cases import for_each
from method_client import RANK, MethodClient
from reference_pages import SCHEDULES, job_of, refusal
from server_rig import Rig

from lorabbit.job.spec import Aggregation, JobSpec
from lorabbit.methods.registry import METHODS
from lorabbit.types import TRAIN
from lorabbit_cli.local.replay import replay

CLIENTS, ROUNDS = 3, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"t_heat": 1, "t_cool": 1},
    "sa-fedlora": {"t0": 1, "r_min": 1, "t_heat": 1, "t_cool": 1, "ladder": [1, 2]},
    "slora": {"sparse_rounds": 1},
}
ALLOWED = {(m, s) for m in METHODS for s in SCHEDULES if not refusal(job_of(m, s))}
RUNS = sorted((m, s) for m, s in ALLOWED if not METHODS[m].personal)
RULES = [
    (r, s)
    for r in get_args(Aggregation)
    for s in SCHEDULES
    if r != "factors" and not refusal(job_of("fedavg", s, aggregation=r))
]


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, clients=0)
    rig.clients = [MethodClient(rig.broker, f"host-{n}", tmp_path / "clients") for n in range(1, CLIENTS + 1)]
    yield rig
    if rig.service is not None:
        rig.service.close()


def small(spec: JobSpec) -> JobSpec:
    """The same job over few rounds, with factors as `MethodClient` has them."""
    content = spec.model_dump(mode="json")
    content["model"] |= {"lora": {"rank": RANK, "alpha": 2 * RANK}}
    content["method"] |= SETTINGS.get(spec.method.name, {})
    content |= {"clients": CLIENTS, "rounds": ROUNDS, "evaluation": {"every": ROUNDS}}
    return JobSpec.model_validate(content | {"local": {"optimizer": "sgd"}, "output": {"keep_updates": True}})


def _in_time(rig: Rig, finish, seconds: float, task) -> None:
    rig.broker.after(seconds if task.phase == TRAIN else 0.0, lambda: finish(task))


def play(rig: Rig, spec: JobSpec) -> tuple[bool, list[bool]]:
    """Run it with one client slower than the others; was an update late, and is each version made again."""
    for client, seconds in zip(rig.clients, (1.0, 1.0, 1.5), strict=True):
        client.finish = partial(_in_time, rig, client.finish, seconds)

    report = rig.run(small(spec))

    assert report.status == "done", report.reason
    assert [entry.round for entry in report.rounds] == [1, 2, 3, 4]
    is_late = any(entry.facts.get("staleness_max", 0) for entry in report.rounds)
    if METHODS[spec.method.name].prepares:  # its round 0 is answered with facts, which a replay does not read
        return is_late, []
    return is_late, [version.is_same for version in replay(rig.runs("matrix"))]


def brings_late_updates(schedule: str) -> bool:
    """Whether the slower client's updates come to a newer version."""
    return schedule.startswith("buffered") or schedule.endswith("kept")


@pytest.mark.parametrize(("method", "schedule"), RUNS)
def test_a_method_runs_under_a_schedule_and_is_made_again_to_the_bit(rig, method, schedule):
    is_late, versions = play(rig, job_of(method, schedule))

    assert is_late is brings_late_updates(schedule)
    assert versions == ([] if METHODS[method].prepares else [True] * ROUNDS)


@pytest.mark.parametrize(("rule", "schedule"), RULES)
def test_an_aggregation_folds_what_a_schedule_brings_and_is_made_again_to_the_bit(rig, rule, schedule):
    is_late, versions = play(rig, job_of("fedavg", schedule, aggregation=rule))

    assert is_late is brings_late_updates(schedule)
    assert versions == [True] * ROUNDS


@for_each(method__schedule=[*product(sorted(METHODS), SCHEDULES)])
def test_a_method_that_does_not_run_under_a_schedule_says_why_in_its_papers_terms(method, schedule):
    said = refusal(job_of(method, schedule))

    assert bool(said) is ((method, schedule) not in ALLOWED)
    if said:
        assert METHODS[method].because in said
        assert "choose" in said or "set it to refuse" in said


def test_every_method_runs_in_step_and_some_under_every_schedule():
    assert {method for method, schedule in ALLOWED if schedule == "sync"} == set(METHODS)
    assert {schedule for _, schedule in ALLOWED} == set(SCHEDULES)


@pytest.mark.parametrize("schedule", ["buffered", "buffered, K = 1"])
def test_where_clients_never_wait_a_methods_t_is_the_number_of_versions(rig, schedule):
    play(rig, job_of("fedavg", schedule))

    made, asked = 0, []
    for event in rig.events:
        made += event.kind == "round-closed"
        if event.kind == "task-sent" and event.phase == TRAIN:
            asked.append((event.round, made))
    assert all(number == versions + 1 for number, versions in asked), asked
    assert len({number for number, _ in asked}) > 1
    told = [task.round for client in rig.clients for task in client.tasks if task.phase == TRAIN]
    assert max(told) <= ROUNDS


def test_fedasync_is_a_buffer_of_one(rig):
    play(rig, job_of("fedavg", "buffered, K = 1"))

    assert [entry.accepted for entry in rig.report("matrix").rounds] == [1] * ROUNDS
