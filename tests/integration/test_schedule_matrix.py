"""Every method and every aggregation under every schedule: a run that can be made again to the bit, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from lorabbit.jobspec import Aggregation, JobSpec
from lorabbit.methods import METHODS
from lorabbit_cli.local import Means, run_local
from lorabbit_cli.reference_schedules import SCHEDULES, job_of, refusal
from lorabbit_cli.replay import replay

CLIENTS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"t_heat": 1, "t_cool": 1},
    "fibecfed": {"n_fisher": 4, "probes": 2, "draws": 1, "warmup_steps": 1},
    "sa-fedlora": {"t0": 1, "r_min": 1, "t_heat": 1, "t_cool": 1, "ladder": [1, 2]},
    "slora": {"sparse_rounds": 1},
}
ALLOWED = [(m, s) for m in sorted(METHODS) for s in SCHEDULES if not refusal(job_of(m, s))]
RULES = [
    (r, s)
    for r in get_args(Aggregation)
    for s in SCHEDULES
    if s != "sync" and r != "factors" and not refusal(job_of("fedavg", s, aggregation=r))
]


def run(folder: Path, spec: JobSpec):
    """A job of seconds."""
    content = spec.model_dump(mode="json")
    content["model"]["lora"] |= {"rank": 2, "alpha": 4}
    content["method"] |= SETTINGS.get(spec.method.name, {})
    content["data"] |= {"limit": 60}
    content |= {
        "clients": CLIENTS,
        "rounds": 4,
        "seed": 3,
        "local": {"steps": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.01},
        "evaluation": {"every": 4},
        "output": {"keep_updates": True, "keep_checkpoints": 0},
    }
    return run_local(JobSpec.model_validate(content), folder, means=Means(device="cpu", workers=1))


def check(folder: Path, spec: JobSpec, schedule: str) -> None:
    ended = run(folder, spec)

    report = ended.report
    assert report.status == "done", report.reason
    assert [entry.round for entry in report.rounds] == [1, 2, 3, 4]
    if METHODS[spec.method.name].prepares:
        return  # what its clients found out in round 0 is not among the updates that a replay reads
    assert [version.is_same for version in replay(ended.folder)] == [True] * 4
    if schedule != "sync":
        assert all(entry.accepted < CLIENTS or schedule.endswith("kept") for entry in report.rounds)
    if schedule.startswith("buffered") or schedule.endswith("kept"):
        assert max(entry.facts["staleness_max"] for entry in report.rounds) > 0, "no update came late"


@pytest.mark.parametrize(("method", "schedule"), ALLOWED)
def test_a_method_runs_under_a_schedule_and_is_made_again_to_the_bit(
    tmp_path: Path, method: str, schedule: str
) -> None:
    check(tmp_path, job_of(method, schedule), schedule)


@pytest.mark.parametrize(("rule", "schedule"), RULES)
def test_an_aggregation_folds_what_a_schedule_brings_and_is_made_again_to_the_bit(
    tmp_path: Path, rule: str, schedule: str
) -> None:
    check(tmp_path, job_of("fedavg", schedule, aggregation=rule), schedule)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_method_that_does_not_run_under_a_schedule_says_why_in_its_papers_terms(method: str, schedule: str) -> None:
    said = refusal(job_of(method, schedule))

    assert bool(said) is ((method, schedule) not in ALLOWED)
    if said:
        assert METHODS[method].because in said
        assert "choose" in said or "set it to refuse" in said


def test_every_method_runs_in_step_and_some_under_every_schedule() -> None:
    assert {method for method, schedule in ALLOWED if schedule == "sync"} == set(METHODS)
    assert {schedule for _, schedule in ALLOWED} == set(SCHEDULES)
