"""AdaLoRA-style budget: components of LoRA are dropped where they matter least, module by module.

After Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023
(arXiv 2303.10512), for a federation. Component i of module m is the pair (column i of B, row i of A).

    (1)  A = sum p_k A_k,  B = sum p_k B_k,   p_k = n_k / sum n_j
    (2)  importance of a component: mean over its entries w of |w dF/dw|, which clients measure as
         |w| sqrt(E[(dF/dw)^2]), averaged by p_k and smoothed: S^{t+1} = beta S^t + (1 - beta) S_new
    (3)  the budget, components of all modules together, falls from r_max M to r_min M by the cubic schedule with
         holds; the server keeps the components of largest S, at least one of each module

D1  Plain factors B A instead of P Lambda Q: there is no orthogonality penalty, and a component is dropped whole.
D2  Dropped components do not come back, so that they need not travel.
D3  `importance: norm` uses s ||B_i|| ||A_i|| of the averaged factors, which costs clients nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lorabbit.aggregation import aggregator, base_delta, client_side
from lorabbit.aggregation.aggregator import ReceivedUpdates
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.averaging import Averaging
from lorabbit.methods.api.method import Export
from lorabbit.methods.components import rank_schedule
from lorabbit.methods.components.rank_schedule import RankSchedule
from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors
from lorabbit.training_session import Session
from lorabbit.types import ADAPTER, Array, ClientUpdate, Json, Plan, ServerState, Tensors

Scores = NDArray[np.float64]
Importance = dict[str, list[float]]
"""Of each component, by module."""


class AdaLora(Averaging):
    """Averaged LoRA under a falling budget."""

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "AdaLoRA-style: a falling budget of LoRA components, kept where they matter most"
    paper: ClassVar[str] = "Zhang et al., AdaLoRA: Adaptive Budget Allocation, 2023, arXiv 2303.10512 (budget only)"
    needs_each: ClassVar[str] = "each client weighs the components of its own factors, which no mean of products has"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum"})
    because: ClassVar[str] = (
        "its budget prunes components from round to round, so a late update may bring components that are gone"
    )

    r_min: int | None = Field(
        default=None, ge=1, description="mean rank at the end; half of model.lora.rank when absent"
    )
    t_heat: int | None = Field(default=None, ge=0, description="rounds with the whole budget; a tenth when absent")
    t_cool: int | None = Field(default=None, ge=0, description="rounds with the last budget; a fifth when absent")
    importance: Literal["sensitivity", "norm"] = Field(default="sensitivity", description="(2), or norms (D3)")
    beta: float = Field(default=0.85, ge=0, lt=1, description="smoothing of the importance over rounds")
    examples: int = Field(default=64, ge=1, description="training examples with which a client measures sensitivity")

    def check(self, job: JobSpec) -> None:
        """The budget must fit the rounds."""
        if job.model.trainable != "lora":
            raise BadInput(f"method.name: adalora needs model.trainable 'lora', not {job.model.trainable!r}")
        aggregator.refuse_choice(job, "adalora", "averages factors and gives modules ranks of its own")
        try:
            _ = self.with_job(job).budget
        except ValueError as error:
            raise BadInput(f"method.r_min: {error}") from error

    @property
    def budget(self) -> RankSchedule:
        """(3): mean rank by round; raises ValueError where it has no sense."""
        highest = self.job.model.lora.rank
        heat, cool = rank_schedule.holds(self.job.rounds, self.t_heat, self.t_cool)
        lowest = self.r_min or max(1, highest // 2)
        return RankSchedule("cubic", self.job.rounds, 0, highest, lowest, heat, cool)

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """Train the components that are left, and measure what they matter."""
        self.restore(plan, session)
        result = session.train()
        payload = plan.payloads[ADAPTER]
        facts: dict[str, Json] = {}
        if self.importance == "sensitivity" and session.num_examples:
            squares = session.fisher(range(min(self.examples, session.num_examples)))
            measured: dict[str, Json] = {}
            for module, rank in _ranks(payload).items():
                told = _sensitivity(lora_math.read(result.tensors, module), lora_math.read(squares, module))
                measured[module] = [*_rounded(told[:rank])]
            facts["importance"] = measured
        me = session.client
        sent = {name: _like(result.tensors[name], value) for name, value in payload.items()}
        scaling = self.aggregation.scaling
        return ClientUpdate(me.client, me.index, sent, result.num_examples, result.loss, {**facts, "scaling": scaling})

    def restore(self, plan: Plan, session: Session) -> None:
        """Pairs filled with zeros to the largest rank: such components get no gradient and stay zero."""
        payload = plan.payloads[ADAPTER]
        padded, _ = base_delta.combined(payload, {}, self.aggregation.scaling)
        session.set_rank(client_side.rank_of(payload))
        session.load(padded)

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """The whole budget."""
        return ServerState(dict(adapter), {"t": 0, "importance": {}})

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """(1) to (3)."""
        received = ReceivedUpdates(updates)
        folded = self.aggregation.fold(state, received)
        t = _t(state) + 1
        importance = self._smoothed(state, self._measured(folded.tensors, received))
        mean_rank = self.budget.rank(min(t, self.job.rounds - 1)) or 1
        kept = _kept(importance, mean_rank * len(importance))
        tensors = dict(folded.tensors)
        for module, components in kept.items():
            factors = lora_math.read(tensors, module)
            tensors |= lora_math.write(module, Factors(factors.a[components], factors.b[:, components]))
        left: dict[str, Json] = {m: [importance[m][i] for i in components] for m, components in kept.items()}
        told = {"rank": max(map(len, kept.values()), default=0), "budget": sum(map(len, kept.values()))}
        facts: dict[str, Json] = {"t": t, "importance": left, "report": {**folded.report, **told}}
        return ServerState({name: tensors[name] for name in state.tensors}, facts)

    def export(self, state: ServerState) -> Export:
        """Modules of unlike ranks, filled with zeros to the largest."""
        return Export(*base_delta.combined(state.tensors, {}, self.aggregation.scaling))

    def _measured(self, tensors: Tensors, received: ReceivedUpdates) -> Importance:
        """(2), before smoothing; norms where nobody measured."""
        told = [
            replace(update, tensors={}) for update in received if "importance" in update.facts and update.num_examples
        ]
        if self.importance == "norm" or not told:
            return {module: _rounded(_norms(lora_math.read(tensors, module))) for module in lora_math.modules(tensors)}
        total = sum(update.num_examples for update in told)
        measured: Importance = {}
        for module, rank in _ranks(tensors).items():
            mean = np.zeros(rank)
            for update in told:
                mean += update.num_examples / total * _told(update, module, rank)
            measured[module] = _rounded(mean)
        return measured

    def _smoothed(self, state: ServerState, measured: Importance) -> Importance:
        """(2), with what earlier rounds measured."""
        before = state.facts.get("importance")
        if not isinstance(before, dict) or not before:
            return measured
        smooth: Importance = {}
        for module, values in measured.items():
            old = np.asarray(before.get(module, values), np.float64)
            smooth[module] = _rounded(self.beta * old + (1.0 - self.beta) * np.asarray(values, np.float64))
        return smooth


def _sensitivity(factors: Factors, squares: Factors) -> Scores:
    """Mean of |w| sqrt(E[g^2]) over each component's entries of A and of B, summed."""
    a: Scores = np.abs(factors.a.astype(np.float64)) * np.sqrt(squares.a.astype(np.float64))
    b: Scores = np.abs(factors.b.astype(np.float64)) * np.sqrt(squares.b.astype(np.float64))
    score: Scores = a.mean(axis=1) + b.mean(axis=0)
    return score


