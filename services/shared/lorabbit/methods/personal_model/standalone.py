"""Standalone: every client trains a model of its own, alone; the control of all personal methods.

    (1)  w_k <- local steps of the job's optimizer on F_k, from the client's own w_k

No tensor travels. A round is a set of local epochs with a fresh optimizer, so that it compares round by
round with the methods that share something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.training_session import PersonalSession
from lorabbit.types import EVALUATE, ClientProfile, ClientUpdate, Plan, ServerState, Tensors


class Standalone(Method):
    """Train alone."""

    name: ClassVar[str] = "standalone"
    summary: ClassVar[str] = "each client trains its own model alone; nothing travels"
    paper: ClassVar[str] = "the control in Yi et al., pFedLoRA, 2023, arXiv 2310.13283"
    because: ClassVar[str] = "its clients share nothing, so there is no update that could be late"
    personal: ClassVar[bool] = True

    def check(self, job: JobSpec) -> None:
        """Only classifiers."""
        requirements.check(job, self.name)

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:  # noqa: ARG002 - nothing is shared
        """Nothing."""
        return {}

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:  # noqa: ARG002 - it says nothing
        """(1)."""
        result = session.train(lambda batch: batch.cross_entropy(batch.logits()), moving=requirements.is_own)
        return ClientUpdate(session.client.client, session.client.index, {}, result.num_examples, result.loss)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """The own model is in place already."""

    # ---- server ----
    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Train."""
        return Plan()

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:  # noqa: ARG002 - the same for all
        """Nothing."""
        return {}

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Fold nothing; the number of clients that trained is told."""
        return replace(state, facts={"report": {"trained": sum(1 for _ in updates)}})

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Nothing is needed."""
        return Plan(EVALUATE)
