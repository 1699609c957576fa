"""The server: holds the lease, knows the clients and runs jobs one after the other.

Without the lease it stands by and changes nothing. With it, it continues whatever the store and
the files say is under way; a server that was killed at any instruction is thereby replaced by the
next one. When it is fenced off, or the store or the broker fails it, it forgets what it thought
and stands by again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery
from lorabbit.config.settings import ServerSettings
from lorabbit.errors import FilesMissing, NotDeclared, Retryable
from lorabbit.events.job_events import AnyEvent
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.state.base import JobEntry, StateStore
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher
from lorabbit_server.clients.enrollment import ClientAccess
from lorabbit_server.clients.registry import ClientRegistry
from lorabbit_server.context import VERSIONS, ServerContext, ServerOverrides
from lorabbit_server.engine import transitions
from lorabbit_server.engine.state import JobState
from lorabbit_server.event_loop import EventLoop, is_transient
from lorabbit_server.health.server_faults import ServerFaults
from lorabbit_server.job.enrollment_sync import RevocationWatcher
from lorabbit_server.job.job_runner import JobRunner
from lorabbit_server.job.message_router import MessageRouter

log = structlog.get_logger()
TICK_SECONDS = 1.0
"""Interval of periodic work of the leader, and of attempts of a standby to take the lease."""
CONTROL_PREFETCH = 256
DATA_PREFETCH = 32
Listener = Callable[[str, AnyEvent], None]


class Server:
    """See the module's docstring. `submit`, `cancel`, `start` are for any thread, callbacks come on the loop's."""

    def __init__(
        self,
        broker: Broker,
        store: StateStore,
        settings: ServerSettings,
        *,
        owner: str,
        overrides: ServerOverrides | None = None,
    ) -> None:
        """Serve over this broker and store; `owner` names this server in the lease, the same after a restart."""
        overrides = overrides or ServerOverrides()
        self.broker, self.store, self.settings = broker, store, settings
        self.payloads = PayloadStore(settings.folder / "payloads", durable=settings.durable)
        self.access = ClientAccess(store.enrollment, settings)
        self.owner, self._now = owner, overrides.now_ms
        self._tick_seconds = min(TICK_SECONDS, settings.lease_seconds / 3)
        self._loop = EventLoop(broker, self._step_down, worker=overrides.worker)
        self._listeners: list[Listener] = []
        self._on_job_ended: list[Callable[[str], None]] = []
        self._on_leading: list[Callable[[], None]] = []
        self._epoch: int | None = None
        self._run: JobRunner | None = None
        self._last_state: JobState | None = None
        self._registry = ClientRegistry(store, lease_ms=round(settings.client_lease_seconds * 1000))
        self._subscriptions: list[Cancellable] = []
        self._timers: list[Cancellable] = []
        self._context: ServerContext | None = None
        self._renewed_ms = 0
        self._expire: Callable[[int, int], None]
        self._last_holder: str | None = None
        self.refused: Counter[str] = Counter()
        self.faults = ServerFaults(round(settings.lease_seconds * 1000))

    # ---- for everybody ----
    def start(self) -> None:
        """Take the lease as soon as it is free, and continue the running job."""
        self.broker.on_broker_reset(lambda: self._step_down(NotDeclared("RabbitMQ lost all it had")))
        self._loop.post(self._stand_by)

    def submit(self, spec: JobSpec, *, operation: str = "") -> str:
        """Queue a job; returns its id, the same one for the same `operation`.

        Raises BadInput when the method or its settings cannot work.
        """
        build(spec)
        runs = self.settings.folder / "runs"
        taken = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        job = self.store.enqueue(
            spec.name, spec.model_dump_json(), taken=taken, now_ms=self._now(), operation=operation
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

    def on_leading(self, callback: Callable[[], None]) -> None:
        """Call back whenever this server has taken the lease."""
        self._on_leading.append(callback)

    @property
    def is_leading(self) -> bool:
        """Whether this server holds the lease."""
        return self._epoch is not None

    @property
    def registry(self) -> ClientRegistry:
        """The clients as this server saw them last; empty before it leads."""
        return self._registry

    @property
    def last_state(self) -> JobState | None:
        """The last known state of the running job, for when the store is unavailable."""
        return self._last_state if self._run is None else self._run.state

    def now_ms(self) -> int:
        """The server's clock."""
        return self._now()

    def drain(self, then: Callable[[], None]) -> None:
        """Commit the pending step, release the lease and call back on the loop, even after errors; from any thread."""

        def leave() -> None:
            with ExitStack() as last:
                last.callback(then)
                last.callback(self.close)
                if self._run is not None:
                    self._run.commit()

        self.broker.post(lambda: self._loop.guard(leave))

    def close(self) -> None:
        """Stop at once and give the lease up; on the loop thread, or after the loop has ended."""
        epoch = self._epoch
        self._reset()
        self._loop.close()
        if epoch is not None:
            self.store.release_lease(self.owner, epoch)

    # ---- the lease ----
    def _stand_by(self) -> None:
        """Take the lease if it is free, or try again soon."""
        if self._epoch is not None:
            return
        self._epoch = self.store.acquire_lease(self.owner, self.settings.lease_seconds)
        if self._epoch is None:
            holder = self.store.lease_holder()
            if holder != self._last_holder:
                log.info("standby", holder=holder)
            self._last_holder = holder
            self._timers = [self._loop.after(self._tick_seconds, self._stand_by)]
            return
        log.info("leader-elected", epoch=self._epoch)
        self._last_holder = None
        self._renewed_ms = self._now()
        for exchange in topology.EXCHANGES:
            self.broker.declare_exchange(exchange)
        for queue in topology.QUEUES:
            self.broker.declare_queue(queue)
        self._registry = ClientRegistry(
            self.store, self._epoch, lease_ms=round(self.settings.client_lease_seconds * 1000)
        )
        self._registry.load(self._now())
        publisher = StreamPublisher(self.broker, self.payloads, leads=partial(self.store.is_newest, self._epoch))
        parts = (self._loop, self.broker, self.store, self.payloads, publisher, self._registry, self.access)
        self._context = ServerContext(*parts, self.settings, self._now, self._epoch, VERSIONS, self.refused)
        router = MessageRouter(self._context, lambda: self._run, self._on_events)
        self._subscriptions = [
            RevocationWatcher(self._context, router.remove_clients),
            self._subscribe(topology.SERVER_QUEUE.name, router.on_control, CONTROL_PREFETCH),
            self._subscribe(topology.DATA_QUEUE.name, router.on_data, DATA_PREFETCH),
        ]
        self._expire = router.expire
        for callback in self._on_leading:
            callback()
        self._next_job()
        self._tick()

    def _subscribe(self, queue: str, on_delivery: Callable[[Delivery], None], prefetch: int) -> Cancellable:
        def take(delivery: Delivery) -> None:
            try:
                on_delivery(delivery)
            except Exception as error:
                if is_transient(error):
                    raise
                # a message that breaks this server must not come back to break it again
                log.exception("message-handling-failed", type=delivery.type, routing_key=delivery.routing_key)
                self.refused["broke-server"] += 1
                self.broker.reject(delivery)
                self._step_down(error)

        def guarded(delivery: Delivery) -> None:
            self._loop.guard(partial(take, delivery))

        return self.broker.subscribe(queue, guarded, prefetch=prefetch)

    def _tick(self) -> None:
        """Renew leases; expire clients; grant stalled uploads again."""
        if self._epoch is None:
            return
        now = self._now()
        if now - self._renewed_ms >= self.settings.lease_seconds * 1000 // 3:
            self.store.renew_lease(self.owner, self._epoch, self.settings.lease_seconds)
            self._registry.renew_leases()
            self._renewed_ms = now
            self._next_job()
        self._loop.post(partial(self._expire, now, round(self._tick_seconds * 1000)))  # behind what has arrived by now
        if self._run is not None:
            self._run.tick()
        self._timers = [self._loop.after(self._tick_seconds, self._tick)]

    def _step_down(self, error: Exception) -> None:
        """Drop all state and stand by; without the files of a job release the lease to a server that has them."""
        log.warning("leadership-lost", why=str(error))
        self.faults.record(error, self._now())
        epoch, pause = self._epoch, self._tick_seconds
        self._reset()
        if isinstance(error, FilesMissing) and epoch is not None:
            pause = self.settings.lease_seconds
            with suppress(Retryable):
                self.store.release_lease(self.owner, epoch)
        self._timers = [self._loop.after(pause, self._stand_by)]

    def _reset(self) -> None:
        for each in (*self._subscriptions, *self._timers):
            each.cancel()
        if self._run is not None:
            self._last_state = self._run.state
            self._run.close()
        if self._context is not None:
            self._context.publisher.close()
        self._subscriptions, self._timers = [], []
        self._run, self._epoch = None, None
        self._context = None

    # ---- jobs ----
    def _next_job(self) -> None:
        """Run the first job that has not ended; cancel it if that was requested."""
        if self._context is None:
            return
        entries = self.store.jobs()
        waiting = [e for e in entries.values() if e.status in {"running", "queued"}]
        waiting.sort(key=lambda e: e.status != "running")
        if self._run is None and waiting:
            self._open(waiting[0], self._context)
        if self._run is not None:
            current = entries.get(self._run.job)
            if current is not None and current.cancel_requested:
                self._apply(transitions.CancelRequested(self._now()))

    def _open(self, entry: JobEntry, context: ServerContext) -> None:
        """Run a job from its current state."""
        self.store.mark_job(entry.job, "running", epoch=context.epoch)
        record = self.store.claim_job(entry.job, context.epoch)
        run = JobRunner(context, entry.job, JobSpec.model_validate_json(entry.spec), record)
        run.on_events = partial(self._on_events, entry.job)
        run.on_end = partial(self._ended, entry.job)
        if not entry.cancel_requested:
            self.faults.check_files(run.state, self.payloads)
        self._run = run
        log.info("job-opened", job=entry.job, stage=run.state.stage)
        run.start(entry)

    def _ended(self, job: str) -> None:
        """Take the next job."""
        if self._run is not None and self._run.job == job:
            self._run.close()
            self._run = None
        for callback in self._on_job_ended:
            callback(job)
        self._loop.post(self._next_job)

    def _on_events(self, job: str, events: list[AnyEvent]) -> None:
        for event in events:
            for callback in self._listeners:
                callback(job, event)

    def _apply(self, event: transitions.Event) -> None:
        if self._run is not None:
            self._run.apply(event)
