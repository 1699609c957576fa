"""ForkRunner: a pool of processes that share one base model and one copy of the data.

The parent forks a fork server while it is still small and has no threads; the fork server loads model and
data once and forks the workers, which share those pages copy-on-write: a hundred clients cost one
model. A worker that dies (the kernel's out-of-memory killer, a crash in native code) fails its task
with the signal's name and is replaced. Ctrl-C reaches the parent only.

The fork server: the process that loads model and data once and forks the workers that share them.

It has one thread and does nothing but fork and reap, so a fresh worker can be forked at any time
without the hazards of forking a process that has threads. Every worker has a pipe of its own; the
parent's end is handed over the control pipe, so no other process holds it, and a worker whose
parent is gone reads the end of its pipe and exits. An exit that the pipe did not cause is reported
and the worker replaced.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import Pipe, connection, reduction
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from lorabbit.errors import BadInput, LoRAbbitError, RunFailed
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics
from lorabbit_client.execution.interface import Cancelled, OnProgress, TaskInput, TaskResult
from lorabbit_client.execution.runners import TaskExecutor, execute_and_hash

PROGRESS_SECONDS = 0.1
"""How often a worker polls its pipe and reports progress."""


class Preloadable(TaskExecutor, Protocol):
    """An executor that can load a job before it is forked."""

    def preload(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load the model and these clients' data; raises LoRAbbitError."""


@dataclass(frozen=True, slots=True)
class PreloadDone:
    """Fork server -> parent: everything is loaded."""


@dataclass(frozen=True, slots=True)
class PreloadFailed:
    """Fork server -> parent: loading failed; nothing follows."""

    sentence: str
    bad_input: bool
    trace: str = ""


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """Fork server -> parent: a worker is there; the handle of its pipe follows."""

    slot: int


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """Fork server -> parent: a worker ended on its own, by `-exit_code` as a signal when negative."""

    slot: int
    exit_code: int


@dataclass(frozen=True, slots=True)
class CancelWork:
    """Parent -> worker: stop this task."""

    task: str


@dataclass(frozen=True, slots=True)
class WorkProgressed:
    """Worker -> parent: progress of the work."""

    fraction: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class WorkCancelled:
    """Worker -> parent: the work was cancelled."""


