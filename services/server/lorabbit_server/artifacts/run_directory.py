"""The directory of a run: what it leaves to its user, updated after every round.

Everything here is made from committed events and from payload files, so a restarted server makes
what is missing again. How a file gets there: see `fenced_files`. `told` belongs to the loop; the work
it returns may run on any one thread, in order.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lorabbit import job_loader
from lorabbit.events import job_events as ev
from lorabbit.events.report import Report, begin, fold
from lorabbit.job.spec import JobSpec
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_server.artifacts.adapter_export import AdapterExporter
from lorabbit_server.artifacts.fenced_files import FencedFileWriter
from lorabbit_server.artifacts.update_archive import UpdateArchive

PAYLOADS_REMEMBERED = 1000
"""Number of most recent payloads that a stopped server may have left in streams."""
_Work = Callable[[], None]


class RunDirectory:
    """See the module's docstring."""

    def __init__(self, folder: Path, job: str, spec: JobSpec, payloads: PayloadStore, files: FencedFileWriter) -> None:
        """Keep the run of a job in this folder, which `files` writes."""
        self.folder = folder
        self.report: Report = begin(job, spec)
        self._spec, self._files = spec, files
        self._exporter = AdapterExporter(payloads, self._files)
        self._archive = UpdateArchive(folder, payloads, self._files, wanted=spec.output.keep_updates)
        self._published: deque[str] = deque(maxlen=PAYLOADS_REMEMBERED)
        self._lines = 0

    def recover(self, events: Iterable[ev.AnyEvent]) -> _Work:
        """Fold what was committed before this server started; returns the work that brings the folder up to date."""
        committed = list(events)
        self._exporter.on_events(committed)
        for event in committed:
            self._fold(event)
        works = [self._inherit, *self._archive.recover(committed), self._write_job()]
        if self.report.rounds:
            last = max((r.round for r in self.report.rounds if r.sha256), default=0)
            works += [self._version(last), self._best()]
        return _in_order([*works, self._write_report(whole=True)])

    @property
    def recent(self) -> frozenset[str]:
        """Hashes of the payloads that a server may have published and not withdrawn."""
        return frozenset(self._published)

    def on_events(self, events: Sequence[ev.AnyEvent]) -> _Work | None:
        """Fold committed events; returns the work that they cause, None when there is none."""
        works: list[_Work] = []
        kept = self._archive.on_events(events)
        self._exporter.on_events(events)
        for event in events:
            self._fold(event)
            match event:
                case ev.JobStarted() | ev.AdapterInitialized():
                    works.append(self._write_job())
                case ev.RoundClosed(round=number):
                    works.append(self._version(number))
                case ev.RoundEvaluated(round=number):
                    works.append(self._best() if self.report.best.round == number else _nothing)
                case ev.JobEnded():
                    works.append(_nothing)
        works += [self._write_report(whole=False)] if works else []
        return _in_order([*kept, *works]) if kept or works else None

    def _fold(self, event: ev.AnyEvent) -> None:
        fold(self.report, [event])
        if isinstance(event, ev.PayloadPublished):
            self._published.append(event.sha256)

    def _inherit(self) -> None:
        self._files.inherit(self.folder)

    # ---- adapters ----
    def _version(self, number: int) -> _Work:
        """Export the adapter of a round as the newest, and as a checkpoint where one is due."""
        if number == 0:
            return _nothing
        output = self._spec.output
        due = output.keep_checkpoints > 0 and (number % output.checkpoint_every == 0 or number == self._spec.rounds)
        works = [self._exporter.folder(number, self.folder / "adapter")]
        if due:
            works.append(self._exporter.folder(number, self.folder / f"checkpoint-{number}", self._prune))
        return _in_order(works)

    def _best(self) -> _Work:
        """Export the adapter of the best round."""
        best = self.report.best.model_copy()
        facts = json.dumps({"round": best.round, "metrics": best.metrics}, indent=2) + "\n"
        folder = self.folder / "best"
        return self._exporter.folder(best.round, folder, lambda: self._files.write(folder / "round.json", facts))

    def _prune(self) -> None:
        """Delete the oldest checkpoints beyond the number that is kept."""
        found = [(int(p.name.removeprefix("checkpoint-")), p) for p in self.folder.glob("checkpoint-[0-9]*")]
        self._files.fence()
        for _, path in sorted(found)[: -self._spec.output.keep_checkpoints]:
            shutil.rmtree(path)

    # ---- texts ----
    def _write_report(self, *, whole: bool) -> _Work:
        """Write report.json as it is now, and the lines of rounds that are complete."""
        text = self.report.model_dump_json(indent=2) + "\n"
        complete = self._complete()
        lines = [r.model_dump_json() + "\n" for r in self.report.rounds[0 if whole else self._lines : complete]]
        self._lines = max(complete, self._lines)

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files.write(self.folder / "report.json", text)
            path = self.folder / "rounds.jsonl"
            if whole:
                self._files.write(path, "".join(lines))
            elif lines:
                self._files.append(path, "".join(lines))

        return work

    def _complete(self) -> int:
        """How many rounds, from the first on, will not change any more."""
        ended = self.report.status != "running"
        complete = 0
        for round_ in self.report.rounds:
            if round_.sha256 is None or (self._spec.evaluates(round_.round) and not round_.metrics and not ended):
                break
            complete += 1
        return complete

    def _write_job(self) -> _Work:
        """Write the job as it was resolved; it runs again as it stands."""
        versions = ", ".join(f"{name} {version}" for name, version in self.report.versions.items())
        head = f"Job {self.report.job}, resolved; run it again with: lorabbit run job.yaml"
        if versions:
            head += f"\nversions: {versions}"
        text = job_loader.dump(self._spec, head=head)

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files.write(self.folder / "job.yaml", text)

        return work


def _nothing() -> None:
    """No work."""


def _in_order(works: Iterable[_Work]) -> _Work:
    """One piece of work after the other."""
    todo = tuple(works)

    def work() -> None:
        for each in todo:
            each()

    return work
