"""Averaging: what methods share whose server folds updates by the job's aggregation and keeps nothing else.

A method of this kind says what a client trains, and overrides a verb where its paper differs. See
`lorabbit.aggregation` for the rules: the mean of factors, of padded factors, of products and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lorabbit.aggregation import aggregator, client_side, rank_pruning
from lorabbit.aggregation.aggregator import Aggregation
from lorabbit.aggregation.staleness import StalenessCorrection
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Export, Method
from lorabbit.training_session import GradientTerm, Session
from lorabbit.types import ADAPTER, ClientProfile, ClientUpdate, Facts, Plan, ServerState, Tensors


class Averaging(Method):
    """A method whose server verbs are those of one `Aggregation`."""

    @property
    def aggregation(self) -> Aggregation:
        """The job's; a method with a rule of its own replaces it."""
        return aggregator.of(self.job)

    def check(self, job: JobSpec) -> None:
        """Any model; the aggregation must fit it."""
        aggregator.check(job)

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """Train what came, and answer with it."""
        return self.tuned(plan, session)

    def tuned(self, plan: Plan, session: Session, gradient_term: GradientTerm | None = None) -> ClientUpdate:
        """Put the plan's model together, train it, and answer with what was trained, its rank and its scaling."""
        self.restore(plan, session)
        received, scaling = plan.payloads[ADAPTER], self.aggregation.scaling
        pruning = rank_pruning.pruning(self.aggregation.prune, received)
        term = pruning.term(gradient_term) if pruning else gradient_term
        result = session.train(gradient_term=term, frozen=client_side.frozen(plan))
        if pruning is None:
            return client_side.answer(plan, session, result, scaling=scaling)
        tensors, given_up = pruning.applied(received, result.tensors)
        facts: Facts = {rank_pruning.PRUNED_TO: pruning.kept} if given_up else {}
        return client_side.answer(plan, session, replace(result, tensors=tensors), scaling=scaling, facts=facts)

    def restore(self, plan: Plan, session: Session) -> None:
        """Put the server's model on a client."""
        client_side.install(plan, session)

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
        """The mean weighted by n_k, of LoRA factors as the aggregation says."""
        return self.aggregation.fold(state, updates)

    def corrected(self, update: Tensors, correction: StalenessCorrection) -> Tensors:
        """As the aggregation carries: by values, or by products where factors of two versions do not compare."""
        return self.aggregation.corrected(update, correction)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """The server's whole model, whatever part of it a client trains."""
        return self.aggregation.scoring(state)

    def adapter(self, state: ServerState) -> Tensors:
        """Factors and head, frozen ones included."""
        return self.aggregation.adapter(state)

    def export(self, state: ServerState) -> Export:
        """On the job's base model, a shift of it included."""
        return Export(*self.aggregation.export(state))
