"""What a run came to: everything that nobody's death may change, and what was sent for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """A run as its report and its events tell it."""

    status: str
    adapter: str
    """sha256 of the exported adapter."""
    rounds: tuple[Any, ...]
    """Per round: number, updates accepted, sha256, metrics."""
    counted: tuple[tuple[int, str, str, str | None], ...]
    """Every result that counted: round, client, phase, sha256; each of them once."""
    bytes_down: int
    """Payload bytes that clients lacked for their tasks."""

    @classmethod
    def of(cls, report: dict[str, Any], events: Iterable[dict[str, Any]]) -> Outcome:
        """Read a finished run; fails where a result counts twice."""
        accepted = [event for event in events if event["kind"] == "update-accepted"]
        counted = [(event["round"], event["client"], event["phase"], event["sha256"]) for event in accepted]
        twice = [each for each, times in Counter(each[:3] for each in counted).items() if times > 1]
        assert not twice, f"counted more than once: {twice}"
        rows = report["rounds"]
        return cls(
            report["status"],
            report["adapter"]["sha256"],
            tuple((row["round"], row["accepted"], row["sha256"], row["metrics"]) for row in rows),
            tuple(sorted(counted, key=lambda each: each[:3])),
            sum(row["bytes_down"] for row in rows),
        )

    def differences(self, other: Outcome) -> list[str]:
        """What the other run has instead, in a few lines."""
        found = [
            f"{name}: {getattr(self, name)!r}, not {getattr(other, name)!r}"
            for name in ("status", "adapter", "bytes_down")
            if getattr(self, name) != getattr(other, name)
        ]
        rounds = [row[0] for row, theirs in zip(self.rounds, other.rounds, strict=False) if row != theirs]
        if rounds or len(self.rounds) != len(other.rounds):
            found.append(f"rounds that differ: {rounds}, of {len(self.rounds)} and {len(other.rounds)}")
        if self.counted != other.counted:
            found.append(f"results that only one of them counted: {sorted(set(self.counted) ^ set(other.counted))[:6]}")
        return found
