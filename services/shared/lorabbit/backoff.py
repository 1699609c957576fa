"""Full-jitter backoff: how long to wait before the next try, so that many clients do not try together."""

from __future__ import annotations

import random
from dataclasses import dataclass


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
        return random.uniform(0.0, bound)  # noqa: S311 - spreads load, keeps no secret

    def reset(self) -> None:
        """Start over after a success."""
        self._tries = 0
