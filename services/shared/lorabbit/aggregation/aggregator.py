"""A job's aggregation as one value: the server verbs of a method, for whatever rule the job names.

Updates are read one module at a time: memory is one module of all clients. Tensors without factors
(task heads, biases) get the plain mean weighted by examples under every rule.

A round's updates, walked as often as a fold needs them, without holding a file open for each of many clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorabbit.aggregation import base_delta, client_side
from lorabbit.aggregation.rank_pruning import PRUNED_TO
from lorabbit.aggregation.rules import RULES, FactorShape, Folded, Rule, Weighted, normalized
from lorabbit.aggregation.staleness import CorrectedProducts, CorrectedUpdate, StalenessCorrection
from lorabbit.errors import BadInput, Refused
from lorabbit.job import schedules
from lorabbit.job.spec import JobSpec, PruneSpec
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import (
    ADAPTER,
    EVALUATE,
    SHIFT,
    Array,
    ClientProfile,
    ClientUpdate,
    Facts,
    Json,
    Plan,
    ServerState,
    Tensors,
)

HELD = 64
"""Updates whose files stay open between walks; of more clients each walk opens them anew."""


class ReceivedUpdates(Iterable[ClientUpdate]):
    """The updates of one round, all of the same names, in the order given."""

    def __init__(
        self,
        updates: Iterable[ClientUpdate],
        check: Callable[[ClientUpdate], None] | None = None,
        weigh: Callable[[ClientUpdate], float] = lambda update: update.num_examples,
    ) -> None:
        """Walk once, check and weigh each; raises Refused ("names") for unlike ones, ValueError where are none."""
        self._source: Iterable[ClientUpdate] = list(updates) if isinstance(updates, Iterator) else updates
        self.names: tuple[str, ...] = ()
        self.weights: list[float] = []
        held: list[ClientUpdate] = []
        for update in self._source:
            if check is not None:
                check(update)
            if not self.weights:
                self.names = tuple(update.tensors)
            elif update.tensors.keys() != set(self.names):
                raise Refused("names", "updates of one round hold different tensors")
            self.weights.append(float(weigh(update)))
            if len(held) <= HELD:
                held.append(update)
        if not self.weights:
            raise ValueError("a round needs at least one update")
        if len(held) <= HELD:
            self._source = held

    def __iter__(self) -> Iterator[ClientUpdate]:
        """Walk again."""
        return iter(self._source)


RANKS = "ranks"
"""Fact of the state: rank of each client that has pruned its own."""
LEAST_NORM = 1e-30
"""Squared; below it the mean update is taken for zero, and its aggregation error too."""


def check(job: JobSpec) -> None:
    """Raise BadInput where a job's aggregation does not fit what it trains, or the ranks of its clients."""
    rule, lora_spec = RULES[job.aggregation], job.model.lora
    if rule.late and schedules.takes_late(job.schedule):
        raise BadInput(
            f"aggregation: {rule.name!r} cannot fold late updates, since {rule.late}; leave aggregation out, "
            "or choose a schedule that refuses late updates"
        )
    if job.model.trainable != "lora":
        if job.aggregation != "factors":
            raise BadInput(
                f"aggregation: {job.aggregation!r} combines LoRA factors, but model.trainable is "
                f"{job.model.trainable!r}; leave aggregation out, or set model.trainable to 'lora'"
            )
        if lora_spec.client_ranks is not None:
            raise BadInput("model.lora.client_ranks: model.trainable is not 'lora', so there is no rank; leave it out")
        return
    ranks = lora_spec.client_ranks or (lora_spec.rank,)
    if max(ranks) > lora_spec.rank:
        raise BadInput(
            f"model.lora.client_ranks: {max(ranks)} is more than model.lora.rank ({lora_spec.rank}), the rank of the "
            "server; raise model.lora.rank to the largest rank of a client"
        )
    if rule.unequal and min(ranks) != lora_spec.rank:
        mixed = ", ".join(sorted(name for name, other in RULES.items() if not other.unequal))
        raise BadInput(
            f"model.lora.client_ranks: aggregation {rule.name!r} needs one rank, since {rule.unequal}; "
            f"choose another aggregation ({mixed}), or give every client model.lora.rank"
        )


def one_rank(job: JobSpec) -> int | None:
    """The rank that every client of a job must train; None where ranks may differ, or there is none."""
    return job.model.lora.rank if job.model.trainable == "lora" and RULES[job.aggregation].unequal else None


