"""Simulated clients: real agents over real connections, whose pace and absences a trace decides.

Each has two connections, an inbox, a folder and a lease of its own, and speaks the whole protocol. What
makes it light is that it imports no learning framework, forces nothing to the disk, and shares one
training thread with the other clients of its process.

Host: a process that makes all light clients of a stress test, forked so that they share their memory.

Everything is imported once, before the first fork. The host ends, and every client with it, when its
standard input does: whoever started it may be killed and leaves no client behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import structlog

from lorabbit.broker.base import Broker, Cancellable
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.logging import configure
from lorabbit.config.settings import ClientSettings
from lorabbit.types import EVALUATE, INITIALIZE
from lorabbit_bench.stress.traces import ClientTraces, read_slowness
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.interface import OnProgress, Runner, TaskInput, TaskResult
from lorabbit_client.execution.runners import ThreadRunner
from lorabbit_client.executor import Executor

log = structlog.get_logger()


class PacedRunner:
    """A runner that waits as long as the client's device would train, or lets the client leave instead."""

    def __init__(self, runner: Runner, broker: Broker, trace: ClientTraces, client: int, left: set[int]) -> None:
        """Pace one client; `left` holds the rounds in which it has left already."""
        self._runner, self._broker, self._trace, self._client, self._left = runner, broker, trace, client, left
        self._waiting: dict[str, Cancellable] = {}
        self.on_leave: Callable[[float], None] = lambda _: None
        """Called with the seconds of an absence that begins now."""

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        """Hand work on at the trace's pace; scoring and the first model take no longer than they take."""
        task = work.task
        if task.phase in {EVALUATE, INITIALIZE}:
            self._runner.submit(work, on_progress, on_done)
            return
        step = self._trace.step(self._client, task.round)
        if step.away_seconds is not None and task.round not in self._left:
            self._left.add(task.round)
            self.on_leave(step.away_seconds)
            return
        go = partial(self._runner.submit, work, on_progress, on_done)
        if step.train_seconds:
            self._waiting[task.task] = self._broker.after(step.train_seconds, go)
        else:
            go()

    def cancel(self, task: str) -> None:
        """Stop a task, or the wait for it."""
        waiting = self._waiting.pop(task, None)
        if waiting is not None:
            waiting.cancel()
        self._runner.cancel(task)

    def close(self) -> None:
        """Do nothing: the shared runner belongs to the process."""


class SimulatedClient:
    """One client in a thread of its own, through all its absences."""

    def __init__(self, number: int, settings: ClientSettings, runner: Runner, trace: ClientTraces) -> None:
        """Prepare client `number`, counted from 0; `start` begins."""
        self._number, self._settings, self._runner, self._trace = number, settings, runner, trace
        self._left: set[int] = set()
        self._delay = 0.0
        self._stopping = threading.Event()
        self._broker: Broker | None = None
        self._thread = threading.Thread(target=self._live, name=settings.address, daemon=True)

    def start(self, after_seconds: float) -> None:
        """Connect and work in the background, in a moment: not all clients of the world are switched on at once."""
        self._delay = after_seconds
        self._thread.start()

    def stop(self) -> None:
        """Hang up; `join` waits for it."""
        self._stopping.set()
        if self._broker is not None:
            self._broker.stop()

    def join(self, seconds: float) -> None:
        """Wait until the client is gone."""
        self._thread.join(seconds)

    def _live(self) -> None:
        self._stopping.wait(self._delay)
        while not self._stopping.is_set():
            away = self._serve()
            self._stopping.wait(away)

    def _serve(self) -> float:
        """Be there until stopped or away; returns the seconds of the absence."""
        broker: Broker = RabbitBroker(self._settings.broker_url, name=f"lorabbit-client {self._settings.address}")
        self._broker = broker
        away = 0.0
        paced = PacedRunner(self._runner, broker, self._trace, self._number, self._left)
        agent = Agent(broker, paced, self._settings)

        def leave(seconds: float) -> None:
            nonlocal away
            away = seconds
            broker.stop()

        paced.on_leave = leave
        broker.post(agent.start)
        if not self._stopping.is_set():
            broker.run()
        broker.close()
        return away


STOP_SECONDS = 10.0
CLIENTS_PER_SECOND = 50
"""So many begin to connect: a fleet that is scaled up, not one that was cut off."""


@dataclass(frozen=True, slots=True)
class ClientHostConfig:
    """What a host is told: which clients, how many to a process, and their traces."""

    clients: int
    per_process: int
    folder: str
    broker_url: str
    train: str
    seed: int
    churn: float
    slow: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Read it from one line of JSON."""
        return cls(**json.loads(text))


def address_of(client: int) -> str:
    """Name a client, counted from 0, so that names sort as numbers do."""
    return f"stress-{client:05d}"


def main() -> int:
    """Fork the clients that standard input asks for, and end with it."""
    hosting = ClientHostConfig.read(sys.stdin.readline())
    configure("ERROR", "json")
    if hosting.train == "real":
        import lorabbit_client.training.workspace  # noqa: F401, PLC0415 - torch, once for all forks
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _interrupt)
        readable, writable = os.pipe()
        for first in range(0, hosting.clients, hosting.per_process):
            if os.fork() == 0:
                os.close(writable)
                _run_clients(hosting, first, readable)
        sys.stdin.read()
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _run_clients(hosting: ClientHostConfig, first: int, parent_pipe: int) -> None:
    """Hold some clients until the host's end of the pipe is closed; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trace = ClientTraces(hosting.seed, hosting.churn, read_slowness(hosting.slow))
    runner = ThreadRunner(Executor(device="cpu"), durable=False)
    clients = []
    for number in range(first, min(first + hosting.per_process, hosting.clients)):
        address = address_of(number)
        settings = ClientSettings(
            broker_url=hosting.broker_url, address=address, folder=Path(hosting.folder) / address, durable=False
        )
        clients.append(SimulatedClient(number, settings, runner, trace))
    for number, client in enumerate(clients, start=first):
        client.start(number / CLIENTS_PER_SECOND)
    waits = threading.Thread(target=os.read, args=(parent_pipe, 1), daemon=True)
    waits.start()
    waits.join()
    for client in clients:
        client.stop()
    for client in clients:
        client.join(STOP_SECONDS / len(clients))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
