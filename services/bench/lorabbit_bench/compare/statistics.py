"""Statistics of a comparison: spread over seeds, and what a paired difference can be.

Intervals are of level 95 %. Student's interval needs at least two seeds and takes them for the
population; the bootstrap draws seeds and, within a seed, clients, each with replacement. Neither is
corrected for the number of runs that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel
from scipy import stats

from lorabbit.runtime.seeds import derive_seed

LEVEL = 0.95
DRAWS = 4000
LEAST_CLIENTS = 5
"""With fewer clients a bootstrap over them says nothing."""


class Spread(BaseModel):
    """Values of one quantity over seeds; `sd` is the sample's (n - 1), None for one value."""

    values: list[float]
    mean: float
    sd: float | None = None


class Interval(BaseModel):
    """An estimate and the interval that holds it; `n` is how many values it stands on."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Tell whether the difference is distinguishable from none."""
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None without finite values."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)) if len(known) > 1 else None
    return Spread(values=known, mean=mean, sd=sd)


def paired_t(differences: Sequence[float]) -> Interval | None:
    """Student's interval of the mean of paired differences; None for fewer than two."""
    over = spread(differences)
    if over is None or over.sd is None:
        return None
    n = len(over.values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * over.sd / math.sqrt(n)
    return Interval(mean=over.mean, low=over.mean - half, high=over.mean + half, n=n)


def bootstrap(groups: Sequence[Sequence[float]], *, seed: int = 0, draws: int = DRAWS) -> Interval | None:
    """Percentile interval of the mean over seeds of the mean over clients.

    `groups` holds, for each seed, the paired differences of the clients. None where any seed has fewer than
    `LEAST_CLIENTS`. The same values and seed give the same interval.
    """
    if not groups or any(len(group) < LEAST_CLIENTS for group in groups):
        return None
    generator = np.random.default_rng(derive_seed(seed, "bootstrap"))
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    means = np.empty(draws, dtype=np.float64)
    for draw in range(draws):
        chosen = generator.integers(len(values), size=len(values))
        means[draw] = np.mean(
            [values[g][generator.integers(len(values[g]), size=len(values[g]))].mean() for g in chosen]
        )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = math.fsum(math.fsum(group) / len(group) for group in groups) / len(groups)
    return Interval(mean=mean, low=float(low), high=float(high), n=sum(len(group) for group in groups))
