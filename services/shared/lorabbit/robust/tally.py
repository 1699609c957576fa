"""Counting, over a run, what a defence did to each client."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

COUNTED = ("clipped", "left_out")


def count(counts: dict[str, dict[str, int]], facts: Mapping[str, JsonValue]) -> None:
    """Add one round's `robust` facts to counts by client and by what happened."""
    told = facts.get("robust")
    if not isinstance(told, dict):
        return
    for what in COUNTED:
        clients = told.get(what)
        for client in clients if isinstance(clients, list) else ():
            mine = counts.setdefault(str(client), {})
            mine[what] = mine.get(what, 0) + 1
