"""FeDeRA: LoRA that starts from the principal singular components of the weights themselves.

Yan, Yang, Tang, Shi, "FeDeRA: Efficient Fine-tuning of Language Models in Federated Learning Leveraging Weight
Decomposition", 2024 (arXiv 2404.18848). For every weight W under LoRA (d_out x d_in), once, on one client:

    (1)  W = U S V^T,   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T
    (2)  W_res = W - s B0 A0 is frozen; the forward pass has W_res + s B A, which starts as W
    (3)  clients train A, B and the head; A = sum p_k A_k, B = sum p_k B_k, p_k = n_k / sum n_j

SVDs differ between machines by signs, and factors with unlike signs must not be averaged: so everybody starts from
the one pair that the server hands out, and makes W_res = W + s (-B0) A0 of it, a shift of the pristine base.

D1  A client of a lower rank trains the first components; the others are folded into its base as they are, and
    the server averages each component over the clients that trained it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from lorabbit.aggregation import aggregator, client_side
from lorabbit.aggregation.aggregator import Aggregation, ReceivedUpdates
from lorabbit.aggregation.rules import COMPONENTS
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.averaging import Averaging
from lorabbit.methods.api.method import Export
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.tensors.serialization import tensors_sha256
from lorabbit.training_session import Session
from lorabbit.types import ADAPTER, SHIFT, Array, ClientProfile, ClientUpdate, Facts, Plan, ServerState, Tensors


class FeDeRA(Averaging):
    """Averaged LoRA from a principal start."""

    name: ClassVar[str] = "federa"
    summary: ClassVar[str] = "LoRA that starts from the principal components of the weights, averaged as in FedAvg"
    paper: ClassVar[str] = "Yan et al., FeDeRA: Efficient Fine-tuning of Language Models, 2024, arXiv 2404.18848"
    absolute: ClassVar[str] = (
        "federa's factors hold the main part of the weights, and to round them as they are would move the base"
    )
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum", "buffered"})

    components: Literal["principal", "minor", "random"] = Field(
        default="principal", description="where factors start; minor: least components; random: plain LoRA (ablations)"
    )
    residual: bool = Field(
        default=True, description="take the start out of the base (2); false: the model starts changed (ablation)"
    )

    def check(self, job: JobSpec) -> None:
        """Nothing may wear down the factors, since they hold the main part of the weights."""
        if job.model.trainable != "lora":
            raise BadInput(f"method.name: federa needs model.trainable 'lora', not {job.model.trainable!r}")
        if job.aggregation != "factors":
            raise BadInput("aggregation: federa averages factors; leave aggregation out")
        if job.model.lora.dropout > 0:
            raise BadInput("model.lora.dropout: federa's factors hold pre-trained components; it must be 0")
        if job.local.weight_decay > 0:
            raise BadInput("local.weight_decay: federa's factors hold pre-trained components; it must be 0")
        if max(job.model.lora.client_ranks or (1,)) > job.model.lora.rank:
            raise BadInput("model.lora.client_ranks: no client can train more components than model.lora.rank")

    @property
    def aggregation(self) -> Aggregation:
        """The mean of factors, by components."""
        return replace(aggregator.of(self.job), rule=COMPONENTS)

    @property
    def works_on_base(self) -> bool:
        """Its weights are decomposed, and their principal components taken out."""
        return True

    # ---- client ----
    def initialize(self, session: Session) -> Tensors:
        """(1): one client decomposes the pristine weights."""
        tensors = dict(session.tensors())
        if self.components == "random":
            return tensors
        weights, scaling = session.base_weights(), session.scaling
        for module in lora_math.modules(tensors):
            like = lora_math.read(tensors, module)
            try:
                start = lora_math.split(
                    weights[module], like.rank, scaling=scaling, smallest=self.components == "minor"
                )
            except ValueError as error:
                raise BadInput(f"model.lora.rank: {module}: {error}") from error
            cast = Factors(start.a.astype(like.a.dtype), start.b.astype(like.b.dtype), scaling)
            tensors |= lora_math.write(module, cast)
        return tensors

    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(3): train from the factors received."""
        self.restore(plan, session)
        result = session.train()
        facts = {"init": plan.settings["init"]}
        return client_side.answer(plan, session, result, scaling=self.aggregation.scaling, facts=facts)

    def restore(self, plan: Plan, session: Session) -> None:
        """(2): shift the base by the start, and with D1 by the components above this client's rank."""
        shift = plan.payloads.get(SHIFT, {})
        if shift and _digest(shift) != plan.settings["init"]:
            raise Refused("init", "the start that came is not the one that the plan names")
        rank = plan.settings.get("rank")
        if isinstance(rank, int):
            adapter = plan.payloads[ADAPTER]
            shift = _folded(shift, adapter, rank, self.aggregation.scaling)
            plan = replace(plan, payloads={**plan.payloads, ADAPTER: client_side.prefix(adapter, rank)})
        client_side.install(replace(plan, payloads={**plan.payloads, SHIFT: shift}), session)

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """Keep the start, with B negated: it is what every base is shifted by."""
        shift: dict[str, Array] = {}
        for module in lora_math.modules(adapter):
            factors = lora_math.read(adapter, module)
            shift |= lora_math.write(module, Factors(factors.a, np.negative(factors.b)))
        shared = {SHIFT: shift} if self.residual else {}
        return ServerState(dict(adapter), {"init": _digest(shift)}, shared)

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """All factors, the start, and the rank that this client trains of them."""
        rank = self.aggregation.rank_for(client)
        settings: Facts = {"init": state.facts["init"]} | ({} if rank is None else {"rank": rank})
        return Plan(payloads={**state.shared, ADAPTER: state.tensors}, settings=settings)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(3), from clients that started where the server says."""
        return self.aggregation.fold(state, ReceivedUpdates(updates, lambda update: _check(update, state)))

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """The whole model."""
        return replace(self.aggregation.scoring(state), settings={"init": state.facts["init"]})

    def export(self, state: ServerState) -> Export:
        """Plain LoRA of twice the rank on the unmodified base: B A - B0 A0 = [B | -B0] [A; A0]."""
        return Export(*self.aggregation.export(state))


def _folded(shift: Tensors, adapter: Tensors, rank: int, scaling: float) -> Tensors:
    """D1: the shift of a base that holds the components from `rank` on, beside the start taken out."""
    tensors: dict[str, Array] = {}
    for module in lora_math.modules(adapter):
        whole = lora_math.read(adapter, module, scaling)
        parts = [(1.0, lora_math.read(shift, module, scaling))] if shift else []
        parts.append((1.0, Factors(whole.a[rank:], whole.b[:, rank:], scaling)))
        both = lora_math.stack(parts, scaling)
        tensors |= lora_math.write(module, Factors(both.a.astype(whole.a.dtype), both.b.astype(whole.b.dtype), scaling))
    return tensors


def _digest(factors: Tensors) -> str:
    return tensors_sha256(factors)


def _check(update: ClientUpdate, state: ServerState) -> None:
    """Refuse what was trained from another start: its factors have other signs and must not be averaged."""
    if update.facts.get("init") != state.facts["init"]:
        raise Refused("init", f"{update.client} trained from another start than the server's")
