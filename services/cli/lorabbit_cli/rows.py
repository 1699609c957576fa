"""Rows: what the live view knows of one client, one round, and one line told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lorabbit.types import EVALUATE, INITIALISE, TRAIN

Level: TypeAlias = Literal["info", "warning", "error"]
STATES = {TRAIN: "training", EVALUATE: "evaluating", INITIALISE: "initialising"}


@dataclass(slots=True)
class ClientRow:
    """What is known of one client. `tasks` maps (phase, round) to the fraction done, None before it began."""

    client: str
    tasks: dict[tuple[str, int], float | None] = field(default_factory=dict)
    active: tuple[str, int] | None = None
    """The task that reported last."""
    lost: bool = False
    loss: float | None = None
    score: float | None = None
    examples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rejected: int = 0

    @property
    def current(self) -> tuple[str, int] | None:
        """The task at work: the one that reported last, else the oldest."""
        if self.active in self.tasks:
            return self.active
        return next(iter(self.tasks), None)

    @property
    def state(self) -> str:
        """idle, waiting, training, evaluating, initialising, lost, or the name of a method's own phase."""
        if self.lost:
            return "lost"
        current = self.current
        if current is None:
            return "idle"
        if self.tasks[current] is None and current[0] != INITIALISE:
            return "waiting"
        return STATES.get(current[0], current[0])

    @property
    def fraction(self) -> float:
        """How far the current task is, 0 without one."""
        current = self.current
        return 0.0 if current is None else self.tasks[current] or 0.0


@dataclass(slots=True)
class RoundRow:
    """What is known of one round; bytes are payload bytes."""

    number: int
    cohort: int = 0
    started_ms: int = 0
    accepted: int = 0
    rejected: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers that the method tells of the round."""
    closed: bool = False
    told: bool = False
    """Its line was written."""
    loss_sum: float = 0.0
    loss_weight: int = 0

    @property
    def train_loss(self) -> float | None:
        """Mean training loss so far, weighted by examples."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None


@dataclass(frozen=True, slots=True)
class Note:
    """A line for people; `level` is info, warning or error."""

    at_ms: int
    text: str
    level: Level = "info"
