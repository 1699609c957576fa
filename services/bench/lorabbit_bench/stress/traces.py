"""Traces: how fast each simulated client is, and when it goes away, from the seed alone.

A client's speed is drawn once, because a device stays what it is; whether it leaves in the middle of a
training is drawn for every round, as is for how long. The draws of one client do not depend on how
many others there are, so the first ten clients of a hundred behave as ten alone do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorabbit.errors import BadInput
from lorabbit.runtime.seeds import generator

LONGEST_SECONDS = 600.0
SHORTEST_AWAY, LONGEST_AWAY = 0.5, 5.0
"""Seconds that a client is away once it left."""
DISTRIBUTIONS = {
    "uniform": ("LOW", "HIGH"),
    "exponential": ("MEAN",),
    "lognormal": ("MEDIAN", "SIGMA"),
    "pareto": ("SHORTEST", "ALPHA"),
}


@dataclass(frozen=True, slots=True)
class TrainTimeDistribution:
    """Distribution of the seconds that a simulated client takes to train."""

    kind: str = "none"
    values: tuple[float, ...] = ()

    def __str__(self) -> str:
        """As it is written on the command line."""
        return ":".join((self.kind, *(f"{value:g}" for value in self.values)))


def read_slowness(text: str) -> TrainTimeDistribution:
    """Read --slow, such as lognormal:0.5:1; raises BadInput."""
    kind, *parts = text.split(":")
    if kind == "none" and not parts:
        return TrainTimeDistribution()
    names = DISTRIBUTIONS.get(kind)
    if names is None:
        raise BadInput(
            f"--slow: {kind!r} is no distribution; choose none, {', '.join(_spelled(n) for n in DISTRIBUTIONS)}"
        )
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        values = ()
    wrong = len(values) != len(names) or not all(0 < value <= LONGEST_SECONDS for value in values)
    if wrong or (kind == "uniform" and values[0] > values[1]):
        raise BadInput(f"--slow: {text!r} does not read as {_spelled(kind)} with numbers above 0, in seconds")
    return TrainTimeDistribution(kind, values)


def _spelled(kind: str) -> str:
    return ":".join((kind, *DISTRIBUTIONS[kind]))


@dataclass(frozen=True, slots=True)
class TraceStep:
    """What a client does with the training task of one round."""

    train_seconds: float
    """Waits so long before it trains: its speed."""
    away_seconds: float | None = None
    """Leaves at once without a word and comes back after so long; None: it stays."""


@dataclass(frozen=True, slots=True)
class ClientTraces:
    """All clients' behavior, from the seed."""

    seed: int
    churn: float
    slow: TrainTimeDistribution

    def train_seconds(self, client: int) -> float:
        """Seconds that one client, counted from 0, takes to train in every round."""
        dice = generator(self.seed, "stress-speed", client)
        match self.slow.kind, self.slow.values:
            case "uniform", (low, high):
                drawn = dice.uniform(low, high)
            case "exponential", (mean,):
                drawn = dice.expovariate(1 / mean)
            case "lognormal", (median, sigma):
                drawn = dice.lognormvariate(math.log(median), sigma)
            case "pareto", (shortest, alpha):
                drawn = shortest * dice.paretovariate(alpha)
            case _:
                return 0.0
        return min(LONGEST_SECONDS, drawn)

    def step(self, client: int, round_number: int) -> TraceStep:
        """What a client does in a round, counted from 1."""
        dice = generator(self.seed, "stress-churn", client, round_number)
        leaves = dice.random() < self.churn
        away = dice.uniform(SHORTEST_AWAY, LONGEST_AWAY) if leaves else None
        return TraceStep(self.train_seconds(client), away)
