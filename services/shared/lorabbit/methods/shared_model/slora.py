"""SLoRA: a sparse start, then LoRA from the principal components of what it learned.

Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models", 2023 (arXiv 2308.06522).

    (1)  t < T1:   one random mask M (density d) over the weights under LoRA, drawn from the job's seed;
                   clients train W + M * D and the head, and send the entries of D where M is set;
                   D^{t+1} = sum_k p_k D_k,   p_k = n_k / sum n_j
    (2)  t = T1:   s B A = the best rank-r approximation of D, per weight (exact SVD, balanced factors)
    (3)  t >= T1:  LoRA from that start, folded by the job's `aggregation`

D1  The density is such that a round of (1) sends as many values as a round of (3), unless `density` says otherwise.
D2  What (2) cuts off of D is given up: the base model stays the pre-trained one, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lorabbit.aggregation import aggregator
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.averaging import Averaging
from lorabbit.methods.api.method import Export
from lorabbit.methods.components import two_stage
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import squared_norm, weighted_mean
from lorabbit.tensors.lora_math import Factors
from lorabbit.training_session import Session
from lorabbit.types import ADAPTER, EVALUATE, Array, ClientProfile, ClientUpdate, Json, Plan, ServerState, Tensors

SPARSE = ".sparse"
"""Behind a module's path: the values of D where its mask is set, in ascending position."""


