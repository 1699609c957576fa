"""Ledger: everything one or more decisions changed, committed in one atomic step.

Deliveries that arrive together are decided one after the other and committed together, so the
store's fsync is paid once for all of them. Only after the commit are the deliveries that caused it
acknowledged, its events told and its messages sent. Messages are part of the commit (an outbox):
they are sent (see `relay`), confirmed by the broker and then forgotten with the next commit, so a server killed
in between sends them again; clients know a message they have seen.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

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

FORGET_SECONDS = 2.0
"""How long confirmed outbox entries may wait for a commit that takes them along."""

_Item = TypeVar("_Item")


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
        """Continue from what the store holds; `on_failed` hears of messages that the broker will never take."""
        self.state = state
        self.on_events: Callable[[list[AnyEvent]], None] = lambda _: None
        self._store, self._broker, self._loop, self._epoch = context.store, context.broker, context.loop, context.epoch
        self._version = record.version
        self._committed = state if record.header is not None else replace(state, tasks={})
        self._header = record.header
        self._events: list[AnyEvent] = []
        self._effects: dict[str, str] = {}
        self._outbox: list[Entry] = []
        self._relayed: list[str] = []
        self._held: list[Delivery] = []
        self._before_sending: list[Callable[[], None]] = []
        self._afterwards: list[Callable[[], None]] = []
        self._outbox_publisher = OutboxPublisher(context, meter, self._confirmed, on_failed)
        self._on_relayed: Callable[[], None] | None = None
        self._scheduled = False
        self._closed = False

    # ---- gather ----
    def record(self, event: AnyEvent) -> None:
        """Append to the job's event log."""
        self._events.append(event)
        self._schedule()

    def count(self, task: str, sha256: str) -> None:
        """Note a result that counts from here on."""
        self._effects[task] = sha256
        self._schedule()

    def post(self, address: str, message: ForTask | Task, *, message_id: str) -> None:
        """Put a message to a client into the outbox."""
        body = codec.encode(message).decode()
        entry = {"address": address, "type": message.type_name(), "body": body, "message_id": message_id}
        entry["task"] = message.task
        if isinstance(message, Task):
            failpoints.hit(failpoints.Failpoint.TASK_DECIDED)
            entry["payloads"] = " ".join(ref.sha256 for _, ref in message.published)
        self._outbox.append(entry)
        self._schedule()

    def hold(self, delivery: Delivery) -> None:
        """Acknowledge this delivery once its effect is durable."""
        self._held.append(delivery)
        self._schedule()

    def before_sending(self, callback: Callable[[], None]) -> None:
        """Do this once the step is durable, before its messages are sent."""
        self._before_sending.append(callback)
        self._schedule()

    def afterwards(self, callback: Callable[[], None]) -> None:
        """Do this once the step is durable."""
        self._afterwards.append(callback)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.post(self._run)

    def _run(self) -> None:
        if not self._closed and self._scheduled:
            self.commit()

    # ---- commit ----
    def commit(self) -> None:
        """Make the step; raises Fenced, Conflict or StoreUnavailable, and then nothing was acknowledged."""
        self._scheduled = False
        events, outbox, relayed = self._events, self._outbox, self._relayed
        self._events, self._outbox, self._relayed = [], [], []
        change = self._change(events, outbox, relayed)
        committed = None
        if change is not None:
            committed = self._store.commit(self.state.job, change)
            if change.effects:
                failpoints.hit(failpoints.Failpoint.RESULT_COUNTED)
            if change.outbox:
                failpoints.hit(failpoints.Failpoint.STEP_COMMITTED)
            self._version, self._committed = committed.version, self.state
            self._header = change.header or self._header
            self._effects = {}
        for callback in _taken(self._before_sending):
            callback()
        if committed is not None:
            for step in committed.outbox_ids:
                self._outbox_publisher.take(step, outbox)
        for delivery in _taken(self._held):
            self._broker.ack(delivery)
        if events:
            self.on_events(events)
        for callback in _taken(self._afterwards):
            callback()

    def _change(self, events: list[AnyEvent], outbox: list[Entry], relayed: list[str]) -> StateChange | None:
        """Describe what differs from the last commit; None when nothing does."""
        before, now = self._committed.tasks, self.state.tasks
        changed = {id_: task for id_, task in now.items() if before.get(id_) is not task}
        header = dump_header(self.state)
        tasks: dict[str, str | None] = {id_: dump_task(task) for id_, task in changed.items()}
        tasks.update({id_: None for id_ in before if id_ not in now})
        if header == self._header and not (tasks or events or outbox or relayed):
            return None
        return StateChange(
            uuid.uuid4().hex,
            self._epoch,
            self._version,
            header=header if header != self._header else None,
            tasks=tasks,
            effects=self._effects,
            events=[event.model_dump_json() for event in events],
            outbox=[json.dumps(outbox)] if outbox else [],
            relayed=relayed,
        )

    # ---- relay ----
    def relay_all(self) -> None:
        """Send what an earlier server left in the outbox."""
        for step, text in self._store.outbox(self.state.job):
            self._outbox_publisher.take(step, json.loads(text))

    def _confirmed(self, step: str) -> None:
        """Forget a step's messages, soon, because the broker has the last of them."""
        if not self._relayed:
            self._loop.after(FORGET_SECONDS, self._forget)
        self._relayed.append(step)
        if self._outbox_publisher.is_idle and self._on_relayed is not None:
            self._loop.post(self._finish)

    def _forget(self) -> None:
        if self._relayed and not self._closed:
            self.commit()

    def when_relayed(self, callback: Callable[[], None]) -> None:
        """Call once the broker has every message, and none is left in the outbox."""
        self._on_relayed = callback
        if self._outbox_publisher.is_idle:
            self._loop.post(self._finish)

    def _finish(self) -> None:
        callback, self._on_relayed = self._on_relayed, None
        if callback is not None and not self._closed:
            self.commit()
            failpoints.hit(failpoints.Failpoint.RUN_WRITTEN)
            callback()

    def close(self) -> None:
        """Take no further step."""
        self._closed = True
        self._outbox_publisher.close()


def _taken(gathered: list[_Item]) -> list[_Item]:
    """Empty a list; returns what was in it."""
    taken = gathered.copy()
    gathered.clear()
    return taken
