"""FibecFed: easy examples first, sensitive blocks shared, other blocks tuned sparsely and kept at home.

Liu et al., "Fisher Information-based Efficient Curriculum Federated Learning with Large Language
Models", EMNLP 2024 (arXiv 2410.00131). What its page marks as a reconstruction is not in the sources
that could be reached.

    (2)  d_i     = ||grad log p(y_i | x_i)||^2 over the LoRA factors: sort ascending, cut into M_k batches
    (3)  m_k(t)  = ceil(min(1, beta + (1 - beta) t / (alpha T)) M_k) easiest batches in round t
    (4)  I_k^l   = mean ||h_l(x + noise) - h_l(x)|| / ||h_l(x)||;  I^l = sum_k (n_k / N) I_k^l / sum_l I_k^l
         G       = the N* blocks of largest I^l: their factors are tuned densely and averaged
    (5)  F_t     = gamma F_{t-1} + (1 - gamma) F~   outside G, on the client
    (7)  mask    = rows with the ceil(rho rows) largest sums of F_t, matrix by matrix; other rows stand still
    (8)  P_G     = sum_k (n_k / n) P_k,G over the cohort

Round 0 asks everybody for I_k; difficulties, F, masks and factors outside G never leave a client.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from lorabbit.aggregation import aggregator, client_side
from lorabbit.aggregation.aggregator import ReceivedUpdates
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.components import curriculum, layer_selection, sparse_masks
from lorabbit.methods.components.layer_selection import LEFT, OUTSIDE
from lorabbit.methods.components.sparse_masks import ComputeStats, sum_stats
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.arithmetic import count, subset
from lorabbit.training_session import Difficulty, Direction, LocalResult, Sensitivity, Session
from lorabbit.types import ADAPTER, EVALUATE, ClientProfile, ClientUpdate, Facts, Json, Plan, ServerState, Tensors

CHOICE = ("gal_version", "gal", "left")
FISHER = "fisher"
"""Private group: F_t; that of own factors is OUTSIDE."""


class FibecFed(Method):
    """Curriculum over examples, shared sensitive blocks, sparse private ones; every part can be switched off."""

    name: ClassVar[str] = "fibecfed"
    summary: ClassVar[str] = "easy examples first; sensitive blocks are shared, the others tuned sparsely at home"
    paper: ClassVar[str] = "Liu et al., Fisher Information-based Efficient Curriculum FL, 2024, arXiv 2410.00131"
    because: ClassVar[str] = (
        "its clients keep own factors, scores and batches that count the rounds, "
        "and training moves them whether or not the update is averaged"
    )
    prepares: ClassVar[bool] = True
    scores_first: ClassVar[bool] = True

    quorum: float = Field(default=1.0, gt=0, le=1, description="share of clients whose answers choose the blocks")
    # ---- curriculum ----
    difficulty: Difficulty | Literal["random"] = Field(default="fisher", description="what makes an example hard")
    pacing: curriculum.Pacing = Field(default="linear", description="how batches are added; none: no curriculum")
    beta: float = Field(default=0.3, gt=0, le=1, description="share of the batches in the first round")
    alpha: float = Field(default=0.6, gt=0, le=1, description="share of the rounds after which all batches are used")
    order: curriculum.Order = Field(default="easy", description="hard: the hardest first")
    keep_order: bool = Field(default=False, description="batches in sorted order; otherwise shuffled every round")
    class_balanced_prefix: bool = Field(default=False, description="classes take turns, each from its easiest on")
    rescore_every: int = Field(default=0, ge=0, description="rounds after which difficulty is measured again; 0 never")
    # ---- shared blocks ----
    gal_ratio: float | Literal["slq", "eigengap", "energy"] = Field(
        default=0.5, description="share of blocks that are aggregated, or the rule that finds it"
    )
    gal_pick: layer_selection.Pick = Field(
        default="top", description="the most sensitive blocks, any, or the least sensitive"
    )
    energy: float = Field(default=0.7, gt=0, le=1, description="share of the sensitivity that 'energy' keeps")
    sensitivity: Sensitivity = Field(default="relative", description="abs: not over the norm; gain: block by block")
    noise: float = Field(default=0.05, gt=0, description="norm of the noise, as a share of the embeddings' norm")
    probes: int = Field(default=32, ge=1, description="examples that are probed with noise")
    draws: int = Field(default=4, ge=1, description="draws of noise for each of them")
    noise_direction: Direction = Field(default="random", description="adversarial: where the loss grows fastest")
    gal_refresh_every: int = Field(default=0, ge=0, description="rounds after which the cohort chooses anew; 0 never")
    # ---- other blocks ----
    sparse: bool = Field(default=True, description="false: blocks that are not shared are tuned densely")
    update_share: float | None = Field(default=None, ge=0, le=1, description="of neurons; as measured, else 0.5")
    granularity: sparse_masks.Granularity = Field(
        default="neuron", description="what a mask keeps whole: rows or weights"
    )
    fisher_momentum: float = Field(default=0.9, ge=0, lt=1, description="gamma of the smoothed Fisher information")
    n_fisher: int = Field(default=64, ge=1, description="examples of each refresh")
    warmup_steps: int = Field(default=10, ge=0, description="trial steps before the first masks; undone afterwards")
    reset_gap: int | None = Field(default=None, ge=0, description="missed rounds after which own factors start anew")
    # ---- server ----
    weights: Literal["examples", "used"] = Field(default="examples", description="used: examples of the curriculum")
    evaluate: Literal["personal", "global"] = Field(default="personal", description="global: without own factors")

    def check(self, job: JobSpec) -> None:
        """Only LoRA has factors by block, and own factors can only be scored where they are."""
        if isinstance(self.gal_ratio, float) and not 0 < self.gal_ratio <= 1:
            raise BadInput(f"method.gal_ratio: {self.gal_ratio} is not in (0, 1]; 0.5 shares half of the blocks")
        if job.model.trainable != "lora":
            raise BadInput(
                f"method.name: fibecfed shares LoRA factors block by block, but model.trainable is "
                f"{job.model.trainable!r}; set model.trainable to 'lora'"
            )
        if self.evaluate == "personal" and job.evaluation.on == "central":
            raise BadInput(
                "method.evaluate: personal scores need each client's own factors, but evaluation.on is 'central'; "
                "set evaluation.on to 'clients', or method.evaluate to 'global'"
            )
        if self.gal_refresh_every and (self.gal_ratio == 1.0 or self.gal_pick == "random"):
            raise BadInput("method.gal_refresh_every: nothing is measured here that could choose anew; leave it 0")
        aggregator.refuse_choice(job, "fibecfed", "averages the factors of its shared blocks")

    # ---- server ----
    def start(self, adapter: Tensors) -> ServerState:
        """Before round 0 nothing is chosen."""
        return ServerState(dict(adapter), {"gal_version": 0, "left": {}})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - one plan for all
        """Round 0 sends nothing: clients measure the adapter that the job's seed gives them."""
        if not state.facts["gal_version"]:
            return Plan(settings={"gal_version": 0})
        return Plan(payloads=layer_selection.sent(state), settings={name: state.facts.get(name) for name in CHOICE})

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:  # noqa: ARG002
        """Factors of shared blocks and the head; nothing in round 0."""
        return state.tensors if state.facts["gal_version"] else {}

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Choose G in round 0; (8) afterwards."""
        if not state.facts["gal_version"]:
            return self._choose(state, [(u.num_examples, u.facts) for u in updates if u.num_examples])
        told: list[tuple[int, Facts]] = []

        def check(update: ClientUpdate) -> None:
            if update.facts.get("gal_version") != state.facts["gal_version"]:
                raise Refused("gal-version", f"{update.client} tuned the blocks of another choice")
            told.append((update.num_examples, update.facts))

        mean = aggregator.of(self.job).fold(state, ReceivedUpdates(updates, check, self._weight))
        folded = replace(mean, facts={**mean.facts, "report": {**mean.report, **sum_stats(facts for _, facts in told)}})
        measured = [(number, facts) for number, facts in told if number and "sensitivities" in facts]
        return self._choose(folded, measured) if measured else folded

    def _weight(self, update: ClientUpdate) -> float:
        """n_k of (8)."""
        used = update.facts.get("n_used") if self.weights == "used" else None
        return used if isinstance(used, int) else update.num_examples

    def _choose(self, state: ServerState, answers: Sequence[tuple[int, Facts]]) -> ServerState:
        """Weigh all answers and choose G: (4)."""
        candidates = layer_selection.blocks_of(layer_selection.everything(state))
        values = layer_selection.importance([(n, facts.get("sensitivities")) for n, facts in answers], candidates)
        told = ((n, facts.get("lossless_share")) for n, facts in answers)
        share = self.gal_ratio if isinstance(self.gal_ratio, float) else layer_selection.lossless(told)
        before = state.facts.get("gal")
        number = len(before) if isinstance(before, list) else layer_selection.enough(share, len(candidates))
        if self.gal_ratio == "energy":
            number = layer_selection.enough_for_energy(values, self.energy)
        chosen = layer_selection.choose(candidates, values, number, pick=self.gal_pick, seed=self.job.seed)
        regrouped = layer_selection.regrouped(state, chosen)
        whole, shared = count(layer_selection.everything(regrouped)), count(regrouped.tensors)
        report: dict[str, Json] = {"passes": sum_stats(facts for _, facts in answers)["passes"], **state.report}
        report |= {"gal": [*chosen], "importance": [float(v) for v in values], "answers": len(answers)}
        report |= {"shared_parameters": shared, "private_parameters": whole - shared}
        return replace(regrouped, facts={**regrouped.facts, "report": report})

    def scoring(self, state: ServerState, client: ClientProfile) -> Plan:  # noqa: ARG002 - the same for all
        """Send what is shared; the rest is where the score is taken, or untouched."""
        return Plan(EVALUATE, layer_selection.sent(state), {"evaluate": self.evaluate, "left": state.facts.get("left")})

    def restore(self, plan: Plan, session: Session) -> None:
        """Put a client's own factors beside the shared ones, for personal scores."""
        session.load(plan.payloads.get(LEFT, {}))
        if plan.settings.get("evaluate") == "personal":
            session.load(_own(plan, session))
        session.load(plan.payloads[ADAPTER])

    def adapter(self, state: ServerState) -> Tensors:
        """The shared tensors, and the others as they were at the start."""
        return layer_selection.everything(state)

    # ---- client ----
    def local_update(self, plan: Plan, session: Session) -> ClientUpdate:
        """Measure in round 0; tune afterwards."""
        me = session.client
        if not plan.settings["gal_version"]:
            facts = self._measure(session) if session.num_examples else {}
            return ClientUpdate(me.client, me.index, {}, session.num_examples, math.nan, facts)
        work = ComputeStats(n_all=session.num_examples)
        gap, shared = self._load(plan, session), plan.payloads[ADAPTER]
        version: Facts = {"gal_version": plan.settings["gal_version"]}
        if not session.num_examples:
            return ClientUpdate(me.client, me.index, subset(session.tensors(), shared), 0, math.nan, version)
        batches = self._batches(session, work)
        share = curriculum.competence(self.pacing, session.round - 1, self.job.rounds, beta=self.beta, alpha=self.alpha)
        easy = batches[: curriculum.batches_used(share, len(batches))]  # (3), in the server's rounds
        work.used, work.batches, work.n_used = len(easy), len(batches), sum(map(len, easy))
        outside = [name for name in session.tensors() if name not in shared]
        masks = self._masks(session, outside, easy, work=work)
        result = session.train(mask=masks or None, batches=self._ordered(easy, session))
        self._keep(session, result, outside, easy, work=work)
        anew = self._sensitivities(session, work) if self._chooses_after(session.round) else {}
        facts = {**work.told(session, result, masks), **anew, **version, "gap": gap}
        sent = replace(result, tensors=subset(result.tensors, shared))
        return client_side.answer(plan, session, sent, scaling=aggregator.of(self.job).scaling, facts=facts)

    def _chooses_after(self, number: int) -> bool:
        """Tell whether a round's cohort chooses G anew; after the last one nothing is tuned any more."""
        return bool(self.gal_refresh_every) and number % self.gal_refresh_every == 0 and number < self.job.rounds

    def _measure(self, session: Session) -> Facts:
        """Round 0: difficulties stay here, sensitivities and the lossless share go to the server."""
        work, facts = ComputeStats(), dict[str, Json]()
        self._batches(session, work)
        if self.gal_ratio != 1.0 and (self.gal_pick != "random" or self.gal_ratio == "energy"):
            facts = self._sensitivities(session, work)
        if self.gal_ratio in ("slq", "eigengap"):
            session.private["lossless_share"] = facts["lossless_share"] = session.lossless_share(self.gal_ratio)
        return {**facts, "passes": work.extra}

    def _sensitivities(self, session: Session, work: ComputeStats) -> dict[str, Json]:
        """I_k^l of every block, at the session's present tensors."""
        how, kind = self.noise_direction, self.sensitivity
        work.extra += min(self.probes, session.num_examples) if how == "adversarial" else 0
        found = session.sensitivity(noise=self.noise, draws=self.draws, probes=self.probes, variant=kind, direction=how)
        return {"sensitivities": [float(value) for value in found]}

    def _load(self, plan: Plan, session: Session) -> int:
        """Put the server's tensors over the client's own; returns how many rounds it has missed."""
        last = session.private.get("last_round")
        gap = session.round - last - 1 if isinstance(last, int) else 0
        if self.reset_gap is not None and gap > self.reset_gap:
            for group in (OUTSIDE, FISHER):
                session.private_tensors.pop(group, None)
        session.load(plan.payloads.get(LEFT, {}))
        session.load(_own(plan, session))
        session.load(plan.payloads[ADAPTER])
        session.private["last_round"], session.private["gal_version"] = session.round, plan.settings["gal_version"]
        return gap

    def _batches(self, session: Session, work: ComputeStats) -> list[list[int]]:
        """(2): all batches, easy to hard; difficulties are measured on first use, and again when due."""
        size = session.local.batch_size
        if self.pacing == "none":
            return curriculum.sorted_batches(np.zeros(session.num_examples), size)
        known, anew = curriculum.difficulties(session, self.difficulty, self.job.seed, self.rescore_every)
        work.extra += session.num_examples if anew and self.difficulty == "fisher" else 0
        classes = session.labels() if self.class_balanced_prefix else None
        return curriculum.sorted_batches(known, size, self.order, classes=classes)

    def _ordered(self, easy: list[list[int]], session: Session) -> list[list[int]] | None:
        """Shuffle the batches in use; without a curriculum the session cuts its own."""
        if self.pacing == "none":
            return None
        return easy if self.keep_order else curriculum.shuffled(easy, derive_seed(session.seed, "order"))

    def _masks(self, session: Session, outside: list[str], easy: list[list[int]], *, work: ComputeStats) -> Tensors:
        """(7) from F as it is kept; before there is one, from F after a few trial steps that are undone."""
        if not self.sparse or not outside:
            return {}
        if self.update_share == 0:
            return {n: np.zeros((len(v), 1), np.bool_) for n, v in session.tensors().items() if n in outside}
        if FISHER not in session.private_tensors:
            start = session.tensors()
            if self.warmup_steps:
                trial = session.local.model_copy(update={"steps": self.warmup_steps, "epochs": None})
                session.train(batches=self._ordered(easy, session), local=trial, stream="warm-up")
                work.extra += self.warmup_steps * session.local.batch_size
            session.private_tensors[FISHER] = self._fisher(session, outside, easy, work=work)
            session.load(start)
        known = session.private_tensors[FISHER]
        if not known.keys() >= set(outside):
            known = {**self._fisher(session, outside, easy, work=work), **known}
            session.private_tensors[FISHER] = subset(known, outside)
        measured = session.private.get("lossless_share")
        usual = measured if isinstance(measured, float) else 0.5
        share = usual if self.update_share is None else self.update_share
        return {name: sparse_masks.mask(known[name], share, self.granularity) for name in outside}

    def _fisher(self, session: Session, outside: list[str], easy: list[list[int]], *, work: ComputeStats) -> Tensors:
        """Mean squared gradients outside G, over some of the examples in use."""
        chosen = curriculum.sample(easy, self.n_fisher, derive_seed(session.seed, "fisher"))
        work.extra += len(chosen)
        return subset(session.fisher(chosen), outside)

    def _keep(
        self, session: Session, result: LocalResult, outside: list[str], easy: list[list[int]], *, work: ComputeStats
    ) -> None:
        """Keep own factors, and (5)."""
        if not outside:
            return
        session.private_tensors[OUTSIDE] = subset(result.tensors, outside)
        if FISHER in session.private_tensors:
            now = self._fisher(session, outside, easy, work=work)
            before = session.private_tensors[FISHER]
            session.private_tensors[FISHER] = sparse_masks.smoothed(before, now, self.fisher_momentum)


def _own(plan: Plan, session: Session) -> Tensors:
    """The factors outside G that this client has tuned, but those of blocks that were shared since."""
    kept = session.private_tensors.get(OUTSIDE, {})
    return layer_selection.still_own(kept, plan.settings.get("left"), session.private.get("gal_version"))
