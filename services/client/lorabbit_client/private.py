"""A client's private state for one job: one JSON file, replaced atomically, never sent.

A task that is executed again (a crash after the state was written, before the result was journaled)
must not see its own effect. So the file keeps, beside the state after a task, the state before it,
under the task's id: the same task starts again from the state before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lorabbit.errors import LoRAbbitError
from lorabbit.types import Json

FILE = "private.json"


def read_private(folder: Path, task: str) -> dict[str, Json]:
    """Return the state that a task starts from; empty for a client's first task."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        state = kept["before"] if kept["task"] == task else kept["after"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoRAbbitError(f"private state {path} is damaged ({error}); remove the file to start afresh") from error
    return dict(state)


def write_private(folder: Path, task: str, before: dict[str, Json], after: dict[str, Json]) -> None:
    """Keep the state after a task; nothing is written while a client has no state at all."""
    path = folder / FILE
    if not after and not path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"task": task, "before": before, "after": after}, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
