"""Listing of clients: every client that the store knows, as an operator sees it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, Field

from lorabbit.job.spec import JobSpec
from lorabbit.state.base import ClientEntry, StateStore
from lorabbit.types import EVALUATE, INITIALIZE, ClientCapabilities
from lorabbit_server.engine.client_selection import natural
from lorabbit_server.engine.state import TaskState, load_state

LEFT, LOST, IDLE = "left", "lost", "idle"
UNDECLARED = {"device": "", "dtype": "", "quantisation": ""}
"""Shown where a client's record has no such key, because an older server wrote it."""


class _ListedFirst(BaseModel):
    """The first keys of a client in the API's answer."""

    client: str
    address: str
    pool: str = ""


class ClientInfo(ClientCapabilities, _ListedFirst):
    """One client: who it is, what it declared, and what it does."""

    codings: tuple[str, ...] = Field(default=(), exclude=True)
    present: bool
    state: str
    """idle, what it does for the job under way, left (it said goodbye) or lost (it fell silent)."""
    seen_ms: int | None
    """When it was heard of last, as far as the server that answers knows."""
    expires_ms: int


def list_clients(store: StateStore, heard_ms: Mapping[str, int], *, now_ms: int, lease_ms: int) -> list[ClientInfo]:
    """Return every known client in natural order; raises StoreUnavailable.

    `heard_ms` is what this server heard itself; without it the store's leases tell, which are renewed now and then.
    """
    doing = work_under_way(store)
    entries = sorted(store.clients().values(), key=lambda entry: natural(entry.client))
    renewed = {entry.client: entry.expires_ms - lease_ms for entry in entries if entry.expires_ms > lease_ms}
    seen = {**renewed, **heard_ms}
    return [_client_info(entry, doing.get(entry.client), now_ms, seen.get(entry.client)) for entry in entries]


def work_under_way(store: StateStore) -> dict[str, str]:
    """Say in words what each client does for the job that runs; clients without a task are not named."""
    running = next((entry for entry in store.jobs().values() if entry.status == "running"), None)
    if running is None:
        return {}
    record = store.load_job(running.job)
    if record.header is None:
        return {}
    state = load_state(record.header, JobSpec.model_validate_json(running.spec), record.tasks)
    return _doing(state.tasks.values())


def _doing(tasks: Iterable[TaskState]) -> dict[str, str]:
    """Name each client's first unfinished task: what trains is told before what scores."""
    waiting = [task for task in tasks if task.status != "accepted"]
    waiting.sort(key=lambda task: (task.phase == EVALUATE, task.round))
    found: dict[str, str] = {}
    for task in waiting:
        found.setdefault(task.client, _words(task))
    return found


def _words(task: TaskState) -> str:
    if task.status == "offered":
        return f"uploads, round {task.round}"
    if task.phase == INITIALIZE:
        return "builds the model"
    return f"{'scores' if task.phase == EVALUATE else 'trains'}, round {task.round}"


def _client_info(entry: ClientEntry, doing: str | None, now_ms: int, seen_ms: int | None) -> ClientInfo:
    present = entry.expires_ms > now_ms
    absent = LOST if entry.expires_ms else LEFT
    return ClientInfo.model_validate(
        UNDECLARED
        | json.loads(entry.record)
        | {
            "client": entry.client,
            "address": entry.address,
            "present": present,
            "state": (doing or IDLE) if present else absent,
            "seen_ms": seen_ms,
            "expires_ms": entry.expires_ms,
        }
    )
