"""Workspace: what a process keeps of one job between tasks, behind one small interface.

The executor speaks to it and knows nothing of torch; `learning` implements it over real models and
`null` over nothing at all. A workspace belongs to one process and runs one task at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from lorabbit.messages import Metrics, Task
from lorabbit.methods.session import ClientSession
from lorabbit.types import Facts, Tensors
from lorabbit_client.execution import OnProgress
from lorabbit_client.private import PrivateState


@dataclass(frozen=True, slots=True)
class Initial:
    """The first adapter of a job, with what only a holder of the base model can say about it."""

    tensors: Tensors
    facts: Facts
    """base_parameters, adapter_parameters, rank, export, export_base, main_metric, versions, label_counts, model."""
    num_examples: int


class Counted(Protocol):
    """What a task computed."""

    @property
    def flops(self) -> float:
        """Floating-point operations so far; 0 where nobody counts."""


class TaskSession(ClientSession, Protocol):
    """A session of either kind (`Session`, or `PersonalSession` for methods that are `personal`), which also counts."""

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""

    @property
    def label_counts(self) -> Facts:
        """Training examples of this client by label; empty where the task has no labels."""


class Workspace(Protocol):
    """One job in one process. A session that it opened is of its own kind and comes back to it."""

    @property
    def base_sha256(self) -> str | None:
        """Hash of the frozen base model; None where there is none."""

    def warm(self, population: int, indices: Iterable[int]) -> None:
        """Load everything that these clients need, so that a fork shares it."""

    def session(self, task: Task, private: PrivateState, on_progress: OnProgress) -> TaskSession:
        """Open one client's session for one task."""

    def counting(self) -> AbstractContextManager[Counted]:
        """Count the operations of what is computed inside."""

    def initialise(self, task: Task, tensors: Tensors) -> Initial:
        """Put beside the first adapter, which a method made through a session, what only this side knows."""

    def evaluate(self, task: Task, session: Any, on_progress: OnProgress) -> Metrics:  # noqa: ANN401 - its own kind
        """Score a session's model, as a method restored it, on held-out data; `seconds` is left to the caller."""
