"""FedSA-LoRA: A is learned together, B is each client's own.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025
(arXiv 2410.01463).

    (1)  client k trains A and its own B_k (and the head) on F_k from (A^t, B_k)
    (2)  A^{t+1} = sum_k p_k A_k,   p_k = n_k / sum n_j;   B_k stays where it is

A is said to hold what the clients share, B what tells them apart.

D1  `head` says whether a classifier's head is averaged like A (default) or stays like B.
D2  The export carries the shared A and B = 0: a start for a new client. Each client's own B never leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from lorabbit.aggregation import aggregator, client_side
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import subset, weighted_mean
from lorabbit.training_session import Session
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Plan, ServerState, Tensors

OWN = "fedsa-lora"
"""Group of private tensors: a client's own B, and its head where that stays."""
UNSENT = "unsent"
"""Group of the server state that keeps the first B for the export; it is never sent."""


class FedSaLora(Method):
    """Averaged A, private B."""

    name: ClassVar[str] = "fedsa-lora"
    summary: ClassVar[str] = "LoRA whose A is averaged while each client keeps a B of its own; half the bytes"
    paper: ClassVar[str] = "Guo et al., Selective Aggregation for Low-Rank Adaptation, 2025, arXiv 2410.01463"
    scores_first: ClassVar[bool] = True
    because: ClassVar[str] = (
        "each client's own B is fitted to the A of its round, and training moves it whether or not the A is averaged"
    )

    head: Literal["shared", "private"] = Field(default="shared", description="whether a classifier's head is averaged")

    def check(self, job: JobSpec) -> None:
        """Only LoRA has an A to share, and only a client has its own B to be scored with."""
        if job.model.trainable != "lora":
            raise BadInput(f"method.name: fedsa-lora needs model.trainable 'lora', not {job.model.trainable!r}")
        aggregator.refuse_choice(job, "fedsa-lora", "averages A alone")
        if job.evaluation.on == "central":
            raise BadInput("evaluation.on: fedsa-lora's clients have models of their own; use 'clients'")

    def travels(self, name: str) -> bool:
        """Tell whether a tensor is averaged."""
        return client_side.is_a(name) if lora_math.is_factor(name) or self.head == "private" else True

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): train both factors, keep B, send A."""
        self.restore(plan, session)
        result = session.train()
        session.private_tensors[OWN] = {n: v for n, v in result.tensors.items() if n not in plan.payloads[ADAPTER]}
        sent = replace(result, tensors=subset(result.tensors, plan.payloads[ADAPTER]))
        return client_side.answer(plan, session, sent, scaling=aggregator.of(self.job).scaling)

    def restore(self, plan: Plan, session: Session) -> None:
        """The shared A under the client's own B; a client that never trained has the first one."""
        session.load({**session.private_tensors.get(OWN, {}), **plan.payloads[ADAPTER]})

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """What is averaged, and beside it the first value of what is not."""
        residual = {name: adapter[name] for name in adapter if not self.travels(name)}
        return ServerState({name: adapter[name] for name in adapter if self.travels(name)}, shared={UNSENT: residual})

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2)."""
        return replace(state, tensors=weighted_mean((u.num_examples, u.tensors) for u in updates))

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """What is shared; each client adds its own part."""
        return Plan(EVALUATE, {ADAPTER: state.tensors})

    def adapter(self, state: ServerState) -> Tensors:
        """D2: the shared A with the first B, which is zero."""
        whole = {**state.shared[UNSENT], **state.tensors}
        return {name: whole[name] for name in sorted(whole)}
