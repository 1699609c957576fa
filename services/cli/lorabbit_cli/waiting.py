"""Waiting: a server's waits as sentences for people, with times told from the server's own clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 10
"""Waits that `lorabbit status` shows; `lorabbit why` shows all."""
STUCK_MS = 60_000
"""Progress that is older than this is told with its age."""
MINUTE, HOUR, DAY = 60, 3600, 86_400


def sentence(wait: Mapping[str, Any], now_ms: int) -> str:
    """One wait: the reason, how far it is, when its owner was heard of, since when, until when."""
    parts = [str(wait["reason"])]
    if wait["fraction"] is not None:
        parts.append(f"{100 * wait['fraction']:.0f} % done")
    if now_ms - (wait["moved_ms"] or now_ms) >= STUCK_MS:
        parts.append(f"no progress for {span_text(now_ms - wait['moved_ms'])}")
    if wait["seen_ms"]:
        parts.append(f"last seen {span_text(now_ms - wait['seen_ms'])} ago")
    if wait["since_ms"]:
        parts.append(f"for {span_text(now_ms - wait['since_ms'])}")
    if wait["deadline_ms"] is not None:
        parts.append(f"deadline in {span_text(wait['deadline_ms'] - now_ms)}")
    return ", ".join(parts)


def shorter(found: Mapping[str, Any]) -> Iterator[str]:
    """The first waits of a status, a line each, and what the server that answered is."""
    waits = found["waits"]
    yield from (sentence(wait, found["now_ms"]) for wait in waits[:SHOWN])
    if len(waits) > SHOWN:
        yield f"and {len(waits) - SHOWN} more: lorabbit why {found['job']}"
    if waits:
        yield found["server"]


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Every wait of a status with what ends it, or why the job is over."""
    if not found["waits"]:
        reason = f": {found['reason']}" if found["reason"] else ""
        yield f"job {found['job']} is {found['status']}{reason}; it waits for nobody"
        return
    for wait in found["waits"]:
        yield sentence(wait, found["now_ms"])
        yield f"    {wait['ends']}"
    yield found["server"]


def span_text(milliseconds: int) -> str:
    """Write a span of time in the two largest units at most: 4 s, 2 min, 1 h 5 min, 3 d 2 h."""
    seconds = max(0, round(milliseconds / 1000))
    for unit, size, smaller, part in (("d", DAY, "h", HOUR), ("h", HOUR, "min", MINUTE), ("min", MINUTE, "s", 1)):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole} {unit} {rest // part} {smaller}" if rest // part else f"{whole} {unit}"
    return f"{seconds} s"
