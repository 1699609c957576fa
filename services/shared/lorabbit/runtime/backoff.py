"""Full-jitter backoff: how long to wait before the next try, so that many clients do not try together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_JITTER = random.Random()  # noqa: S311 - spreads load, keeps no secret
"""A generator of its own: a wait in another thread takes no number from a training's `random`."""


@dataclass(slots=True)
class Backoff:
    """Waits that are uniform between nothing and a bound that doubles from `first_seconds` to `longest_seconds`."""

    first_seconds: float
    longest_seconds: float
    _tries: int = 0

    def next_seconds(self) -> float:
        """How long to wait this time."""
        bound = min(self.longest_seconds, self.first_seconds * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return _JITTER.uniform(0.0, bound)

    def reset(self) -> None:
        """Start over after a success."""
        self._tries = 0


def shuffled(hosts: Sequence[str]) -> list[str]:
    """The hosts in an order drawn anew, so that many clients do not try the same one first."""
    return _JITTER.sample(hosts, len(hosts))
