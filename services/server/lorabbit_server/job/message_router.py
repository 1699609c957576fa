"""The message router: checks every message from a client and passes it to the registry or to the running job.

Answers that change no state (a welcome, an answer about a job that has ended) are sent at once; the delivery is
acknowledged when the broker has confirmed the answer. Everything else is handled by the running job.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from functools import partial

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Delivery, Outgoing
from lorabbit.errors import Refused
from lorabbit.events.job_events import AnyEvent, TaskProgressed
from lorabbit.protocol import codec
from lorabbit.protocol.messages import (
    AddressTaken,
    Alive,
    CancelTask,
    Commit,
    Deny,
    ForTask,
    Goodbye,
    Hello,
    Message,
    Offer,
    TaskAccepted,
    TaskFailed,
    TaskProgress,
    Verdict,
    Welcome,
)
from lorabbit.runtime import failpoints
from lorabbit.types import ClientId
from lorabbit_server.clients.addresses import ClientQueues, DuplicateClientDetector
from lorabbit_server.context import ServerContext
from lorabbit_server.engine import transitions
from lorabbit_server.job.job_runner import JobRunner

log = structlog.get_logger()
PROGRESS_SECONDS = 0.5


class MessageRouter:
    """See the module's docstring; for the loop thread."""

    def __init__(
        self,
        context: ServerContext,
        running: Callable[[], JobRunner | None],
        on_events: Callable[[str, list[AnyEvent]], None],
    ) -> None:
        """Pass messages to the job that `running` returns; report progress to `on_events`."""
        self._context, self._running, self._on_events = context, running, on_events
        self._broker, self._registry, self._now = context.broker, context.registry, context.now_ms
        self._progress: dict[str, TaskProgressed] = {}
        self._client_queues = ClientQueues(context.broker)
        self._duplicates = DuplicateClientDetector()

    def on_data(self, delivery: Delivery) -> None:
        """Pass a chunk to the uploads of the running job."""
        address = topology.address_of(delivery.routing_key)
        try:
            self._context.access.check(delivery, address)
        except Refused as why:
            self._refuse(delivery, address, why)
            return
        run = self._running()
        if run is None:
            self._broker.ack(delivery)
        else:
            run.uploads.on_chunk(delivery)

    def on_control(self, delivery: Delivery) -> None:
        """Decode a control message, check its sender and handle it."""
        address = topology.address_of(delivery.routing_key)
        try:
            self._context.access.check(delivery, address)
            message = codec.decode(delivery.type, delivery.body)
            self._check_sender(message, address)
        except Refused as why:
            self._refuse(delivery, address, why)
            return
        match message:
            case Hello() | Alive() if self._is_duplicate(message, delivery):
                self._reject_duplicate(message, delivery)
            case Hello():
                self._on_hello(message, delivery)
            case Alive():
                self._on_alive(message, delivery)
            case Goodbye():
                self._on_goodbye(message, delivery)
            case ForTask():
                self._on_task_message(message, delivery, address)
            case _:
                self._broker.ack(delivery)

    def remove_clients(self, clients: Iterable[str]) -> None:
        """Remove clients that were revoked: their queues, their leases and their tasks."""
        for address in clients:
            self._client_queues.delete(address)
            self._duplicates.remove_address(address)
            client = self._registry.leave(address)
            if client is not None:
                log.info("client-removed", client=client)
                self._exclude(client, f"{client} was revoked")

    def expire(self, now_ms: int, every_ms: int) -> None:
        """Expire client leases, and exclude clients that were lost for `patience_seconds`; called at every tick."""
        for client in self._registry.expire(now_ms, every_ms):
            log.warning("client-lost", client=client)
            self._apply(transitions.ClientDisconnected(client, self._registry.present, now_ms))
        run = self._running()
        if run is None or run.spec.patience_seconds is None:
            return
        patience_ms, silent_ms = 1000 * run.spec.patience_seconds, self._registry.silent_ms
        for client in run.state.lost:
            if client not in run.state.aside and now_ms - silent_ms.get(client, now_ms) >= patience_ms:
                self._exclude(client, f"{client} was lost for {run.spec.patience_seconds:.0f} s (patience_seconds)")

    def _exclude(self, client: ClientId, reason: str) -> None:
        """Exclude a client from the job."""
        self._apply(transitions.ClientExcluded(client, self._registry.present, reason, self._now()))

    def _refuse(self, delivery: Delivery, address: str, why: Refused) -> None:
        """Count and reject an invalid message."""
        log.warning("message-refused", address=address, type=delivery.type, reason=why.reason, detail=why.detail)
        self._context.refused[why.reason] += 1
        self._broker.reject(delivery)

    def _check_sender(self, message: Message, address: str) -> None:
        """Raise Refused when a message names another client than its sender."""
        if isinstance(message, Hello | Alive | Goodbye):
            if message.address != address:
                raise Refused("forged", f"it came from {address} in the name of {message.address}")
            if self._context.access.is_enrolled and message.client not in {None, address}:
                raise Refused("forged", f"{address} wants to be {message.client}")
        elif isinstance(message, ForTask):
            known = self._registry.at(address)
            if known != message.client:
                raise Refused("unknown-client", f"{address} is {known or 'nobody'}, not {message.client}")

    def _on_hello(self, message: Hello, delivery: Delivery) -> None:
        """Declare a client's queue and lease its identity; enrolled clients have their address as identity."""
        if self._context.access.is_enrolled:
            message = message.model_copy(update={"client": message.address})
        known = self._registry.at(message.address)
        was_here = known is not None and known in self._registry.present
        self._client_queues.declare(message.address, may_be_gone=not was_here)
        client = self._registry.hello(message, self._now())
        log.info("client-connected", client=client, address=message.address, device=message.device)
        welcome = Welcome(client=client, heartbeat_seconds=self._context.settings.heartbeat_seconds)
        self._reply(message.address, welcome, f"welcome.{uuid.uuid4().hex}", delivery)
        self._apply(self._hello_event(client, frozenset(message.outbox), is_new=not was_here))

    def _on_alive(self, message: Alive, delivery: Delivery) -> None:
        """Renew a lease; a heartbeat of an unknown client is handled as a hello."""
        client, back = self._registry.heard(message.address, self._now())
        if client is None:
            claimed = ClientId(message.client)
            taken = claimed in self._registry.present
            self._on_hello(self._registry.introduction(message.address, None if taken else claimed), delivery)
            return
        self._client_queues.declare(message.address)
        if client != message.client:
            welcome = Welcome(client=client, heartbeat_seconds=self._context.settings.heartbeat_seconds)
            self._reply(message.address, welcome, f"welcome.{uuid.uuid4().hex}", delivery)
            return
        self._broker.ack(delivery)
        if back:
            self._on_return(client)

    def _on_return(self, client: ClientId) -> None:
        """Handle the return of a client whose lease had expired but which kept its tasks."""
        entry = self._registry.get(client)
        run = self._running()
        if run is None or entry is None:
            return
        own = frozenset(task.id for task in run.state.tasks.values() if task.client == client)
        self._apply(self._hello_event(client, own))

    def _hello_event(
        self, client: ClientId, outbox: frozenset[str], *, is_new: bool = True
    ) -> transitions.HelloReceived:
        """Build the engine's event for a client that connected."""
        declared = self._registry.capabilities[client]
        return transitions.HelloReceived(
            client, self._registry.present, declared.device, outbox, is_new, self._now(), declared
        )

    def _is_duplicate(self, message: Hello | Alive, delivery: Delivery) -> bool:
        """Whether an older process uses the same address; redelivered messages are stale and ignored."""
        if not message.process or delivery.redelivered:
            return False
        return self._duplicates.observe(message.address, message.process)

    def _reject_duplicate(self, message: Hello | Alive, delivery: Delivery) -> None:
        """Tell a duplicate process to stop; repeated for each of its messages, since both processes read the queue."""
        log.warning("address-taken", address=message.address, why="two clients use it; give each its own")
        self._context.refused["address-taken"] += 1
        self._reply(message.address, AddressTaken(process=message.process), f"taken.{uuid.uuid4().hex}", delivery)

    def _on_goodbye(self, message: Goodbye, delivery: Delivery) -> None:
        if self._duplicates.remove_process(message.address, message.process):
            # The remaining process says hello again, and receives the tasks that the other one consumed.
            self._reply(message.address, AddressTaken(process=message.process), f"taken.{uuid.uuid4().hex}", delivery)
            return
        client = self._registry.leave(message.address)
        self._broker.ack(delivery)
        if client is not None:
            log.info("client-disconnected", client=client)
            self._apply(transitions.ClientDisconnected(client, self._registry.present, self._now()))

    def _on_task_message(self, message: ForTask, delivery: Delivery, address: str) -> None:
        """Pass a message about a task to its job."""
        client, back = self._registry.heard(address, self._now())
        if client is not None:
            self._client_queues.declare(address)
            if back:
                self._on_return(client)
        run = self._running()
        if run is None or run.job != message.job or client is None:
            self._on_other_job(message, delivery, address)
            return
        run.meter(message.task, delivery)
        match message:
            case Offer():
                failpoints.hit(failpoints.Failpoint.OFFER_RECEIVED)
                run.on_offer(message, delivery, client)
            case TaskFailed():
                if message.damaged is not None:
                    self._context.publisher.republish(message.damaged)
                run.on_task_failed(message, delivery, client)
            case TaskProgress():
                self._on_progress(run, message)
                self._broker.ack(delivery)
            case Commit():
                run.uploads.on_commit(message.task, client, message.sha256)
                self._broker.ack(delivery)
            case _:
                self._broker.ack(delivery)

    def _on_other_job(self, message: ForTask, delivery: Delivery, address: str) -> None:
        """Answer a message for a job that is not running, so that the client can delete its task."""
        if not isinstance(message, Offer | TaskAccepted):
            self._broker.ack(delivery)
            return
        about = {"job": message.job, "task": message.task, "client": message.client}
        answer: Message
        if isinstance(message, TaskAccepted):
            answer = CancelTask(**about)
        elif self._context.store.effect(message.job, message.task) is not None:
            answer = Verdict(**about, accepted=True)
        else:
            answer = Deny(**about, reason="job-ended")
            self._context.refused["job-ended"] += 1
        self._reply(address, answer, f"{message.task}.late", delivery)

    def _reply(self, address: str, message: Message, message_id: str, delivery: Delivery) -> None:
        """Send an answer outside the outbox; the delivery is acknowledged once the broker confirms the answer."""
        outgoing = Outgoing(
            topology.CONTROL,
            topology.control_key(address),
            message.type_name(),
            codec.encode(message),
            {"epoch": self._context.epoch},
            message_id,
        )
        self._broker.send_with_retry(outgoing, lambda _: self._broker.ack(delivery))

    # ---- progress ----
    def _on_progress(self, run: JobRunner, message: TaskProgress) -> None:
        """Publish progress to the listeners at once, and to the store in batches."""
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
        self._on_events(run.job, [event])
        if not self._progress:
            self._context.loop.after(PROGRESS_SECONDS, partial(self._log_progress, run.job))
        self._progress[task.id] = event

    def _log_progress(self, job: str) -> None:
        events, self._progress = list(self._progress.values()), {}
        if events:
            self._context.store.log_progress(job, [event.model_dump_json() for event in events])

    def _apply(self, event: transitions.Event) -> None:
        run = self._running()
        if run is not None:
            run.apply(event)
