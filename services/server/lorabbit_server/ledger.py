"""Ledger: everything one or more decisions changed, committed in one atomic step.

Deliveries that arrive together are decided one after the other and committed together, so the
store's fsync is paid once for all of them. Only after the commit are the deliveries that caused it
acknowledged, its events told and its messages sent. Messages are part of the commit (an outbox):
they are sent, confirmed by the broker and then forgotten with the next commit, so a server killed
in between sends them again; clients know a message they have seen.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace

import structlog

from lorabbit import codec
from lorabbit.broker import topology
from lorabbit.broker.base import Delivery, Outgoing
from lorabbit.errors import BrokerBusy, LoRAbbitError
from lorabbit.events import AnyEvent
from lorabbit.messages import Message
from lorabbit.state.base import Change, JobRecord
from lorabbit_server.jobstate import JobState, dump_header, dump_task
from lorabbit_server.tools import Tools

RELAY_AGAIN_SECONDS = 1.0
FORGET_SECONDS = 2.0
"""How long confirmed outbox entries may wait for a commit that takes them along."""

log = structlog.get_logger()


class Ledger:
    """The pending step of one job; for the loop thread."""

    def __init__(self, tools: Tools, state: JobState, record: JobRecord) -> None:
        """Continue from what the store holds."""
        self.state = state
        self.on_events: Callable[[list[AnyEvent]], None] = lambda _: None
        self._store, self._broker, self._loop, self._epoch = tools.store, tools.broker, tools.loop, tools.epoch
        self._version = record.version
        self._committed = state if record.header is not None else replace(state, tasks={})
        self._header = record.header
        self._events: list[AnyEvent] = []
        self._effects: dict[str, str] = {}
        self._outbox: list[dict[str, str]] = []
        self._relayed: list[str] = []
        self._held: list[Delivery] = []
        self._afterwards: list[Callable[[], None]] = []
        self._unconfirmed: dict[str, int] = {}
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

    def post(self, address: str, message: Message, *, message_id: str) -> int:
        """Put a message to a client into the outbox; returns the bytes of its body."""
        body = codec.encode(message).decode()
        entry = {"address": address, "type": message.type_name(), "body": body, "message_id": message_id}
        self._outbox.append(entry)
        self._schedule()
        return len(body)

    def hold(self, delivery: Delivery) -> None:
        """Acknowledge this delivery once its effect is durable."""
        self._held.append(delivery)
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
        if change is not None:
            committed = self._store.commit(self.state.job, change)
            self._version, self._committed = committed.version, self.state
            self._header = change.header or self._header
            self._effects = {}
            for entry in committed.outbox_ids:
                self._relay(entry, outbox)
        held, self._held = self._held, []
        for delivery in held:
            self._broker.ack(delivery)
        if events:
            self.on_events(events)
        afterwards, self._afterwards = self._afterwards, []
        for callback in afterwards:
            callback()

    def _change(self, events: list[AnyEvent], outbox: list[dict[str, str]], relayed: list[str]) -> Change | None:
        """Describe what differs from the last commit; None when nothing does."""
        before, now = self._committed.tasks, self.state.tasks
        changed = {id_: task for id_, task in now.items() if before.get(id_) is not task}
        header = dump_header(self.state)
        tasks: dict[str, str | None] = {id_: dump_task(task) for id_, task in changed.items()}
        tasks.update({id_: None for id_ in before if id_ not in now})
        if header == self._header and not (tasks or events or outbox or relayed):
            return None
        return Change(
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
        for entry, text in self._store.outbox(self.state.job):
            self._relay(entry, json.loads(text))

    def _relay(self, entry: str, messages: list[dict[str, str]]) -> None:
        """Send the messages of one step; they are forgotten together."""
        self._unconfirmed[entry] = len(messages)
        for message in messages:
            self._send(entry, message)

    def _send(self, entry: str, message: dict[str, str]) -> None:
        """Send one message until the broker has it."""
        if self._closed:
            return

        def done(error: LoRAbbitError | None) -> None:
            if isinstance(error, BrokerBusy):
                self._loop.after(RELAY_AGAIN_SECONDS, lambda: self._send(entry, message))
                return
            if error is not None:
                log.warning("message-undeliverable", address=message["address"], type=message["type"], why=str(error))
            self._confirmed(entry)

        self._broker.send(
            Outgoing(
                topology.CONTROL,
                topology.control_key(message["address"]),
                message["type"],
                message["body"].encode(),
                {"epoch": self._epoch},
                message["message_id"],
            ),
            done,
        )

    def _confirmed(self, entry: str) -> None:
        """Forget a step's messages, soon, once the broker has the last of them."""
        self._unconfirmed[entry] -= 1
        if self._unconfirmed[entry]:
            return
        del self._unconfirmed[entry]
        if not self._relayed:
            self._loop.after(FORGET_SECONDS, self._forget)
        self._relayed.append(entry)
        if not self._unconfirmed and self._on_relayed is not None:
            self._loop.post(self._finish)

    def _forget(self) -> None:
        if self._relayed and not self._closed:
            self.commit()

    def when_relayed(self, callback: Callable[[], None]) -> None:
        """Call once the broker has every message, and none is left in the outbox."""
        self._on_relayed = callback
        if not self._unconfirmed:
            self._loop.post(self._finish)

    def _finish(self) -> None:
        callback, self._on_relayed = self._on_relayed, None
        if callback is not None and not self._closed:
            self.commit()
            callback()

    def close(self) -> None:
        """Take no further step."""
        self._closed = True
