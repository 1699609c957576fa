"""Growth: how cost and memory change from the smallest to the largest number of clients.

Cost that grows linearly is a cost for one client that stays; memory that does not depend on the number
of clients stays too. Both ends are compared for each payload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorabbit_cli.stress.measure import Row


@dataclass(frozen=True, slots=True)
class Growth:
    """One payload, at its smallest and its largest size."""

    payload_mb: float
    clients: tuple[int, int]
    cpu_ms: tuple[float, float]
    """Processor milliseconds of all tiers for one client's round."""
    seconds_per_client: tuple[float, float]
    """Of a round's median time."""
    server_mb: tuple[float, float]

    @property
    def cpu_times(self) -> float:
        """By how much the cost of one client's round is larger at the largest size; 1 is linear growth."""
        return self.cpu_ms[1] / self.cpu_ms[0] if self.cpu_ms[0] else 0.0


def growth(rows: Sequence[Row]) -> list[Growth]:
    """Compare the ends of every payload that was measured at two sizes or more."""
    found = []
    for payload in sorted({row.payload_mb for row in rows}):
        of_it = sorted((row for row in rows if row.payload_mb == payload), key=lambda row: row.clients)
        if len(of_it) > 1:
            found.append(_between(payload, of_it[0], of_it[-1]))
    return found


def _between(payload: float, small: Row, large: Row) -> Growth:
    def cpu(row: Row) -> float:
        return sum(row.cpu_ms_per_update.values())

    return Growth(
        payload,
        (small.clients, large.clients),
        (cpu(small), cpu(large)),
        (small.round_p50 / small.clients, large.round_p50 / large.clients),
        (small.memory_mb.get("server", 0.0), large.memory_mb.get("server", 0.0)),
    )
