"""A server that only says what a test tells it to, and a runner that finishes when a test says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from lorabbit.broker import topology
from lorabbit.broker.base import Delivery, Outgoing
from lorabbit.broker.memory import MemoryBroker
from lorabbit.config.settings import ClientSettings
from lorabbit.job.spec import JobSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import Hello, Message, Metrics, PayloadRef, Task, Welcome
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher
from lorabbit.types import ADAPTER, TRAIN, Tensors
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.interface import OnProgress, TaskInput, TaskResult

Kind = TypeVar("Kind", bound=Message)
CHUNK_BYTES = 1024


class ScriptedRunner:
    """Keeps work until `finish`."""

    def __init__(self) -> None:
        self.work: dict[str, tuple[TaskInput, OnProgress, Callable[[TaskResult], None]]] = {}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def submit(self, work: TaskInput, on_progress: OnProgress, on_done: Callable[[TaskResult], None]) -> None:
        self.submitted.append(work.task.task)
        self.work[work.task.task] = work, on_progress, on_done

    def cancel(self, task: str) -> None:
        self.cancelled.append(task)

    def close(self) -> None:
        """Nothing to give back."""

    def finish(
        self, task: str, tensors: Tensors | None = None, *, error: str | None = None, retry_delay_seconds: float = 0.0
    ) -> None:
        """Let a task end, with tensors, with metrics alone, or with an error."""
        work, _, on_done = self.work.pop(task)
        sha256 = None if tensors is None else serialization.write_tensors(work.output, tensors)
        has_tensors = tensors is not None
        on_done(
            TaskResult(
                Metrics(num_examples=3),
                has_tensors,
                error=error,
                retry_delay_seconds=retry_delay_seconds,
                sha256=sha256,
            )
        )


class Rig:
    """A broker with a clock of the test's own, a scripted server on it, and agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = 0.0
        self.broker = MemoryBroker(clock=lambda: self.seconds)
        self.store = PayloadStore(folder / "server", durable=False)
        self.publisher = StreamPublisher(self.broker, self.store)
        self.said: list[Message] = []
        self.chunks: list[Delivery] = []
        self.welcomes = True
        self.is_declared = False

    def declare(self) -> None:
        """Become a server that is there."""
        for exchange in topology.EXCHANGES:
            self.broker.declare_exchange(exchange)
        for queue in topology.QUEUES:
            self.broker.declare_queue(queue)
        self.broker.subscribe(topology.SERVER_QUEUE.name, self._hear, prefetch=1000)
        self.broker.subscribe(topology.DATA_QUEUE.name, self._take, prefetch=1000)
        self.is_declared = True

    def _hear(self, delivery: Delivery) -> None:
        message = codec.decode(delivery.type, delivery.body)
        self.said.append(message)
        self.broker.ack(delivery)
        if isinstance(message, Hello) and self.welcomes:
            self.broker.declare_queue(topology.inbox(message.address))
            self.tell(Welcome(client=message.client or "client-7", heartbeat_seconds=5.0), address=message.address)

    def _take(self, delivery: Delivery) -> None:
        self.chunks.append(delivery)
        self.broker.ack(delivery)

    def agent(
        self,
        runner: ScriptedRunner,
        *,
        address: str = "somewhere",
        client: str | None = None,
        idle_seconds: float | None = None,
    ) -> Agent:
        """A client process on its own folder; started again, it finds what it left there."""
        settings = ClientSettings(
            folder=self.folder / address, address=address, client=client, idle_seconds=idle_seconds
        )
        agent = Agent(self.broker, runner, settings)
        agent.start()
        self.run()
        return agent

    def kill(self, agent: Agent) -> None:
        """Stop an agent as kill -9 does: nothing is said, nothing is written, its folder stays."""
        assert agent._inbox is not None
        agent._inbox.cancel()
        assert agent._registration._timer is not None
        agent._registration._timer.cancel()
        for assignment in agent._task_runs.values():
            assignment.stop()

    def tell(self, message: Message, *, address: str = "somewhere") -> None:
        """Send to a client."""
        key = topology.control_key(address)
        self.broker.send(Outgoing(topology.CONTROL, key, message.type_name(), codec.encode(message)))

    def run(self, *, seconds: float = 0.0) -> None:
        """Let everything happen that is due, then some time pass, second by second."""
        self.broker.run_until_idle()
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds = min(end, self.seconds + 1.0)
            self.broker.run_until_idle()

    def heard(self, kind: type[Kind]) -> list[Kind]:
        """What clients said, of one kind."""
        return [message for message in self.said if isinstance(message, kind)]

    def publish(self, value: float, *, size: int = 2000) -> PayloadRef:
        """Publish an adapter of several chunks."""
        ref = self.store.add_tensors({"w": np.full(size, value, np.float32)}, chunk_bytes=CHUNK_BYTES)
        self.publisher.publish(ref)
        return ref

    def task(self, name: str, *payloads: PayloadRef, epoch: int = 1, attempt: int = 1, phase: str = TRAIN) -> Task:
        """An order for client-7."""
        roles = {ADAPTER if number == 0 else f"role-{number}": ref for number, ref in enumerate(payloads)}
        return Task(
            job="job",
            task=name,
            client="client-7",
            index=6,
            population=9,
            round=1,
            attempt=attempt,
            epoch=epoch,
            phase=phase,
            seed=5,
            payloads=roles,
            settings={},
            spec=JobSpec(),
        )

    def received(self) -> str:
        """Hash of the chunks that arrived, put in order."""
        by_index = {int(chunk.headers["index"]): chunk.body for chunk in self.chunks}
        return hashlib.sha256(b"".join(by_index[index] for index in sorted(by_index))).hexdigest()
