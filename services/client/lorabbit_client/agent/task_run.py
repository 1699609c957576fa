"""One task on a client, from the journal to the verdict.

    fetching -> ready -> running -> offered -> sending -> committed -> (gone)

Every step may be repeated: an offer or a commit that stays unanswered is sent again with a growing
delay, a second grant is served, and whatever was done is found again in the journal after a crash.
A task run ends with a verdict, a denial, a cancellation, or a failure that the broker has taken.

`AgentContext` holds what the task runs of one client share.

Progress of one task on its way to the server, of which only the newest is worth anything.

One message at a time is with the broker. What is told meanwhile waits and is replaced by what is told later, so a task
that trains for hours while the broker is away keeps two messages, and not two for every second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog

from lorabbit.broker.base import Broker, Cancellable, OnDone
from lorabbit.errors import LoRAbbitError
from lorabbit.protocol.messages import (
    Commit,
    Grant,
    Message,
    Offer,
    PayloadRef,
    Task,
    TaskAccepted,
    TaskFailed,
    TaskProgress,
)
from lorabbit.runtime import failpoints
from lorabbit.runtime.backoff import Backoff
from lorabbit.transfer.chunked_transfer import ChunkSender, DamagedStream
from lorabbit_client.agent.journal import Journal
from lorabbit_client.agent.payload_cache import DownloadPlan, PayloadAccounting, PayloadCache
from lorabbit_client.execution.interface import Runner, TaskInput, TaskResult


@dataclass(frozen=True, slots=True)
class AgentContext:
    """One client's ways to the server, the disk and the training."""

    broker: Broker
    runner: Runner
    journal: Journal
    cache: PayloadCache
    accounting: PayloadAccounting
    address: str
    send: Callable[[Message, OnDone | None], None]
    done: Callable[[str], None]
    """The task is over: forget the task run."""
    advance: Callable[[], None]
    """A task run is ready, or no longer at work: `run` those whose turn it is."""


class ProgressReporter:
    """See the module's docstring; for the loop thread."""

    def __init__(self, send: Callable[[Message, OnDone | None], None], ids: Mapping[str, str]) -> None:
        """Tell of the task whose `job`, `task` and `client` are in `ids`."""
        self._send, self._ids = send, ids
        self._newest: TaskProgress | None = None
        self._is_out = False

    def tell(self, fraction: float, loss: float | None) -> None:
        """Tell how much is done, and the loss where it is finite."""
        finite = loss if loss is not None and abs(loss) < float("inf") else None
        self._newest = TaskProgress(**self._ids, fraction=min(1.0, max(0.0, fraction)), loss=finite)
        self._advance()

    def stop(self) -> None:
        """Tell nothing more: the work is over."""
        self._newest = None

    def _advance(self) -> None:
        if self._is_out or self._newest is None:
            return
        newest, self._newest = self._newest, None
        self._is_out = True
        self._send(newest, self._sent)

    def _sent(self, _: LoRAbbitError | None) -> None:
        """Go on whether the broker took it or not: the next one is newer."""
        self._is_out = False
        self._advance()


log = structlog.get_logger()

PROGRESS_SECONDS = 0.5
ASK_AGAIN_SECONDS = 10.0
ASK_AGAIN_MAX_SECONDS = 60.0
CHUNK_BYTES = 2**20
"""How a result is cut when the task brought no payload to take it from."""
MAX_REASON = 2000


