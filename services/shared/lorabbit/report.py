"""Report: the contract of `report.json`, and the fold that makes it from a job's event log.

The server writes it after every round, so a report exists however a job ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from lorabbit import events as ev


class Part(BaseModel):
    """Base of every part of a report; `update` by assignment while folding."""

    model_config = ConfigDict(extra="forbid")


class ClientRound(Part):
    """One client's work in one round. `metrics` score the adapter of this round on its test split."""

    client: str
    num_examples: int
    loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    overhead_up: int = 0
    overhead_down: int = 0


class Round(Part):
    """One round; bytes are payload bytes over all its clients, evaluation included."""

    round: int
    cohort: list[str]
    accepted: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    overhead_up: int = 0
    overhead_down: int = 0
    seconds: float = 0.0
    aggregate_seconds: float = 0.0
    train_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    per_client: list[ClientRound] = Field(default_factory=list)
    sha256: str | None = None


class Final(Part):
    """The last adapter's scores."""

    metrics: dict[str, float] = Field(default_factory=dict)


class Best(Part):
    """The round whose adapter scored best on the job's main metric."""

    round: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)


class AdapterFacts(Part):
    """The exported adapter."""

    sha256: str = ""
    bytes: int = 0
    parameters: int = 0
    rank: int | None = None


class BaseFacts(Part):
    """The frozen base model."""

    parameters: int = 0
    sha256: str | None = None


class Report(Part):
    """One run, whole."""

    job: str
    status: Literal["running", "done", "failed", "cancelled"] = "running"
    reason: str = ""
    method: dict[str, JsonValue] = Field(default_factory=dict)
    seed: int = 0
    main_metric: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    clients: list[str] = Field(default_factory=list)
    label_counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    """client -> label -> training examples, where the task has labels."""
    seconds: float = 0.0
    rounds: list[Round] = Field(default_factory=list)
    final: Final = Field(default_factory=Final)
    best: Best = Field(default_factory=Best)
    adapter: AdapterFacts = Field(default_factory=AdapterFacts)
    base: BaseFacts = Field(default_factory=BaseFacts)


def fold(report: Report, events: Iterable[ev.AnyEvent]) -> Report:
    """Fold events, in order, into a report; returns the same object."""
    raise NotImplementedError
