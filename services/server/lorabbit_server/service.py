"""Service: the server's shell. It holds the lease, knows the clients and runs jobs one after the other.

Without the lease it stands by and changes nothing. With it, it continues whatever the store and
the files say is under way; a server that was killed at any instruction is thereby replaced by the
next one. When it is fenced off, or the store or the broker fails it, it forgets what it thought
and stands by again.
"""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog

from lorabbit import __version__, codec
from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, Outgoing
from lorabbit.errors import Refused
from lorabbit.events import AnyEvent, TaskProgressed
from lorabbit.jobspec import JobSpec
from lorabbit.messages import (
    Alive,
    Deny,
    ForTask,
    Goodbye,
    Hello,
    Message,
    Offer,
    TaskFailed,
    TaskProgress,
    Verdict,
    Welcome,
)
from lorabbit.methods import build
from lorabbit.payloads import PayloadStore
from lorabbit.settings import ServerSettings
from lorabbit.state.base import JobEntry, StateStore
from lorabbit.transfer import AdapterPublisher
from lorabbit.types import ClientId
from lorabbit_server import steps
from lorabbit_server.guarded import GuardedLoop
from lorabbit_server.jobrun import JobRun
from lorabbit_server.meter import header_bytes
from lorabbit_server.registry import Registry
from lorabbit_server.tools import Tools

log = structlog.get_logger()
TICK_SECONDS = 1.0
PROGRESS_SECONDS = 0.5
CONTROL_PREFETCH = 256
DATA_PREFETCH = 32
Listener = Callable[[str, AnyEvent], None]


def wall_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Means:
    """What a test replaces: the clock, and the executor of heavy work."""

    now_ms: Callable[[], int] = wall_ms
    worker: Executor | None = None


