"""FML: each client trains its own model and a small shared one that teach each other; the shared one is averaged.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning", 2020 (arXiv 2006.16765).
With p the softmax of a model's logits, for the own model o and the shared model s,

    (1)  L_o = alpha CE(p_o, y) + (1 - alpha) KL(p_s || p_o)
    (2)  L_s = beta  CE(p_s, y) + (1 - beta)  KL(p_o || p_s)
    (3)  s   = sum_k (n_k / n) s_k,   n = sum of n_k over the cohort

D1  One optimizer minimizes L_o + L_s, each teacher without gradient: the two models share no tensor, so
    the gradients are those of (1) and (2); only `local.max_grad_norm` clips both together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.training_session import Forward, PersonalSession
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Plan, ServerState, Tensors

ROLE = "shared"
PREFIX = "shared."


class Fml(Method):
    """Mutual learning of an own and a shared model."""

    name: ClassVar[str] = "fml"
    summary: ClassVar[str] = "own models and a small shared model teach each other; the shared one is averaged"
    paper: ClassVar[str] = "Shen et al., Federated Mutual Learning, 2020, arXiv 2006.16765"
    because: ClassVar[str] = (
        "each client's own model and the shared one teach each other, and go on "
        "whether or not the shared one is averaged"
    )
    personal: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0, le=1, description="weight of the labels in the own model's loss")
    beta: float = Field(default=0.5, ge=0, le=1, description="weight of the labels in the shared model's loss")
    shared_model: str | None = Field(
        default=None, description="name of the shared model; cnn:5 beside CNNs, else the first own model, when absent"
    )

    def check(self, job: JobSpec) -> None:
        """Only classifiers."""
        requirements.check(job, self.name)

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """The shared model as the job draws it."""
        session.add_model(ROLE, requirements.shared_model(self.job, self.shared_model))
        return session.tensors(PREFIX)

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1) and (2)."""
        session.add_model(ROLE, requirements.shared_model(self.job, self.shared_model))
        session.load(plan.payloads[ADAPTER])
        result = session.train(self._loss, moving=lambda name: requirements.is_own(name) or name.startswith(PREFIX))
        client = session.client
        return ClientUpdate(client.client, client.index, session.tensors(PREFIX), result.num_examples, result.loss)

    def _loss(self, batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
        """L_o + L_s."""
        own, shared = batch.logits(), batch.logits(ROLE)
        mine = self.alpha * batch.cross_entropy(own) + (1 - self.alpha) * batch.kl(own, shared)
        common = self.beta * batch.cross_entropy(shared) + (1 - self.beta) * batch.kl(shared, own)
        return mine + common

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """The own model is in place already."""

    # ---- server ----
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:  # noqa: ARG002
        """(3)."""
        return ServerState(weighted_mean((update.num_examples, update.tensors) for update in updates))

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Nothing is needed: own models are scored."""
        return Plan(EVALUATE)
