"""Holdings: which payloads a client holds, and what a task makes it read.

A client holds what its last tasks named. It reads a payload whole, or by the shorter way that the task names where
it holds what that tells the difference to. Clients that share a shelf each keep their own list, so the bytes counted
are those of separate machines. What is held and what was counted is written in one step, so a client that is killed
within a task counts what it read before, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lorabbit.coding import Recipe
from lorabbit.messages import PayloadRef, Task, Way
from lorabbit_client.journal import OWED, Journal
from lorabbit_client.shelf import OnTaken, Shelf

CODED, ORIGIN = "coded", "origin"
"""In the place of a phase: a file that an adapter is made of, and one that it is told as a difference to."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What one task reads."""

    counted: Mapping[str, int]
    """Bytes that are not here yet, by role."""
    files: tuple[PayloadRef, ...]
    """To be taken from the shelf, whole or coded."""
    kept: tuple[str, ...]
    """To be given back to the shelf as well: what the task makes, and what it makes that of."""
    recipes: tuple[Recipe, ...]
    """How the task makes the payloads that are coded."""


class Holdings:
    """See the module's docstring; for the loop thread."""

    def __init__(self, journal: Journal, shelf: Shelf) -> None:
        """Go on from what the journal remembers."""
        self._journal, self._shelf = journal, shelf
        self._held = journal.held()
        self._counted = journal.read_by_task()
        self._coming: dict[str, Way] = {}
        """Payloads that a task is to make, by sha256."""

    def tidy(self) -> None:
        """Delete what an earlier process left on the shelf and nobody holds."""
        self._shelf.tidy(self._held.values())

    def read(self, task: Task) -> Reads:
        """Decide what a task reads, count what is not here, hold it, and put away what it replaces.

        A task that was counted before, and not forgotten, costs what it cost then.
        """
        known = set(self._held.values())
        self._coming = {sha256: way for sha256, way in self._coming.items() if not self._shelf.is_here(sha256)}
        ways = {
            ref.sha256: task.ways[ref.sha256]
            for ref in task.payloads.values()
            if ref.sha256 in task.ways and not self._shelf.has(ref.sha256) and self._is_open(task.ways[ref.sha256])
        }
        before = self._counted.get(task.task)
        counted = self._lacked(task, known, ways) if before is None else before
        owed = self._counted.pop(OWED + task.job, {})
        counted = {role: counted.get(role, 0) + owed.get(role, 0) for role in (*counted, *owed)}
        self._coming |= ways
        reads = self._reads(task, counted, ways)
        self._hold(task, counted, is_new=before is None or bool(owed))
        return reads

    def forget(self, task: str) -> None:
        """Count a task anew if it comes again; the next write takes it along."""
        self._counted = {id_: counted for id_, counted in self._counted.items() if id_ != task}

    def owe(self, task: Task) -> None:
        """Count what a task read that failed with the next one of its job."""
        counted = self._counted.get(task.task, {})
        if counted:
            self.forget(task.task)
            unpaid = {id_: read for id_, read in self._counted.items() if not id_.startswith(OWED)}
            self._counted = {**unpaid, OWED + task.job: counted}
            self._journal.remember_held(self._held, self._counted)

    def take(self, reads: Reads, on_taken: OnTaken) -> None:
        """Bring a task's files here; `on_taken` is called for each, perhaps at once."""
        for sha256 in reads.kept:
            self._shelf.expect(sha256)
        for ref in reads.files:
            self._shelf.take(ref, on_taken)

    def give(self, reads: Reads) -> None:
        """Say that a task needs its files no longer."""
        for sha256 in (*reads.kept, *(ref.sha256 for ref in reads.files)):
            self._shelf.give(sha256)

    def _lacked(self, task: Task, known: Collection[str], ways: Collection[str]) -> dict[str, int]:
        """Bytes of a task's payloads, each once, that this client neither has nor is about to make."""
        counted: dict[str, int] = {}
        seen = set[str]()
        for role, ref in task.payloads.items():
            way = task.ways.get(ref.sha256)
            is_coming = ref.sha256 in self._coming and ref.sha256 in ways
            is_here = self._shelf.is_shared or self._shelf.has(ref.sha256) or is_coming
            if not (ref.sha256 in known and is_here) and ref.sha256 not in seen:
                is_short = way is not None and self._is_short(way, known)
                counted[role] = way.coded.size_bytes if way is not None and is_short else ref.size_bytes
            seen.add(ref.sha256)
        return counted

    def _is_open(self, way: Way) -> bool:
        """Tell whether a payload can be made in this way here."""
        return way.origin is None or self._shelf.is_here(way.origin)

    def _is_short(self, way: Way, known: Collection[str]) -> bool:
        """Tell whether this client reads the coded file, or would where the shelf is shared."""
        return way.origin is None or (way.origin in known and (self._shelf.is_shared or self._is_open(way)))

    def _reads(self, task: Task, counted: Mapping[str, int], ways: Mapping[str, Way]) -> Reads:
        """Name the files of a task, each once."""
        refs = {ref.sha256: ref for ref in task.payloads.values()}
        files = {ref.sha256: ref for ref in refs.values() if ref.sha256 not in ways}
        files |= {way.coded.sha256: way.coded for way in ways.values()}
        origins = {way.origin for way in ways.values() if way.origin is not None}
        recipes = tuple(
            Recipe(
                coded=self._shelf.path(way.coded.sha256),
                origin=None if way.origin is None else self._shelf.path(way.origin),
                target=self._shelf.path(sha256),
                origin_sha256=way.origin,
                sha256=sha256,
                size_bytes=refs[sha256].size_bytes,
            )
            for sha256, way in ways.items()
        )
        return Reads(counted, tuple(files.values()), tuple({*ways, *origins}), recipes)

    def _hold(self, task: Task, counted: Mapping[str, int], *, is_new: bool) -> None:
        """Hold payloads under what they are for, and what they are made of; those of earlier jobs go."""
        before = self._held
        taken = {f"{task.job} {task.phase} {role}": ref.sha256 for role, ref in task.payloads.items()}
        for role, ref in task.payloads.items():
            way = task.ways.get(ref.sha256)
            if way is not None:
                taken[f"{task.job} {CODED} {role}"] = way.coded.sha256
            if way is not None and way.origin is not None and way.origin in before.values():
                taken[f"{task.job} {ORIGIN} {role}"] = way.origin
        self._held = {key: sha256 for key, sha256 in before.items() if key.startswith(f"{task.job} ")} | taken
        if self._held != before or (counted and is_new):
            self._counted = {**self._counted, task.task: dict(counted)} if counted else self._counted
            self._journal.remember_held(self._held, self._counted)
        for sha256 in set(before.values()) - set(self._held.values()):
            self._shelf.put_away(sha256)
