"""Jobs with private examples, over services: what a killed client has counted, and what an owner's demand leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from learning import job, write_reviews
from mortal_rig import Fate, MortalRig

from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.execution.privacy_ledger import PrivacyLedger
from lorabbit_client.executor import Executor

STEPS, ROUNDS = 2, 3


def spec_of(folder: Path, **more) -> JobSpec:
    write_reviews(folder)
    local = {"steps": STEPS, "batch_size": 4}
    given = {"privacy": {"level": "example", "clip": 0.1}, "rounds": ROUNDS, "local": local}
    return job(folder, **{**given, **more})


def played(folder: Path, spec: JobSpec, *, fate: Fate | None = None, limits=UNLIMITED) -> tuple[MortalRig, Report]:
    rig = MortalRig(folder / "services", spec, Executor(limits=limits), fate)
    report = rig.play()
    rig.service.close()
    return rig, report


def counted(rig: MortalRig) -> list[int]:
    """Steps in the ledger of each client."""
    return [
        sum(kind.steps for kind in PrivacyLedger.read(rig.folder / "clients" / address / "privacy.json").all_releases)
        for address in sorted(rig.agents)
    ]


@pytest.mark.parametrize("after_writing", [False, True], ids=["while it trains", "once its result is written"])
def test_a_training_that_is_done_twice_counts_twice_where_its_result_was_written_the_first_time(
    tmp_path: Path, *, after_writing: bool
):
    rig, report = played(tmp_path, spec_of(tmp_path), fate=Fate("host-2", 2, "train", after_writing))

    assert (rig.deaths, report.status) == (1, "done")
    assert counted(rig) == [ROUNDS * STEPS, (ROUNDS + after_writing) * STEPS]


def test_a_job_of_clients_whose_owners_demand_privacy_ends_without_scores(tmp_path: Path):
    _, report = played(tmp_path, spec_of(tmp_path), limits=TrainingLimits(epsilon=1000.0))

    assert (report.status, [r.accepted for r in report.rounds]) == ("done", [2] * ROUNDS)
    assert [(r.metrics, r.train_loss) for r in report.rounds] == [({}, None)] * ROUNDS


def test_a_job_without_noise_ends_with_the_owners_sentence(tmp_path: Path):
    _, report = played(tmp_path, spec_of(tmp_path, privacy=None), limits=TrainingLimits(epsilon=1000.0))

    assert report.status == "failed"
    assert "this client's owner demands noise from its own process (LORABBIT_PRIVACY_EPSILON)" in report.reason
