"""FedProx: FedAvg with a proximal term that holds each client near the global tensors.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv 1812.06127).

    (1)  h_k(w; w^t) = F_k(w) + (mu / 2) ||w - w^t||^2,   gradient of the term: mu (w - w^t)
    (2)  w^{t+1}     = sum_k (n_k / n) w_k

D1  The paper samples clients with probability n_k / n and averages uniformly (its Algorithm 2);
    here sampling is uniform and the mean is weighted, as in FedAvg, so that mu = 0 is FedAvg.

The job's `aggregation` replaces (2) for LoRA factors: see `lorabbit.aggregation`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.averaging import Averaging
from lorabbit.training_session import Session
from lorabbit.types import ClientUpdate, Plan


class FedProx(Averaging):
    """Pull local tensors towards the global ones with strength `mu`."""

    name: ClassVar[str] = "fedprox"
    summary: ClassVar[str] = "FedAvg with a proximal term of strength mu that limits client drift"
    paper: ClassVar[str] = "Li et al., Federated Optimization in Heterogeneous Networks, 2020, arXiv 1812.06127"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})

    mu: float = Field(default=0.01, ge=0, description="strength of the proximal term; 0 is FedAvg")

    def check(self, job: JobSpec) -> None:
        """The term alone must not overshoot."""
        super().check(job)
        rate = job.local.learning_rate
        if rate * self.mu >= 1:
            raise BadInput(f"method.mu: {self.mu} times the learning rate {rate} must be below 1, or steps diverge")

    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): tune with mu (w - w^t) added to every gradient."""

        def pull(name: str, value: Any, start: Any) -> Any:  # noqa: ANN401, ARG001 - the session's own array kind
            return self.mu * (value - start)

        return self.tuned(plan, session, gradient_term=pull if self.mu else None)
