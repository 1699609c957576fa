"""Unit of work: everything that one or more decisions changed, committed to the store in one atomic step.

Deliveries that arrive together are decided one after the other and committed together, so that the store's fsync is
paid once for all of them. Only after the commit are the deliveries acknowledged, the events published and the messages
sent. Messages are part of the commit (a transactional outbox): `outbox` sends them, and once the broker has confirmed
them the next commit deletes them. A server that is killed in between sends them again; clients recognize duplicates.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lorabbit.broker.base import Delivery
from lorabbit.events.job_events import AnyEvent
from lorabbit.protocol import codec
from lorabbit.protocol.messages import ForTask, Task
from lorabbit.runtime import failpoints
from lorabbit.state.base import JobRecord, StateChange
from lorabbit_server.context import ServerContext
from lorabbit_server.engine.state import JobState, dump_header, dump_task
from lorabbit_server.job.outbox import Entry, OutboxPublisher
from lorabbit_server.transfer.traffic_meter import TrafficMeter

DELETE_DELAY_SECONDS = 2.0
"""How long confirmed outbox entries wait for another commit that deletes them."""


@dataclass(frozen=True, slots=True)
class PendingMessage:
    """A message to a client that is sent after the commit."""

    address: str
    message: ForTask | Task
    message_id: str


@dataclass(slots=True)
class Step:
    """One decision: the state after it, and everything that it changes or causes."""

    state: JobState
    deliveries: list[Delivery] = field(default_factory=list)
    """Acknowledged once the step is committed."""
    events: list[AnyEvent] = field(default_factory=list)
    effects: dict[str, str] = field(default_factory=dict)
    """Accepted tasks, with the sha256 of their payloads."""
    messages: list[PendingMessage] = field(default_factory=list)
    before_sending: list[Callable[[], None]] = field(default_factory=list)
    """Called after the commit, before the messages of the step are sent."""
    after_commit: list[Callable[[], None]] = field(default_factory=list)


class UnitOfWork:
    """The pending step of one job; for the loop thread."""

    def __init__(
        self,
        context: ServerContext,
        state: JobState,
        record: JobRecord,
        meter: TrafficMeter,
        on_failed: Callable[[str, Exception], None],
    ) -> None:
        """Continue from what the store holds; `on_failed` is called for a message that the broker refuses for good."""
        self.on_events: Callable[[list[AnyEvent]], None] = lambda _: None
        self._store, self._broker, self._loop, self._epoch = context.store, context.broker, context.loop, context.epoch
        self._version = record.version
        self._committed = state if record.header is not None else replace(state, tasks={})
        self._header = record.header
        self._pending = Step(state)
        self._confirmed_steps: list[str] = []
        self._outbox_publisher = OutboxPublisher(context, meter, self._on_confirmed, on_failed)
        self._on_delivered: Callable[[], None] | None = None
        self._scheduled = False
        self._closed = False

    @property
    def state(self) -> JobState:
        """The state after the last decision; it may not be committed yet."""
        return self._pending.state

    def add(self, step: Step) -> None:
        """Add a decision to the pending step, which the next turn of the loop commits."""
        pending = self._pending
        pending.state = step.state
        pending.deliveries += step.deliveries
        pending.events += step.events
        pending.effects |= step.effects
        pending.messages += step.messages
        pending.before_sending += step.before_sending
        pending.after_commit += step.after_commit
        if not self._scheduled:
            self._scheduled = True
            self._loop.post(self._run)

    def _run(self) -> None:
        if not self._closed and self._scheduled:
            self.commit()

    # ---- commit ----
    def commit(self) -> None:
        """Commit the pending step; raises Fenced, Conflict or StoreUnavailable, and then nothing is acknowledged."""
        self._scheduled = False
        step, self._pending = self._pending, Step(self.state)
        relayed, self._confirmed_steps = self._confirmed_steps, []
        outbox = [_entry(each) for each in step.messages]
        change = self._change(step, outbox, relayed)
        committed = None
        if change is not None:
            committed = self._store.commit(step.state.job, change)
            if change.effects:
                failpoints.hit(failpoints.Failpoint.RESULT_COUNTED)
            if change.outbox:
                failpoints.hit(failpoints.Failpoint.STEP_COMMITTED)
            self._version, self._committed = committed.version, step.state
            self._header = change.header or self._header
        for callback in step.before_sending:
            callback()
        if committed is not None:
            for id_ in committed.outbox_ids:
                self._outbox_publisher.publish(id_, outbox)
        for delivery in step.deliveries:
            self._broker.ack(delivery)
        if step.events:
            self.on_events(step.events)
        for callback in step.after_commit:
            callback()

    def _change(self, step: Step, outbox: list[Entry], relayed: list[str]) -> StateChange | None:
        """The difference to the last commit; None when there is none."""
        before, now = self._committed.tasks, step.state.tasks
        changed = {id_: task for id_, task in now.items() if before.get(id_) is not task}
        header = dump_header(step.state)
        tasks: dict[str, str | None] = {id_: dump_task(task) for id_, task in changed.items()}
        tasks.update({id_: None for id_ in before if id_ not in now})
        if header == self._header and not (tasks or step.events or outbox or relayed):
            return None
        return StateChange(
            uuid.uuid4().hex,
            self._epoch,
            self._version,
            header=header if header != self._header else None,
            tasks=tasks,
            effects=step.effects,
            events=[event.model_dump_json() for event in step.events],
            outbox=[json.dumps(outbox)] if outbox else [],
            relayed=relayed,
        )

    # ---- outbox ----
    def resend_all(self) -> None:
        """Send the messages that an earlier server left in the outbox."""
        for step, text in self._store.outbox(self.state.job):
            self._outbox_publisher.publish(step, json.loads(text))

    def _on_confirmed(self, step: str) -> None:
        """Schedule the deletion of a step's messages, which the broker has confirmed."""
        if not self._confirmed_steps:
            self._loop.after(DELETE_DELAY_SECONDS, self._delete_confirmed)
        self._confirmed_steps.append(step)
        if self._outbox_publisher.is_idle and self._on_delivered is not None:
            self._loop.post(self._finish)

    def _delete_confirmed(self) -> None:
        if self._confirmed_steps and not self._closed:
            self.commit()

    def when_delivered(self, callback: Callable[[], None]) -> None:
        """Call back when the broker has confirmed every message and the outbox is empty."""
        self._on_delivered = callback
        if self._outbox_publisher.is_idle:
            self._loop.post(self._finish)

    def _finish(self) -> None:
        callback, self._on_delivered = self._on_delivered, None
        if callback is not None and not self._closed:
            self.commit()
            failpoints.hit(failpoints.Failpoint.RUN_WRITTEN)
            callback()

    def close(self) -> None:
        """Stop committing and sending."""
        self._closed = True
        self._outbox_publisher.close()


def _entry(pending: PendingMessage) -> Entry:
    """Encode a message for the outbox."""
    message = pending.message
    entry = {
        "address": pending.address,
        "type": message.type_name(),
        "body": codec.encode(message).decode(),
        "message_id": pending.message_id,
        "task": message.task,
    }
    if isinstance(message, Task):
        entry["payloads"] = " ".join(ref.sha256 for _, ref in message.published)
    return entry
