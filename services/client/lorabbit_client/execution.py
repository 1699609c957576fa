"""Execute one task: files in, a file and an outcome out.

This is the seam between the protocol (`agent`, which never sees torch) and the learning (which
never sees a broker). A task's payloads arrive as safetensors files and its result leaves as one, so
the same function serves a training thread in a service and a pool of processes in an embedded run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from lorabbit.coding import Recipe
from lorabbit.messages import Metrics, Task

OnProgress: TypeAlias = Callable[[float, float | None], None]
"""(fraction done, current loss); raises Cancelled when the task is no longer wanted."""


class Cancelled(Exception):
    """The task was cancelled while it ran."""


@dataclass(frozen=True, slots=True)
class Work:
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
    recipes: tuple[Recipe, ...] = ()
    """How to make the input files that came coded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task; picklable."""

    metrics: Metrics
    has_tensors: bool
    base_sha256: str | None = None
    error: str | None = None
    """One sentence when the task failed; everything else is then meaningless."""
    bad_input: bool = False
    rest_seconds: float = 0.0
    """So long has a failed task better not be asked again."""
    details: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    """Of the file at `Work.output`; a runner fills it in, off the loop thread, where the executor did not."""


class Runner(Protocol):
    """Runs work off the loop thread. Callbacks may be called from any thread: `post` them."""

    def submit(self, work: Work, on_progress: OnProgress, on_done: Callable[[Outcome], None]) -> None:
        """Queue work; work of one client runs in the order submitted."""

    def cancel(self, task: str) -> None:
        """Stop a task soon; its `on_done` is not called, and no result of it stays, though it had just been written."""

    def close(self) -> None:
        """Stop everything and give back what it holds."""