def _norms(factors: Factors) -> Scores:
    a, b = (np.linalg.norm(f.astype(np.float64), axis=axis) for f, axis in ((factors.a, 1), (factors.b, 0)))
    product: Scores = np.multiply(a, b)
    return product


def _kept(importance: Importance, budget: int) -> dict[str, list[int]]:
    """(3): the components to keep, in order, by module; ties go to the first module and component."""
    best = {module: max(range(len(values)), key=lambda i: values[i]) for module, values in importance.items()}
    rest = sorted(
        (-value, module, place)
        for module, values in importance.items()
        for place, value in enumerate(values)
        if place != best[module]
    )
    kept = {module: [place] for module, place in best.items()}
    for _, module, place in rest[: max(0, budget - len(best))]:
        kept[module].append(place)
    return {module: sorted(places) for module, places in kept.items()}


def _told(update: ClientUpdate, module: str, rank: int) -> Scores:
    """What a client measured of one module; raises Refused where it is not one number for each component."""
    told = update.facts.get("importance")
    values = told.get(module) if isinstance(told, dict) else None
    if not isinstance(values, list) or len(values) != rank or not all(isinstance(v, (int, float)) for v in values):
        raise Refused("importance", f"{update.client} did not measure {rank} components of {module}")
    return np.asarray(values, np.float64)


def _ranks(tensors: Tensors) -> dict[str, int]:
    return {module: lora_math.read(tensors, module).rank for module in lora_math.modules(tensors)}


def _like(value: Array, sent: Array) -> Array:
    """Cut what was filled with zeros."""
    return value[tuple(slice(length) for length in sent.shape)]


def _rounded(values: Scores) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _t(state: ServerState) -> int:
    t = state.facts.get("t", 0)
    return t if isinstance(t, int) else 0
