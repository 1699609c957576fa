"""Journal and outbox: what a client has promised and not yet delivered, on its own disk.

A task is journaled before its delivery is acknowledged, a result is on the disk before it is
offered, and it stays there until the server's verdict. Every file is replaced in one step (written
beside, fsynced, renamed), so after a kill at any instruction each task is either unknown (and will
be delivered again), journaled (and is executed again from its seed), or in the outbox (and is
offered again). An embedded run dies as one process and keeps none of this (`durable=False`), and
neither does a simulated client that nobody would restart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import structlog

from lorabbit.errors import Refused
from lorabbit.protocol import codec
from lorabbit.protocol.messages import Message, Offer, Task
from lorabbit.runtime import failpoints
from lorabbit.runtime.atomic_files import replace_file

log = structlog.get_logger()
Kind = TypeVar("Kind", bound=Message)

PRIVATE_FOLDER_MODE = 0o700
_RESULT = ".safetensors"
_READ = "read"
"""The key beside the payloads' keys, which have spaces."""
CARRIED_OVER = "owed "
"""Key prefix in place of a task: bytes that failed tasks of a job have downloaded."""


class Journal:
    """Files of one client process; for its loop thread."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """Use a folder, made where it is missing."""
        self._folder = folder
        self._durable = durable
        self._tasks, self._outbox = folder / "journal", folder / "outbox"
        self._private = folder / "private"
        self._identity = folder / "identity.json"
        self._held = folder / "held.json"
        self.ledger = folder / "privacy.json"
        """File of the client's privacy ledger; never sent."""
        for part in (self._tasks, self._outbox, self._private):
            part.mkdir(parents=True, exist_ok=True)
        self._private.chmod(PRIVATE_FOLDER_MODE)

    def accept(self, task: Task) -> None:
        """Record a task before its delivery is acknowledged."""
        if self._durable:
            replace_file(self._tasks / f"{task.task}.json", codec.encode(task))

    def output(self, task: str) -> Path:
        """Where the tensors of a task's result are written and stay until `forget`."""
        return self._outbox / f"{task}{_RESULT}"

    def private(self, job: str, client: str) -> Path:
        """Folder of a client's private state for a job; never sent."""
        return self._private / job / client

    def finish(self, offer: Offer) -> None:
        """Put a result into the outbox; its tensors are on the disk already."""
        if self._durable:
            failpoints.hit(failpoints.Failpoint.RESULT_WRITTEN)
            replace_file(self._outbox / f"{offer.task}.json", codec.encode(offer))
            failpoints.hit(failpoints.Failpoint.RESULT_IN_OUTBOX)
            (self._tasks / f"{offer.task}.json").unlink(missing_ok=True)

    def forget(self, task: str) -> None:
        """Delete a task and its result: the server has stored or rejected it."""
        if self._durable:
            (self._tasks / f"{task}.json").unlink(missing_ok=True)
            (self._outbox / f"{task}.json").unlink(missing_ok=True)
        self.output(task).unlink(missing_ok=True)

    def delete_leftovers(self) -> None:
        """Delete files in the outbox that belong to no recorded result."""
        if self._durable:
            whole = {self.output(offer.task) for offer in self.results()}
            for path in self._outbox.iterdir():
                if path.suffix != ".json" and path not in whole:
                    path.unlink()

    def results(self) -> list[Offer]:
        """Results that wait for a verdict, oldest first."""
        return [offer for offer in _read(self._outbox, Offer) if self._is_complete(offer)]

    def tasks(self) -> list[Task]:
        """Tasks accepted whose result is not in the outbox, oldest first."""
        finished = {offer.task for offer in self.results()}
        return [task for task in _read(self._tasks, Task) if task.task not in finished]

    def identity(self) -> str | None:
        """The identity that the server last gave this client."""
        known = _read_json(self._identity).get("client")
        return known if isinstance(known, str) else None

    def save_identity(self, client: str) -> None:
        """Store the identity, to which the data on this machine belongs."""
        if self._durable and client != self.identity():
            replace_file(self._identity, json.dumps({"client": client}).encode())

    def held(self) -> dict[str, str]:
        """Payloads that are kept for the next task: purpose -> sha256."""
        return {key: value for key, value in _read_json(self._held).items() if isinstance(value, str)}

    def downloaded_by_task(self) -> dict[str, dict[str, int]]:
        """Downloaded bytes by unfinished task and role, and those carried over from failed tasks."""
        kept = _read_json(self._held).get(_READ)
        open_ = {task.task for task in self.tasks()}
        if not isinstance(kept, dict):
            return {}
        return {task: read for task, read in kept.items() if task in open_ or task.startswith(CARRIED_OVER)}

    def save_held(self, held: Mapping[str, str], read: Mapping[str, Mapping[str, int]]) -> None:
        """Store the list of held payloads and the counted bytes."""
        if self._durable:
            replace_file(self._held, json.dumps({**held, _READ: read}, sort_keys=True).encode())

    def _is_complete(self, offer: Offer) -> bool:
        """Tell whether a result's tensors are complete; otherwise the task is executed again."""
        if offer.payload is None:
            return True
        path = self.output(offer.task)
        if path.exists() and path.stat().st_size == offer.payload.size_bytes:
            return True
        log.warning("update-lost", task=offer.task, path=str(path))
        return False


def _read(folder: Path, kind: type[Kind]) -> Iterator[Kind]:
    """Messages of a folder, oldest first; a damaged one is left out and named."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in paths:
        try:
            message = codec.decode(kind.type_name(), path.read_bytes())
        except Refused as error:
            log.warning("journal-entry-damaged", path=str(path), why=error.detail)
            continue
        if isinstance(message, kind):
            yield message


def _read_json(path: Path) -> dict[str, object]:
    """A small JSON object; empty when it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