class Service:
    """See the module's docstring. `submit`, `cancel`, `start` are for any thread, callbacks come on the loop's."""

    def __init__(
        self,
        broker: Broker,
        store: StateStore,
        settings: ServerSettings,
        *,
        owner: str,
        means: Means | None = None,
    ) -> None:
        """Serve over this broker and store; `owner` names this server in the lease, the same after a restart."""
        means = means or Means()
        self.broker, self.store, self.settings = broker, store, settings
        self.payloads = PayloadStore(settings.folder / "payloads", durable=settings.durable)
        self.owner, self._now = owner, means.now_ms
        self._loop = GuardedLoop(broker, self._step_down, worker=means.worker)
        self._listeners: list[Listener] = []
        self._on_job_ended: list[Callable[[str], None]] = []
        self._epoch: int | None = None
        self._run: JobRun | None = None
        self._registry = Registry(store, lease_ms=round(settings.client_lease_seconds * 1000))
        self._subscriptions: list[Cancellable] = []
        self._timers: list[Cancellable] = []
        self._progress: dict[str, TaskProgressed] = {}
        self._inboxes: set[str] = set()
        self._renewed_ms = 0

    # ---- for everybody ----
    def start(self) -> None:
        """Take the lease as soon as it is free, and go on from there."""
        self._loop.post(self._stand_by)

    def submit(self, spec: JobSpec) -> str:
        """Queue a job; returns its id. Raises BadInput when the method or its settings cannot work."""
        build(spec)
        runs = self.settings.folder / "runs"
        taken = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        job = self.store.enqueue(
            spec.name, spec.model_dump_json(), taken=taken, now_ms=self._now(), operation=uuid.uuid4().hex
        )
        self._loop.post(self._next_job)
        return job

    def cancel(self, job: str) -> bool:
        """End a job, or take it out of the queue; False when there is none or it has ended."""
        wanted = self.store.request_cancel(job)
        if wanted:
            self._loop.post(self._next_job)
        return wanted

    def listen(self, callback: Listener) -> None:
        """Call back with every event of every job, once it is durable, and with progress, which never is."""
        self._listeners.append(callback)

    def on_job_ended(self, callback: Callable[[str], None]) -> None:
        """Call back with a job's id once its run folder is complete."""
        self._on_job_ended.append(callback)

    @property
    def is_leading(self) -> bool:
        """Whether this server holds the lease."""
        return self._epoch is not None

    def drain(self, then: Callable[[], None]) -> None:
        """Finish the step under way, give the lease up, then call back on the loop; from any thread."""

        def leave() -> None:
            if self._run is not None:
                self._run.commit()
            self.close()
            then()

        self.broker.post(lambda: self._loop.guard(leave))

    def close(self) -> None:
        """Stop at once and give the lease up; on the loop thread, or after the loop has ended."""
        epoch = self._epoch
        self._forget()
        self._loop.close()
        if epoch is not None:
            self.store.release_lease(self.owner, epoch)

    # ---- the lease ----
    def _stand_by(self) -> None:
        """Lead if the lease is free, or try again soon."""
        if self._epoch is not None:
            return
        self._epoch = self.store.acquire_lease(self.owner, self.settings.lease_seconds)
        if self._epoch is None:
            log.info("standing-by", holder=self.store.lease_holder())
            self._timers = [self._loop.after(self.settings.lease_seconds / 3, self._stand_by)]
            return
        log.info("leading", epoch=self._epoch)
        self._renewed_ms = self._now()
        for exchange in topology.EXCHANGES:
            self.broker.declare_exchange(exchange)
        for queue in topology.QUEUES:
            self.broker.declare_queue(queue)
        self._registry = Registry(self.store, lease_ms=round(self.settings.client_lease_seconds * 1000))
        self._registry.load(self._now())
        self._subscriptions = [
            self._subscribe(topology.SERVER_QUEUE.name, self._on_control, CONTROL_PREFETCH),
            self._subscribe(topology.DATA_QUEUE.name, self._on_data, DATA_PREFETCH),
        ]
        self._next_job()
        self._tick()

    def _subscribe(self, queue: str, on_delivery: Callable[[Delivery], None], prefetch: int) -> Cancellable:
        def guarded(delivery: Delivery) -> None:
            self._loop.guard(partial(on_delivery, delivery))

        return self.broker.subscribe(queue, guarded, prefetch=prefetch)

    def _tick(self) -> None:
        """Renew leases, notice clients that fell silent and uploads that stalled."""
        if self._epoch is None:
            return
        now = self._now()
        if now - self._renewed_ms >= self.settings.lease_seconds * 1000 / 3:
            self.store.renew_lease(self.owner, self._epoch, self.settings.lease_seconds)
            self._registry.renew()
            self._renewed_ms = now
            self._next_job()
        for client in self._registry.expire(now):
            log.warning("client-lost", client=client)
            self._apply(steps.ClientLeft(client, self._registry.present, now))
        if self._run is not None:
            self._run.tick()
        self._timers = [self._loop.after(TICK_SECONDS, self._tick)]

    def _step_down(self, error: Exception) -> None:
        """Forget everything and stand by: the store knows better."""
        log.warning("stepping-down", why=str(error))
        self._forget()
        self._timers = [self._loop.after(TICK_SECONDS, self._stand_by)]

    def _forget(self) -> None:
        for each in (*self._subscriptions, *self._timers):
            each.cancel()
        if self._run is not None:
            self._run.close()
        self._subscriptions, self._timers = [], []
        self._run, self._epoch = None, None
        self._inboxes.clear()
        self._progress.clear()

    # ---- jobs ----
    def _next_job(self) -> None:
        """Continue or begin the first job that has not ended; end it where an operator wants that."""
        if self._epoch is None:
            return
        entries = self.store.jobs()
        waiting = [e for e in entries.values() if e.status in {"running", "queued"}]
        waiting.sort(key=lambda e: e.status != "running")
        if self._run is None and waiting:
            self._open(waiting[0], self._epoch)
        if self._run is not None:
            current = entries.get(self._run.job)
            if current is not None and current.cancel_requested:
                self._apply(steps.CancelRequested(self._now()))

    def _open(self, entry: JobEntry, epoch: int) -> None:
        """Run a job from where it stands."""
        self.store.mark_job(entry.job, "running", epoch=epoch)
        record = self.store.claim_job(entry.job, epoch)
        tools = Tools(
            self._loop,
            self.broker,
            self.store,
            self.payloads,
            AdapterPublisher(self.broker, self.payloads),
            self._registry,
            self.settings,
            self._now,
            epoch,
            {"lorabbit": __version__, "python": platform.python_version(), "numpy": np.__version__},
        )
        run = JobRun(tools, entry.job, JobSpec.model_validate_json(entry.spec), record)
        run.on_events = partial(self._tell, entry.job)
        run.on_end = partial(self._ended, entry.job)
        self._run = run
        log.info("job-opened", job=entry.job, stage=run.state.stage)
        run.start(submitted_ms=entry.submitted_ms)

    def _ended(self, job: str) -> None:
        """Take the next job."""
        if self._run is not None and self._run.job == job:
            self._run.close()
            self._run = None
        for callback in self._on_job_ended:
            callback(job)
        self._loop.post(self._next_job)

    def _tell(self, job: str, events: list[AnyEvent]) -> None:
        for event in events:
            for callback in self._listeners:
                callback(job, event)

    def _apply(self, event: steps.Event) -> None:
        if self._run is not None:
            self._run.apply(event)

    # ---- deliveries ----
    def _on_data(self, delivery: Delivery) -> None:
        """Take in a chunk."""
        if self._run is None:
            self.broker.ack(delivery)
        else:
            self._run.on_chunk(delivery)

    def _on_control(self, delivery: Delivery) -> None:
        """Read a control message and bring it to whom it concerns."""
        address = topology.address_of(delivery.routing_key)
        try:
            message = codec.decode(delivery.type, delivery.body)
            self._check_sender(message, address)
        except Refused as why:
            log.warning("message-refused", address=address, type=delivery.type, reason=why.reason, detail=why.detail)
            self.broker.reject(delivery)
            return
        match message:
            case Hello():
                self._on_hello(message, delivery)
            case Alive():
                self._on_alive(message, delivery)
            case Goodbye():
                self._on_goodbye(message, delivery)
            case ForTask():
                self._on_task_message(message, delivery, address)
            case _:
                self.broker.ack(delivery)

    def _check_sender(self, message: Message, address: str) -> None:
        """Refuse a message in somebody else's name."""
        if isinstance(message, Hello | Alive | Goodbye):
            if message.address != address:
                raise Refused("forged", f"it came from {address} in the name of {message.address}")
        elif isinstance(message, ForTask):
            known = self._registry.at(address)
            if known != message.client:
                raise Refused("unknown-client", f"{address} is {known or 'nobody'}, not {message.client}")

    def _on_hello(self, message: Hello, delivery: Delivery) -> None:
        """Give a client its inbox, its identity and what it has to do."""
        if message.address not in self._inboxes:
            self.broker.declare_queue(topology.inbox(message.address))
            self._inboxes.add(message.address)
        client = self._registry.hello(message, self._now())
        log.info("client-arrived", client=client, address=message.address, device=message.device)
        welcome = Welcome(client=client, heartbeat_seconds=self.settings.heartbeat_seconds)
        self._reply(message.address, welcome, f"welcome.{uuid.uuid4().hex}", delivery)
        self._apply(
            steps.ClientArrived(client, self._registry.present, message.device, frozenset(message.outbox), self._now())
        )

    def _on_alive(self, message: Alive, delivery: Delivery) -> None:
        """Renew a lease; a client that this server does not know is as good as one that says hello."""
        client, back = self._registry.heard(message.address, self._now())
        if client is None:
            claimed = ClientId(message.client)
            taken = claimed in self._registry.present
            self._on_hello(Hello(address=message.address, client=None if taken else claimed), delivery)
            return
        if client != message.client:
            welcome = Welcome(client=client, heartbeat_seconds=self.settings.heartbeat_seconds)
            self._reply(message.address, welcome, f"welcome.{uuid.uuid4().hex}", delivery)
            return
        self.broker.ack(delivery)
        if back:
            self._came_back(client)

    def _came_back(self, client: ClientId) -> None:
        """Note a client that was silent, but never gone: it still has its tasks."""
        entry = self._registry.get(client)
        if self._run is None or entry is None:
            return
        own = frozenset(task.id for task in self._run.state.tasks.values() if task.client == client)
        self._apply(steps.ClientArrived(client, self._registry.present, entry.device, own, self._now()))

    def _on_goodbye(self, message: Goodbye, delivery: Delivery) -> None:
        client = self._registry.leave(message.address)
        self.broker.ack(delivery)
        if client is not None:
            log.info("client-left", client=client)
            self._apply(steps.ClientLeft(client, self._registry.present, self._now()))

    def _on_task_message(self, message: ForTask, delivery: Delivery, address: str) -> None:
        """Bring a message about a task to its job."""
        client, back = self._registry.heard(address, self._now())
        if client is not None and back:
            self._came_back(client)
        run = self._run
        if run is None or run.job != message.job or client is None:
            self._on_other_job(message, delivery, address)
            return
        run.meter(message.task, len(delivery.body) + header_bytes(delivery))
        match message:
            case Offer():
                run.on_offer(message, delivery, client)
            case TaskFailed():
                run.on_task_failed(message, delivery, client)
            case TaskProgress():
                self._on_progress(run, message)
                self.broker.ack(delivery)
            case _:
                self.broker.ack(delivery)

    def _on_other_job(self, message: ForTask, delivery: Delivery, address: str) -> None:
        """Answer an offer for a job that is not running, so that the client can forget it."""
        if not isinstance(message, Offer):
            self.broker.ack(delivery)
            return
        about = {"job": message.job, "task": message.task, "client": message.client}
        answer: Message
        if self.store.effect(message.job, message.task) is not None:
            answer = Verdict(**about, accepted=True)
        else:
            answer = Deny(**about, reason="job-ended")
        self._reply(address, answer, f"{message.task}.late", delivery)

    def _reply(self, address: str, message: Message, message_id: str, delivery: Delivery) -> None:
        """Answer without the store: the question is acknowledged once the broker has the answer."""
        outgoing = Outgoing(
            topology.CONTROL,
            topology.control_key(address),
            message.type_name(),
            codec.encode(message),
            {"epoch": self._epoch or 0},
            message_id,
        )
        self.broker.send(outgoing, lambda _: self.broker.ack(delivery))

    # ---- progress ----
    def _on_progress(self, run: JobRun, message: TaskProgress) -> None:
        """Show progress at once here, and a little later to those who read the store."""
        task = run.state.tasks.get(message.task)
        if task is None or task.client != message.client:
            return
        event = TaskProgressed(
            at_ms=self._now(),
            round=task.round,
            client=task.client,
            phase=task.phase,
            fraction=message.fraction,
            loss=message.loss,
        )
        self._tell(run.job, [event])
        if not self._progress:
            self._loop.after(PROGRESS_SECONDS, partial(self._log_progress, run.job))
        self._progress[task.id] = event

    def _log_progress(self, job: str) -> None:
        events, self._progress = list(self._progress.values()), {}
        if events:
            self.store.log_progress(job, [event.model_dump_json() for event in events])
