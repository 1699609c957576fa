"""RunFolder: what a run leaves behind for its user, kept current after every round.

Everything here is made from committed events and from payload files, so a restarted server makes
what is missing again. A file appears whole or not at all: it is written beside its place and then
renamed. `told` belongs to the loop; the work it returns may run on any one thread, in order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from lorabbit import events as ev
from lorabbit import jobfile
from lorabbit.jobspec import JobSpec
from lorabbit.payloads import PayloadStore
from lorabbit.report import Report, begin, fold

WEIGHTS = {"transformers": "model.safetensors"}
"""Name of the tensors' file by format; PEFT's for every other."""
EXPORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.json")
_Work = Callable[[], None]


class RunFolder:
    """See the module's docstring."""

    def __init__(self, folder: Path, job: str, spec: JobSpec, payloads: PayloadStore, *, durable: bool) -> None:
        """Keep the run of a job in this folder."""
        self.folder = folder
        self.report: Report = begin(job, spec)
        self._spec, self._payloads, self._durable = spec, payloads, durable
        self._export: Mapping[str, JsonValue] = {}
        self._lines = 0

    def recover(self, events: Iterable[ev.AnyEvent]) -> _Work:
        """Fold what was committed before this server started; returns the work that brings the folder up to date."""
        for event in events:
            self._fold(event)
        works = [self._write_job()]
        if self.report.rounds:
            last = max((r.round for r in self.report.rounds if r.sha256), default=0)
            works += [self._version(last), self._best()]
        return _in_order([*works, self._write_report(whole=True)])

    @property
    def recent(self) -> frozenset[str]:
        """Hashes of the adapters that a server may have published lately."""
        hashes = [self.report.first_sha256, *(r.sha256 for r in self.report.rounds[-3:])]
        return frozenset(sha256 for sha256 in hashes if sha256)

    def told(self, events: Iterable[ev.AnyEvent]) -> _Work | None:
        """Fold committed events; returns the work that they cause, None when there is none."""
        works: list[_Work] = []
        for event in events:
            self._fold(event)
            match event:
                case ev.JobStarted() | ev.AdapterInitialised():
                    works.append(self._write_job())
                case ev.RoundClosed(round=number):
                    works.append(self._version(number))
                case ev.RoundEvaluated(round=number):
                    works.append(self._best() if self.report.best.round == number else _nothing)
                case ev.JobEnded():
                    works.append(_nothing)
        return _in_order([*works, self._write_report(whole=False)]) if works else None

    def _fold(self, event: ev.AnyEvent) -> None:
        fold(self.report, [event])
        if isinstance(event, ev.AdapterInitialised):
            export = event.facts.get("export")
            self._export = export if isinstance(export, dict) else {}

    # ---- adapters ----
    def _version(self, number: int) -> _Work:
        """Export the adapter of a round as the newest, and as a checkpoint where one is due."""
        round_ = self.report.round_of(number)
        if round_ is None or round_.sha256 is None:
            return _nothing
        source = self._payloads.path(round_.sha256)
        output = self._spec.output
        due = output.keep_checkpoints > 0 and (number % output.checkpoint_every == 0 or number == self._spec.rounds)

        def work() -> None:
            if not source.exists():
                return
            self._export_to(self.folder / "adapter", source)
            if due:
                self._export_to(self.folder / f"checkpoint-{number}", source)
                self._prune()

        return work

    def _best(self) -> _Work:
        """Export the adapter of the best round."""
        best = self.report.best.model_copy()
        round_ = self.report.round_of(best.round)
        if round_ is None or round_.sha256 is None:
            return _nothing
        source = self._payloads.path(round_.sha256)

        def work() -> None:
            if source.exists():
                self._export_to(self.folder / "best", source)
                facts = {"round": best.round, "metrics": best.metrics}
                self._write(self.folder / "best" / "round.json", json.dumps(facts, indent=2) + "\n")

        return work

    def _export_to(self, folder: Path, source: Path) -> None:
        """Write an adapter folder that PEFT or transformers loads as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        files = self._export.get("files")
        for name, content in (files if isinstance(files, dict) else {}).items():
            if EXPORT_NAME.fullmatch(name):  # named by a client
                self._write(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
        weights = folder / WEIGHTS.get(str(self._export.get("format")), "adapter_model.safetensors")
        beside = weights.with_name(weights.name + ".part")
        shutil.copyfile(source, beside)
        self._settle(beside, weights)

    def _prune(self) -> None:
        """Delete the oldest checkpoints beyond the number that is kept."""
        found = [(int(p.name.removeprefix("checkpoint-")), p) for p in self.folder.glob("checkpoint-[0-9]*")]
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
            self._write(self.folder / "report.json", text)
            path = self.folder / "rounds.jsonl"
            if whole:
                self._write(path, "".join(lines))
            elif lines:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)

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
        text = jobfile.dump(self._spec, head=head)

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(self.folder / "job.yaml", text)

        return work

    def _write(self, path: Path, text: str) -> None:
        beside = path.with_name(path.name + ".part")
        beside.write_text(text, encoding="utf-8")
        self._settle(beside, path)

    def _settle(self, beside: Path, path: Path) -> None:
        """Put a file in its place, after its bytes."""
        if self._durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)


def _nothing() -> None:
    """No work."""


def _in_order(works: Iterable[_Work]) -> _Work:
    """One piece of work after the other."""
    todo = tuple(works)

    def work() -> None:
        for each in todo:
            each()

    return work
