"""FD, federated distillation: clients share the mean logits of each class and learn from those of the others.

Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated
Distillation and Augmentation under Non-IID Private Data", 2018 (arXiv 1811.11479). With z the own logits,
M_c the clients of a round that hold class c, and F_kc client k's mean of z over its examples of c,

    (1)  L     = CE(z, y) + gamma KL(softmax(T_ky) || softmax(z))
    (2)  F_c   = 1 / |M_c| sum over k in M_c of F_kc
    (3)  T_kc  = (|M_c| F_c - F_kc) / (|M_c| - 1) for k in M_c with |M_c| > 1;  F_c for another k

D1  The paper's cross-entropy between student and teacher has the gradient of the KL in (1).
D2  F_kc is taken once, after the local training, and not while it goes on.
D3  A class that nobody brings in a round keeps its older mean; one without a teacher adds no term.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.personal_model import requirements
from lorabbit.training_session import Forward, PersonalSession
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Facts, Plan, ServerState, Tensors

LOGITS, HELD = "logits", "held"
TEACHER, TAUGHT = "teacher", "taught"
KEPT = "fd"
"""Private group of what this client last sent, and private value of the round of it."""


class Fd(Method):
    """Distil towards the mean logits of the other clients, class by class."""

    name: ClassVar[str] = "fd"
    summary: ClassVar[str] = "clients share mean logits by class and learn from those of the others"
    paper: ClassVar[str] = "Jeong et al., Federated Distillation and Augmentation, 2018, arXiv 1811.11479"
    because: ClassVar[str] = (
        "its clients distil from the class means of the round before, which all of that round must have formed"
    )
    personal: ClassVar[bool] = True

    gamma: float = Field(default=1.0, ge=0, description="weight of the distillation; 0 is standalone")

    def check(self, job: JobSpec) -> None:
        """Only classifiers."""
        requirements.check(job, self.name)

    # ---- client ----
    def initialize(self, session: PersonalSession) -> Tensors:
        """Nobody holds any class yet."""
        size = session.classes
        return {LOGITS: np.zeros((size, size), np.float32), HELD: np.zeros(size, np.float32)}

    def local_update(self, plan: Plan, session: PersonalSession) -> ClientUpdate:
        """(1) with (3), then this client's F_kc."""
        session.load(self._teacher(plan, session))
        result = session.train(self._loss, moving=requirements.is_own)
        means, counts = session.mean_by_class(lambda batch: batch.logits())
        sent = {LOGITS: means.astype(np.float32), HELD: counts.astype(bool).astype(np.float32)}
        session.private_tensors[KEPT] = sent
        session.private[KEPT] = _number(plan.settings, "round")
        client = session.client
        return ClientUpdate(client.client, client.index, sent, result.num_examples, result.loss)

    def _teacher(self, plan: Plan, session: PersonalSession) -> Tensors:
        """(3): the global means without this client's part of them."""
        means = plan.payloads[ADAPTER][LOGITS].astype(np.float64)
        holders = np.array(plan.settings.get("holders"), np.float64)
        formed = np.array(plan.settings.get("formed"), np.int64)
        took_part = _number(plan.settings, "took_part")
        if took_part and session.private.get(KEPT) == took_part and KEPT in session.private_tensors:
            own = session.private_tensors[KEPT]
            mine = own[HELD].astype(bool) & (formed == took_part)
            means = np.where(mine[:, None], holders[:, None] * means - own[LOGITS].astype(np.float64), means)
            holders = holders - mine
            means = np.where(mine[:, None], means / np.maximum(holders, 1)[:, None], means)
        taught = (holders > 0).astype(np.float32)[:, None]
        return {TEACHER: (means * taught).astype(np.float32), TAUGHT: taught}

    def _loss(self, batch: Forward) -> Any:  # noqa: ANN401 - the session's own array kind
        """(1)."""
        logits = batch.logits()
        own = batch.cross_entropy(logits)
        if not self.gamma:
            return own
        taught = batch.of_label(batch.tensor(TAUGHT))
        told = taught * batch.of_label(batch.tensor(TEACHER)) + (1 - taught) * batch.constant(logits)
        return own + self.gamma * batch.kl(logits, told)

    def restore(self, plan: Plan, session: PersonalSession) -> None:
        """The own model is in place already."""

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """No class has a mean."""
        size = len(adapter[HELD])
        return ServerState(dict(adapter), {"round": 0, "holders": [0] * size, "formed": [0] * size, "took_part": {}})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """The means, with what the client must know to leave its own part out."""
        took_part = state.facts.get("took_part")
        last = took_part.get(str(client.index), 0) if isinstance(took_part, dict) else 0
        settings: Facts = {
            "round": _number(state.facts, "round") + 1,
            "holders": state.facts["holders"],
            "formed": state.facts["formed"],
            "took_part": last,
        }
        return Plan(payloads={ADAPTER: state.tensors}, settings=settings)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(2), with every client that holds a class counted once."""
        number = _number(state.facts, "round") + 1
        sums = np.zeros(state.tensors[LOGITS].shape, np.float64)
        holders = np.zeros(len(sums), np.float64)
        indices: list[int] = []
        for update in updates:
            held = update.tensors[HELD].astype(np.float64) > 0
            sums += np.where(held[:, None], update.tensors[LOGITS].astype(np.float64), 0.0)
            holders += held
            indices.append(update.index)
        brought = holders > 0
        means = np.where(brought[:, None], sums / np.maximum(holders, 1)[:, None], state.tensors[LOGITS])
        share = np.where(brought, holders / max(len(indices), 1), state.tensors[HELD])
        old_holders, old_formed = np.array(state.facts["holders"]), np.array(state.facts["formed"])
        took_part = state.facts.get("took_part")
        facts: Facts = {
            "round": number,
            "holders": [int(n) for n in np.where(brought, holders, old_holders)],
            "formed": [int(n) for n in np.where(brought, number, old_formed)],
            "took_part": {**(took_part if isinstance(took_part, dict) else {}), **{str(k): number for k in indices}},
        }
        return ServerState({LOGITS: means.astype(np.float32), HELD: share.astype(np.float32)}, facts)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Nothing is needed: own models are scored."""
        return Plan(EVALUATE)


def _number(facts: Facts, name: str) -> int:
    """A whole number among facts; zero for anything else."""
    value = facts.get(name)
    return value if isinstance(value, int) else 0
