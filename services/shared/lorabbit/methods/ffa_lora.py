"""FFA-LoRA: freeze A, train and average B only, so that the average is exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (arXiv 2403.12313).

    (1)  A is drawn once and shared; clients train B (and the task head) on F_k
    (2)  B^{t+1} = sum_k (n_k / n) B_k, hence  s mean(B_k A) = s mean(B_k) A:  no aggregation error

A travels once to each client as a payload of its own: it never changes, so a client that holds it
reads nothing again, and uploads carry B and the head alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec
from lorabbit.methods.base import Method, Session
from lorabbit.tensors import subset, weighted_mean
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Plan, ServerState, Tensors

FROZEN = "frozen-a"
"""Payload role of the shared A factors."""


def is_a(name: str) -> bool:
    """Tell whether a tensor is a LoRA A factor."""
    return ".lora_A." in name or ".lora_embedding_A" in name


class FfaLora(Method):
    """Exact federated averaging of LoRA: one shared frozen A, averaged B."""

    name: ClassVar[str] = "ffa-lora"
    summary: ClassVar[str] = "LoRA with one shared frozen A: averaging B alone is exact and halves the upload"
    paper: ClassVar[str] = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024, arXiv 2403.12313"

    def check(self, job: JobSpec) -> None:
        """Only LoRA has factors to freeze."""
        if job.model.trainable != "lora":
            raise BadInput(
                f"method.name: ffa-lora freezes LoRA's A factors, but model.trainable is {job.model.trainable!r}; "
                "set model.trainable to 'lora'"
            )

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """A stays as it was drawn, in a file of its own."""
        frozen = {name: value for name, value in adapter.items() if is_a(name)}
        moving = {name: value for name, value in adapter.items() if not is_a(name)}
        return ServerState(moving, shared={FROZEN: frozen})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """(1): A under its own role, everything else as the adapter."""
        return Plan(payloads={**state.shared, ADAPTER: state.tensors})

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2): average B and the head; the same A stays beside them."""
        mean = weighted_mean((u.num_examples, u.tensors) for u in updates)
        return ServerState(mean, state.facts, state.shared)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:
        """Score what is tuned: A is there already."""
        return replace(self.plan(state, client), phase=EVALUATE)

    def restore(self, plan: Plan, session: Session) -> None:
        """Load both."""
        session.load({**plan.payloads[FROZEN], **plan.payloads[ADAPTER]})

    def adapter(self, state: ServerState) -> Tensors:
        """A and B and the head, as PEFT wants them together."""
        return {**state.shared[FROZEN], **state.tensors}

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): train B and the head under the shared A."""
        session.load({**plan.payloads[FROZEN], **plan.payloads[ADAPTER]})
        result = session.train(frozen=is_a)
        me = session.client
        tensors = subset(result.tensors, plan.payloads[ADAPTER])
        return ClientUpdate(me.client, me.index, tensors, result.num_examples, result.loss)
