"""Privacy budgets of a job and of a client's owner, checked before a training with private examples.

The job's budget is for what this job releases, as the server's specification of it says. The owner's is for all jobs
together, at a delta of the owner's own, and holds whatever a server says.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabbit.config.settings import PREFIX
from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.job.spec import LocalSpec, PrivacySpec
from lorabbit.privacy.accountant import SampledGaussian, epsilon_of
from lorabbit_client.capabilities import TrainingLimits
from lorabbit_client.execution.privacy_ledger import PrivacyLedger
from lorabbit_client.training.batching import steps_of


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """The budget of one party, and the releases that count against it."""

    name: str
    """Of the key or the variable that sets it."""
    epsilon: float | None
    """None: everything is allowed."""
    delta: float
    spent: tuple[SampledGaussian, ...]

    def after(self, release: SampledGaussian, times: int = 1) -> float:
        """Epsilon after `times` more of these."""
        return epsilon_of((*self.spent, release._replace(steps=times * release.steps)), self.delta)

    def allows(self, release: SampledGaussian, times: int = 1) -> bool:
        """Tell whether `times` more of these fit the budget."""
        return self.epsilon is None or self.after(release, times) <= self.epsilon

    def check(self, release: SampledGaussian) -> None:
        """Raise if the release exceeds the budget: BadInput if nothing is spent yet, LoRAbbitError otherwise."""
        if self.allows(release):
            return
        cost = f"{self.after(release):.3g}"
        if not self.spent:
            raise BadInput(
                f"{self.name}: one round of {release.steps} steps at a sampling rate of {release.rate:.3g} costs "
                f"{cost}, and the budget is {self.epsilon}; raise privacy.noise or {self.name}"
            )
        raise LoRAbbitError(f"{self.name}: another round would cost {cost} of a budget of {self.epsilon}")


def release_of(spec: PrivacySpec, local: LocalSpec, rows: int) -> SampledGaussian:
    """What one training on so many rows releases."""
    return SampledGaussian(spec.noise, min(1.0, local.batch_size / rows), steps_of(local, rows))


def spend(release: SampledGaussian, spec: PrivacySpec, job: str, ledger: PrivacyLedger, limits: TrainingLimits) -> None:
    """Add a release to the ledger; raises BadInput or LoRAbbitError if it exceeds a budget.

    The result then reports the job's cost, and `spent` if no further release like it fits both budgets.
    """
    of_job = PrivacyBudget("privacy.epsilon", spec.epsilon, spec.delta, ledger.of(job))
    of_owner = PrivacyBudget(f"{PREFIX}PRIVACY_EPSILON", limits.epsilon, limits.delta, ledger.all_releases)
    for budget in (of_job, of_owner):
        budget.check(release)
    ledger.add(job, release)
    ledger.summary = {
        "steps": sum(kind.steps for kind in ledger.of(job)),
        "rate": release.rate,
        "epsilon": float(f"{of_job.after(release):.6g}"),
        "spent": not (of_job.allows(release, 2) and of_owner.allows(release, 2)),
    }
