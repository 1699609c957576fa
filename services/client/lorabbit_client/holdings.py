"""Holdings: which payloads one client keeps for its next task, and what each task's payloads cost it.

Both are written in one step, so a client that is killed within a task counts what it read before, once.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorabbit.messages import Task
from lorabbit_client.journal import Journal
from lorabbit_client.shelf import Shelf


class Holdings:
    """See the module's docstring; for the loop thread."""

    def __init__(self, journal: Journal, shelf: Shelf) -> None:
        """Continue from what the journal holds."""
        self._journal, self._shelf = journal, shelf
        self._held = journal.held()
        self._read = journal.read_by_task()

    @property
    def hashes(self) -> Iterable[str]:
        """What is kept."""
        return self._held.values()

    def take(self, task: Task) -> dict[str, int]:
        """Count by role what this client lacks of a task's payloads, hold them, and put away what they replace.

        A task that was counted before, and not forgotten, costs what it cost then.
        """
        counted = self._read.get(task.task)
        before = self._held
        of_this_job = {key: sha256 for key, sha256 in before.items() if key.startswith(f"{task.job} ")}
        taken = {f"{task.job} {task.phase} {role}": ref.sha256 for role, ref in task.payloads.items()}
        read = self._lacked(task) if counted is None else counted
        self._held = {**of_this_job, **taken}
        if self._held != before or (read and counted is None):
            self._read = {**self._read, task.task: read} if read else self._read
            self._journal.remember_held(self._held, self._read)
        for sha256 in set(before.values()) - set(self._held.values()):
            self._shelf.put_away(sha256)
        return read

    def forget(self, task: str) -> None:
        """Count a task anew if it comes again; the next write takes it along."""
        self._read = {id_: read for id_, read in self._read.items() if id_ != task}

    def _lacked(self, task: Task) -> dict[str, int]:
        counted: dict[str, int] = {}
        known, seen = set(self._held.values()), set[str]()
        for role, ref in task.payloads.items():
            is_held = ref.sha256 in known and (self._shelf.is_shared or self._shelf.has(ref.sha256))
            if not is_held and ref.sha256 not in seen:
                counted[role] = ref.size_bytes
            seen.add(ref.sha256)
        return counted
