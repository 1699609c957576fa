"""Nursery: the process that loads model and data once and forks the workers that share them.

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
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.jobspec import JobSpec
from lorabbit_client.execution import Cancelled, Outcome, Work
from lorabbit_client.runners import Executes, execute_and_seal

PROGRESS_SECONDS = 0.1
"""How often a worker looks at its pipe and reports while it works."""


class Warms(Executes, Protocol):
    """An executor that can load a job before it is forked."""

    def warm(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load the model and these clients' data; raises LoRAbbitError."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Nursery -> parent: everything is loaded."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Nursery -> parent: loading failed; nothing follows."""

    sentence: str
    bad_input: bool
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Born:
    """Nursery -> parent: a worker is there; the handle of its pipe follows."""

    slot: int


@dataclass(frozen=True, slots=True)
class Died:
    """Nursery -> parent: a worker ended on its own, by `-exit_code` as a signal when negative."""

    slot: int
    exit_code: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Parent -> worker: stop this task."""

    task: str


@dataclass(frozen=True, slots=True)
class Progressed:
    """Worker -> parent: how far the work is."""

    fraction: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class Stopped:
    """Worker -> parent: the work was cancelled."""


def fork() -> int:
    """Fork, without Python's warning about threads: native libraries keep some that never run our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Nursery:
    """The life of the nursery process; `run` does not return."""

    def __init__(self, control: Connection[Any, Any], executor: Warms, workers: int) -> None:
        """Report to the parent over `control`; keep `workers` alive."""
        self._control = control
        self._executor = executor
        self._workers = workers
        self._parent = os.getppid()
        self._children: dict[int, int] = {}

    def run(self, spec: JobSpec, population: int, indices: Iterable[int]) -> NoReturn:
        """Load the job, then keep the workers alive until they are no longer needed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)
        try:
            self._warm_and_watch(spec, population, indices)
        except OSError:
            self._end()  # the parent is gone, or no process can be forked
        os._exit(0)

    def _warm_and_watch(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        try:
            self._executor.warm(spec, population, indices)
        except LoRAbbitError as error:
            self._control.send(Failed(str(error), isinstance(error, BadInput)))
            return
        except Exception as error:  # noqa: BLE001 - the parent must hear of a defect, whatever it is
            sentence = f"loading the model and the data failed with {type(error).__name__}: {error}"
            self._control.send(Failed(sentence, bad_input=False, trace=traceback.format_exc()))
            return
        gc.collect()
        gc.freeze()  # a collection in a worker must not touch, and so copy, the shared pages
        self._control.send(Ready())
        for slot in range(self._workers):
            self._bear(slot)
        while self._children:
            self._reap()

    def _bear(self, slot: int) -> None:
        """Fork a worker and hand its pipe to the parent."""
        ours, theirs = Pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            ours.close()
            self._control.close()
            work_until_hung_up(theirs, self._executor)
        self._children[child] = slot
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        theirs.close()
        self._control.send(Born(slot))
        reduction.send_handle(self._control, ours.fileno(), self._parent)
        ours.close()

    def _reap(self) -> None:
        """Wait until a worker ends; replace it unless its parent hung up."""
        child, status = os.waitpid(-1, 0)
        slot = self._children.pop(child)
        exit_code = os.waitstatus_to_exitcode(status)
        if exit_code == 0:
            return
        self._control.send(Died(slot, exit_code))
        self._bear(slot)

    def _end(self, *_: object) -> NoReturn:
        """Take every worker along."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)
        os._exit(0)


def work_until_hung_up(pipe: Connection[Any, Any], executor: Executes) -> NoReturn:
    """Be a worker: execute what comes over the pipe, until its other end is closed."""
    exit_code = 0
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, Work):
                pipe.send(_execute(pipe, executor, message))
    except (EOFError, OSError):
        pass
    except BaseException:  # noqa: BLE001 - a forked child must never run its parent's clean-up
        traceback.print_exc()
        exit_code = 70
    os._exit(exit_code)


def _execute(pipe: Connection[Any, Any], executor: Executes, work: Work) -> Outcome | Stopped:
    """Execute one work, looking for a cancellation now and then."""
    due = time.monotonic() + PROGRESS_SECONDS

    def report(fraction: float, loss: float | None) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due:
            return
        due = now + PROGRESS_SECONDS
        while pipe.poll():
            if pipe.recv() == Cancel(work.task.task):
                raise Cancelled
        pipe.send(Progressed(fraction, loss))

    try:
        return execute_and_seal(executor, work, report, durable=False)
    except Cancelled:
        return Stopped()


def wait_for(child: int, seconds: float) -> bool:
    """Reap a child within some seconds; False when it is still there."""
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
