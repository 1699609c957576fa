"""Rank by round: a hold at the highest rank (heating), a fall (annealing), a hold at the lowest (cooling).

With u = t - T0 rounds into the annealing stage of n = T - T0 rounds, a = heat, b = n - cool:

    r(u) = r_max                                              u < a
           floor(r_min + (r_max - r_min) (1 - x)^3 + 1/2)     a <= u < b,  x = (u - a) / (b - a)      cubic
           r_min                                              u >= b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cubic", "geometric", "linear", "cosine", "constant", "explicit", "reverse"]


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """The rank of every round of one job; `reverse` is the cubic one run backwards, for ablations."""

    shape: Shape
    rounds: int
    """T: of the job."""
    start: int
    """T0: rounds before there is a rank."""
    highest: int
    lowest: int
    heat: int
    cool: int
    ladder: Sequence[int] = ()
    """Ranks to round up to; none: every rank is used."""
    explicit: Sequence[int] = ()
    """One rank for each round from T0 on; the last one holds."""

    def __post_init__(self) -> None:
        """Refuse what has no sense; raises ValueError."""
        if self.lowest > self.highest:
            raise ValueError(f"r_min is {self.lowest}, above r_max ({self.highest})")
        if self.shape == "explicit" and not self.explicit:
            raise ValueError("an explicit schedule needs its list of ranks")
        if self.explicit and self.shape != "explicit":
            raise ValueError(f"{self.shape!r} reads no list of ranks; leave ranks out, or set it to 'explicit'")
        if self.ladder and self.shape in {"constant", "explicit"}:
            raise ValueError(f"{self.shape!r} has no ranks to round up; leave ladder out")
        if any(not self.lowest <= rank <= self.highest for rank in self.explicit):
            raise ValueError(f"a rank of the list is not between r_min ({self.lowest}) and r_max ({self.highest})")
        if self.shape not in {"constant", "explicit"} and self.heat >= self._fall_end:
            raise ValueError(
                f"{self.heat} rounds of heating and {self.cool} of cooling leave none to fall in: "
                f"there are {self.rounds - self.start} rounds after the first {self.start}"
            )
        if self.ladder and (max(self.ladder) != self.highest or min(self.ladder) < self.lowest):
            raise ValueError(f"the ladder must lie between r_min ({self.lowest}) and r_max ({self.highest}), its top")

    @property
    def _fall_end(self) -> int:
        return self.rounds - self.start - self.cool

    def rank(self, t: int) -> int | None:
        """Rank of a 0-based round; None before `start`."""
        u = t - self.start
        if u < 0:
            return None
        if self.shape == "reverse":
            u = self.rounds - self.start - 1 - u
        if self.shape == "explicit":
            return self.explicit[min(u, len(self.explicit) - 1)]
        rank = self._smooth(max(u, 0))
        return min((step for step in self.ladder if step >= rank), default=rank)

    def _smooth(self, u: int) -> int:
        """The schedule before the ladder."""
        low, high = self.lowest, self.highest
        if self.shape == "constant" or u < self.heat:
            return high
        if u >= self._fall_end:
            return low
        x: float = (u - self.heat) / (self._fall_end - self.heat)
        if self.shape == "geometric":
            return math.floor(high * math.pow(low / high, x) + 0.5)
        share = {"linear": 1.0 - x, "cosine": 0.5 * (1.0 + math.cos(math.pi * x))}.get(self.shape, (1.0 - x) ** 3)
        return math.floor(low + (high - low) * share + 0.5)


def holds(rounds: int, heat: int | None, cool: int | None) -> tuple[int, int]:
    """Rounds of heating and of cooling: a tenth and a fifth of the stage where a job says nothing.

    A stage of fewer than four rounds has none, unless the job says so.
    """
    short = rounds < 4  # noqa: PLR2004 - one of heating, one of cooling, and two to fall in
    default_heat, default_cool = (0, 0) if short else (math.ceil(rounds / 10), math.ceil(rounds / 5))
    return (default_heat if heat is None else heat, default_cool if cool is None else cool)
