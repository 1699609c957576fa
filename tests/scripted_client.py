"""A client that speaks the protocol and learns nothing: its update is the adapter plus its index + 1.

With the adapter zero at first and equal numbers of examples, one round over all of `n` clients moves every
value by the mean of 1 ... n, so every sum in a test can be done on paper.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, Outgoing
from lorabbit.protocol import codec
from lorabbit.protocol.messages import (
    Alive,
    Commit,
    Deny,
    Goodbye,
    Grant,
    Hello,
    Message,
    Metrics,
    Offer,
    Task,
    TaskAccepted,
    TaskProgress,
    Verdict,
    Welcome,
)
from lorabbit.tensors import serialization
from lorabbit.transfer.chunked_transfer import ChunkSender, StreamReader
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE, Tensors

SHAPES = {"a": (4, 3), "b": (3,)}
BASE = "ba5e" * 16


class ScriptedClient:
    """Answers every task at once; `answer` may replace what it answers to one."""

    def __init__(self, broker: Broker, address: str, folder: Path, *, client: str | None = None) -> None:
        self.broker, self.address, self.wanted = broker, address, client
        self.store = PayloadStore(folder / address, durable=False)
        self.client: str | None = None
        self.tasks: list[Task] = []
        self.verdicts: list[Verdict | Deny] = []
        self.offers: dict[str, Offer] = {}
        self.work: Callable[[ScriptedClient, Task], bool] = lambda _client, _task: False
        """Return True to do nothing more about a task."""
        self.on_grant: Callable[[ScriptedClient, Grant], bool] = lambda _client, _grant: False
        """Return True to send nothing."""
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self.stutter = 1
        """How often everything is said."""
        self.examples = 10
        self.base_sha256 = BASE
        self.declared: dict[str, Any] = {}
        """What it says of itself beside its name."""
        self._subscription: Cancellable | None = None
        self._reading: list[StreamReader] = []

    # ---- life ----
    def start(self) -> None:
        self.broker.post(self._start)

    def _start(self) -> None:
        self._subscription = self.broker.subscribe(topology.inbox(self.address).name, self._receive)
        self.hello()

    def hello(self) -> None:
        self.send(Hello(address=self.address, client=self.wanted, outbox=tuple(self.offers), **self.declared))

    def stop(self) -> None:
        """Die: nothing is said, what was delivered and not acknowledged comes again."""
        if self._subscription is not None:
            self._subscription.cancel()
            self._subscription = None

    def alive(self) -> None:
        if self.client is not None and self._subscription is not None:
            self.send(Alive(address=self.address, client=self.client))

    def leave(self) -> None:
        self.stop()
        assert self.client is not None
        self.send(Goodbye(address=self.address, client=self.client))

    # ---- protocol ----
    def send(self, message: Message) -> None:
        self.sent.append(message)
        outgoing = Outgoing(topology.UP, topology.up_key(self.address), message.type_name(), codec.encode(message))
        for _ in range(self.stutter):
            self.broker.send(outgoing)

    def _receive(self, delivery: Delivery) -> None:
        message = codec.decode(delivery.type, delivery.body)
        self.broker.ack(delivery)
        self.received.append(message)
        match message:
            case Welcome():
                self.client = message.client
                for offer in self.offers.values():
                    self.send(offer)
            case Task():
                known = any(task.task == message.task for task in self.tasks)
                self.tasks.append(message)
                if not known and not self.work(self, message):
                    self.do(message)
            case Grant():
                if not self.on_grant(self, message):
                    self.upload(message)
            case Verdict() | Deny():
                self.verdicts.append(message)
                self.offers.pop(message.task, None)
            case _:
                pass

    def progress(self, task: Task, fraction: float) -> None:
        self.send(TaskProgress(**self.about(task), fraction=fraction))

    def about(self, task: Task) -> dict[str, str]:
        return {"job": task.job, "task": task.task, "client": task.client}

    def do(self, task: Task) -> None:
        self.send(TaskAccepted(**self.about(task)))
        refs = {ref.sha256: ref for ref in task.payloads.values()}
        if not refs:
            self.finish(task)
            return
        awaited = set(refs)

        def read(sha256: str, error: Exception | None) -> None:
            assert error is None, error
            awaited.discard(sha256)
            if not awaited:
                self.finish(task)

        for sha256, ref in refs.items():
            self._reading.append(StreamReader(self.broker, self.store, ref, partial(read, sha256)))

    def finish(self, task: Task) -> None:
        if task.phase == EVALUATE and ADAPTER not in task.payloads:
            self.tell(task, accuracy=0.25)
            return
        if task.phase == EVALUATE:
            values = serialization.read_tensors(self.store.path(task.payloads[ADAPTER].sha256))
            mean = float(np.mean(values["a"]))
            metrics = Metrics(num_examples=self.examples, loss=1.0 / (1.0 + mean), values={"accuracy": mean / 100})
            self.send(Offer(**self.about(task), payload=None, metrics=metrics, base_sha256=self.base_sha256))
            return
        self.offer(task, self.tensors(task))

    def tell(self, task: Task, **values: float) -> None:
        """Offer a result without tensors."""
        metrics = Metrics(num_examples=self.examples, loss=0.5, steps=1, values=values)
        offer = Offer(**self.about(task), payload=None, metrics=metrics, base_sha256=self.base_sha256)
        self.offers[task.task] = offer
        self.send(offer)

    def tensors_like(self, value: float) -> Tensors:
        return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}

    def tensors(self, task: Task) -> Tensors:
        if task.phase == INITIALIZE:
            return self.tensors_like(0.0)
        received = serialization.read_tensors(self.store.path(task.payloads[ADAPTER].sha256))
        return {name: received[name] + np.float32(task.index + 1) for name in received}

    def offer(self, task: Task, tensors: Tensors) -> None:
        ref = self.store.add_tensors(tensors, chunk_bytes=1024)
        facts = {} if task.phase != INITIALIZE else {"main_metric": "accuracy", "rank": 2, "export": EXPORT}
        metrics = Metrics(num_examples=self.examples, loss=0.5, steps=1, facts=facts)
        read = {ADAPTER: ref.size_bytes}
        about = {**self.about(task), "bytes_down": ref.size_bytes, "bytes_by_role": read}
        offer = Offer(**about, payload=ref, metrics=metrics, base_sha256=self.base_sha256)
        self.offers[task.task] = offer
        self.send(offer)

    def upload(self, grant: Grant) -> None:
        offer = self.offers.get(grant.task)
        if offer is None or offer.payload is None:
            return
        about = {"job": grant.job, "task": grant.task, "client": grant.client}

        def sent(error: Exception | None) -> None:
            assert error is None, error
            self.send(Commit(**about, sha256=grant.sha256))

        path = self.store.path(grant.sha256)
        ChunkSender(self.broker, self.address, offer.payload, path, grant.missing, sent, about=about)


EXPORT = {"format": "peft", "files": {"adapter_config.json": {"peft_type": "LORA", "r": 2}}}
