"""FedAvg over whatever is trainable: full fine-tuning, LoRA (FedIT), BitFit, adapters, heads.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), Algorithm 1. With LoRA it is FedIT (Zhang et al., 2023, arXiv
2305.05644): the factors A and B are averaged separately.

    (1)  w_k     = local steps of the job's optimiser on F_k, from w^t
    (2)  w^{t+1} = sum_k (n_k / n) w_k,   n = sum of n_k over the cohort

The job's `aggregation` replaces (2) for LoRA factors: see `lorabbit.aggregation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from lorabbit import aggregation
from lorabbit.aggregation import Aggregation
from lorabbit.jobspec import JobSpec
from lorabbit.methods.base import Export, Method, Session
from lorabbit.types import ClientProfile, ClientUpdate, Plan, ServerState, Tensors


class FedAvg(Method):
    """Average the clients' tensors, weighted by their number of training examples."""

    name: ClassVar[str] = "fedavg"
    summary: ClassVar[str] = "weighted average of what is trained: LoRA (FedIT), full, BitFit, adapter or head"
    paper: ClassVar[str] = "McMahan et al., Communication-Efficient Learning of Deep Networks, 2017, arXiv 1602.05629"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})

    @property
    def aggregation(self) -> Aggregation:
        """The job's."""
        return aggregation.of(self.job)

    def check(self, job: JobSpec) -> None:
        """Any model; the aggregation must fit it."""
        aggregation.check(job)

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): tune from the global tensors."""
        aggregation.install(plan, session)
        result = session.train(frozen=aggregation.frozen(plan))
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
        """(2): the mean weighted by n_k, of LoRA factors as the job's aggregation says."""
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
