"""Work: what share of a round's steps a client does, and how updates of unlike shares are weighed.

A client that is slow does fewer steps of the same round instead of missing its deadline. From its last training
the server knows d seconds per step, r seconds for everything else (both ways of the transfer, reading, waiting) and
the steps N of a whole round, so the share that fits into T seconds is

    s = (margin T - r) / (d N),     least_share <= s <= 1.

Plain averaging would then pull the model towards the clients that did more steps: its fixed point is that of other
weights than n_k (Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, arXiv 2007.07481). Their remedy, FedNova, averages changes per step and multiplies by the mean number of
steps. With tau_k = s_k tau, p_k = n_k / n and one start w it is

    w_k' = w + (s / s_k) (w_k - w),     s = sum_k p_k s_k,     w+ = sum_k p_k w_k'.

The shares are the server's own, so no client can make its update count more by what it tells of its steps. Where all
shares are equal every factor is 1, and the updates stay what came, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorabbit.aggregation.rules import RULES
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec, LocalSpec

MARGIN = 0.9
"""Share of the time in which a client is meant to be done; the rest is for what varies."""
GRAIN = 100
"""Shares are whole hundredths, so that a report can print them as they are."""


@dataclass(frozen=True, slots=True)
class ClientSpeed:
    """How fast a client was in its last training."""

    step_ms: float
    rest_ms: float
    """Everything but the steps: transfer both ways, reading, waiting."""
    steps: float
    """Of a whole round of this client."""

    @classmethod
    def measured(cls, *, took_ms: int, training_seconds: float, steps: int, share: float) -> ClientSpeed | None:
        """From one training, which did `share` of its round; None where it did no step."""
        if steps <= 0:
            return None
        training_ms = min(float(took_ms), 1000.0 * training_seconds)
        return cls(training_ms / steps, took_ms - training_ms, steps / share)

    @property
    def whole_ms(self) -> float:
        """Time that a whole round takes."""
        return self.rest_ms + self.step_ms * self.steps


def share(job: JobSpec, speed: ClientSpeed | None, within_ms: float | None) -> float:
    """Share of the steps that a client is asked for; all of them where it was not measured or nothing presses."""
    if job.work is None or speed is None or within_ms is None or speed.step_ms <= 0:
        return 1.0
    fits = (MARGIN * within_ms - speed.rest_ms) / (speed.step_ms * speed.steps)
    return min(1.0, max(job.work.least_share, math.floor(fits * GRAIN) / GRAIN))


def shortened(local: LocalSpec, part: float) -> LocalSpec:
    """The same local work with a share of its steps, at least one."""
    if part >= 1.0:
        return local
    if local.steps is not None:
        return local.model_copy(update={"steps": max(1, round(local.steps * part))})
    return local.model_copy(update={"epochs": (local.epochs or 1.0) * part})


def factors(job: JobSpec, examples: Sequence[int], shares: Sequence[float]) -> list[float]:
    """What each update's change is multiplied by, so that unlike shares do not move the fixed point."""
    total = sum(examples)
    if job.work is None or job.work.weighting == "examples" or len(set(shares)) <= 1 or not total:
        return [1.0] * len(shares)
    mean = math.fsum(n * part for n, part in zip(examples, shares, strict=True)) / total
    return [mean / part for part in shares]


def check(job: JobSpec, *, kinds: frozenset[str], because: str) -> None:
    """Raise BadInput where updates cannot be scaled: `kinds` are the schedules that the job's method bears."""
    if job.work is None or job.work.weighting == "examples":
        return
    why = because if "buffered" not in kinds else RULES[job.aggregation].late
    if job.robust is not None:
        why = "robust compares the updates as they came"
    if job.privacy is not None:
        why = "privacy bounds every update as it came"
    if why:
        raise BadInput(
            f"work.weighting: an update of {job.method.name} cannot be scaled by the steps behind it: {why}; "
            "write 'examples'"
        )
