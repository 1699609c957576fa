"""Execution of one job: passes events to `decide` and performs the commands.

All changes of a decision are one step, which the unit of work commits before messages are sent or events are
published. Slow work (hashing, validation, aggregation, export) runs on the worker thread and returns as an event.
After a crash the next server repeats the commands that follow from the state in the store.

`RoundTimer` is the timer of the round's deadline. The deadline is part of the state, so it survives a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog

from lorabbit.broker.base import Cancellable, Delivery
from lorabbit.errors import Refused
from lorabbit.events import job_events as ev
from lorabbit.events.job_events import EVENTS, AnyEvent
from lorabbit.job.spec import CompressionSpec, JobSpec
from lorabbit.methods.registry import build
from lorabbit.protocol.messages import CancelTask, Deny, ForTask, Offer, Task, TaskFailed, Verdict
from lorabbit.runtime import failpoints
from lorabbit.state.base import JobEntry, JobRecord
from lorabbit.types import INITIALIZE, ClientId
from lorabbit_server.aggregation import aggregator
from lorabbit_server.aggregation.model_versions import ModelVersionStore
from lorabbit_server.artifacts.fenced_files import FencedFileWriter
from lorabbit_server.artifacts.run_directory import RunDirectory
from lorabbit_server.context import ServerContext
from lorabbit_server.engine import transitions
from lorabbit_server.engine.reducer import decide, resume
from lorabbit_server.engine.state import JobState, TaskState, UploadOffer, load_state
from lorabbit_server.engine.transitions import DeadlinePassed, Event, SetDeadline
from lorabbit_server.job.task_builder import TaskBuilder
from lorabbit_server.job.unit_of_work import PendingMessage, Step, UnitOfWork
from lorabbit_server.transfer.downloads import Downloads
from lorabbit_server.transfer.traffic_meter import TrafficMeter
from lorabbit_server.transfer.uploads import Uploads, refusal


class RoundTimer:
    """The timer of the round's deadline; for the loop thread."""

    def __init__(self, context: ServerContext, on_deadline: Callable[[Event], None]) -> None:
        """Call `on_deadline` with the event when the deadline passes."""
        self._context, self._on_deadline = context, on_deadline
        self._timer: Cancellable | None = None

    def set(self, command: SetDeadline) -> None:
        """Replace the deadline; one in the past fires at once."""
        self.close()
        seconds = max(0, command.at_ms - self._context.now_ms()) / 1000
        self._timer = self._context.loop.after(seconds, partial(self._on_timeout, command.round))

    def _on_timeout(self, number: int) -> None:
        self._timer = None
        self._on_deadline(DeadlinePassed(number, self._context.now_ms()))

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


log = structlog.get_logger()
Callback = Callable[[], None]