def fork() -> int:
    """Fork, without Python's warning about threads: native libraries keep some that never run our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class ForkServer:
    """The fork server process; `run` does not return."""

    def __init__(self, control: Connection[Any, Any], executor: Preloadable, workers: int) -> None:
        """Report to the parent over `control`; keep `workers` alive."""
        self._control = control
        self._executor = executor
        self._workers = workers
        self._parent = os.getppid()
        self._children: dict[int, int] = {}

    def run(self, spec: JobSpec, population: int, indices: Iterable[int]) -> NoReturn:
        """Load the job, then keep the workers alive until they are no longer needed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._kill_workers)
        try:
            self._preload_and_watch(spec, population, indices)
        except OSError:
            self._kill_workers()  # the parent is gone, or no process can be forked
        os._exit(0)

    def _preload_and_watch(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        try:
            self._executor.preload(spec, population, indices)
        except LoRAbbitError as error:
            self._control.send(PreloadFailed(str(error), isinstance(error, BadInput)))
            return
        except Exception as error:  # noqa: BLE001 - the parent must hear of a defect, whatever it is
            sentence = f"loading the model and the data failed with {type(error).__name__}: {error}"
            self._control.send(PreloadFailed(sentence, bad_input=False, trace=traceback.format_exc()))
            return
        gc.collect()
        gc.freeze()  # a collection in a worker must not touch, and so copy, the shared pages
        self._control.send(PreloadDone())
        for slot in range(self._workers):
            self._start_worker(slot)
        while self._children:
            self._reap()

    def _start_worker(self, slot: int) -> None:
        """Fork a worker and hand its pipe to the parent."""
        ours, theirs = Pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            ours.close()
            self._control.close()
            serve_until_closed(theirs, self._executor)
        self._children[child] = slot
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        theirs.close()
        self._control.send(WorkerStarted(slot))
        reduction.send_handle(self._control, ours.fileno(), self._parent)
        ours.close()

    def _reap(self) -> None:
        """Wait until a worker ends; replace it unless its parent hung up."""
        child, status = os.waitpid(-1, 0)
        slot = self._children.pop(child)
        exit_code = os.waitstatus_to_exitcode(status)
        if exit_code == 0:
            return
        self._control.send(WorkerExited(slot, exit_code))
        self._start_worker(slot)

    def _kill_workers(self, *_: object) -> NoReturn:
        """Kill all workers and exit."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)
        os._exit(0)


def serve_until_closed(pipe: Connection[Any, Any], executor: TaskExecutor) -> NoReturn:
    """Execute the work that arrives on the pipe, until its other end is closed."""
    exit_code = 0
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, TaskInput):
                pipe.send(_execute(pipe, executor, message))
    except (EOFError, OSError):
        pass
    except BaseException:  # noqa: BLE001 - a forked child must never run its parent's clean-up
        traceback.print_exc()
        exit_code = 70
    os._exit(exit_code)


def _execute(pipe: Connection[Any, Any], executor: TaskExecutor, work: TaskInput) -> TaskResult | WorkCancelled:
    """Execute one work, and poll for a cancellation."""
    next_report = time.monotonic() + PROGRESS_SECONDS

    def report(fraction: float, loss: float | None) -> None:
        nonlocal next_report
        now = time.monotonic()
        if now < next_report:
            return
        next_report = now + PROGRESS_SECONDS
        while pipe.poll():
            if pipe.recv() == CancelWork(work.task.task):
                raise Cancelled
        pipe.send(WorkProgressed(fraction, loss))

    try:
        return execute_and_hash(executor, work, report, durable=False)
    except Cancelled:
        return WorkCancelled()


def wait_for(child: int, seconds: float) -> bool:
    """Reap a child within some seconds; False when it is still there."""
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


CLOSE_SECONDS = 5.0


@dataclass(slots=True)
class _PooledTask:
    """Work that is queued or running."""

    work: TaskInput
    on_progress: OnProgress
    on_done: Callable[[TaskResult], None]
    cancelled: bool = False

    @property
    def client(self) -> tuple[str, str]:
        """Whose work it is: one client's work is never done by two workers at once."""
        return self.work.task.job, self.work.task.client


class ForkRunner:
    """Executes in `workers` processes; `warm` first, and before this process starts any thread."""

    def __init__(self, executor: Preloadable, workers: int) -> None:
        """Fork nothing yet."""
        self._executor = executor
        self._workers = workers
        self._fork_server: int | None = None
        self._control: Connection[Any, Any] | None = None
        self._reader_thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._queue: deque[_PooledTask] = deque()
        self._pipes: dict[int, Connection[Any, Any]] = {}
        self._running: dict[int, _PooledTask] = {}
        self._stop_reason: str | None = None

    def preload(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load a job in the fork server and fork the workers; raises BadInput or RunFailed."""
        ours, theirs = Pipe()
        child = fork()
        if child == 0:
            ours.close()
            ForkServer(theirs, self._executor, self._workers).run(spec, population, indices)
        theirs.close()
        self._fork_server, self._control = child, ours
        try:
            message = ours.recv()
        except EOFError:
            message = PreloadFailed("the process that loads the model was killed (out of memory?)", bad_input=False)
        if isinstance(message, PreloadFailed):
            self.close()
            if message.bad_input:
                raise BadInput(message.sentence)
            raise RunFailed(message.sentence)
        self._reader_thread = threading.Thread(target=self._read_messages, args=(ours,), name="workers", daemon=True)
        self._reader_thread.start()

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        """Queue work; it goes to the first idle worker once its client has nothing else running."""
        queued = _PooledTask(work, on_progress, on_done)
        with self._lock:
            stop_reason = self._stop_reason
            if stop_reason is None:
                self._queue.append(queued)
                self._dispatch()
        if stop_reason is not None:
            on_done(error_result(stop_reason))

    def cancel(self, task: str) -> None:
        """Take a task from the queue, or stop it at its next progress report."""
        with self._lock:
            self._queue = deque(q for q in self._queue if q.work.task.task != task)
            for slot, queued in self._running.items():
                if queued.work.task.task == task:
                    queued.cancelled = True
                    self._send(slot, CancelWork(task))

    def close(self) -> None:
        """Stop the workers and the fork server at once; whatever they do is lost."""
        with self._lock:
            self._queue.clear()
            self._stop_reason = self._stop_reason or "the workers were stopped"
            self._running.clear()
        child, self._fork_server = self._fork_server, None
        if child is not None:
            os.kill(child, signal.SIGTERM)
            if not wait_for(child, CLOSE_SECONDS):
                os.kill(child, signal.SIGKILL)
                wait_for(child, CLOSE_SECONDS)
        if self._reader_thread is not None:
            self._reader_thread.join(CLOSE_SECONDS)
        for pipe in (*self._pipes.values(), *([self._control] if self._control else [])):
            pipe.close()

    def _dispatch(self) -> None:
        """Give queued work to idle workers; the lock is held."""
        idle = [slot for slot in self._pipes if slot not in self._running]
        busy = {queued.client for queued in self._running.values()}
        waiting: deque[_PooledTask] = deque()
        while self._queue and idle:
            queued = self._queue.popleft()
            if queued.client in busy:
                waiting.append(queued)
                continue
            slot = idle.pop(0)
            self._running[slot] = queued
            busy.add(queued.client)
            self._send(slot, queued.work)
        self._queue.extendleft(reversed(waiting))

    def _send(self, slot: int, message: object) -> None:
        """Send to a worker; a worker that has exited is handled when its exit is reported."""
        try:
            self._pipes[slot].send(message)
        except OSError:
            return

    def _read_messages(self, control: Connection[Any, Any]) -> None:
        """Receive from the workers and the fork server until the fork server is gone.

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
                    self._on_worker_event(control, control.recv())
                except (EOFError, OSError):
                    self._fail_all()
                    return

    def _receive(self, slot: int, pipe: Connection[Any, Any]) -> None:
        """Receive one message from a worker, or close its pipe at the end of file."""
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._close_pipe(slot)
        else:
            self._on_worker_message(slot, message)

    def _on_worker_event(self, control: Connection[Any, Any], message: WorkerStarted | WorkerExited) -> None:
        """Register a new worker, or fail the work of one that exited."""
        if isinstance(message, WorkerStarted):
            pipe: Connection[Any, Any] = Connection(reduction.recv_handle(control))
            with self._lock:
                self._pipes[message.slot] = pipe
                self._dispatch()
            return
        self._close_pipe(message.slot)
        with self._lock:
            queued = self._running.pop(message.slot, None)
        if queued is not None:
            queued.on_done(error_result(exit_reason(message.exit_code)))

    def _close_pipe(self, slot: int) -> None:
        """Close the pipe of a worker that has exited."""
        with self._lock:
            pipe = self._pipes.pop(slot, None)
        if pipe is not None:
            pipe.close()

    def _on_worker_message(self, slot: int, message: WorkProgressed | WorkCancelled | TaskResult) -> None:
        """Forward a worker's message; an idle worker gets its next work first."""
        with self._lock:
            queued = self._running.get(slot)
            if not isinstance(message, WorkProgressed):
                self._running.pop(slot, None)
                if queued is not None and queued.cancelled:
                    queued.work.output.unlink(missing_ok=True)  # before the next work may write there
                self._dispatch()
        if queued is None or queued.cancelled:
            return
        if isinstance(message, WorkProgressed):
            queued.on_progress(message.fraction, message.loss)
        elif isinstance(message, TaskResult):
            queued.on_done(message)

    def _fail_all(self) -> None:
        """Fail all work: the fork server is gone, and no worker will ever be replaced."""
        with self._lock:
            self._stop_reason = self._stop_reason or "the process that keeps the workers was killed (out of memory?)"
            lost = [*self._running.values(), *self._queue]
            self._running.clear()
            self._queue.clear()
        for queued in lost:
            queued.on_done(error_result(self._stop_reason))


def error_result(sentence: str) -> TaskResult:
    """Return the result of work that failed outside the executor."""
    return TaskResult(Metrics(num_examples=0), has_tensors=False, error=sentence)


def exit_reason(exit_code: int) -> str:
    """Say what ended a worker, for an operator."""
    if exit_code == -signal.SIGKILL:
        return (
            "the training process was killed by SIGKILL, most likely because memory ran out; "
            "use fewer workers, a smaller batch or a smaller model"
        )
    if exit_code < 0:
        return f"the training process was ended by {signal.Signals(-exit_code).name}, a crash in native code"
    return f"the training process ended by itself with exit code {exit_code}"
