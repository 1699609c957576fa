"""ForkRunner: a pool of processes that share one base model and one copy of the data.

The parent forks a `nursery` while it is still small and has no threads; the nursery loads model and
data once and forks the workers, which share those pages copy-on-write: a hundred clients cost one
model. A worker that dies (the kernel's out-of-memory killer, a crash in native code) fails its task
with the signal's name and is replaced. Ctrl-C reaches the parent only.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import Pipe, connection, reduction
from multiprocessing.connection import Connection
from typing import Any

from lorabbit.errors import BadInput, RunFailed
from lorabbit.jobspec import JobSpec
from lorabbit.messages import Metrics
from lorabbit_client import nursery
from lorabbit_client.execution import OnProgress, Outcome, Work

CLOSE_SECONDS = 5.0


@dataclass(slots=True)
class _Queued:
    """Work that waits for a worker, or is with one."""

    work: Work
    on_progress: OnProgress
    on_done: Callable[[Outcome], None]
    cancelled: bool = False

    @property
    def client(self) -> tuple[str, str]:
        """Whose work it is: one client's work is never done by two workers at once."""
        return self.work.task.job, self.work.task.client


class ForkRunner:
    """Executes in `workers` processes; `warm` first, and before this process starts any thread."""

    def __init__(self, executor: nursery.Warms, workers: int) -> None:
        """Fork nothing yet."""
        self._executor = executor
        self._workers = workers
        self._nursery: int | None = None
        self._control: Connection[Any, Any] | None = None
        self._pump: threading.Thread | None = None
        self._lock = threading.Lock()
        self._queue: deque[_Queued] = deque()
        self._pipes: dict[int, Connection[Any, Any]] = {}
        self._running: dict[int, _Queued] = {}
        self._gone: str | None = None

    def warm(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load a job in the nursery and fork the workers; raises BadInput or RunFailed."""
        ours, theirs = Pipe()
        child = nursery.fork()
        if child == 0:
            ours.close()
            nursery.Nursery(theirs, self._executor, self._workers).run(spec, population, indices)
        theirs.close()
        self._nursery, self._control = child, ours
        try:
            answer = ours.recv()
        except EOFError:
            answer = nursery.Failed("the process that loads the model was killed (out of memory?)", bad_input=False)
        if isinstance(answer, nursery.Failed):
            self.close()
            if answer.bad_input:
                raise BadInput(answer.sentence)
            raise RunFailed(answer.sentence)
        self._pump = threading.Thread(target=self._read, args=(ours,), name="workers", daemon=True)
        self._pump.start()

    def submit(self, work: Work, on_progress: OnProgress, on_done: Callable[[Outcome], None]) -> None:
        """Queue work; it goes to the first idle worker once its client has nothing else running."""
        queued = _Queued(work, on_progress, on_done)
        with self._lock:
            gone = self._gone
            if gone is None:
                self._queue.append(queued)
                self._hand_out()
        if gone is not None:
            on_done(failure(gone))

    def cancel(self, task: str) -> None:
        """Take a task from the queue, or stop it at its next progress report."""
        with self._lock:
            self._queue = deque(q for q in self._queue if q.work.task.task != task)
            for slot, queued in self._running.items():
                if queued.work.task.task == task:
                    queued.cancelled = True
                    self._tell(slot, nursery.Cancel(task))

    def close(self) -> None:
        """Stop the workers and the nursery at once; whatever they do is lost."""
        with self._lock:
            self._queue.clear()
            self._gone = self._gone or "the workers were stopped"
            self._running.clear()
        child, self._nursery = self._nursery, None
        if child is not None:
            os.kill(child, signal.SIGTERM)
            if not nursery.wait_for(child, CLOSE_SECONDS):
                os.kill(child, signal.SIGKILL)
                nursery.wait_for(child, CLOSE_SECONDS)
        if self._pump is not None:
            self._pump.join(CLOSE_SECONDS)
        for pipe in (*self._pipes.values(), *([self._control] if self._control else [])):
            pipe.close()

    def _hand_out(self) -> None:
        """Give queued work to idle workers; the lock is held."""
        idle = [slot for slot in self._pipes if slot not in self._running]
        busy = {queued.client for queued in self._running.values()}
        kept: deque[_Queued] = deque()
        while self._queue and idle:
            queued = self._queue.popleft()
            if queued.client in busy:
                kept.append(queued)
                continue
            slot = idle.pop(0)
            self._running[slot] = queued
            busy.add(queued.client)
            self._tell(slot, queued.work)
        self._queue.extendleft(reversed(kept))

    def _tell(self, slot: int, message: object) -> None:
        """Send to a worker; one that has just died is dealt with when its death is reported."""
        try:
            self._pipes[slot].send(message)
        except OSError:
            return

    def _read(self, control: Connection[Any, Any]) -> None:
        """Receive from the workers and the nursery until the nursery is gone.

        Workers first: what a worker said before it died counts.
        """
        while True:
            with self._lock:
                pipes = dict(self._pipes)
            ready = connection.wait([control, *pipes.values()])
            for slot, pipe in pipes.items():
                if pipe in ready:
                    self._receive(slot, pipe)
            if control in ready:
                try:
                    self._hear_of_worker(control, control.recv())
                except (EOFError, OSError):
                    self._lose_everything()
                    return

    def _receive(self, slot: int, pipe: Connection[Any, Any]) -> None:
        """Take one message from a worker, or notice that it hung up."""
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._forget(slot)
        else:
            self._hear_from(slot, message)

    def _hear_of_worker(self, control: Connection[Any, Any], message: nursery.Born | nursery.Died) -> None:
        """Take a new worker in, or fail what a dead one was doing."""
        if isinstance(message, nursery.Born):
            pipe: Connection[Any, Any] = Connection(reduction.recv_handle(control))
            with self._lock:
                self._pipes[message.slot] = pipe
                self._hand_out()
            return
        self._forget(message.slot)
        with self._lock:
            queued = self._running.pop(message.slot, None)
        if queued is not None:
            queued.on_done(failure(cause_of_death(message.exit_code)))

    def _forget(self, slot: int) -> None:
        """Close the pipe of a worker that hung up."""
        with self._lock:
            pipe = self._pipes.pop(slot, None)
        if pipe is not None:
            pipe.close()

    def _hear_from(self, slot: int, message: nursery.Progressed | nursery.Stopped | Outcome) -> None:
        """Pass a worker's message on; a finished worker gets its next work first."""
        with self._lock:
            queued = self._running.get(slot)
            if not isinstance(message, nursery.Progressed):
                self._running.pop(slot, None)
                if queued is not None and queued.cancelled:
                    queued.work.output.unlink(missing_ok=True)  # before the next work may write there
                self._hand_out()
        if queued is None or queued.cancelled:
            return
        if isinstance(message, nursery.Progressed):
            queued.on_progress(message.fraction, message.loss)
        elif isinstance(message, Outcome):
            queued.on_done(message)

    def _lose_everything(self) -> None:
        """Fail all work: the nursery is gone, and no worker will ever be replaced."""
        with self._lock:
            self._gone = self._gone or "the process that keeps the workers was killed (out of memory?)"
            lost = [*self._running.values(), *self._queue]
            self._running.clear()
            self._queue.clear()
        for queued in lost:
            queued.on_done(failure(self._gone))


def failure(sentence: str) -> Outcome:
    """The outcome of work that no executor could answer for."""
    return Outcome(Metrics(num_examples=0), has_tensors=False, error=sentence)


def cause_of_death(exit_code: int) -> str:
    """Say what ended a worker, for an operator."""
    if exit_code == -signal.SIGKILL:
        return (
            "the training process was killed by SIGKILL, most likely because memory ran out; "
            "use fewer workers, a smaller batch or a smaller model"
        )
    if exit_code < 0:
        return f"the training process was ended by {signal.Signals(-exit_code).name}, a crash in native code"
    return f"the training process ended by itself with exit code {exit_code}"
