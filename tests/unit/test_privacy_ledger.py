"""What a client has released stays counted, by job and over all jobs, and budgets are held against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import PrivacySpec
from lorabbit.privacy.accountant import SampledGaussian, epsilon_of, epsilon_of_steps
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.execution.privacy_ledger import PrivacyLedger
from lorabbit_client.training.privacy_budget import spend

FEW, MANY = SampledGaussian(1.0, 0.01, 10), SampledGaussian(2.0, 0.5, 4)


def test_releases_are_counted_by_job_and_over_all_jobs_and_survive_the_process(tmp_path: Path):
    ledger = PrivacyLedger.read(tmp_path / "client" / "privacy.json")
    for job, release in (("a", FEW), ("a", MANY), ("b", FEW), ("a", FEW)):
        ledger.add(job, release)
    ledger.write()

    kept = PrivacyLedger.read(tmp_path / "client" / "privacy.json")

    assert kept.of("a") == (FEW._replace(steps=20), MANY)
    assert kept.of("c") == ()
    assert kept.all_releases == (FEW._replace(steps=30), MANY)


def test_a_training_that_ends_without_a_result_is_not_counted(tmp_path: Path):
    PrivacyLedger.read(tmp_path / "privacy.json").add("a", FEW)

    assert PrivacyLedger.read(tmp_path / "privacy.json").all_releases == ()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [[1.0, 0.5]]}', '{"a": [["x", 1, 2]]}'])
def test_a_damaged_ledger_is_named_and_nothing_is_trained_on_trust(text, tmp_path: Path):
    (tmp_path / "privacy.json").write_text(text)

    with pytest.raises(LoRAbbitError, match=r"the privacy ledger .*privacy\.json is damaged .* count from nothing"):
        PrivacyLedger.read(tmp_path / "privacy.json")


def test_unlike_releases_compose_to_more_than_each_and_less_than_their_sum():
    few, many = epsilon_of((FEW,), 1e-5), epsilon_of((MANY,), 1e-5)

    assert max(few, many) < epsilon_of((FEW, MANY), 1e-5) < few + many
    assert epsilon_of((FEW, FEW), 1e-5) == pytest.approx(epsilon_of_steps(1.0, 0.01, 20, 1e-5))


def test_a_job_pays_for_its_own_releases_and_the_owner_for_those_of_all_jobs():
    ledger = PrivacyLedger(releases={"other": [FEW]})
    one, two = epsilon_of((FEW,), 1e-5), epsilon_of((FEW, FEW), 1e-5)

    spend(FEW, PrivacySpec(level="example", epsilon=(one + two) / 2), "job", ledger, UNLIMITED)

    assert ledger.summary == {"steps": 10, "rate": 0.01, "epsilon": pytest.approx(one, rel=1e-5), "spent": True}
    with pytest.raises(LoRAbbitError, match=r"^LORABBIT_PRIVACY_EPSILON: another round would cost"):
        spend(FEW, PrivacySpec(level="example"), "third", ledger, TrainingLimits(epsilon=two))
    assert ledger.of("third") == ()


def test_the_owner_counts_at_a_delta_of_its_own():
    owner = TrainingLimits(epsilon=0.9 * epsilon_of((MANY,), 1e-6), delta=1e-6)

    with pytest.raises(BadInput, match=r"^LORABBIT_PRIVACY_EPSILON: one round of 4 steps at a sampling rate of 0\.5"):
        spend(MANY, PrivacySpec(level="example", delta=0.99), "job", PrivacyLedger(), owner)