class TaskRun:
    """See the module's docstring; for the loop thread."""

    def __init__(self, context: AgentContext, *, job: str, task: str, client: str) -> None:
        """Do nothing yet: `begin` or `resume`."""
        self._context = context
        self._ids = {"job": job, "task": task, "client": client}
        self._log = log.bind(**self._ids)
        self._progress = ProgressReporter(context.send, self._ids)
        self.task = task
        self.client = client
        self.stage = "new"
        self.order: Task | None = None
        self._awaited = 0
        self._reads: DownloadPlan | None = None
        self._offer: Offer | None = None
        self._timer: Cancellable | None = None
        self._sender: ChunkSender | None = None
        self._patience = Backoff(ASK_AGAIN_SECONDS, ASK_AGAIN_MAX_SECONDS)
        self._unconfirmed = 0

    @property
    def is_in_outbox(self) -> bool:
        """Tell whether the result is safe on this client's disk."""
        return self._offer is not None

    # ---- up to the result ----
    def begin(self, order: Task) -> None:
        """Start a journaled task: bring its payloads here, then run it."""
        self.order = order
        self.stage = "fetching"
        self.acknowledge()
        self._reads = self._context.accounting.read(order)
        self._awaited = len(self._reads.files)
        self._context.accounting.take(self._reads, self._fetched)
        if not self._reads.files:
            self._is_ready()

    def acknowledge(self) -> None:
        """Tell the server that the task is journaled, at the start and whenever it asks again."""
        self._context.send(TaskAccepted(**self._ids), None)

    def _fetched(self, error: LoRAbbitError | None) -> None:
        if self.stage != "fetching" or self.order is None:
            return
        if error is not None:
            damaged = error.ref if isinstance(error, DamagedStream) else None
            self._fail(f"the task's payload could not be read: {error}", damaged=damaged)
            return
        self._awaited -= 1
        if self._awaited == 0:
            self._is_ready()

    def _is_ready(self) -> None:
        """Everything is here; the agent decides when to run."""
        self.stage = "ready"
        self._context.advance()

    def run(self) -> None:
        """Hand the work to the runner."""
        order = self.order
        if order is None:
            return
        self._stop_timer()
        self.stage = "running"
        work = TaskInput(
            order,
            {role: self._context.cache.path(ref.sha256) for role, ref in order.payloads.items()},
            self._context.journal.output(self.task),
            self._context.journal.private(order.job, order.client),
            self._context.journal.ledger,
            () if self._reads is None else self._reads.recipes,
        )
        due = time.monotonic() + PROGRESS_SECONDS

        def on_progress(fraction: float, loss: float | None) -> None:
            nonlocal due
            failpoints.hit(failpoints.Failpoint.TRAINING)
            now = time.monotonic()
            if now >= due:
                due = now + PROGRESS_SECONDS
                self._context.broker.post(partial(self._progressed, fraction, loss))

        def on_done(outcome: TaskResult) -> None:
            self._context.broker.post(partial(self._finished, order, outcome))

        self._context.runner.submit(work, on_progress, on_done)

    def _progressed(self, fraction: float, loss: float | None) -> None:
        if self.stage == "running":
            self._progress.tell(fraction, loss)

    def _finished(self, order: Task, outcome: TaskResult) -> None:
        """Put a result into the outbox and offer it, or report the failure."""
        if self.stage != "running":
            return
        self._progress.stop()
        if outcome.error is not None:
            self._log.warning("task-failed", why=outcome.error, **outcome.details)
            self._context.accounting.carry_over(order)
            self._fail(outcome.error, bad_input=outcome.bad_input, rest_seconds=outcome.rest_seconds)
            return
        counted = {} if self._reads is None else dict(self._reads.counted)
        offer = Offer(
            **self._ids,
            payload=self._payload(order, outcome),
            metrics=outcome.metrics,
            base_sha256=outcome.base_sha256,
            bytes_down=sum(counted.values()),
            bytes_by_role=counted,
        )
        self._context.journal.finish(offer)
        self._give_payloads()
        self.resume(offer)
        self._context.advance()

    def _payload(self, order: Task, outcome: TaskResult) -> PayloadRef | None:
        """Name the result's tensors by content, cut as the server cuts its own."""
        if not outcome.has_tensors or outcome.sha256 is None:
            return None
        size = self._context.journal.output(self.task).stat().st_size
        cut = min((ref.chunk_bytes for ref in order.payloads.values()), default=CHUNK_BYTES)
        return PayloadRef(sha256=outcome.sha256, size_bytes=size, chunk_bytes=cut)

    def _fail(
        self, reason: str, *, bad_input: bool = False, damaged: PayloadRef | None = None, rest_seconds: float = 0.0
    ) -> None:
        """Hand the task back, after a rest; it is forgotten once the broker has taken the message."""
        self._stop_timer()
        self.stage = "failed"
        self._context.advance()

        def sent(error: LoRAbbitError | None) -> None:
            if error is not None:
                self._log.warning("failure-not-sent", why=str(error))
            self._end()

        failed = TaskFailed(**self._ids, reason=reason[:MAX_REASON], bad_input=bad_input, damaged=damaged)
        if rest_seconds:
            self._timer = self._context.broker.after(rest_seconds, lambda: self._context.send(failed, sent))
        else:
            self._context.send(failed, sent)

    # ---- from the outbox to the verdict ----
    def resume(self, offer: Offer) -> None:
        """Offer a result that is in the outbox."""
        self._offer = offer
        self._ask()

    def _ask(self) -> None:
        """Offer, and again later while no answer comes; one unconfirmed offer at a time."""
        self._stop_timer()
        if self._offer is None or self.stage == "gone":
            return
        if self._unconfirmed == 0:
            self._unconfirmed += 1
            self._context.send(self._offer, self._confirmed)
        if self.stage != "committed":
            self.stage = "offered"
        self._timer = self._context.broker.after(ASK_AGAIN_SECONDS + self._patience.next_seconds(), self._ask)

    def _confirmed(self, error: LoRAbbitError | None) -> None:
        self._unconfirmed -= 1
        if error is not None:
            self._log.info("offer-not-sent", why=str(error))

    def granted(self, grant: Grant) -> None:
        """Send the chunks that the server lacks, then commit; a sender at work goes on."""
        offer = self._offer
        if offer is None or offer.payload is None or offer.payload.sha256 != grant.sha256 or self.stage == "sending":
            return
        self._stop_timer()
        if not grant.missing:
            self._commit(grant.sha256)
            return
        self.stage = "sending"
        self._sender = ChunkSender(
            self._context.broker,
            self._context.address,
            offer.payload,
            self._context.journal.output(self.task),
            grant.missing,
            partial(self._sent, grant.sha256),
            about=self._ids,
        )

    def _sent(self, sha256: str, error: LoRAbbitError | None) -> None:
        self._sender = None
        if self.stage != "sending":
            return
        if error is not None:
            self._log.warning("chunks-not-sent", why=str(error))
            self.stage = "offered"
            self._timer = self._context.broker.after(ASK_AGAIN_SECONDS, self._ask)
            return
        self._commit(sha256)

    def _commit(self, sha256: str) -> None:
        """Tell the server that everything is sent; while no verdict comes, offer again."""
        failpoints.hit(failpoints.Failpoint.UPLOAD_SENT)
        self.stage = "committed"
        self._context.send(Commit(**self._ids, sha256=sha256), None)
        self._timer = self._context.broker.after(ASK_AGAIN_SECONDS, self._ask)

    def on_verdict(self, *, accepted: bool, reason: str) -> None:
        """Forget the task: the server has its result durably, or never wants it."""
        if not accepted:
            self._log.info("update-rejected", reason=reason)
        if self.stage == "running":
            self._context.runner.cancel(self.task)
        self._end()

    def cancel(self) -> None:
        """Stop whatever is going on: the task is no longer wanted."""
        self.on_verdict(accepted=False, reason="cancelled")

    def stop(self) -> None:
        """Stop without forgetting: the process ends, and the journal has the task."""
        self._stop_timer()
        self._progress.stop()
        if self._sender is not None:
            self._sender.cancel()
        self.stage = "gone"

    def _end(self) -> None:
        if self.stage == "gone":
            return
        self.stop()
        self._give_payloads()
        self._context.journal.forget(self.task)
        self._context.done(self.task)
        self._context.advance()

    def _give_payloads(self) -> None:
        reads, self._reads = self._reads, None
        if reads is not None:
            self._context.accounting.give(reads)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
