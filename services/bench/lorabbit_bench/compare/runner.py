"""Runs: carry out what a comparison still lacks, several at once, and put each into the cache as it ends.

Every run is a process of its own with a working folder of its own, so that a run that fails or is
killed takes nothing with it. One thread watches their output; there is nothing to poll.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lorabbit import job_loader
from lorabbit_bench.compare.cache import RunCache, RunOutcome, sources
from lorabbit_bench.compare.sweep import RunSpec

READ_BYTES = 65536
LAST_LINES = 3
"""Of a run's standard error, when it says nothing else of why it failed."""


class RunListener(Protocol):
    """Who is told how runs go; `name` is a planned run's name."""

    def started(self, name: str) -> None:
        """A run begins."""

    def progressed(self, name: str, line: Mapping[str, Any]) -> None:
        """A run said something of a round."""

    def ended(self, name: str, outcome: RunOutcome) -> None:
        """A run is over, well or not."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How much of the machine runs may take."""

    jobs: int
    """Runs at once."""
    workers: int
    """Training processes of each."""
    threads: int = 1
    device: str = "cpu"
    with_adapter: bool = False


@dataclass(slots=True)
class _Running:
    """A run's process, and what it said so far."""

    key: str
    planned: RunSpec
    process: subprocess.Popen[bytes]
    folder: Path
    rest: bytes = b""
    end: dict[str, Any] = field(default_factory=dict)


def run_all(
    todo: Mapping[str, RunSpec], cache: RunCache, scratch: Path, effort: Parallelism, watch: RunListener
) -> dict[str, RunOutcome]:
    """Run each key's job and return key -> outcome; whatever stops this stops the runs."""
    crew = _ProcessPool(cache, scratch, effort, watch)
    try:
        return crew.work(todo)
    finally:
        crew.stop()


class _ProcessPool:
    """The runs that are at work, watched by one selector."""

    def __init__(self, cache: RunCache, scratch: Path, effort: Parallelism, watch: RunListener) -> None:
        """Start nothing yet."""
        self._cache, self._scratch, self._effort, self._watch = cache, scratch, effort, watch
        self._sources = sources()
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, _Running] = {}
        self._outcomes: dict[str, RunOutcome] = {}

    def work(self, todo: Mapping[str, RunSpec]) -> dict[str, RunOutcome]:
        """Keep as many runs going as the effort allows, until there are none left."""
        waiting = deque(todo.items())
        while waiting or self._running:
            while waiting and len(self._running) < self._effort.jobs:
                self._start(*waiting.popleft())
            for ready, _ in self._selector.select():
                self._read(self._running[ready.fd])
        return self._outcomes

    def stop(self) -> None:
        """End whatever still runs."""
        for running in self._running.values():
            _end(running.process)
        self._running.clear()
        self._selector.close()

    def _start(self, key: str, planned: RunSpec) -> None:
        folder = self._scratch / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = folder / "job.yaml"
        job.write_text(job_loader.dump(planned.spec), encoding="utf-8")
        command = [sys.executable, "-m", "lorabbit_bench.compare.worker", str(job), str(folder / "runs")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - this program's own module
                [*command, str(self._effort.workers), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdout is not None  # noqa: S101 - it was asked for
        running = _Running(key, planned, process, folder)
        self._running[process.stdout.fileno()] = running
        self._selector.register(process.stdout, selectors.EVENT_READ)
        self._watch.started(planned.name)

    def _read(self, running: _Running) -> None:
        """Take in what a run said; nothing more to read means that it is over."""
        assert running.process.stdout is not None  # noqa: S101 - as above
        chunk = os.read(running.process.stdout.fileno(), READ_BYTES)
        if not chunk:
            self._finished(running)
            return
        *lines, running.rest = (running.rest + chunk).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "end" in said:
                running.end = said
            else:
                self._watch.progressed(running.planned.name, said)

    def _finished(self, running: _Running) -> None:
        """Keep what came of a run."""
        stdout = running.process.stdout
        assert stdout is not None  # noqa: S101 - as above
        self._selector.unregister(stdout)
        del self._running[stdout.fileno()]
        stdout.close()
        code = running.process.wait()
        outcome = self._outcome(running, code)
        if outcome.status == "done":
            self._cache.put(Path(running.end["folder"]), outcome, with_adapter=self._effort.with_adapter)
        self._outcomes[running.key] = outcome
        shutil.rmtree(running.folder, ignore_errors=True)
        self._watch.ended(running.planned.name, outcome)

    def _outcome(self, running: _Running, code: int) -> RunOutcome:
        said = {name: value for name, value in running.end.items() if name not in {"end", "folder"}}
        status = "done" if running.end.get("end") == "done" and code == 0 else "failed"
        if status == "failed" and not said.get("reason"):
            said["reason"] = _log_tail(running.folder / "log", code)
        known = {"device": self._effort.device, "workers": self._effort.workers, "threads": self._effort.threads}
        return RunOutcome.model_validate(
            {"key": running.key, "status": status, "sources": self._sources, **known, **said}
        )


def _log_tail(log: Path, code: int) -> str:
    """What a process that said nothing of its end wrote last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "; ".join([f"the run's process ended with {how}", *lines])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run and everything it started, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
