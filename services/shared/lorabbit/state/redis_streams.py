"""Redis streams as events with cursors: the log and the passing progress, read as one.

A cursor is the last id read of either stream, so a reader that comes back misses nothing of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorabbit.state.base import START, LoggedEvent
from lorabbit.state.lua_scripts import text_of

PROGRESS = "progress"
"""Last part of the key of a job's passing news."""


def merge(found: Any, after: str) -> list[LoggedEvent]:  # noqa: ANN401 - redis-py's answer
    """Bring what was read of the log and of the progress into one order, each event with the cursor behind it."""
    read = found.items() if isinstance(found, dict) else found
    rows: list[tuple[tuple[int, int], int, str, str]] = []
    for name, answer in read:
        nested = isinstance(found, dict)  # RESP3
        listed = (answer[0] if answer else []) if nested else answer
        place = 1 if text_of(name).endswith(PROGRESS) else 0
        rows.extend((_order(entry), place, entry, event) for entry, event in entries(listed))
    cursor = list(positions(after))
    logged = []
    for _, place, entry, event in sorted(rows):
        cursor[place] = entry
        logged.append(LoggedEvent("_".join(cursor), event))
    return logged


def entries(listed: Iterable[Any]) -> list[tuple[str, str]]:
    """(id, text) of stream entries, which hold one field each."""
    return [(text_of(entry), text_of(next(iter(fields.values())))) for entry, fields in listed]


def positions(cursor: str) -> tuple[str, str]:
    """Split a cursor into its places in the log and in the progress."""
    log, _, progress = cursor.partition("_")
    return log or START, progress or START


def _order(entry: str) -> tuple[int, int]:
    """A stream id as numbers."""
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)
