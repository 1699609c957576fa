"""LG-FedAvg: every client keeps its own trunk and shares the last layer of its classifier.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency, "Think Locally, Act Globally: Federated
Learning with Local and Global Representations", 2020 (arXiv 2001.01523), Algorithm 1.

    (1)  (w_k, v_k) <- local steps on F_k, from the own trunk w_k and the global last layer v
    (2)  v = sum_k (n_k / n) v_k,   n = sum of n_k over the cohort

D1  The paper shares the upper layers of like models. Only layers of equal shape can be averaged over
    unlike ones, so the last one travels: (classes, d) and its bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.training_session import PersonalSession
from lorabbit.types import ADAPTER, ClientUpdate, Plan, ServerState, Tensors

PREFIX = "head."


class LgFedAvg(Method):
    """Private trunk, averaged last layer."""

    name: ClassVar[str] = "lg-fedavg"
    summary: ClassVar[str] = "own trunks, one averaged last layer of the classifier"
    paper: ClassVar[str] = "Liang et al., Think Locally, Act Globally, 2020, arXiv 2001.01523"
    because: ClassVar[str] = (
        "each client's own representation is fitted to the shared layers of its "
        "round, and training moves it whether or not they are averaged"
    )
    personal: ClassVar[bool] = True

    def check(self, job: JobSpec) -> None:
        """Only classifiers."""
        requirements.check(job, self.name)

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """The last layer of the first client."""
        return _last_layer(session)

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1)."""
        self.restore(plan, session)
        result = session.train(lambda batch: batch.cross_entropy(batch.logits()), moving=requirements.is_own)
        client = session.client
        return ClientUpdate(client.client, client.index, _last_layer(session), result.num_examples, result.loss)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """Own trunk, global last layer."""
        own, given = session.last_layer(), plan.payloads[ADAPTER]
        present = session.tensors(requirements.OWN)
        for part, name in own.items():
            found = given.get(PREFIX + part)
            if found is None or found.shape != present[name].shape:
                raise BadInput(
                    f"model.variants: the last layer of {session.client.client} has a {part} of shape"
                    f" {list(present[name].shape)}, the shared one {None if found is None else list(found.shape)};"
                    " lg-fedavg averages last layers of one shape"
                )
        session.load({name: given[PREFIX + part] for part, name in own.items()})

    # ---- server ----
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:  # noqa: ARG002
        """(2)."""
        return ServerState(weighted_mean((update.num_examples, update.tensors) for update in updates))


def _last_layer(session: PersonalSession) -> Tensors:
    """The own last layer under the names of the wire."""
    own = session.tensors(requirements.OWN)
    return {PREFIX + part: own[name] for part, name in sorted(session.last_layer().items())}