class SLora(Averaging):
    """Sparse fine-tuning first, LoRA from its SVD then."""

    name: ClassVar[str] = "slora"
    summary: ClassVar[str] = (
        "sparse fine-tuning of the weights under LoRA first, then LoRA from the SVD of what it learned"
    )
    paper: ClassVar[str] = "Babakniya et al., SLoRA: Federated Parameter Efficient Fine-Tuning, 2023, arXiv 2308.06522"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum"})
    because: ClassVar[str] = (
        "its first stage trains under a mask and its second stands on what that "
        "stage found, so a late update may belong to another stage"
    )

    sparse_rounds: int | None = Field(default=None, ge=1, description="T1; a tenth of the rounds when absent")
    density: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of a weight that the first stage trains; as many values as LoRA when absent",
    )
    sparse_learning_rate: float | None = Field(default=None, gt=0, description="local.learning_rate when absent")

    def check(self, job: JobSpec) -> None:
        """Both stages need LoRA's modules and a round each."""
        if job.model.trainable != "lora":
            raise BadInput(f"method.name: slora needs model.trainable 'lora', not {job.model.trainable!r}")
        aggregator.check(job)
        aggregator.refuse_pruning(job, "slora", "decides the rank of its second stage by the first")
        if self.with_job(job).stage_rounds >= job.rounds:
            raise BadInput(f"method.sparse_rounds: they leave no round of {job.rounds} for LoRA; lower them")

    @property
    def stage_rounds(self) -> int:
        """T1."""
        return max(1, self.job.rounds // 10) if self.sparse_rounds is None else self.sparse_rounds

    def positions(self, module: str, d_out: int, d_in: int) -> Array:
        """Flat positions of a module's mask in its d_out x d_in weight, ascending; server and clients draw the same."""
        size, rank = d_out * d_in, self.job.model.lora.rank
        values = rank * (d_in + d_out) if self.density is None else max(1, round(self.density * size))
        draw = np.random.default_rng(derive_seed(self.job.seed, "slora", module))
        return np.sort(draw.choice(size, min(values, size), replace=False, shuffle=False))

    @property
    def works_on_base(self) -> bool:
        """The first stage trains it."""
        return True

    # ---- client ----
    def initialize(self, session: Session) -> Tensors:
        """The first adapter; no weight may have fewer components than (2) takes."""
        adapter = session.tensors()
        for module in lora_math.modules(adapter):
            like = lora_math.read(adapter, module)
            d_out, d_in = _shape(like)
            if like.rank > min(d_out, d_in):
                raise BadInput(
                    f"model.lora.rank: {module}: a {d_out} x {d_in} weight has {min(d_out, d_in)} components, "
                    f"not {like.rank}; lower it"
                )
        return adapter

    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1) or (3), as the plan says."""
        if plan.settings.get("stage") != "sparse":
            return self.tuned(plan, session)
        masks = self._install(plan, session)
        heads = {two_stage.own_name(name): name for name in plan.payloads[ADAPTER] if not name.endswith(SPARSE)}
        local = session.local
        if self.sparse_learning_rate is not None:
            local = local.model_copy(update={"learning_rate": self.sparse_learning_rate})
        trained = session.train(
            frozen=lambda name: name not in masks and name not in heads,
            mask={name: mask.where for name, mask in masks.items()},
            local=local if local != session.local else None,
        )
        sent: dict[str, Array] = {name: trained.tensors[own] for own, name in heads.items()}
        sent |= {mask.sent_as: mask.taken(trained.tensors[name]) for name, mask in masks.items()}
        me = session.client
        tensors = {name: sent[name].astype(value.dtype) for name, value in plan.payloads[ADAPTER].items()}
        return ClientUpdate(me.client, me.index, tensors, trained.num_examples, trained.loss)

    def restore(self, plan: Plan, session: Session) -> None:
        """The whole model with D in it, or LoRA."""
        if plan.settings.get("stage") == "sparse":
            self._install(plan, session)
        else:
            super().restore(plan, session)

    def _install(self, plan: Plan, session: Session) -> dict[str, _Mask]:
        """Put W + M * D and the heads into the whole model; returns the masks by the weights' names."""
        payload = plan.payloads[ADAPTER]
        base = session.base_weights()
        session.select("whole")
        model = session.tensors()
        masks: dict[str, _Mask] = {}
        loaded: dict[str, Array] = {}
        for sent_as in (name for name in payload if name.endswith(SPARSE)):
            module = sent_as.removesuffix(SPARSE)
            own, weight = two_stage.own_name(module) + ".weight", base[module]
            mask = _Mask(sent_as, weight, model[own], self.positions(module, *weight.shape))
            masks[own], loaded[own] = mask, mask.added(payload[sent_as])
        heads = {two_stage.own_name(name): payload[name] for name in payload if not name.endswith(SPARSE)}
        session.load({**loaded, **heads})
        return masks

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """D = 0; the first adapter is kept for its names and shapes, and never sent."""
        tensors: dict[str, Array] = {name: adapter[name] for name in adapter if not lora_math.is_factor(name)}
        for module in lora_math.modules(adapter):
            like = lora_math.read(adapter, module)
            count = len(self.positions(module, *_shape(like)))
            tensors[module + SPARSE] = np.zeros(count, like.a.dtype)
        return ServerState(tensors, {"t": 0}, {two_stage.FIRST: dict(adapter)})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """Values of D, or factors."""
        if self._sparse(state):
            return Plan(payloads={ADAPTER: state.tensors}, settings={"stage": "sparse"})
        return super().plan(state, client)

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:
        """The same back."""
        return state.tensors if self._sparse(state) else super().uploads(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(1) and (2), or (3)."""
        if not self._sparse(state):
            return super().aggregate(state, updates)
        t = _t(state) + 1
        mean = weighted_mean((u.num_examples, u.tensors) for u in updates)
        told: dict[str, Json] = {"stage": "sparse", "aggregation_error": 0.0}
        facts: dict[str, Json] = {**state.facts, "t": t, "report": told}
        if t < self.stage_rounds:
            return ServerState(mean, facts, state.shared)
        factors = self._factors(mean, state.shared[two_stage.FIRST])
        told["lost"] = _lost(mean, factors, self.aggregation.scaling)
        begun = super().start(factors)
        return ServerState(begun.tensors, facts, begun.shared)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:
        """The model of the stage."""
        if self._sparse(state):
            return Plan(EVALUATE, {ADAPTER: state.tensors}, {"stage": "sparse"})
        return super().scoring(state, client)

    def adapter(self, state: ServerState) -> Tensors:
        """Factors and head; in the first stage those that (2) would make now."""
        if self._sparse(state):
            return self._factors(state.tensors, state.shared[two_stage.FIRST])
        return super().adapter(state)

    def export(self, state: ServerState) -> Export:
        """On the job's base model."""
        return Export(self.adapter(state)) if self._sparse(state) else super().export(state)

    def _sparse(self, state: ServerState) -> bool:
        return _t(state) < self.stage_rounds

    def _factors(self, tensors: Tensors, first: Tensors) -> Tensors:
        """(2)."""
        made: dict[str, Array] = {name: tensors[name] for name in first if not lora_math.is_factor(name)}
        for module in lora_math.modules(first):
            like, scaling = lora_math.read(first, module), self.aggregation.scaling
            dense = np.zeros(like.b.shape[0] * like.a.shape[1])
            dense[self.positions(module, *_shape(like))] = tensors[module + SPARSE]
            cut = lora_math.split(dense.reshape(_shape(like)), like.rank, scaling=scaling)
            made |= lora_math.write(module, Factors(cut.a.astype(like.a.dtype), cut.b.astype(like.b.dtype), scaling))
        return {name: made[name] for name in first}


class _Mask:
    """One weight's mask on a client, whichever way its model keeps the weight."""

    def __init__(self, sent_as: str, weight: Array, own: Array, positions: Array) -> None:
        self.sent_as = sent_as
        self._weight, self._dtype, self._positions = weight, own.dtype, positions
        plain, turned = (np.array_equal(kept.astype(weight.dtype), weight) for kept in (own, own.T))
        self._turned = turned and not plain
        where = np.zeros(weight.size, np.bool_)
        where[positions] = True
        self.where: Array = self._model(where.reshape(weight.shape))

    def added(self, values: Array) -> Array:
        """W + M * D as the model keeps it."""
        dense: Any = self._weight.astype(np.float32).reshape(-1).copy()
        dense[self._positions] += values.astype(np.float32)
        return self._model(dense.reshape(self._weight.shape)).astype(self._dtype)

    def taken(self, trained: Array) -> Array:
        """D at the mask, from a trained weight."""
        weight = trained.T if self._turned else trained
        difference: Array = (weight.astype(np.float32) - self._weight.astype(np.float32)).reshape(-1)
        entries: Array = difference[self._positions]
        return entries

    def _model(self, value: Array) -> Array:
        return np.ascontiguousarray(value.T) if self._turned else value


def _lost(sparse: Tensors, factors: Tensors, scaling: float) -> float:
    """Share of the norm of D that the factors leave out, over all modules."""
    kept = sum(lora_math.norm(lora_math.read(factors, module, scaling)) ** 2 for module in lora_math.modules(factors))
    size = sum(squared_norm({name: sparse[name]}) for name in sparse if name.endswith(SPARSE))
    return float(f"{math.sqrt(max(0.0, 1.0 - kept / size)):.6g}") if size else 0.0


def _shape(like: Factors) -> tuple[int, int]:
    """d_out, d_in."""
    return like.b.shape[0], like.a.shape[1]


def _t(state: ServerState) -> int:
    t = state.facts.get("t", 0)
    return t if isinstance(t, int) else 0
