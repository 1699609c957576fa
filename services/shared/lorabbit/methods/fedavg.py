"""FedAvg over whatever is trainable: full fine-tuning, LoRA (FedIT), BitFit, adapters, heads.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), Algorithm 1. With LoRA it is FedIT (Zhang et al., 2023, arXiv
2305.05644): the factors A and B are averaged separately.

    (1)  w_k     = local steps of the job's optimiser on F_k, from w^t
    (2)  w^{t+1} = sum_k (n_k / n) w_k,   n = sum of n_k over the cohort
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from lorabbit.methods.base import Method, Session
from lorabbit.tensors import weighted_mean
from lorabbit.types import ADAPTER, ClientUpdate, Plan, ServerState


class FedAvg(Method):
    """Average the clients' tensors, weighted by their number of training examples."""

    name: ClassVar[str] = "fedavg"
    summary: ClassVar[str] = "weighted average of what is trained: LoRA (FedIT), full, BitFit, adapter or head"
    paper: ClassVar[str] = "McMahan et al., Communication-Efficient Learning of Deep Networks, 2017, arXiv 1602.05629"

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1): tune from the global tensors."""
        session.load(plan.payloads[ADAPTER])
        result = session.train()
        me = session.client
        return ClientUpdate(me.client, me.index, result.tensors, result.num_examples, result.loss)

    # ---- server ----
    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2): the mean weighted by n_k."""
        return ServerState(weighted_mean((u.num_examples, u.tensors) for u in updates), state.facts)