class JobRunner:
    """See the module's docstring; for the loop thread."""

    def __init__(self, context: ServerContext, job: str, spec: JobSpec, record: JobRecord) -> None:
        """Start a job, or continue it from its record in the store."""
        self.job, self.spec = job, spec
        self.on_events: Callable[[list[AnyEvent]], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        state = JobState(job, spec) if record.header is None else load_state(record.header, spec, record.tasks)
        self._is_new = record.header is None
        files = FencedFileWriter(context.settings.durable, context.epoch, context.fence)
        self._context, self._meter = context, TrafficMeter(context.traffic_of(job), files)
        self._method = build(spec)
        self._versions = ModelVersionStore(
            self._method, context.payloads, context.settings.chunk_bytes, spec.transport.downloads
        )
        self._task_builder = TaskBuilder(self._method, self._versions, context.registry, epoch=context.epoch)
        self.uploads = Uploads(context, job, self._meter, self._on_checked)
        """Takes chunks and commits straight from the message router."""
        self._downloads = Downloads(context, self._is_needed, self._fail_job)
        self._round_timer = RoundTimer(context, self.apply)
        folder = context.settings.folder / "runs" / job
        self._run_directory = RunDirectory(folder, job, spec, context.payloads, files)
        self._unit_of_work = UnitOfWork(context, state, record, self._meter, self._fail_job)
        self._unit_of_work.on_events = self._on_committed

    @property
    def state(self) -> JobState:
        """The state as decided, which may be a step ahead of the store."""
        return self._unit_of_work.state

    def start(self, entry: JobEntry) -> None:
        """Start the job, or repeat the commands that a stopped server did not finish."""
        if self._is_new:
            self._unit_of_work.add(Step(self.state, events=[ev.JobSubmitted(at_ms=entry.submitted_ms)]))
        else:
            self._recover(resumes=not entry.cancel_requested)
        self._downloads.delete_leftovers()
        if self.state.stage == "ended":
            self._unit_of_work.add(Step(self.state, after_commit=[self._end_job]))
        elif entry.cancel_requested:
            self.apply(transitions.CancelRequested(self._now()))
        else:
            self.apply(transitions.JobOpened(tuple(here := self._context.registry.capabilities), self._now(), here))

    def _recover(self, *, resumes: bool) -> None:
        """Repeat what a stopped server may not have finished: files; if the job resumes, also streams and commands."""
        logged = self._context.store.events(self.job, progress=False)
        self._write(self._run_directory.recover(EVENTS.validate_json(each.event) for each in logged))
        self._downloads.inherit(self._run_directory.recent)
        self.uploads.inherit()
        for task in self.state.tasks.values() if resumes else ():
            if task.status != "accepted":
                self._downloads.publish(ref for _, ref in self._task_builder.message(self.state, task).published)
        self._unit_of_work.resend_all()
        for command in resume(self.state) if resumes else ():
            self._deferred(command)()  # now: chunks that are already queued arrive before the next commit

    def commit(self) -> None:
        """Commit the pending step now."""
        self._unit_of_work.commit()

    def close(self) -> None:
        """Stop; the store holds what the next server needs."""
        self._round_timer.close()
        self._unit_of_work.close()

    # ---- events ----
    def apply(self, event: transitions.Event, delivery: Delivery | None = None) -> None:
        """Apply an event and perform the commands; `delivery` is acknowledged after the commit."""
        before = self.state
        state, commands = decide(before, event)
        step = Step(state, [] if delivery is None else [delivery])
        for command in commands:
            self._perform(command, step)
        unneeded = self._release(before, state)
        if unneeded:
            step.after_commit.append(lambda: self._downloads.delete_unneeded(unneeded))
        self._unit_of_work.add(step)

    def _release(self, before: JobState, now: JobState) -> frozenset[str]:
        """Release what a decision made unnecessary; returns the hashes of files that are no longer needed."""
        tasks = now.tasks
        removed = not before.tasks.keys() <= tasks.keys()
        changed = [
            task for id_, task in before.tasks.items() if id_ in tasks and tasks[id_].offered is not task.offered
        ]
        unneeded = self.uploads.retain(tasks) if changed or removed else frozenset()
        unneeded |= {task.offered.payload.sha256 for task in changed if task.offered and task.offered.payload}
        if not unneeded and not removed and now.head is before.head:
            return unneeded
        self._meter.retain(tasks.keys())
        return unneeded | self._versions.retain(now.versions) | (before.payloads - now.payloads)

    def on_offer(self, message: Offer, delivery: Delivery, client: ClientId) -> None:
        """Check an offer and answer it; the delivery is acknowledged after the commit."""
        task = self.state.tasks.get(message.task)
        wants_tensors, limit = None, self._context.settings.max_payload_bytes
        if task is not None and task.status != "accepted":
            try:
                wants_tensors = self._task_builder.check_offer(self.state, task, message.payload, max_bytes=limit)
            except Refused as why:
                refused = transitions.UpdateFailedValidation(
                    task.id, why.reason, why.detail, before_upload=True, at_ms=self._now()
                )
                self.apply(refused, delivery)
                return
        self.apply(
            transitions.OfferReceived(
                message.task,
                client,
                UploadOffer.of(message),
                was_accepted=task is None and self._context.store.effect(self.job, message.task) is not None,
                wants_tensors=wants_tensors,
                traffic=self._meter.read(message.task),
                at_ms=self._now(),
            ),
            delivery,
        )

    def on_task_failed(self, message: TaskFailed, delivery: Delivery, client: ClientId) -> None:
        """Handle a task that its client could not do."""
        failure = transitions.TaskFailureReceived(message.task, client, message.reason, message.bad_input, self._now())
        self.apply(failure, delivery)

    def meter(self, task: str, delivery: Delivery) -> None:
        """Count the bytes of a control message from a client."""
        self._meter.received(task, delivery)

    def tick(self) -> None:
        """Grant stalled uploads again."""
        self.uploads.regrant_stalled(frozenset(self.state.lost))

    # ---- commands ----
    def _perform(self, command: transitions.Command, step: Step) -> None:
        """Add the effects of a command to a step: changes, messages, and callbacks for after the commit."""
        match command:
            case transitions.AppendEvent(event):
                step.events.append(event)
            case transitions.MarkAccepted(id_, sha256):
                step.effects[id_] = sha256
            case transitions.SendTask(task):
                self._send_task(task, step)
            case transitions.SendCancelTask(id_, client):
                self._post(step, client, CancelTask(job=self.job, task=id_, client=client), f"{id_}.cancel")
            case transitions.DenyUpload(id_, client, reason):
                self._context.refused[reason] += 1
                denied = Deny(job=self.job, task=id_, client=client, reason=reason)
                self._post(step, client, denied, f"{id_}.deny")
            case transitions.SendVerdict(id_, client, accepted, reason):
                verdict = Verdict(job=self.job, task=id_, client=client, accepted=accepted, reason=reason)
                self._post(step, client, verdict, f"{id_}.verdict")
            case _:
                step.after_commit.append(self._deferred(command))

    def _deferred(self, command: transitions.DeferredCommand) -> Callback:
        """Return what a command does after the commit."""
        match command:
            case transitions.GrantUpload(task):
                return lambda: self._open_upload(task)
            case transitions.StartMethod(task):
                return lambda: self._start_method(task)
            case transitions.Aggregate():
                return lambda: self._aggregate(command)
            case transitions.SetDeadline():
                return lambda: self._round_timer.set(command)
            case transitions.EndJob():
                return self._end_job

    def _send_task(self, task: TaskState, step: Step) -> None:
        """Put a task into the outbox; its payloads are published before it is sent."""
        message = self._task_builder.message(step.state, task)
        refs = [ref for _, ref in message.published]
        for role, ref in self._downloads.announce(message.published):
            published = ev.PayloadPublished(at_ms=self._now(), round=step.state.round, role=role, **ref.content)
            step.events.append(published)
        step.before_sending.append(lambda: self._downloads.publish(refs))
        self._post(step, task.client, message, f"{task.id}.{message.attempt}.{self._context.epoch}")

    def _post(self, step: Step, client: ClientId, message: ForTask | Task, message_id: str) -> None:
        """Put a message into the outbox; a client without an address gets its tasks after its next hello."""
        entry = self._context.registry.get(client)
        if entry is None:
            return
        if isinstance(message, Task):
            failpoints.hit(failpoints.Failpoint.TASK_DECIDED)
        step.messages.append(PendingMessage(entry.address, message, message_id))

    # ---- uploads ----
    def _open_upload(self, task: TaskState) -> None:
        current = self.state.tasks.get(task.id)
        if current is not None and current.status == "offered":
            self.uploads.expect(current, self._task_builder.expected(self.state, current))

    def _on_checked(self, task: TaskState, found: CompressionSpec | Exception) -> None:
        """Accept a payload that passed validation, unless its offer was replaced meanwhile."""
        current = self.state.tasks.get(task.id)
        if current is None or current.status != "offered" or current.offered != task.offered:
            return
        if not isinstance(found, Exception):
            self.apply(transitions.UpdateReceived(task.id, self._meter.read(task.id), self._now(), found.word))
        elif self.uploads.allows_repeat(task, found):
            self._open_upload(task)
        elif (why := refusal(found)) is None:
            self._fail_job(f"checking the {task.phase} result of {task.client}", found)
        else:
            self.apply(transitions.UpdateFailedValidation(task.id, why.reason, why.detail, at_ms=self._now()))

    def _is_needed(self, sha256: str) -> bool:
        """Whether the job may still read a payload; for any thread."""
        state = self.state
        if state.stage == "ended":
            return False
        return sha256 in state.payloads or sha256 in self._versions.unclaimed or sha256 in self._versions.current

    def _start_method(self, task: TaskState) -> None:
        """Make the first server state from the initial adapter, on the worker thread."""
        offered = task.offered
        if task.phase != INITIALIZE or offered is None:
            return

        facts = self._context.with_versions(offered.metrics.facts)
        work = partial(aggregator.start_method, self._versions, task, facts)
        self._context.loop.work(
            work, self._on_deferred_done, lambda error: self._fail_job("starting the method", error)
        )

    def _aggregate(self, command: transitions.Aggregate) -> None:
        """Aggregate the round's updates into the next server state, on the worker thread."""
        if self.state.head is None:
            return
        background = self._task_builder.update_context(self.state, command.tasks)
        state = self._versions.load(self.state.head)

        work = partial(aggregator.aggregate_round, self._versions, state, command, background=background)
        self._context.loop.work(
            work, self._on_deferred_done, partial(self._fail_job, f"aggregating round {command.round}")
        )

    def _on_deferred_done(
        self, event: transitions.MethodStarted | transitions.RoundAggregated | transitions.UpdatesUnusable
    ) -> None:
        """Apply the result of deferred work; the state now references the files that it wrote, or nothing does."""
        self.apply(replace(event, at_ms=self._now()))
        self._versions.unclaimed.clear()

    def _fail_job(self, what: str, error: Exception) -> None:
        """End the job after an error in the server's own work; a retry would fail in the same way."""
        log.error("job-step-failed", job=self.job, what=what, why=repr(error))
        reason = f"{what} failed: {error or type(error).__name__}"
        self.apply(transitions.ServerWorkFailed(reason, getattr(error, "exit_code", 1), self._now()))

    # ---- the run directory and the end ----
    def _on_committed(self, events: list[AnyEvent]) -> None:
        """Pass committed events to the run directory and to the listeners."""
        self._write(self._run_directory.on_events(events))
        self.on_events(events)

    def _write(self, work: Callback | None) -> None:
        if work is not None:
            self._context.loop.work(work, lambda _: None, lambda error: self._fail_job("writing the run", error))

    def _end_job(self) -> None:
        """Wait until all files are written and all messages are sent, then finish the job."""

        def written(_: object) -> None:
            self._unit_of_work.when_delivered(self._finish)

        self._downloads.delete_leftovers()
        self._context.loop.work(lambda: None, written, written)

    def _finish(self) -> None:
        self._meter.retain(())
        state = self.state
        status = "done" if state.outcome == "running" else state.outcome
        reason, exit_code = state.reason, state.exit_code
        self._context.store.mark_job(self.job, status, epoch=self._context.epoch, reason=reason, exit_code=exit_code)
        self.on_end()

    def _now(self) -> int:
        return self._context.now_ms()
