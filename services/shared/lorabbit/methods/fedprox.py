"""FedProx: FedAvg with a proximal term that holds each client near the global tensors.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv 1812.06127).

    (1)  h_k(w; w^t) = F_k(w) + (mu / 2) ||w - w^t||^2,   gradient of the term: mu (w - w^t)
    (2)  w^{t+1}     = sum_k (n_k / n) w_k

D1  The paper samples clients with probability n_k / n and averages uniformly (its Algorithm 2);
    here sampling is uniform and the mean is weighted, as in FedAvg, so that mu = 0 is FedAvg.

The job's `aggregation` replaces (2) for LoRA factors: see `lorabbit.aggregation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from lorabbit import aggregation
from lorabbit.aggregation import Aggregation
from lorabbit.jobspec import JobSpec
from lorabbit.methods.base import Export, Method, Session
from lorabbit.types import ClientProfile, ClientUpdate, Plan, ServerState, Tensors


class FedProx(Method):
    """Pull local tensors towards the global ones with strength `mu`."""

    name: ClassVar[str] = "fedprox"
    summary: ClassVar[str] = "FedAvg with a proximal term of strength mu that limits client drift"
    paper: ClassVar[str] = "Li et al., Federated Optimization in Heterogeneous Networks, 2020, arXiv 1812.06127"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})

    mu: float = Field(default=0.01, ge=0, description="strength of the proximal term; 0 is FedAvg")

    @property
    def aggregation(self) -> Aggregation:
        """The job's."""
        return aggregation.of(self.job)

    def check(self, job: JobSpec) -> None:
        """Any model; the aggregation must fit it."""
        aggregation.check(job)

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): tune with mu (w - w^t) added to every gradient."""

        def pull(name: str, value: Any, start: Any) -> Any:  # noqa: ANN401, ARG001 - the session's own array kind
            return self.mu * (value - start)

        aggregation.install(plan, session)
        result = session.train(gradient_term=pull if self.mu else None, frozen=aggregation.frozen(plan))
        return aggregation.answer(plan, session, result, scaling=self.aggregation.scaling)

    def restore(self, plan: Plan, session: Session) -> None:
        """Put the server's model on a client."""
        aggregation.install(plan, session)

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """From what one client drew."""
        return self.aggregation.start(adapter)

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """The global tensors, at the client's rank."""
        return self.aggregation.plan(state, client)

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:
        """What was sent comes back."""
        return self.aggregation.uploads(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2) with D1: the mean weighted by n_k, of LoRA factors as the job's aggregation says."""
        return self.aggregation.fold(state, updates)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """The server's model."""
        return self.aggregation.scoring(state)

    def adapter(self, state: ServerState) -> Tensors:
        """Factors and head."""
        return self.aggregation.adapter(state)

    def export(self, state: ServerState) -> Export:
        """On the job's base model, a shift of it included."""
        return Export(*self.aggregation.export(state))
