"""Runners execute work outside the event loop's thread.

A service trains in one thread (`ThreadRunner`); torch releases the GIL, and the broker's socket has its own thread. An
embedded run trains in processes that share one base model (`process_pool.ForkRunner`), or, for the null model, at once
(`InlineRunner`). Before `on_done` is called, a runner computes the sha256 of the result and, if `durable`, flushes it
to the disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from lorabbit.runtime.atomic_files import sync
from lorabbit_client.execution.failures import failed_result
from lorabbit_client.execution.interface import Cancelled, OnProgress, TaskInput, TaskResult

CLOSE_SECONDS = 10.0
"""How long `close` waits for the running training to stop."""


class TaskExecutor(Protocol):
    """What a runner needs of an executor."""

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        """Do one task; raises nothing but Cancelled."""


def execute_and_hash(executor: TaskExecutor, work: TaskInput, on_progress: OnProgress, *, durable: bool) -> TaskResult:
    """Execute work and take its result's sha256; whatever fails fails the task. Raises Cancelled and nothing else."""
    try:
        return _with_sha256(executor.execute(work, on_progress), work, durable=durable)
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - a full disk or memory must fail the task, not the thread
        return failed_result(work, error)


def _with_sha256(outcome: TaskResult, work: TaskInput, *, durable: bool) -> TaskResult:
    """Force a result to disk and take its sha256; raises OSError."""
    if outcome.error is not None or not outcome.has_tensors:
        return outcome
    if durable:
        sync(work.output)
        sync(work.output.parent)
    if outcome.sha256 is not None:
        return outcome
    with work.output.open("rb") as file:
        return replace(outcome, sha256=hashlib.file_digest(file, "sha256").hexdigest())


class InlineRunner:
    """Executes at once, in the caller's thread: for work that takes less time than a handover."""

    def __init__(self, executor: TaskExecutor) -> None:
        """Run everything on `executor`."""
        self._executor = executor

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        """Execute now; `on_done` is called before this returns."""
        on_done(execute_and_hash(self._executor, work, on_progress, durable=False))

    def cancel(self, task: str) -> None:
        """Do nothing: submitted work has already ended."""

    def close(self) -> None:
        """Do nothing: it holds nothing."""


@dataclass(frozen=True, slots=True)
class _QueuedTask:
    """Work that is queued or running."""

    work: TaskInput
    on_progress: OnProgress
    on_done: Callable[[TaskResult], None]
    cancelled: threading.Event


class ThreadRunner:
    """Executes in one thread, in the order submitted."""

    def __init__(self, executor: TaskExecutor, *, durable: bool = True) -> None:
        """Run everything on `executor`; the thread starts with the first work."""
        self._executor = executor
        self._durable = durable
        self._queue: deque[_QueuedTask] = deque()
        self._running: _QueuedTask | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        """Queue work; it fails at once where no thread can be started, and the next work tries again."""
        try:
            with self._changed:
                self._start()
                self._queue.append(_QueuedTask(work, on_progress, on_done, threading.Event()))
                self._changed.notify()
        except (RuntimeError, MemoryError) as error:
            on_done(failed_result(work, error))

    def cancel(self, task: str) -> None:
        """Take a task from the queue, or stop it at its next progress report."""
        with self._changed:
            for queued in (*self._queue, *([self._running] if self._running else [])):
                if queued.work.task.task == task:
                    queued.cancelled.set()

    def close(self) -> None:
        """Stop what runs at its next progress report, and the thread with it."""
        with self._changed:
            self._closed = True
            for queued in (*self._queue, *([self._running] if self._running else [])):
                queued.cancelled.set()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _start(self) -> None:
        """Start the thread with the first work; raises RuntimeError if the system cannot start one."""
        if self._thread is None:
            thread = threading.Thread(target=self._loop, name="training", daemon=True)
            thread.start()
            self._thread = thread

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                self._running = queued = self._queue.popleft()
            self._execute(queued)

    def _execute(self, queued: _QueuedTask) -> None:
        """Execute one work unless it is cancelled before or meanwhile."""

        def report(fraction: float, loss: float | None) -> None:
            if queued.cancelled.is_set():
                raise Cancelled
            queued.on_progress(fraction, loss)

        if queued.cancelled.is_set():
            return
        try:
            outcome = execute_and_hash(self._executor, queued.work, report, durable=self._durable)
        except Cancelled:
            return
        if queued.cancelled.is_set():
            queued.work.output.unlink(missing_ok=True)
        else:
            queued.on_done(outcome)
