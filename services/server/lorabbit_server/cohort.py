"""Who is asked: the order of the population and the sample of a round, from the job's seed alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorabbit.seeds import generator
from lorabbit.types import ClientId


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which ``client-2`` comes before ``client-10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def population(present: Iterable[ClientId], size: int) -> tuple[ClientId, ...]:
    """Pick a job's clients, in the order of their data partitions."""
    return tuple(sorted(present, key=natural)[:size])


def sample(seed: int, round_number: int, *, population_size: int, size: int) -> tuple[int, ...]:
    """Draw the client indices of a round without replacement, ascending."""
    if size >= population_size:
        return tuple(range(population_size))
    return tuple(sorted(generator(seed, "cohort", round_number).sample(range(population_size), size)))
