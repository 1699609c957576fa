"""Plays rows: each against the undisturbed run of its job, which is played once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services import ServiceMissing

from chaos.faults import NotHere
from chaos.rows import JOBS, Row
from chaos.scene import Ground, Played, Scene

UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Verdict:
    """What a row came to."""

    row: Row
    recovery_seconds: float | None
    same_adapter: bool
    sent_twice: int
    """Bytes of updates that went up more than an undisturbed run sends."""
    differences: list[str] = field(default_factory=list)
    """What is not as it must be; empty for a row that passed."""


class Theatre:
    """Plays one row after the other on one ground; `close` it at the end."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Start the services for these rows."""
        self._ground = Ground(len(rows) + len(JOBS), sum(row.clustered for row in rows))
        self._references: dict[str, Played] = {}

    def play(self, row: Row) -> Verdict:
        """Play a row; raises AssertionError where the run does not come to its end, NotHere where it cannot begin."""
        if row.job not in self._references:
            self._references[row.job] = self._play(row.job, Row(UNDISTURBED, "", _undisturbed))
        expected, played = self._references[row.job], self._play(row.job, row)
        differences = played.outcome.differences(expected.outcome)
        sent_twice = played.sent - expected.sent
        unknown = played.sent - played.accounted
        if row.remembers and not 0 <= unknown <= (sent_twice if row.kills_broker else 0):
            differences.append(f"{played.accounted} bytes are accounted for, {played.sent} were sent")
        return Verdict(
            row,
            played.recovery_seconds,
            played.outcome.adapter == expected.outcome.adapter,
            sent_twice,
            differences,
        )

    def close(self) -> None:
        """Stop the services."""
        self._ground.close()

    def _play(self, job: str, row: Row) -> Played:
        with tempfile.TemporaryDirectory(prefix="lorabbit-chaos-") as folder:
            try:
                scene = Scene(Path(folder), self._ground, JOBS[job], clustered=row.clustered)
            except ServiceMissing as missing:
                raise NotHere(str(missing)) from missing
            try:
                row.act(scene)
                return scene.play_on()
            finally:
                scene.close()


def _undisturbed(scene: Scene) -> None:
    scene.start()
    scene.submit()
