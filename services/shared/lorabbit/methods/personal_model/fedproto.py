"""FedProto: clients share the mean representation of each class, and keep their own near the global ones.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, "FedProto: Federated Prototype Learning across Heterogeneous
Clients", AAAI 2022 (arXiv 2105.00243). With r the input of the own last layer, n_kc the examples of class
c on client k and C_kc the mean of r over them,

    (1)  L   = CE(z, y) + lam mean (r - C_y)^2
    (2)  C_c = sum over k of n_kc C_kc / sum over k of n_kc
    (3)  answer: the class with the nearest C_c, or that of the own last layer

D1  Equation 6 of the paper divides (2) by the number of holders once more, which pulls prototypes
    towards zero; here they are a mean.
D2  (1) compares each example with its class's prototype, as the authors' code does, and not the means.
D3  A class that nobody brings in a round keeps its older prototype; one without any adds no term.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.training_session import Forward, PersonalSession
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Plan, ServerState, Tensors

PROTOTYPES, EXAMPLES = "prototypes", "examples"
KNOWN = "known"
FAR = 1e9
"""Added to the squared distance from a class without a prototype."""


class FedProto(Method):
    """Hold representations near global class prototypes."""

    name: ClassVar[str] = "fedproto"
    summary: ClassVar[str] = "clients share the mean representation of each class and keep near the global ones"
    paper: ClassVar[str] = "Tan et al., FedProto, 2022, arXiv 2105.00243"
    because: ClassVar[str] = (
        "its clients are drawn to the prototypes of the round before, which all of that round must have formed"
    )
    personal: ClassVar[bool] = True

    lam: float = Field(default=1.0, ge=0, description="weight of the distance to the prototypes; 0 is standalone")
    infer: Literal["prototype", "local"] = Field(
        default="prototype", description="answer by the nearest prototype, or by the own last layer"
    )

    def check(self, job: JobSpec) -> None:
        """Only classifiers."""
        requirements.check(job, self.name)

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """Nobody has seen any class yet."""
        shape = (session.classes, session.width("representation"))
        return {PROTOTYPES: np.zeros(shape, np.float32), EXAMPLES: np.zeros(session.classes, np.float32)}

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1), then this client's prototypes."""
        self._install(plan, session)
        result = session.train(self._loss, moving=requirements.is_own)
        means, counts = session.mean_by_class(lambda batch: batch.representation())
        sent = {PROTOTYPES: means.astype(np.float32), EXAMPLES: counts.astype(np.float32)}
        client = session.client
        return ClientUpdate(client.client, client.index, sent, result.num_examples, result.loss)

    def _install(self, plan: Plan, session: PersonalSession) -> None:
        given = plan.payloads[ADAPTER]
        width, own = given[PROTOTYPES].shape[1], session.width("representation")
        if width != own:
            raise BadInput(
                f"model.variants: {session.client.client} has representations of width {own}, the prototypes {width};"
                " fedproto needs own models with last layers of one width"
            )
        known = (given[EXAMPLES].astype(np.float64) > 0).astype(np.float32)
        session.load({PROTOTYPES: given[PROTOTYPES], KNOWN: known[:, None]})

    def _loss(self, batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
        """(1)."""
        own = batch.cross_entropy(batch.logits())
        if not self.lam:
            return own
        seen, known = batch.representation(), batch.of_label(batch.tensor(KNOWN))
        told = known * batch.of_label(batch.tensor(PROTOTYPES)) + (1 - known) * batch.constant(seen)
        return own + self.lam * batch.mse(seen, told)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """(3); before there is any prototype the own last layer answers."""
        if self.infer == "prototype" and plan.payloads[ADAPTER][EXAMPLES].any():
            self._install(plan, session)
            session.predict_with(_nearest)

    # ---- server ----
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2); `examples` becomes their mean over the clients of the round, zero where nobody ever had any."""
        sums = np.zeros(state.tensors[PROTOTYPES].shape, np.float64)
        examples = np.zeros(len(sums), np.float64)
        clients = 0
        for update in updates:
            held = update.tensors[EXAMPLES].astype(np.float64)
            sums += held[:, None] * update.tensors[PROTOTYPES].astype(np.float64)
            examples += held
            clients += 1
        brought = examples > 0
        means = np.where(brought[:, None], sums / np.maximum(examples, 1)[:, None], state.tensors[PROTOTYPES])
        mean_examples = np.where(brought, examples / max(clients, 1), state.tensors[EXAMPLES])
        return ServerState({PROTOTYPES: means.astype(np.float32), EXAMPLES: mean_examples.astype(np.float32)})

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """The prototypes."""
        return Plan(EVALUATE, {ADAPTER: state.tensors})


def _nearest(batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
    """Probabilities by distance from the prototypes, none for a class without one."""
    away = batch.distances(batch.representation(), batch.tensor(PROTOTYPES))
    return batch.softmax(-1.0 * away - FAR * (1 - batch.tensor(KNOWN).T))
