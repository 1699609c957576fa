"""Workspace: what a process keeps of one job between tasks, behind one small interface.

The executor speaks to it and knows nothing of torch; `learning` implements it over real models and
`null` over nothing at all. A workspace belongs to one process and runs one task at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from lorabbit.messages import Metrics, Task
from lorabbit.methods.base import Session
from lorabbit.types import Facts, Json, Tensors
from lorabbit_client.execution import OnProgress


@dataclass(frozen=True, slots=True)
class Initial:
    """The first adapter of a job, with what only a holder of the base model can say about it."""

    tensors: Tensors
    facts: Facts
    """base_parameters, adapter_parameters, rank, export, main_metric, versions, label_counts, model."""
    num_examples: int


class TaskSession(Session, Protocol):
    """A session that also counts, for the outcome."""

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""

    @property
    def label_counts(self) -> Facts:
        """Training examples of this client by label; empty where the task has no labels."""


class Workspace(Protocol):
    """One job in one process."""

    @property
    def base_sha256(self) -> str | None:
        """Hash of the frozen base model; None where there is none."""

    def warm(self, population: int, indices: Iterable[int]) -> None:
        """Load everything that these clients need, so that a fork shares it."""

    def initialise(self, task: Task) -> Initial:
        """Build the first adapter from the job's seed."""

    def session(self, task: Task, private: MutableMapping[str, Json], on_progress: OnProgress) -> TaskSession:
        """Open one client's session for one task."""

    def evaluate(self, task: Task, adapter: Tensors, on_progress: OnProgress) -> Metrics:
        """Score an adapter on held-out data; `seconds` is left to the caller."""
