"""Client selection: which clients match a job, their order, and the selection for a round.

Pure: the same seed and the same facts (capabilities, numbers of tasks, speeds) give the same selection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorabbit.aggregation.aggregator import one_rank
from lorabbit.aggregation.partial_work import ClientSpeed
from lorabbit.job.spec import JobSpec, SelectionSpec
from lorabbit.methods.registry import build
from lorabbit.runtime.seeds import generator
from lorabbit.types import ClientCapabilities, ClientId

GIB = 2**30


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which ``client-2`` comes before ``client-10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def population(present: Iterable[ClientId], size: int) -> tuple[ClientId, ...]:
    """Pick a job's clients, in the order of their data partitions."""
    return tuple(sorted(present, key=natural)[:size])


@dataclass(frozen=True, slots=True)
class ClientRequirements:
    """What a job's maths asks of every client, whatever is selected."""

    rank: int | None = None
    """The rank that all must train; None where ranks may differ, or there is none."""
    whole_base: str = ""
    """Why all must hold the base model's weights unquantized; empty where they need not."""

    def unmet(self, declared: ClientCapabilities) -> ClientRequirements:
        """The part of it that a client cannot give."""
        rank = self.rank if self.rank is not None and (declared.max_rank or self.rank) < self.rank else None
        return ClientRequirements(rank, self.whole_base if declared.quantisation != "none" else "")

    def unmet_by_any(self, clients: Iterable[ClientCapabilities]) -> ClientRequirements:
        """The part of it that at least one of some clients cannot give."""
        found = [self.unmet(declared) for declared in clients]
        rank = self.rank if any(each.rank is not None for each in found) else None
        return ClientRequirements(rank, self.whole_base if any(each.whole_base for each in found) else "")


NO_REQUIREMENTS = ClientRequirements()


def requirements_of(job: JobSpec) -> ClientRequirements:
    """What a job needs of every client."""
    method = build(job)
    return ClientRequirements(None if method.personal else one_rank(job), method.needs_whole_base())


def matches(
    selection: SelectionSpec | None, declared: ClientCapabilities, needed: ClientRequirements = NO_REQUIREMENTS
) -> bool:
    """Tell whether a client is one of those that a job takes in."""
    if needed.unmet(declared) != NO_REQUIREMENTS:
        return False
    if selection is None:
        return True
    return (
        set(selection.tags) <= set(declared.tags)
        and (not selection.pools or declared.pool in selection.pools)
        and (not selection.devices or declared.device.partition(":")[0] in selection.devices)
        and (selection.memory_gib is None or declared.memory_bytes >= selection.memory_gib * GIB)
    )


def describe(selection: SelectionSpec | None, unmet: ClientRequirements = NO_REQUIREMENTS) -> str:
    """Say in words which clients a job takes in; empty where it takes any.

    `unmet` is what somebody here cannot give.
    """
    rank, why = unmet.rank, unmet.whole_base
    limits = [f"a LORABBIT_MAX_RANK of at least {rank}, the one rank of this aggregation"] if rank is not None else []
    limits += [f"LORABBIT_QUANTISATION none, since {why}"] if why else []
    return " and ".join([*_selected(selection), *limits])


def _selected(selection: SelectionSpec | None) -> list[str]:
    if selection is None:
        return []
    parts = [f"tags {', '.join(selection.tags)}"] if selection.tags else []
    parts += [f"pool {' or '.join(selection.pools)}"] if selection.pools else []
    parts += [f"device {' or '.join(selection.devices)}"] if selection.devices else []
    parts += [f"{selection.memory_gib:g} GiB of memory"] if selection.memory_gib is not None else []
    return parts


@dataclass(frozen=True, slots=True)
class ClientSampler:
    """One choice among clients, by index."""

    seed: int
    number: int
    """Of the round, or of the task where clients never wait: what makes one draw unlike the next."""
    order: str = "random"
    asked: Mapping[int, int] = field(default_factory=dict)
    speeds: Mapping[int, ClientSpeed] = field(default_factory=dict)

    def choose(self, candidates: Sequence[int], size: int) -> tuple[int, ...]:
        """Choose without replacement, ascending; the first in the draw's order, ties by chance.

        In the order `fast` a client that was never measured comes first, so that it will be.
        """
        if size >= len(candidates):
            return tuple(candidates)
        rng = generator(self.seed, "cohort", self.number)
        if self.order == "random":
            return tuple(sorted(rng.sample(candidates, max(0, size))))
        shuffled = rng.sample(candidates, len(candidates))
        return tuple(sorted(sorted(shuffled, key=self._rank)[: max(0, size)]))

    def _rank(self, index: int) -> float:
        if self.order == "fair":
            return self.asked.get(index, 0)
        return self.speeds[index].whole_ms if index in self.speeds else -1.0
