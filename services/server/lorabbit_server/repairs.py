"""Repairs: chunks of an upload that were refused, asked for again as soon as their client has sent the others.

A client at work takes no second grant, so the asking waits for its commit; chunks and commits come through
two queues, either first. A commit is answered once, and one chunk is asked for a few times this way: whoever
sends damaged chunks for ever gets no more answers than that, and is asked again when the upload has stalled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

AT_ONCE = 3
"""So often is one chunk asked for at once."""


class Repairs:
    """See the module's docstring; of one upload, by the tasks that bring it."""

    def __init__(self) -> None:
        """Know of no refusal."""
        self._refused: dict[str, set[int]] = {}
        self._sent: set[str] = set()
        """Tasks whose clients have sent everything that they were asked for."""
        self._asked: Counter[int] = Counter()

    def refused(self, task: str, index: int) -> None:
        """Note a chunk that arrived for a task and was none."""
        self._refused.setdefault(task, set()).add(index)

    def sent(self, task: str) -> None:
        """Note that a task's client has sent everything that it was asked for."""
        self._sent.add(task)

    def granted(self, task: str) -> None:
        """Note that a client was asked for everything that is missing; one that was still sending does not hear it."""
        if task in self._sent:
            self._sent.discard(task)
            self._refused.pop(task, None)

    def take(self, task: str, missing: Collection[int]) -> list[int]:
        """Return which refused chunks to ask a task's client for now, in order; none while it may still be sending."""
        if task not in self._sent:
            return []
        refused = self._refused.pop(task, set())
        wanted = [index for index in sorted(refused.intersection(missing)) if self._asked[index] < AT_ONCE]
        if wanted:
            self._sent.discard(task)
            self._asked.update(wanted)
        return wanted
