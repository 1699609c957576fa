"""One task on a client, from the journal to the verdict.

    fetching -> ready -> running -> offered -> sending -> committed -> (gone)

Every step can be repeated: an unanswered offer or commit is sent again with a growing delay, a second grant is
served, and after a crash the journal has the state. A task run ends with a verdict, a denial, a cancellation, or a
failure that the broker has confirmed.
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
    """What the task runs of one client share."""

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
    """A task run is ready or has stopped running: `run` the next ones."""


class ProgressReporter:
    """Sends the progress of one task to the server; for the loop thread.

    One message at a time is unconfirmed. A later report replaces the one that waits, so a task that trains for hours
    without a broker keeps two messages.
    """

    def __init__(self, send: Callable[[Message, OnDone | None], None], ids: Mapping[str, str]) -> None:
        """Report on the task whose `job`, `task` and `client` are in `ids`."""
        self._send, self._ids = send, ids
        self._latest: TaskProgress | None = None
        self._is_unconfirmed = False

    def report(self, fraction: float, loss: float | None) -> None:
        """Report the fraction done, and the loss if it is finite."""
        finite = loss if loss is not None and abs(loss) < float("inf") else None
        self._latest = TaskProgress(**self._ids, fraction=min(1.0, max(0.0, fraction)), loss=finite)
        self._send_latest()

    def stop(self) -> None:
        """Drop a report that waits; the task has ended."""
        self._latest = None

    def _send_latest(self) -> None:
        if self._is_unconfirmed or self._latest is None:
            return
        latest, self._latest = self._latest, None
        self._is_unconfirmed = True
        self._send(latest, self._on_sent)

    def _on_sent(self, _: LoRAbbitError | None) -> None:
        """Send the next report, whether the broker confirmed this one or not."""
        self._is_unconfirmed = False
        self._send_latest()


log = structlog.get_logger()

PROGRESS_SECONDS = 0.5
RETRY_SECONDS = 10.0
RETRY_MAX_SECONDS = 60.0
CHUNK_BYTES = 2**20
"""Chunk size of a result when the task has no payload whose size could be used."""
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
        self.message: Task | None = None
        self._pending_downloads = 0
        self._download_plan: DownloadPlan | None = None
        self._offer: Offer | None = None
        self._timer: Cancellable | None = None
        self._sender: ChunkSender | None = None
        self._offer_backoff = Backoff(RETRY_SECONDS, RETRY_MAX_SECONDS)
        self._unconfirmed = 0

    @property
    def is_in_outbox(self) -> bool:
        """Whether the result is on this client's disk."""
        return self._offer is not None

    # ---- up to the result ----
    def start(self, message: Task) -> None:
        """Start a journaled task: download its payloads, then run it."""
        self.message = message
        self.stage = "fetching"
        self.acknowledge()
        self._download_plan = self._context.accounting.plan_download(message)
        self._pending_downloads = len(self._download_plan.files)
        self._context.accounting.acquire(self._download_plan, self._on_payload_available)
        if not self._download_plan.files:
            self._set_ready()

    def acknowledge(self) -> None:
        """Confirm to the server that the task is journaled, at the start and on every redelivery."""
        self._context.send(TaskAccepted(**self._ids), None)

    def _on_payload_available(self, error: LoRAbbitError | None) -> None:
        if self.stage != "fetching" or self.message is None:
            return
        if error is not None:
            damaged = error.ref if isinstance(error, DamagedStream) else None
            self._fail(f"the task's payload could not be read: {error}", damaged=damaged)
            return
        self._pending_downloads -= 1
        if self._pending_downloads == 0:
            self._set_ready()

    def _set_ready(self) -> None:
        """All payloads are available; the agent decides when to run."""
        self.stage = "ready"
        self._context.advance()

    def run(self) -> None:
        """Hand the work to the runner."""
        message = self.message
        if message is None:
            return
        self._stop_timer()
        self.stage = "running"
        work = TaskInput(
            message,
            {role: self._context.cache.path(ref.sha256) for role, ref in message.payloads.items()},
            self._context.journal.output(self.task),
            self._context.journal.private(message.job, message.client),
            self._context.journal.ledger,
            () if self._download_plan is None else self._download_plan.decode_steps,
        )
        next_report = time.monotonic() + PROGRESS_SECONDS

        def on_progress(fraction: float, loss: float | None) -> None:
            nonlocal next_report
            failpoints.hit(failpoints.Failpoint.TRAINING)
            now = time.monotonic()
            if now >= next_report:
                next_report = now + PROGRESS_SECONDS
                self._context.broker.post(partial(self._report_progress, fraction, loss))

        def on_done(outcome: TaskResult) -> None:
            self._context.broker.post(partial(self._on_result, message, outcome))

        self._context.runner.submit(work, on_progress, on_done)

    def _report_progress(self, fraction: float, loss: float | None) -> None:
        if self.stage == "running":
            self._progress.report(fraction, loss)

    def _on_result(self, message: Task, outcome: TaskResult) -> None:
        """Put a result into the outbox and offer it, or report the failure."""
        if self.stage != "running":
            return
        self._progress.stop()
        if outcome.error is not None:
            self._log.warning("task-failed", why=outcome.error, **outcome.details)
            self._context.accounting.carry_over(message)
            self._fail(outcome.error, bad_input=outcome.bad_input, retry_delay_seconds=outcome.retry_delay_seconds)
            return
        bytes_by_role = {} if self._download_plan is None else dict(self._download_plan.bytes_by_role)
        offer = Offer(
            **self._ids,
            payload=self._payload(message, outcome),
            metrics=outcome.metrics,
            base_sha256=outcome.base_sha256,
            bytes_down=sum(bytes_by_role.values()),
            bytes_by_role=bytes_by_role,
        )
        self._context.journal.finish(offer)
        self._release_payloads()
        self.resume(offer)
        self._context.advance()

    def _payload(self, message: Task, outcome: TaskResult) -> PayloadRef | None:
        """Return the reference of the result's tensors, with the chunk size that the server uses."""
        if not outcome.has_tensors or outcome.sha256 is None:
            return None
        size = self._context.journal.output(self.task).stat().st_size
        cut = min((ref.chunk_bytes for ref in message.payloads.values()), default=CHUNK_BYTES)
        return PayloadRef(sha256=outcome.sha256, size_bytes=size, chunk_bytes=cut)

    def _fail(
        self,
        reason: str,
        *,
        bad_input: bool = False,
        damaged: PayloadRef | None = None,
        retry_delay_seconds: float = 0.0,
    ) -> None:
        """Report the failure, after a delay if given; the task ends when the broker has confirmed the message."""
        self._stop_timer()
        self.stage = "failed"
        self._context.advance()

        def sent(error: LoRAbbitError | None) -> None:
            if error is not None:
                self._log.warning("failure-not-sent", why=str(error))
            self._finish()

        failed = TaskFailed(**self._ids, reason=reason[:MAX_REASON], bad_input=bad_input, damaged=damaged)
        if retry_delay_seconds:
            self._timer = self._context.broker.after(retry_delay_seconds, lambda: self._context.send(failed, sent))
        else:
            self._context.send(failed, sent)

    # ---- from the outbox to the verdict ----
    def resume(self, offer: Offer) -> None:
        """Offer a result that is in the outbox."""
        self._offer = offer
        self._send_offer()

    def _send_offer(self) -> None:
        """Send the offer, and again until the server answers; at most one offer is unconfirmed."""
        self._stop_timer()
        if self._offer is None or self.stage == "gone":
            return
        if self._unconfirmed == 0:
            self._unconfirmed += 1
            self._context.send(self._offer, self._on_offer_sent)
        if self.stage != "committed":
            self.stage = "offered"
        self._timer = self._context.broker.after(RETRY_SECONDS + self._offer_backoff.next_seconds(), self._send_offer)

    def _on_offer_sent(self, error: LoRAbbitError | None) -> None:
        self._unconfirmed -= 1
        if error is not None:
            self._log.info("offer-not-sent", why=str(error))

    def on_grant(self, grant: Grant) -> None:
        """Send the missing chunks, then commit; a transfer that already runs continues."""
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
            partial(self._on_chunks_sent, grant.sha256),
            about=self._ids,
        )

    def _on_chunks_sent(self, sha256: str, error: LoRAbbitError | None) -> None:
        self._sender = None
        if self.stage != "sending":
            return
        if error is not None:
            self._log.warning("chunks-not-sent", why=str(error))
            self.stage = "offered"
            self._timer = self._context.broker.after(RETRY_SECONDS, self._send_offer)
            return
        self._commit(sha256)

    def _commit(self, sha256: str) -> None:
        """Tell the server that all chunks are sent; without a verdict, offer again later."""
        failpoints.hit(failpoints.Failpoint.UPLOAD_SENT)
        self.stage = "committed"
        self._context.send(Commit(**self._ids, sha256=sha256), None)
        self._timer = self._context.broker.after(RETRY_SECONDS, self._send_offer)

    def on_verdict(self, *, accepted: bool, reason: str) -> None:
        """End the task: the server has stored the result, or rejected it."""
        if not accepted:
            self._log.info("update-rejected", reason=reason)
        if self.stage == "running":
            self._context.runner.cancel(self.task)
        self._finish()

    def cancel(self) -> None:
        """Stop and drop the task: the server no longer wants it."""
        self.on_verdict(accepted=False, reason="cancelled")

    def stop(self) -> None:
        """Stop; the task stays in the journal for the next start of this process."""
        self._stop_timer()
        self._progress.stop()
        if self._sender is not None:
            self._sender.cancel()
        self.stage = "gone"

    def _finish(self) -> None:
        if self.stage == "gone":
            return
        self.stop()
        self._release_payloads()
        self._context.journal.forget(self.task)
        self._context.done(self.task)
        self._context.advance()

    def _release_payloads(self) -> None:
        plan, self._download_plan = self._download_plan, None
        if plan is not None:
            self._context.accounting.release(plan)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
