"""The processes a test started: those of this process that were not there before.

The test run's own RabbitMQ and Redis are children of the same process, and none of a test's business.
"""

from __future__ import annotations

import psutil


class Family:
    """Children and grandchildren of this process since it was made."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))

    def members(self) -> list[psutil.Process]:
        """All of them, down to the last generation."""
        return [
            p for p in psutil.Process().children(recursive=True) if p not in self._before and not _kin(p, self._before)
        ]

    def children(self) -> list[psutil.Process]:
        """The first generation."""
        return [p for p in psutil.Process().children() if p not in self._before]


def _kin(process: psutil.Process, others: set[psutil.Process]) -> bool:
    """Tell whether a process descends from one of the others: a broker starts processes when it likes."""
    try:
        return any(parent in others for parent in process.parents())
    except psutil.NoSuchProcess:
        return True
