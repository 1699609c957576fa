"""Easy first: sorted batches and how many of them a round uses.

Pacing follows competence schedules (Platanios et al., "Competence-based Curriculum Learning", NAACL 2019,
arXiv 1903.09848): a share beta of the batches in round 0, all of them after a share alpha of the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lorabbit.runtime.seeds import derive_seed
from lorabbit.types import Array

if TYPE_CHECKING:
    from lorabbit.training_session import Difficulty, Session

Pacing = Literal["linear", "sqrt", "exp", "step", "none"]
Order = Literal["easy", "hard"]
ROUNDING = 1e-9
CURRICULUM = "curriculum"
"""Private group: the difficulties of a client's examples."""


def competence(pacing: Pacing, t: int, rounds: int, *, beta: float, alpha: float) -> float:
    """Return the share of the data in 0-based round `t` of `rounds`, in (0, 1].

    With x = min(1, t / (alpha rounds)): linear beta + (1 - beta) x; sqrt the root of
    beta^2 + (1 - beta^2) x; exp beta^(1 - x); step beta until x = 1; none 1.
    """
    x = min(1.0, t / (alpha * rounds)) if alpha * rounds > 0 else 1.0
    if pacing == "none" or x >= 1.0:
        return 1.0
    if pacing == "linear":
        return beta + (1.0 - beta) * x
    if pacing == "sqrt":
        return math.sqrt(beta**2 + (1.0 - beta**2) * x)
    return beta ** (1.0 - x) if pacing == "exp" else beta


def batches_used(share: float, batches: int) -> int:
    """Return m = ceil(share M), at least one batch and at most all."""
    return max(1, min(batches, math.ceil(share * batches - ROUNDING)))


def sorted_batches(scores: Array, size: int, order: Order = "easy", *, classes: Array | None = None) -> list[list[int]]:
    """Sort examples by their scores, ties by position, and cut them into batches; the last may be short.

    With `classes`, classes take turns and each gives its own easiest example next, so that a prefix
    holds every class.
    """
    keys = np.asarray(scores, np.float64) if order == "easy" else -np.asarray(scores, np.float64)
    ranked = np.argsort(keys, kind="stable")
    if classes is not None:
        of = np.asarray(classes)[ranked]
        turn = np.zeros(len(ranked), np.int64)
        for value in np.unique(of):
            mine = of == value
            turn[mine] = np.arange(int(mine.sum()))
        ranked = ranked[np.argsort(turn, kind="stable")]
    return [[int(i) for i in ranked[start : start + size]] for start in range(0, len(ranked), size)]


def difficulties(
    session: Session, kind: Difficulty | Literal["random"], seed: int, rescore_every: int
) -> tuple[Array, bool]:
    """Return the difficulties that a client keeps, float64 (num_examples,), and whether they were measured now.

    They are measured on first use, when there are other examples, and every `rescore_every` rounds where that is not 0.
    """
    scored = session.private.get("scored")
    due = rescore_every and isinstance(scored, int) and session.round - scored >= rescore_every
    known = session.private_tensors.get(CURRICULUM, {}).get("difficulty")
    if known is not None and not due and len(known) == session.num_examples:
        return known, False
    draw = np.random.default_rng(derive_seed(seed, "difficulty", session.client.index))
    measured = None if kind == "random" else session.difficulty(kind)
    found = draw.random(session.num_examples) if measured is None else measured
    session.private_tensors[CURRICULUM] = {"difficulty": found}
    session.private["scored"] = session.round
    return found, True


def shuffled(batches: Sequence[list[int]], seed: int) -> list[list[int]]:
    """Return the batches in random order; what is in each stays."""
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


def sample(batches: Sequence[Sequence[int]], size: int, seed: int) -> list[int]:
    """Draw at most `size` of the examples in these batches, ascending."""
    used = sorted(i for batch in batches for i in batch)
    order = np.random.default_rng(seed).permutation(len(used))[:size]
    return sorted(used[i] for i in order)
