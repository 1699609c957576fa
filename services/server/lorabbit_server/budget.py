"""The privacy budget in the engine: who is asked no more, and when a job has nobody left to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import JsonValue

from lorabbit.types import ClientId
from lorabbit_server.jobstate import JobState


def retire(state: JobState, report: Mapping[str, JsonValue]) -> JobState:
    """Note the clients of which a round's report says that their budget is spent."""
    told = report.get("privacy")
    spent = told.get("spent") if isinstance(told, dict) else None
    more = {ClientId(str(client)) for client in spent} if isinstance(spent, list) else set()
    retired = more | set(state.retired)
    return replace(state, retired=tuple(client for client in state.clients if client in retired))


def within(state: JobState, asked: Sequence[int]) -> tuple[int, ...]:
    """Those of the clients to be asked whose budget bears another round; somebody else where none of them has any."""
    gone = {*state.retired, *state.aside}
    able = tuple(index for index in asked if state.clients[index] not in gone)
    return able or tuple(index for index, name in enumerate(state.clients) if name not in gone)[: len(asked)]


def is_spent(state: JobState) -> bool:
    """Tell whether no client may be asked any more."""
    return bool(state.retired) and {*state.retired, *state.aside} == set(state.clients)


def sentence(state: JobState) -> str:
    """Why a job ended before its last round; empty where it did not."""
    if not is_spent(state) or state.round >= state.spec.rounds or state.spec.privacy is None:
        return ""
    return (
        f"privacy.epsilon: after round {state.round} of {state.spec.rounds} no client may spend more of its budget of "
        f"{state.spec.privacy.epsilon}"
    )
