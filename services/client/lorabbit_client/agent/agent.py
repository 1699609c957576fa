"""The protocol side of a client, driven by callbacks on the broker's loop thread.

`Registration` keeps the client registered. The agent journals and acknowledges tasks at once, and a `TaskRun` executes
each of them. It holds no delivery while training and imports no torch. Messages that come twice, late or out of order
change nothing. A process may hold many agents on one broker, which share the runner and the payload cache.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, OnDone, Outgoing
from lorabbit.config.settings import ClientSettings
from lorabbit.errors import Refused
from lorabbit.protocol import codec
from lorabbit.protocol.messages import AddressTaken, CancelTask, Deny, ForTask, Grant, Message, Task, Verdict, Welcome
from lorabbit.runtime import failpoints
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import EVALUATE
from lorabbit_client.agent.journal import Journal
from lorabbit_client.agent.payload_cache import PayloadAccounting, PayloadCache
from lorabbit_client.agent.registration import Registration
from lorabbit_client.agent.task_run import AgentContext, TaskRun
from lorabbit_client.execution.interface import Runner

log = structlog.get_logger()

FINISHED_KEPT = 256


class Agent:
    """One client; `start` and `close` belong to the loop thread, as everything else."""

    def __init__(
        self,
        broker: Broker,
        runner: Runner,
        settings: ClientSettings,
        *,
        cache: PayloadCache | None = None,
        embedded: bool = False,
    ) -> None:
        """Use a payload cache that others use too, or its own.

        An embedded agent sends no heartbeats and keeps no journal: it dies with its server.
        """
        self._broker = broker
        self._settings = settings
        self._address = settings.address
        durable = settings.durable and not embedded
        self._journal = Journal(settings.folder, durable=durable)
        self._cache = cache or PayloadCache(broker, PayloadStore(settings.folder / "payloads", durable=durable))
        self._registration = Registration(
            broker, settings, self._journal, self._send, self._outbox, heartbeats=not embedded
        )
        self._task_runs: dict[str, TaskRun] = {}
        self._finished: dict[tuple[str, int, int], None] = {}
        self._epochs: dict[str, int] = {}
        accounting = PayloadAccounting(self._journal, self._cache)
        self._context = AgentContext(
            broker,
            runner,
            self._journal,
            self._cache,
            accounting,
            self._address,
            self._send,
            self._forget,
            self._advance,
        )
        self._on_drained: Callable[[], None] | None = None
        self._inbox: Cancellable | None = None

    # ---- being there ----
    def start(self) -> None:
        """Resume the tasks in the journal, consume the inbox, and register."""
        self._context.accounting.delete_leftovers()
        self._journal.delete_leftovers()
        for offer in self._journal.results():
            task_run = self._start_run(offer)
            task_run.resume(offer)
        for task in self._journal.tasks():
            log.info("task-resumed", job=task.job, task=task.task)
            self._start_run(task).start(task)
        self._inbox = self._broker.subscribe(topology.inbox(self._address).name, self._on_delivery)
        self._registration.register()

    def close(self) -> None:
        """Say goodbye and stop; what is unfinished stays in the journal."""
        for task_run in self._task_runs.values():
            task_run.stop()
        if self._inbox is not None:
            self._inbox.cancel()
        self._registration.close()

    def drain(self, then: Callable[[], None]) -> None:
        """Accept no further task, and call back when the running ones have ended."""
        self._on_drained = then
        if self.is_idle:
            then()

    @property
    def client(self) -> str | None:
        """The identity; None until the server gives one."""
        return self._registration.client

    @property
    def is_idle(self) -> bool:
        """Whether the client has no task."""
        return not self._task_runs

    def on_idle(self, then: Callable[[], None]) -> None:
        """Set a callback for `settings.idle_seconds` without a task since the last one."""
        self._registration.on_idle = then

    def on_conflict(self, then: Callable[[str], None]) -> None:
        """Set a callback, with a message, for another process that has this address or identity."""
        self._registration.on_conflict = then

    def _outbox(self) -> tuple[str, ...] | None:
        """Tasks whose results wait for a verdict; None without any task."""
        in_outbox = tuple(task for task, task_run in self._task_runs.items() if task_run.is_in_outbox)
        return None if self.is_idle else in_outbox

    def _on_welcome(self, welcome: Welcome) -> None:
        """Store the identity; the server that answers may have restarted its epochs.

        Results for a former identity would be refused, so its tasks are dropped.
        """
        self._registration.on_welcome(welcome)
        self._epochs.clear()
        self._finished.clear()
        for task_run in list(self._task_runs.values()):
            if task_run.client != welcome.client:
                task_run.cancel()

    # ---- messages ----
    def _on_delivery(self, delivery: Delivery) -> None:
        """Handle one message; reject it on a defect, so that it is not redelivered."""
        try:
            self._handle_message(delivery)
        except (OSError, MemoryError):
            raise  # no fault of the message
        except Exception:
            log.exception("message-handling-failed", type=delivery.type)
            self._broker.reject(delivery)
            raise

    def _handle_message(self, delivery: Delivery) -> None:
        """Decode and dispatch a message; acknowledge it after its changes are on the disk."""
        try:
            message = codec.decode(delivery.type, delivery.body)
        except Refused as error:
            log.warning("message-refused", type=delivery.type, reason=error.reason, why=error.detail)
            self._broker.reject(delivery)
            return
        if isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, AddressTaken):
            self._registration.on_address_taken(message)
        elif isinstance(message, Task):
            self._accept_task(message)
        elif isinstance(message, ForTask):
            self._forward(message)
        self._broker.ack(delivery)

    def _accept_task(self, task: Task) -> None:
        """Journal a task and start it, unless it is known, stale or another client's."""
        known = self._task_runs.get(task.task)
        if known is not None:
            known.acknowledge()
            for _, ref in task.published:
                self._cache.redirect(ref)
            return
        if self._on_drained is not None or _delivery_key(task) in self._finished:
            return  # whoever holds this identity next is sent what is open
        newest = self._epochs.get(task.job, task.epoch)
        if task.epoch < newest or (self.client is not None and task.client != self.client):
            log.info("task-ignored", task=task.task, epoch=task.epoch, newest=newest, client=task.client)
            return
        self._epochs[task.job] = task.epoch
        failpoints.hit(failpoints.Failpoint.TASK_DELIVERED)
        self._journal.accept(task)
        failpoints.hit(failpoints.Failpoint.TASK_JOURNALED)
        self._registration.reset_idle_time()
        self._start_run(task).start(task)

    def _forward(self, message: ForTask) -> None:
        """Dispatch a message to its task run; messages for unknown tasks are ignored."""
        task_run = self._task_runs.get(message.task)
        if task_run is None:
            return
        if isinstance(message, Grant):
            task_run.on_grant(message)
        elif isinstance(message, Verdict):
            failpoints.hit(failpoints.Failpoint.VERDICT_RECEIVED)
            task_run.on_verdict(accepted=message.accepted, reason=message.reason)
        elif isinstance(message, Deny):
            task_run.on_verdict(accepted=False, reason=message.reason)
        elif isinstance(message, CancelTask):
            self._cancel_task(task_run)

    def _cancel_task(self, task_run: TaskRun) -> None:
        """Drop a cancelled task; the server can send the same delivery again."""
        task_run.cancel()
        if task_run.message is not None:
            self._finished.pop(_delivery_key(task_run.message), None)

    def _send(self, message: Message, on_done: OnDone | None) -> None:
        """Publish to the server under this client's address."""
        key, body = topology.up_key(self._address), codec.encode(message)
        outgoing = Outgoing(topology.UP, key, message.type_name(), body, message_id=uuid.uuid4().hex)
        self._broker.send_with_retry(outgoing, on_done)

    # ---- bookkeeping ----
    def _start_run(self, about: ForTask | Task) -> TaskRun:
        task_run = TaskRun(self._context, job=about.job, task=about.task, client=about.client)
        self._task_runs[about.task] = task_run
        return task_run

    def _forget(self, task: str) -> None:
        """Remove a task run, and remember its delivery for a while to ignore duplicates."""
        task_run = self._task_runs.pop(task)
        self._context.accounting.forget(task)
        if task_run.message is not None:
            self._finished[_delivery_key(task_run.message)] = None
            if len(self._finished) > FINISHED_KEPT:
                del self._finished[next(iter(self._finished))]
        if self._on_drained is not None and self.is_idle:
            self._on_drained()

    def _advance(self) -> None:
        """Run the task runs that are ready, but none before an earlier evaluation.

        An evaluation can read private state that the next training changes.
        """
        scoring: set[tuple[str, int]] = set()
        for task_run in list(self._task_runs.values()):
            message = task_run.message
            if message is None:
                continue
            if task_run.stage == "ready" and (message.phase == EVALUATE or (message.job, message.epoch) not in scoring):
                task_run.run()
            if message.phase == EVALUATE and task_run.stage in {"fetching", "ready", "running"}:
                scoring.add((message.job, message.epoch))


def _delivery_key(task: Task) -> tuple[str, int, int]:
    """Key by which a duplicate delivery differs from a new attempt of the same task."""
    return task.task, task.attempt, task.epoch
