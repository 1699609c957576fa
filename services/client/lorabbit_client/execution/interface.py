"""Interfaces between the agent, which imports no torch, and training, which knows no broker.

A `Runner` executes a `TaskInput`, whose payloads are safetensors files, and returns a `TaskResult`. A `Workspace` keeps
the model and data of one job between tasks; it belongs to one process and runs one task at a time.
`LearningWorkspace`, `PersonalWorkspace` and `NullWorkspace` implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lorabbit.compression.compressor import DecodeStep
from lorabbit.protocol.messages import Metrics, Task
from lorabbit.training_session import ClientSession
from lorabbit.types import Facts, Tensors
from lorabbit_client.execution.private_state import PrivateState

OnProgress: TypeAlias = Callable[[float, float | None], None]
"""(fraction done, current loss); raises Cancelled when the task is no longer wanted."""


class Cancelled(Exception):
    """The task was cancelled while it ran."""


@dataclass(frozen=True, slots=True)
class TaskInput:
    """A task with everything it needs on disk."""

    task: Task
    inputs: Mapping[str, Path]
    """Payload role -> safetensors file."""
    output: Path
    """Where to write the result's tensors; not written when nothing but metrics returns."""
    private: Path
    """Folder of the client's private state for this job."""
    ledger: Path
    """File of the client's privacy ledger, over all jobs."""
    decode_steps: tuple[DecodeStep, ...] = ()
    """How to decode the input files that are compressed."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Result of a task; picklable."""

    metrics: Metrics
    has_tensors: bool
    base_sha256: str | None = None
    error: str | None = None
    """One sentence when the task failed; everything else is then meaningless."""
    bad_input: bool = False
    retry_delay_seconds: float = 0.0
    """Delay before a failed task is reported, so that it is not retried at once."""
    details: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    """Of the file at `TaskInput.output`; the runner computes it if the executor did not."""


class Runner(Protocol):
    """Runs work off the loop thread. Callbacks may be called from any thread: `post` them."""

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        """Queue work; work of one client runs in the order submitted."""

    def cancel(self, task: str) -> None:
        """Stop a task soon; `on_done` is not called, and its result is deleted."""

    def close(self) -> None:
        """Stop all tasks and release resources."""


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """The first adapter of a job, and facts that need the base model."""

    tensors: Tensors
    facts: Facts
    """base_parameters, adapter_parameters, rank, export, export_base, main_metric, versions, label_counts, model."""
    num_examples: int


class OperationCount(Protocol):
    """Number of operations that a task computed."""

    @property
    def flops(self) -> float:
        """Floating-point operations so far; 0 if they are not counted."""


class TaskSession(ClientSession, Protocol):
    """A session of either kind (`Session`, or `PersonalSession` for methods that are `personal`), which also counts."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def label_counts(self) -> Facts:
        """Training examples of this client by label; empty where the task has no labels."""


class Workspace(Protocol):
    """One job in one process; `evaluate` takes a session that this workspace opened."""

    @property
    def base_sha256(self) -> str | None:
        """Hash of the frozen base model; None where there is none."""

    def preload(self, population: int, indices: Iterable[int]) -> None:
        """Load everything that these clients need, so that a fork shares it."""

    def session(self, task: Task, private: PrivateState, on_progress: OnProgress) -> TaskSession:
        """Open one client's session for one task."""

    def count_flops(self) -> AbstractContextManager[OperationCount]:
        """Count the operations of what is computed inside."""

    def initialize(self, task: Task, tensors: Tensors) -> InitialAdapter:
        """Add the facts that only a client knows to the first adapter, which a method made through a session."""

    def evaluate(self, task: Task, session: Any, on_progress: OnProgress) -> Metrics:  # noqa: ANN401 - its own kind
        """Score a session's model, as a method restored it, on held-out data; `seconds` is left to the caller."""
