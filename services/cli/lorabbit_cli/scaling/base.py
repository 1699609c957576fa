"""What is the same wherever clients run: up in batches, each ready before the next; down in one step.

A client that leaves is told so (SIGTERM): it finishes its task or hands it back, and says goodbye. Nothing
of a job is lost; who holds its identity next is given the task again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from lorabbit.errors import BadInput, RunFailed

Tell: TypeAlias = Callable[[str], None]
"""Takes one line of progress."""
LOOK_SECONDS = 0.5


class OverQuota(BadInput):
    """Whatever runs the clients lets no more of them start."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How a pool stands at a moment."""

    there: int
    """Clients that exist, those included that are starting or leaving."""
    ready: int
    """Clients that hold a connection to the broker, and are not leaving."""
    trouble: str = ""
    """What keeps one of them from being ready, where that is known."""

    def is_at(self, number: int) -> bool:
        """Tell whether the pool has so many clients, all ready and none leaving."""
        return self.there == self.ready == number


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """What a scaling did."""

    pool: str
    before: int
    after: int
    seconds: float


class Scaler(ABC):
    """One place where pools of clients run. Every method raises BadInput with one sentence where it may not go on."""

    @abstractmethod
    def count(self, pool: str) -> int:
        """Return how many clients a pool is meant to have."""

    @abstractmethod
    def resize(self, pool: str, number: int) -> None:
        """Say that a pool is to have so many clients; returns before they are there or gone."""

    @abstractmethod
    def status(self, pool: str) -> PoolStatus:
        """Look at a pool."""

    def watch(self, pool: str, deadline: float) -> Iterator[PoolStatus]:
        """Yield how a pool stands, now and whenever it may have changed, until `deadline` (monotonic seconds)."""
        while True:
            yield self.status(pool)
            if time.monotonic() >= deadline:
                return
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds."""


@dataclass(frozen=True, slots=True)
class RolloutPolicy:
    """How fast a pool grows."""

    batch: int = 10
    """Clients that start at once."""
    patience_seconds: float = 300.0
    """How long a batch may take until it is ready."""


def scale(scaler: Scaler, pool: str, number: int, *, pace: RolloutPolicy, tell: Tell) -> ScaleResult:
    """Bring a pool to so many clients, and wait until they are ready or gone.

    A pool that reaches a quota is put back to what it was. Raises BadInput, and RunFailed where patience ends.
    """
    start, before = time.monotonic(), scaler.count(pool)
    tell(f"{pool}: {before} clients, {number} wanted")
    try:
        for step in steps(before, number, pace.batch):
            scaler.resize(pool, step)
            _await(scaler, pool, step, pace.patience_seconds, tell)
    except OverQuota:
        scaler.resize(pool, before)
        raise
    return ScaleResult(pool, before, number, time.monotonic() - start)


def steps(before: int, number: int, batch: int) -> list[int]:
    """Return the sizes on the way: up by `batch` at most, down at once, and at least the one that is wanted."""
    return [*range(before + batch, number, batch), number]


def _await(scaler: Scaler, pool: str, number: int, patience_seconds: float, tell: Tell) -> None:
    """Wait until a pool stands at a number; raises RunFailed where that takes too long."""
    last, told = PoolStatus(0, 0), ""
    for last in scaler.watch(pool, time.monotonic() + patience_seconds):
        line = f"{pool}: {last.ready} of {number} ready"
        leaving = max(0, last.there - number)
        line += f", {leaving} leaving" if leaving else ""
        if line != told:
            tell(line)
            told = line
        if last.is_at(number):
            return
    why = f": {last.trouble}" if last.trouble else ""
    raise RunFailed(
        f"pool {pool!r}: {last.ready} of {number} clients are ready after {patience_seconds:.0f} s{why}; "
        "they may still come: lorabbit clients"
    )


def no_such_pool(pool: str, known: list[str], where: str) -> BadInput:
    """Make the error for a pool that is not there."""
    there = f"there are {', '.join(sorted(known))}" if known else "there is none"
    return BadInput(f"--pool: {where} has no pool {pool!r}; {there}")
