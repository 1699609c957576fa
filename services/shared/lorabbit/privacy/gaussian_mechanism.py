"""Client-level privacy: the Gaussian mechanism on the mean of a round's updates (DP-FedAvg).

McMahan et al., Learning Differentially Private Recurrent Language Models, 2018, arXiv 1710.06963:

    d_k = (x_k - x) min(1, C / ||x_k - x||)          over every tensor that travels, as it travels
    x  <- x + (1/m) (sum d_k + N(0, sigma^2 C^2 I))

One client more or less moves the sum by at most C. Every client counts once: numbers of examples are data too.
The method then sees m updates with the same noisy tensors; whatever it makes of them is post-processing.

Gaussian noise from the operating system's random bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lorabbit.errors import Refused
from lorabbit.job.spec import JobSpec, PrivacySpec
from lorabbit.privacy.accountant import epsilon_of_rounds
from lorabbit.runtime.seeds import derive_seed
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.tensors.lora_math import Matrix
from lorabbit.types import Array, ClientUpdate, Facts, Json, ServerState

SUMMED = 4
"""Draws that are added for one value, so that nobody can tell it from the gaps between floats (arXiv 2107.10138)."""
_BITS = 53


def normal(shape: tuple[int, ...], deviation: float, seed: int | None = None) -> Matrix:
    """Draw independent N(0, deviation^2) values, float64.

    Without a seed every bit comes from the operating system's generator, as privacy needs it. With a seed the values
    are the same every time and give no privacy at all.
    """
    if seed is not None:
        return deviation * np.random.default_rng(seed).standard_normal(shape)
    count = math.prod(shape)
    total = np.zeros(count)
    for _ in range(SUMMED):
        total += _box_muller(count)
    return (deviation / math.sqrt(SUMMED) * total).reshape(shape)


def _box_muller(count: int) -> Matrix:
    """Standard normal values from uniform ones."""
    raw = np.frombuffer(os.urandom(16 * count), dtype="<u8").reshape(2, count) >> (64 - _BITS)
    first, second = (raw + 0.5) * 2.0**-_BITS
    values: Matrix = np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * math.pi * second)
    return values


PARTICIPATED = "participated"
"""The fact of a server state that counts, by client, the rounds whose mean it was in."""


def protect(job: JobSpec, state: ServerState, updates: Iterable[ClientUpdate]) -> Iterable[ClientUpdate]:
    """Return the updates with the tensors of their noisy mean; the same updates where the job wants none."""
    spec = job.privacy
    if spec is None or spec.level != "client":
        return updates
    received = list(updates)
    names = received[0].tensors.keys()
    if any(u.tensors.keys() != names for u in received) or any(name not in state.tensors for name in names):
        raise Refused("names", "updates of one round hold different tensors")
    shares = [min(1.0, spec.clip / length) if length > 0.0 else 1.0 for length in _norms(state, received)]
    tensors = {name: _noisy(job, spec, state, received, shares, name) for name in names}
    return [replace(update, tensors=tensors) for update in received]


def _norms(state: ServerState, received: Sequence[ClientUpdate]) -> list[float]:
    """Norm of what each client would change; a change too long for a float counts as infinite."""
    found = []
    for update in received:
        squares = 0.0
        for name in update.tensors:
            if is_floating(state.tensors[name]):
                squares += float(np.sum(np.square(_change(state, update, name))))
        found.append(math.sqrt(squares))
    return found


def _change(state: ServerState, update: ClientUpdate, name: str) -> Matrix:
    difference: Matrix = np.asarray(update.tensors[name], np.float64) - np.asarray(state.tensors[name], np.float64)
    return difference


def _noisy(  # noqa: PLR0913, PLR0917 - one tensor of one round
    job: JobSpec,
    spec: PrivacySpec,
    state: ServerState,
    received: Sequence[ClientUpdate],
    shares: Sequence[float],
    name: str,
) -> Array:
    """One tensor of the noisy mean; what is no real number stays the server's."""
    base = state.tensors[name]
    if not is_floating(base):
        return base
    total = np.zeros(base.shape)
    for update, share in zip(received, shares, strict=True):
        total += share * _change(state, update, name)
    seed = derive_seed(job.seed, "privacy", _rounds(state), name) if spec.seeded else None
    total += normal(base.shape, spec.noise * spec.clip, seed)
    noisy: Array = (np.asarray(base, np.float64) + total / len(received)).astype(base.dtype)
    return noisy


def _rounds(state: ServerState) -> int:
    return sum(_participated(state).values())


def _participated(state: ServerState) -> dict[str, int]:
    told = state.facts.get(PARTICIPATED)
    return {k: v for k, v in told.items() if isinstance(v, int)} if isinstance(told, dict) else {}


def spending(job: JobSpec, state: ServerState, updates: Iterable[ClientUpdate]) -> tuple[Facts, Facts]:
    """Return facts for the next server state, and what the report tells: epsilon by client, and who has no more.

    At the level of examples both come from the clients, who alone know their numbers of examples.
    """
    spec = job.privacy
    if spec is None:
        return {}, {}
    if spec.level == "example":
        claims = {str(u.client): u.facts.get("privacy") for u in updates}
        told = {client: claim for client, claim in claims.items() if isinstance(claim, dict)}
        spent = {client: claim.get("epsilon") for client, claim in told.items()}
        return {}, _told(spec, spent, [client for client, claim in told.items() if claim.get("spent") is True])
    counts = _participated(state)
    for update in updates:
        counts[str(update.client)] = counts.get(str(update.client), 0) + 1
    epsilons = {client: epsilon_of_rounds(spec.noise, rounds, spec.delta) for client, rounds in counts.items()}
    over = [c for c, n in counts.items() if _exceeds(spec, epsilon_of_rounds(spec.noise, n + 1, spec.delta))]
    return {PARTICIPATED: dict(counts)}, _told(spec, {c: float(f"{e:.6g}") for c, e in epsilons.items()}, over)


def _exceeds(spec: PrivacySpec, epsilon: float) -> bool:
    return spec.epsilon is not None and epsilon > spec.epsilon


def _told(spec: PrivacySpec, epsilons: Mapping[str, Json], spent: Sequence[str]) -> Facts:
    return {"level": spec.level, "delta": spec.delta, "epsilon": dict(epsilons), "spent": list(spent)}