def refuse_choice(job: JobSpec, method: str, because: str) -> None:
    """Raise BadInput where a job chooses an aggregation or ranks, for a method that has its own."""
    if job.aggregation != "factors":
        raise BadInput(f"aggregation: {method} {because}; leave aggregation out")
    if job.model.lora.client_ranks is not None:
        raise BadInput(f"model.lora.client_ranks: {method} {because}; leave client_ranks out")
    refuse_pruning(job, method, because)


def refuse_pruning(job: JobSpec, method: str, because: str) -> None:
    """Raise BadInput where a job lets clients prune, for a method whose client half does not."""
    if job.model.lora.prune is not None:
        raise BadInput(f"model.lora.prune: {method} {because}; leave prune out")


def of(job: JobSpec) -> Aggregation:
    """The aggregation that a job names."""
    spec = job.model.lora
    rule, scaling = RULES[job.aggregation], spec.alpha / spec.rank
    return Aggregation(rule, spec.rank, scaling, spec.client_ranks, job.seed, spec.prune)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """One rule with the numbers of a job; tensors without LoRA factors are averaged whatever it says."""

    rule: Rule
    rank: int
    """Of the server."""
    scaling: float
    """s in y = W x + s B A x, the same at every rank."""
    client_ranks: Sequence[int] | None = None
    seed: int = 0
    prune: PruneSpec | None = None

    # ---- what travels ----
    def rank_for(self, client: ClientProfile) -> int | None:
        """Rank that a client trains where job or client says so, never more than the server's; None: the server's.

        A client's own limit counts where the rule folds unequal ranks.
        """
        limit = None if self.rule.unequal else client.capabilities.max_rank
        if self.client_ranks is None:
            return limit if limit is not None and limit < self.rank else None
        rank = min(self.client_ranks[client.index % len(self.client_ranks)], self.rank)
        return rank if limit is None else min(rank, limit)

    def _present_rank(self, state: ServerState, client: ClientProfile) -> int | None:
        """What a client's rank has come to by its own pruning, or `rank_for`."""
        first, pruned = self.rank_for(client), state.facts.get(RANKS)
        left = pruned.get(client.client) if isinstance(pruned, dict) else None
        return left if isinstance(left, int) and left < (first or self.rank) else first

    def start(self, adapter: Tensors) -> ServerState:
        """The first server state; a frozen A is a group of its own."""
        if not self.rule.freezes_a:
            return ServerState(dict(adapter))
        frozen = {name: adapter[name] for name in adapter if client_side.is_a(name)}
        moving = {name: adapter[name] for name in adapter if name not in frozen}
        return ServerState(moving, shared={client_side.FROZEN: frozen})

    def plan(self, state: ServerState, client: ClientProfile) -> Plan:
        """Tensors at the client's rank, and what they stand on."""
        rank = self._present_rank(state, client)
        if rank is None:
            return Plan(payloads={**state.shared, ADAPTER: state.tensors})
        return Plan(
            payloads={**state.shared, ADAPTER: client_side.prefix(state.tensors, rank)}, settings={"rank": rank}
        )

    def uploads(self, state: ServerState, client: ClientProfile) -> Tensors:
        """What the update of a client must look like."""
        rank = self._present_rank(state, client)
        return state.tensors if rank is None else client_side.prefix(state.tensors, rank)

    def scoring(self, state: ServerState) -> Plan:
        """The server's whole adapter, whatever rank a client trains: what is scored is what is exported."""
        return Plan(EVALUATE, {**state.shared, ADAPTER: state.tensors})

    def adapter(self, state: ServerState) -> Tensors:
        """Factors and heads together."""
        frozen = state.shared.get(client_side.FROZEN)
        return {**frozen, **state.tensors} if frozen else state.tensors

    def export(self, state: ServerState) -> tuple[Tensors, Facts]:
        """An adapter that PEFT loads on the unmodified base, and the keys of its config that differ."""
        adapter = self.adapter(state)
        moved = state.shared.get(SHIFT)
        return base_delta.combined(adapter, moved, self.scaling) if moved else (adapter, {})

    # ---- folding ----
    def fold(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Fold a round's updates into the next state, and tell the round's aggregation error."""
        modules = lora_math.modules([*state.shared.get(client_side.FROZEN, {}), *state.tensors])
        received = updates if isinstance(updates, ReceivedUpdates) else ReceivedUpdates(updates)
        if not modules:
            means = {name: _mean(received, name) for name in received.names}
            return ServerState(means, state.facts, state.shared)
        folded = _Round(self, state, received)
        tensors: dict[str, Array] = {}
        moved: dict[str, Array] = {}
        for module in modules:
            part = folded.module(module)
            tensors |= {n: v for n, v in lora_math.write(module, part.factors).items() if n in received.names}
            if part.shift is not None:
                moved |= base_delta.add(state.shared.get(SHIFT, {}), module, part.shift)
        for name in received.names:
            if name not in tensors:
                tensors[name] = _mean(received, name)
        facts: dict[str, Json] = {**state.facts, "report": {"aggregation_error": folded.error()}}
        if self.rule.shifts_base:
            facts["folds"] = _folds(state) + 1
        if self.prune is not None:
            facts |= _pruned(facts, received)
        shared = {**state.shared, SHIFT: moved} if moved else state.shared
        return ServerState({name: tensors[name] for name in received.names}, facts, shared)

    def corrected(self, update: Tensors, correction: StalenessCorrection) -> Tensors:
        """A late update as it comes to the newest version, by its values or by its products."""
        return (
            CorrectedProducts(update, correction) if self.rule.late_by_products else CorrectedUpdate(update, correction)
        )

    def at_rank(self, rank: int) -> Aggregation:
        """The same for another rank of the server."""
        return replace(self, rank=rank)


def _pruned(facts: Facts, received: Iterable[ClientUpdate]) -> dict[str, Json]:
    """Note which ranks clients have come to, and report how many gave up components in this round."""
    now: dict[str, Json] = {u.client: to for u in received if isinstance(to := u.facts.get(PRUNED_TO), int) and to > 0}
    known, report = facts.get(RANKS), facts["report"]
    told = {**(report if isinstance(report, dict) else {}), "pruned": len(now)}
    return {RANKS: {**(known if isinstance(known, dict) else {}), **now}, "report": told}


class _Round:
    """The updates of one round, module by module, and the error so far."""

    def __init__(self, setting: Aggregation, state: ServerState, received: ReceivedUpdates) -> None:
        self._setting, self._received = setting, received
        self._present = state.tensors
        self._frozen = state.shared.get(client_side.FROZEN, {})
        self._moving = frozenset(lora_math.modules(state.tensors))
        self._folds = _folds(state)
        self._weights = self._norms() if setting.rule.by_norm else received.weights
        self._missed = self._size = 0.0

    def module(self, module: str) -> Folded:
        """Fold one module."""
        setting = self._setting
        seed = derive_seed(setting.seed, "factors", self._folds, module)
        factors = list(self._factors(module))
        kept = lora_math.read(self._present, module, setting.scaling) if module in self._moving else None
        target = FactorShape(setting.rank, setting.scaling, seed, kept)
        folded = setting.rule.fold(list(zip(self._weights, factors, strict=True)), target)
        self._measure(list(zip(self._received.weights, factors, strict=True)), folded.product())
        return folded

    def error(self) -> float:
        """||mean(s B A) - what was aggregated|| / ||mean(s B A)|| over all modules, in the given weights; 6 digits."""
        error = math.sqrt(self._missed / self._size) if self._size > LEAST_NORM else 0.0
        return float(f"{error:.6g}")

    def _measure(self, weighted: Weighted, aggregate: Factors) -> None:
        missed, size = lora_math.aggregation_error(normalized(weighted), aggregate)
        self._missed += missed**2
        self._size += size**2

    def _factors(self, module: str) -> Iterator[Factors]:
        for update in self._received:
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            scaling = client_side.scaling_of(update, self._setting.scaling)
            yield Factors(self._frozen[a] if a in self._frozen else update.tensors[a], update.tensors[b], scaling)

    def _norms(self) -> list[float]:
        """Norm of each client's whole update; the weights received where every update is zero."""
        squares = [0.0] * len(self._received.weights)
        for module in lora_math.modules(self._received.names):
            for place, factors in enumerate(self._factors(module)):
                squares[place] += lora_math.norm(factors) ** 2
        return [math.sqrt(square) for square in squares] if any(squares) else self._received.weights


def _mean(received: ReceivedUpdates, name: str) -> Array:
    """The weighted mean of one tensor; the others are not read."""
    weighted = zip(received.weights, received, strict=True)
    return weighted_mean((weight, {name: u.tensors[name]}) for weight, u in weighted)[name]


def _folds(state: ServerState) -> int:
    folds = state.facts.get("folds", 0)
    return folds if isinstance(folds, int) else 0
