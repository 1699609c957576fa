"""The defense of a round: between validation and `method.aggregate`, whatever the method.

The updates are weighed in the space of `robust.geometry`, one robust update is made of them, and every client's
tensors are replaced by it, so that a method may average them as it likes. Factors of the result are the
server's own: the best approximation of its rank, balanced. No client's gauge reaches the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lorabbit.errors import RunFailed
from lorabbit.job.spec import JobSpec, RobustSpec
from lorabbit.robust.geometry import (
    CohortUpdates,
    FactorUpdates,
    Stacked,
    TensorUpdates,
    cast,
    cores,
    lora_names,
    norms,
)
from lorabbit.robust.rules import COORDINATES, ClientWeights, centre, needed, principal, weigh
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.lora_math import Factors, Matrix
from lorabbit.types import Array, ClientUpdate, Facts, Json, ServerState


def defend(job: JobSpec, state: ServerState, updates: Iterable[ClientUpdate]) -> tuple[Iterable[ClientUpdate], Facts]:
    """Return what the method may fold, and what was done, for the report; the same updates where there is no defense.

    Clients without examples, and rounds without tensors, have nothing to weigh. Raises RunFailed where too few
    clients brought an update.
    """
    spec = job.robust
    if spec is None:
        return updates, {}
    received = list(updates)
    moved = [update for update in received if update.num_examples > 0 and update.tensors]
    if not moved:
        return received, {}
    if len(moved) < needed(spec):
        raise RunFailed(f"robust.kind: {spec.kind} needs {needed(spec)} updates with examples, and {len(moved)} came")
    whole = job.aggregation == "stack"
    cohort, gram, wild = _measured(state, moved, job.model.lora.alpha / job.model.lora.rank)
    if len(cohort.received) < needed(spec):
        raise RunFailed(f"robust.kind: {spec.kind} needs {needed(spec)} updates of finite norm; {wild} have none")
    weighed = None if spec.kind in COORDINATES else weigh(spec, gram)
    made = _RobustUpdate(cohort, spec, weighed, whole=whole)
    tensors = made.tensors()
    if whole:
        only = replace(moved[0], num_examples=sum(update.num_examples for update in moved))
        return [_standing_in(only, tensors, cohort.scaling)], _told(spec, cohort, gram, weighed, wild)
    told = {**_told(spec, cohort, gram, weighed, wild), "lost": made.lost}
    return [_standing_in(update, tensors, cohort.scaling) for update in received], told


def _measured(state: ServerState, moved: list[ClientUpdate], scaling: float) -> tuple[CohortUpdates, Matrix, list[str]]:
    """The cohort and its inner products, without the clients whose product overflows, who are named."""
    with np.errstate(over="ignore", invalid="ignore"):
        cohort = CohortUpdates(state, moved, scaling)
        gram = cohort.gram()
    finite = np.isfinite(np.diag(gram))
    wild = [str(u.client) for u, good in zip(moved, finite, strict=True) if not good]
    if not wild:
        return cohort, gram, wild
    if len(wild) == len(moved):
        raise RunFailed(f"robust: no update of this round has a finite norm ({', '.join(wild)})")
    tame = CohortUpdates(state, [u for u, good in zip(moved, finite, strict=True) if good], scaling)
    return tame, tame.gram(), wild


def _standing_in(update: ClientUpdate, tensors: dict[str, Array], scaling: float) -> ClientUpdate:
    """Return a client's update with the tensors of all, and the server's scaling where it told one."""
    known: dict[str, Json] = {"scaling": scaling, "rank": max(_ranks(tensors), default=0)}
    return replace(update, tensors=tensors, facts={k: known.get(k, v) for k, v in update.facts.items()})


def _ranks(tensors: dict[str, Array]) -> list[int]:
    return [value.shape[1] for name, value in tensors.items() if name.endswith(".lora_B.weight")]


def _told(
    spec: RobustSpec, cohort: CohortUpdates, gram: Matrix, weighed: ClientWeights | None, wild: Sequence[str]
) -> dict[str, Json]:
    """What a round did to whom; norms to 6 digits."""
    names = [str(update.client) for update in cohort.received]
    lengths: dict[str, Json] = {n: float(f"{v:.6g}") for n, v in zip(names, norms(gram), strict=True)}
    told: dict[str, Json] = {"kind": spec.kind, "norms": lengths}
    if weighed is not None:
        told["clipped"] = [names[k] for k in weighed.clipped]
    left = [] if weighed is None else [names[k] for k in weighed.left_out]
    if weighed is not None or wild:
        told["left_out"] = [*left, *wild]
    return told


class _RobustUpdate:
    """One robust update, tensor by tensor."""

    def __init__(self, cohort: CohortUpdates, spec: RobustSpec, weighed: ClientWeights | None, *, whole: bool) -> None:
        self._cohort, self._spec, self._weighed, self._whole = cohort, spec, weighed, whole
        self._missed = self._size = 0.0

    @property
    def lost(self) -> float:
        """Norm of what the server's rank could not hold, over that of the robust product; 6 digits."""
        return float(f"{(self._missed / self._size) ** 0.5:.6g}") if self._size > 0 else 0.0

    def tensors(self) -> dict[str, Array]:
        """All of them, in the order and dtypes in which they came."""
        first = self._cohort.received[0].tensors
        made: dict[str, Array] = {}
        for pair in self._cohort.pairs():
            made |= self._shared_a(pair) if pair.shares_a else self._product(pair)
        for plain in self._cohort.tensors():
            made[plain.name] = cast(self._mean(plain), first[plain.name])
        rest = [name for name in self._cohort.names if name not in made]
        if rest:
            made |= weighted_mean((1.0, {n: u.tensors[n] for n in rest}) for u in self._cohort.received)
        return {name: made[name] for name in self._cohort.names}

    def _mean(self, plain: TensorUpdates) -> Matrix:
        moved: Matrix = plain.base + self._centre(plain.received - plain.base)
        return moved

    def _centre(self, moves: Stacked) -> Matrix:
        if self._weighed is None:
            return centre(self._spec, moves)
        return np.asarray(np.tensordot(self._weighed.weights, moves, axes=1), np.float64)

    def _shared_a(self, pair: FactorUpdates) -> dict[str, Array]:
        """B alone: its entries have no gauge where all share one A."""
        base, name = np.asarray(pair.base.b, np.float64), lora_names(pair.module)[1]
        moves = np.stack([f.scaling / pair.base.scaling * np.asarray(f.b, np.float64) - base for f in pair.received])
        return {name: cast(base + self._centre(moves), pair.received[0].b)}

    def _product(self, pair: FactorUpdates) -> dict[str, Array]:
        """The server's product and the robust change, as factors of the server's rank."""
        found = lora_math.stack(self._parts(pair), pair.base.scaling)
        if not self._whole:
            cut = lora_math.truncate(found, pair.base.rank)
            found, self._missed, self._size = cut.factors, self._missed + cut.lost**2, self._size + cut.norm**2
        like = pair.received[0]
        return lora_math.write(pair.module, Factors(cast(found.a, like.a), cast(found.b, like.b), found.scaling))

    def _parts(self, pair: FactorUpdates) -> Sequence[tuple[float, Factors]]:
        if self._weighed is not None:
            weights = [float(weight) for weight in self._weighed.weights]
            kept = [(weight, f) for weight, f in zip(weights, pair.received, strict=True) if weight > 0.0]
            return [(1.0 - sum(weights), pair.base), *kept]
        found = cores(pair)
        if found.left is None or found.right is None or not np.any(found.values):
            return [(1.0, pair.base)]
        left, right = principal(found.values)
        middle = centre(self._spec, left.T @ found.values @ right)
        change = Factors((found.right @ right).T, found.left @ left @ middle, 1.0)
        return [(1.0, pair.base), (1.0, change)]
