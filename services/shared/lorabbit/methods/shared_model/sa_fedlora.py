"""SA-FedLoRA: a short stage of full fine-tuning, then LoRA whose rank falls from round to round.

Yang, Liu, Gao, Xu, Wang, "SA-FedLoRA: Adaptive Parameter Allocation for Efficient Federated Learning with LoRA Tuning",
2024 (arXiv 2405.09394v1; v2 of that number is another paper). t is 0-based, T0 rounds are the initiating stage.

    (1)  t < T0:   L_k(w; w^t) = F_k(w) + (mu / 2) ||w - w^t||^2, over every parameter w
                   w^{t+1} = sum_k p_k w_k,   p_k = n_k / sum n_j
    (2)  t >= T0:  the rank r_t falls from r_max to r_min (`lorabbit.methods.components.rank_schedule`); clients train
                   A, B and the head on F_k over the frozen W* = w^{T0}
    (3)  r_t < r_{t-1}: the factors become the best approximation of rank r_t of s B A
         (`lorabbit.tensors.lora_math.truncate`)

Of the paper only the abstract and reviews could be read: the forms of the penalty, of the schedule and of (3)
are reconstructions, named in docs/methods/sa-fedlora.md.

D1  `initiating: lora` runs the first T0 rounds at r_max with the penalty on A, B and the head, for models
    too large to travel whole.
D2  The scaling s = lora.alpha / lora.rank is the same at every rank, so that shrinking changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from lorabbit.aggregation import aggregator, base_delta, client_side
from lorabbit.aggregation.aggregator import Aggregation, ReceivedUpdates
from lorabbit.aggregation.rules import COMPONENTS, RULES
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Export, Method
from lorabbit.methods.components import rank_schedule, two_stage
from lorabbit.methods.components.rank_schedule import RankSchedule
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.training_session import GradientTerm, Session
from lorabbit.types import (
    ADAPTER,
    BASE,
    EVALUATE,
    SHIFT,
    ClientProfile,
    ClientUpdate,
    Facts,
    Json,
    Plan,
    ServerState,
    Tensors,
)

INITIATING, ANNEALING = "initiating", "annealing"
STANDING = ("base_hash", "merged")
"""What tells the base of one round from that of another: its hash, and how often factors were merged into it."""


class SaFedLora(Method):
    """Whole model first, then LoRA of falling rank."""

    name: ClassVar[str] = "sa-fedlora"
    summary: ClassVar[str] = "a few rounds of full fine-tuning, then LoRA whose rank falls by a schedule"
    paper: ClassVar[str] = "Yang et al., SA-FedLoRA: Adaptive Parameter Allocation, 2024, arXiv 2405.09394v1"
    schedules: ClassVar[frozenset[str]] = frozenset({"sync", "quorum"})
    because: ClassVar[str] = (
        "its rank falls from round to round, so a late update has an older rank and stands on an older base"
    )

    initiating: Literal["full", "lora"] = Field(
        default="full", description="what the first stage trains and sends: the whole model, or LoRA at r_max (D1)"
    )
    t0: int | None = Field(default=None, ge=0, description="T0: rounds of the first stage; 6% of all when absent")
    mu: float = Field(default=0.01, ge=0, description="strength of the first stage's penalty; 0: none")
    penalty: Literal["prox", "l2", "l1prox", "fisher-prox"] = Field(
        default="prox",
        description="mu/2 ||w - w^t||^2, mu/2 ||w||^2, mu ||w - w^t||_1, or prox weighted by Fisher information",
    )
    prox_in_annealing: bool = Field(default=False, description="keep the penalty in the second stage")
    schedule: rank_schedule.Shape = Field(
        default="cubic", description="how the rank falls; constant and reverse ablate"
    )
    r_max: int | None = Field(default=None, ge=1, le=1024, description="highest rank; model.lora.rank when absent")
    r_min: int | None = Field(default=None, ge=1, le=1024, description="lowest rank; an eighth of r_max when absent")
    t_heat: int | None = Field(default=None, ge=0, description="rounds held at r_max; a tenth when absent")
    t_cool: int | None = Field(default=None, ge=0, description="rounds held at r_min; a fifth when absent")
    ladder: tuple[int, ...] = Field(default=(), description="ranks to round up to; every rank when empty")
    ranks: tuple[int, ...] = Field(default=(), description="explicit: one rank for each round after the first stage")
    shrink: Literal["svd", "importance", "merge-reinit"] = Field(
        default="svd",
        description="(3), drop the components of least ||B_i|| ||A_i||, or move all into the base and begin anew",
    )
    initiating_learning_rate: float | None = Field(default=None, gt=0, description="local.learning_rate when absent")
    annealing_learning_rate: float | None = Field(default=None, gt=0, description="local.learning_rate when absent")

    # ---- what follows from the job ----
    def check(self, job: JobSpec) -> None:
        """The schedule must fit the rounds, and the aggregation must be one that the method knows."""
        method = self.with_job(job)
        if job.model.trainable != "lora":
            raise BadInput(f"method.name: sa-fedlora needs model.trainable 'lora', not {job.model.trainable!r}")
        if job.aggregation not in {"factors", "svd"}:
            raise BadInput(
                f"aggregation: sa-fedlora averages factors ('factors') or products ('svd'), not {job.aggregation!r}"
            )
        if method.stage_rounds >= job.rounds:
            raise BadInput(f"method.t0: {method.stage_rounds} leaves no round of {job.rounds} for the second stage")
        try:
            highest = method.ranks_by_round.highest
        except ValueError as error:
            raise BadInput(f"method.schedule: {error}") from error
        if max(job.model.lora.client_ranks or (1,)) > highest:
            raise BadInput(f"model.lora.client_ranks: a client has more than r_max ({highest}); lower it")
        rates = [self.initiating_learning_rate or job.local.learning_rate]
        if self.prox_in_annealing:
            rates.append(self.annealing_learning_rate or job.local.learning_rate)
        rate = max(rates)
        if self.penalty != "l1prox" and rate * self.mu >= 1:
            raise BadInput(f"method.mu: {self.mu} times the learning rate {rate} must be below 1, or steps diverge")

    @property
    def stage_rounds(self) -> int:
        """T0."""
        return max(1, self.job.rounds * 6 // 100) if self.t0 is None else self.t0

    @property
    def ranks_by_round(self) -> RankSchedule:
        """(2); raises ValueError where it has no sense."""
        rounds, start = self.job.rounds, self.stage_rounds
        heat, cool = rank_schedule.holds(rounds - start, self.t_heat, self.t_cool)
        highest = self.r_max or self.job.model.lora.rank
        lowest = self.r_min or max(1, highest // 8)
        return RankSchedule(self.schedule, rounds, start, highest, lowest, heat, cool, self.ladder, self.ranks)

    @property
    def scaling(self) -> float:
        """s, of the job (D2)."""
        return aggregator.of(self.job).scaling

    @property
    def works_on_base(self) -> bool:
        """In the first stage, and where a lower rank merges factors into it."""
        return self._whole or self.shrink == "merge-reinit"

    def aggregation(self, rank: int) -> Aggregation:
        """The job's, at the rank of a round; weak clients train the first components."""
        rule = COMPONENTS if self.job.aggregation == "factors" else RULES["svd"]
        return replace(aggregator.of(self.job), rule=rule, rank=rank)

    def _rank(self, t: int) -> int:
        """Rank of the factors that clients get in a round; r_max before T0, the last one after the end."""
        schedule = self.ranks_by_round
        return schedule.rank(min(t, self.job.rounds - 1)) or schedule.highest

    # ---- client ----
    def initialize(self, session: Session) -> Tensors:
        """The first adapter, and the whole model where the first stage trains it."""
        return two_stage.with_whole(session) if self._whole else session.tensors()

    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """(1) or (2), as the plan says: a client knows no schedule."""
        self.restore(plan, session)
        stage, local = plan.settings["stage"], session.local
        rate = self.initiating_learning_rate if stage == INITIATING else self.annealing_learning_rate
        if rate is not None:
            local = local.model_copy(update={"learning_rate": rate})
        term = self._penalty(session) if stage == INITIATING or self.prox_in_annealing else None
        result = session.train(gradient_term=term, local=local if local != session.local else None)
        facts = {name: fact for name, fact in plan.settings.items() if name in {"stage", *STANDING}}
        return client_side.answer(plan, session, result, scaling=self.scaling, facts=facts)

    def restore(self, plan: Plan, session: Session) -> None:
        """Install a whole model, or an adapter and the base that it stands on."""
        if plan.settings["part"] == "whole":
            session.select("whole")
            session.load(plan.payloads[ADAPTER])
            return
        if BASE in plan.payloads:
            two_stage.install_base(plan, session)
        client_side.install(plan, session)

    def _penalty(self, session: Session) -> GradientTerm | None:
        """Gradient of the penalty: mu (w - w^t), mu w, mu sign(w - w^t) made smooth at zero, or mu f (w - w^t).

        f is the diagonal Fisher information at w^t over its largest value, so that 0 <= f <= 1.
        """
        mu, kind = self.mu, self.penalty
        importance = session.importance() if mu and kind == "fisher-prox" else {}

        def pull(name: str, value: Any, start: Any) -> Any:  # noqa: ANN401 - the session's own array kind
            if kind == "l2":
                return mu * value
            away = value - start
            if kind == "fisher-prox":
                return mu * importance[name] * away
            return mu * away if kind == "prox" else mu * away / (abs(away) + 1e-12)

        return pull if mu else None

    # ---- server ----
    def _settings(self, state: ServerState) -> dict[str, Json]:
        """All that a client must know of the round, but its own cap."""
        t = _count(state, "t")
        stage = INITIATING if t < self.stage_rounds else ANNEALING
        if stage == INITIATING and self._whole:
            return {"stage": stage, "part": "whole"}
        known = {name: state.facts[name] for name in STANDING if name in state.facts}
        return {"stage": stage, "part": "adapter", "rank": self._rank(t), "scaling": self.scaling, **known}

    def _folding(self, state: ServerState) -> Aggregation:
        return self.aggregation(self._rank(_count(state, "t")))

    def _fresh(self, first: Tensors, model: Tensors, t: int) -> Tensors:
        return two_stage.first_factors(first, model, self.aggregation(self._rank(t)))

    @property
    def _whole(self) -> bool:
        return self.initiating == "full" and self.stage_rounds > 0

    def start(self, adapter: Tensors) -> ServerState:
        """Round 0: the whole model, or factors at r_max drawn here from the job's seed (B = 0)."""
        model, first = two_stage.split(adapter)
        if self._whole:
            return ServerState(model, {"t": 0}, {two_stage.FIRST: first})
        return ServerState(self._fresh(first, {}, 0), {"t": 0})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """Tensors of the stage; every number that a client needs is in the settings."""
        settings = self._settings(state)
        if settings["part"] == "whole":
            return Plan(payloads={ADAPTER: state.tensors}, settings=settings)
        plan = self._folding(state).plan(state, client)
        return replace(plan, settings={**settings, **plan.settings})

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:
        """The whole model in the first stage, the client's part of the factors in the second."""
        if self._settings(state)["part"] == "whole":
            return state.tensors
        return self._folding(state).uploads(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Fold a round; at the end of the first stage freeze W*, and before a lower rank shrink (3)."""
        settings, t = self._settings(state), _count(state, "t") + 1
        checked = ReceivedUpdates(updates, lambda update: _check(update, settings))
        facts: dict[str, Json] = {**state.facts, "t": t}
        if settings["part"] == "whole":
            mean = weighted_mean((u.num_examples, u.tensors) for u in checked)
            facts["report"] = {"stage": INITIATING}
            if t < self.stage_rounds:
                return ServerState(mean, facts, state.shared)
            facts["base_hash"] = two_stage.digest(mean)
            return ServerState(self._fresh(state.shared[two_stage.FIRST], mean, t), facts, {BASE: mean})
        folded = self._folding(state).fold(state, checked)
        coming, shared, tensors = self._rank(t), state.shared, folded.tensors
        lost: Facts = {"lost": 0.0}
        if self.shrink != "merge-reinit":
            tensors, lost = two_stage.change_rank(tensors, coming, self.aggregation(coming), by=self.shrink)
        elif coming != client_side.rank_of(tensors):
            tensors, merged = two_stage.merge(tensors, shared.get(SHIFT, {}), self.aggregation(coming), t)
            shared, facts["merged"] = {**shared, SHIFT: merged}, _count(state, "merged") + 1
        told = {"stage": settings["stage"], "rank": settings["rank"], "next_rank": coming}
        facts["report"] = {**folded.report, **told, **lost}
        return ServerState(tensors, facts, shared)

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """The model of the stage, at the server's rank."""
        base = {role: state.shared[role] for role in (BASE, SHIFT) if role in state.shared}
        return Plan(EVALUATE, {**base, ADAPTER: state.tensors}, self._settings(state))

    def adapter(self, state: ServerState) -> Tensors:
        """Factors and head; before the second stage those that it would start from."""
        if self._settings(state)["part"] == "whole":
            return self._fresh(state.shared[two_stage.FIRST], state.tensors, self.stage_rounds)
        return state.tensors

    def export(self, state: ServerState) -> Export:
        """The adapter at its rank, with what was merged beside it, and the base that the first stage made."""
        tensors = self.adapter(state)
        if SHIFT in state.shared:
            return Export(*base_delta.combined(tensors, state.shared[SHIFT], self.scaling), state.shared.get(BASE))
        config = client_side.config_of(client_side.rank_of(tensors), self.scaling)
        if self._settings(state)["part"] == "whole":
            return Export(tensors, config, state.tensors)
        return Export(tensors, config, state.shared.get(BASE))


def _count(state: ServerState, name: str) -> int:
    """What a state counts: `t`, the rounds that are folded into it, or `merged`, how often factors were merged."""
    count = state.facts.get(name, 0)
    if not isinstance(count, int):
        raise Refused("malformed", f"a server state of sa-fedlora counts {name}")
    return count


def _check(update: ClientUpdate, settings: Facts) -> None:
    """Refuse an update that was trained on another base, or at a rank that the round does not have."""
    if any(update.facts.get(name) != settings.get(name) for name in STANDING):
        raise Refused("base", f"{update.client} trained on another base than the one of this round")
    if settings["part"] == "adapter" and client_side.rank_of(update.tensors) > _rank_of(settings):
        raise Refused("rank", f"{update.client} trained at a higher rank than the one of this round")


def _rank_of(settings: Facts) -> int:
    rank = settings["rank"]
    return rank if isinstance(rank, int) else 0
