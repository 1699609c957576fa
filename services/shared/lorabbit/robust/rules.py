"""The rules: who counts, and how much of each, from inner products and coordinates alone.

With D_k the change that client k asks for, n clients, f of them hostile, each counting once:

    clip          D = 1/n sum min(1, C / ||D_k||) D_k                (Sun et al. 2019, arXiv 1911.07963)
    krum          D = the D_k with the least sum of squared distances to its n - f - 2 nearest
    multi-krum    D = the mean of the m best of krum                  (Blanchard et al. 2017, arXiv 1703.02757)
    median        D = the median of each coordinate                   (Yin et al. 2018, arXiv 1803.01498)
    trimmed-mean  D = the mean of each coordinate without its ceil(b n) largest and smallest values
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorabbit.errors import BadInput
from lorabbit.job.spec import RobustSpec
from lorabbit.robust.geometry import Stacked, norms, squared_distances
from lorabbit.tensors.lora_math import Matrix

ROUNDING = 1e-9
COORDINATES = frozenset({"median", "trimmed-mean"})
"""Kinds that look at one coordinate at a time; the others weigh whole updates."""


@dataclass(frozen=True, slots=True)
class ClientWeights:
    """How much of each client's change goes into the mean."""

    weights: NDArray[np.float64]
    clipped: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()


def needed(spec: RobustSpec) -> int:
    """Least number of clients in a round for which a kind means anything."""
    if spec.kind in {"krum", "multi-krum"}:
        return 2 * spec.attackers + 3
    if spec.kind == "trimmed-mean":
        return 3
    return 3 if spec.kind == "median" else 1


def check_size(spec: RobustSpec, clients: int) -> None:
    """Raise BadInput where a round of so many clients is too small for the job's defense."""
    if clients < needed(spec):
        why = {
            "krum": f"krum needs 2 * attackers + 3 = {needed(spec)} clients to tell {spec.attackers} from the others",
            "multi-krum": f"multi-krum needs 2 * attackers + 3 = {needed(spec)} clients",
        }.get(spec.kind, f"{spec.kind} of fewer than 3 values is no more robust than their mean")
        raise BadInput(f"robust.kind: {why}, and a round has {clients}; raise clients or cohort")
    if spec.kind == "trimmed-mean" and 2 * cut(spec, clients) >= clients:
        raise BadInput(
            f"robust.trim: {spec.trim} of {clients} clients is {cut(spec, clients)} from each end, which leaves "
            "nobody; lower it, or raise cohort"
        )
    if spec.kind == "multi-krum" and spec.keep is not None and spec.keep > clients - spec.attackers - 2:
        raise BadInput(
            f"robust.keep: {spec.keep} of {clients} clients may let an attacker in; at most cohort - attackers - 2 = "
            f"{clients - spec.attackers - 2}"
        )


def cut(spec: RobustSpec, clients: int) -> int:
    """Values that a trimmed mean cuts from each end, at least one."""
    return max(1, math.ceil(spec.trim * clients - ROUNDING))


def weigh(spec: RobustSpec, gram: Matrix) -> ClientWeights:
    """Weights of whole updates from their inner products; ties go to the lower client index."""
    clients = len(gram)
    if spec.kind == "clip":
        lengths = norms(gram)
        bound = float(np.median(lengths)) if spec.norm is None else spec.norm
        factors = np.array([1.0 if length <= bound else bound / length for length in lengths])
        return ClientWeights(factors / clients, clipped=tuple(int(k) for k in np.flatnonzero(factors < 1.0)))
    number = 1 if spec.kind == "krum" else spec.keep or clients - spec.attackers - 2
    order = np.argsort(krum_scores(gram, spec.attackers), kind="stable")
    chosen = np.sort(order[:number])
    weights = np.zeros(clients)
    weights[chosen] = 1.0 / len(chosen)
    return ClientWeights(weights, left_out=tuple(int(k) for k in np.flatnonzero(weights == 0.0)))


def krum_scores(gram: Matrix, attackers: int) -> NDArray[np.float64]:
    """Sum of squared distances of each update to its n - f - 2 nearest others."""
    distances = squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    nearest = max(1, len(gram) - attackers - 2)
    scores: NDArray[np.float64] = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
    return scores


def centre(spec: RobustSpec, values: Stacked) -> Matrix:
    """Median or trimmed mean over the first axis."""
    if spec.kind == "median":
        return np.asarray(np.median(values, axis=0), np.float64)
    off = cut(spec, len(values))
    middle = np.sort(values, axis=0)[off : len(values) - off]
    return np.asarray(middle.mean(axis=0), np.float64)


def principal(values: Stacked) -> tuple[Matrix, Matrix]:
    """Rotations of rows and columns to the axes that the updates themselves have, every client counting alike.

    Eigenvectors of sum D_k D_k^T / ||D_k||^2 and sum D_k^T D_k / ||D_k||^2: they follow from the products alone, so
    that coordinates do not depend on the gauge of anybody's factors, and no long update turns them its way.
    """
    lengths = np.sqrt(np.sum(np.square(values), axis=(1, 2)))
    moved = values[lengths > 0] / lengths[lengths > 0][:, None, None]
    left = np.linalg.eigh(np.einsum("kij,klj->il", moved, moved))[1]
    right = np.linalg.eigh(np.einsum("kij,kil->jl", moved, moved))[1]
    return left, right
