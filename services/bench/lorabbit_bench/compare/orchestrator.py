"""Everything that `lorabbit compare` does between its options and its exit code.

Progress of a comparison: a line for each run that begins or ends; on a terminal, bars of those at work.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lorabbit.config.settings import ClientSettings, read_settings
from lorabbit.errors import BadInput
from lorabbit_bench.compare import report
from lorabbit_bench.compare.cache import CacheKeys, RunCache, RunOutcome, versions
from lorabbit_bench.compare.metrics import RunMetrics, run_metrics
from lorabbit_bench.compare.results import Comparison, compare
from lorabbit_bench.compare.runner import Parallelism, run_all
from lorabbit_bench.compare.sweep import RunSpec, Sweep
from lorabbit_cli.formatting import duration_text, score_text
from lorabbit_cli.local.embedded_run import NVIDIA_DEVICE


class CompareProgress:
    """Shows how runs go; use it as a context."""

    def __init__(self, rounds: Mapping[str, int], metrics: Mapping[str, str | None], console: Console) -> None:
        """Know every run that is still to do: name -> rounds, and the metric to show."""
        self._rounds, self._metrics, self._console = rounds, metrics, console
        self._done = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[score]}"), console=console)
        self._all: TaskID | None = None
        self._of: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Begin to draw, where there is a terminal."""
        if self._console.is_terminal and self._rounds:
            self._all = self._bars.add_task("runs", total=len(self._rounds), score="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        if self._all is not None:
            self._bars.stop()

    def started(self, name: str) -> None:
        """A run begins."""
        if self._all is not None:
            self._of[name] = self._bars.add_task(name, total=self._rounds[name], score="")

    def progressed(self, name: str, line: Mapping[str, Any]) -> None:
        """A round of a run ended, or was scored."""
        if name not in self._of:
            return
        if "round" in line:
            self._bars.update(self._of[name], completed=line["round"])
        scores = line.get("scores") or {}
        metric = self._metrics.get(name) or next((key for key in scores if key != "loss"), "loss")
        if metric in scores:
            self._bars.update(self._of[name], score=f"{metric} {score_text(scores[metric])}")

    def ended(self, name: str, outcome: RunOutcome) -> None:
        """A run is over: say so in a line that stays."""
        self._done += 1
        how = duration_text(outcome.wall_seconds) if outcome.status == "done" else f"failed: {outcome.reason}"
        line = f"{self._done}/{len(self._rounds)} {name}: {how}"
        style = "red" if outcome.status == "failed" else ""
        self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        if self._all is not None:
            self._bars.advance(self._all)
        if name in self._of:
            self._bars.remove_task(self._of.pop(name))


NOT_RUN = "not run yet"
WORK = ".work-"
"""Working folders in the cache; the number of the process that owns one follows."""


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What the command line asks for, beside the sweep."""

    out: Path
    cache: Path
    command: str
    only: tuple[str, ...] = ()
    jobs: int | None = None
    fresh: bool = False
    runs: bool = True
    """False: only report what is finished."""
    with_adapter: bool = False


@dataclass(frozen=True, slots=True)
class CompareResult:
    """What came of it."""

    folder: Path
    comparison: Comparison
    failed: Mapping[str, str]
    """Name of a run -> why it failed."""
    cached: int
    """Runs that were there already."""


def run_comparison(sweep: Sweep, asked: CompareOptions, console: Console) -> CompareResult:
    """Run what is missing, and write the report. Raises BadInput; a run that fails is in the result."""
    settings = read_settings(ClientSettings)
    wanted = _wanted(sweep, asked.only)
    device = settings.device
    if device == "auto":
        device = "cuda" if NVIDIA_DEVICE.exists() else "cpu"
    keys = CacheKeys(settings.data_root, device)
    by_key: dict[str, list[RunSpec]] = {}
    for planned in wanted:
        by_key.setdefault(keys.of(planned.spec), []).append(planned)
    cache, folder = RunCache(asked.cache), asked.out / sweep.name
    with _exclusive(folder):
        known = {} if asked.fresh else _known(cache, by_key, asked)
        todo = {key: runs[0] for key, runs in by_key.items() if key not in known}
        effort = choose_parallelism(device, settings.threads, asked, len(by_key))
        outcomes = known | (_run(todo, cache, effort, console) if asked.runs else {})
        reasons = {k: o.reason for k, o in outcomes.items() if o.status == "failed"}
        failed = {planned.name: reason for key, reason in reasons.items() for planned in by_key[key]}
        measures = _measures(sweep, by_key, outcomes, cache)
        present = {f"{m.case}/{m.label}/{m.seed}" for m in measures}
        missing = {p.name: failed.get(p.name, NOT_RUN) for p in wanted if p.name not in present}
        comparison = compare(sweep, measures, missing, versions())
        report.write(comparison, sweep, folder, asked.command)
    return CompareResult(folder, comparison, failed, len(known))


def _wanted(sweep: Sweep, patterns: Sequence[str]) -> list[RunSpec]:
    """Choose the runs whose names fit; raises BadInput when there are none."""
    wanted = [p for p in sweep.planned if not patterns or any(fnmatchcase(p.name, pattern) for pattern in patterns)]
    if not wanted:
        raise BadInput(f"--only: no run fits; the first one is named {sweep.planned[0].name}")
    return wanted


def _known(cache: RunCache, by_key: Mapping[str, object], asked: CompareOptions) -> dict[str, RunOutcome]:
    found = {key: cache.find(key, with_adapter=asked.with_adapter) for key in by_key}
    return {key: outcome for key, outcome in found.items() if outcome is not None}


def choose_parallelism(device: str, threads: int, asked: CompareOptions, runs: int) -> Parallelism:
    """Share the processors out: as many runs at once as there are processors for, one on a GPU.

    What is left over goes to the training processes of each run. The number of all runs decides, not of those
    still to do, so that a comparison that goes on measures time as it began.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores // threads) if device == "cpu" else 1
    jobs = asked.jobs or max(1, min(most, runs))
    return Parallelism(jobs, max(1, cores // (threads * jobs)), threads, device, asked.with_adapter)


def _run(todo: Mapping[str, RunSpec], cache: RunCache, effort: Parallelism, console: Console) -> dict[str, RunOutcome]:
    """Run these under a live view, in a working folder beside the cache that is removed afterwards."""
    if not todo:
        return {}
    rounds = {planned.name: planned.spec.rounds for planned in todo.values()}
    metrics = {planned.name: planned.spec.evaluation.metric for planned in todo.values()}
    place = cache.place("")
    try:
        place.mkdir(parents=True, exist_ok=True)
        _remove_scratch(place)
        scratch = tempfile.TemporaryDirectory(dir=place, prefix=f"{WORK}{os.getpid()}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInput(f"{place} cannot be written: {error.strerror}; name another folder with --cache") from error
    with scratch as folder, CompareProgress(rounds, metrics, console) as view:
        return run_all(todo, cache, Path(folder), effort, view)


def _remove_scratch(place: Path) -> None:
    """Remove the working folders of comparisons that were killed."""
    for left in place.glob(f"{WORK}*"):
        owner = left.name.removeprefix(WORK).partition("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _measures(
    sweep: Sweep, by_key: Mapping[str, Sequence[RunSpec]], outcomes: Mapping[str, RunOutcome], cache: RunCache
) -> list[RunMetrics]:
    """Measure every run that is done, in the order of the sweep."""
    metric = sweep.target.metric if sweep.target else None
    made = {
        planned.name: run_metrics(
            planned, cache.report(key), outcomes[key], metric=metric, link=sweep.link, device=sweep.device
        )
        for key, runs in by_key.items()
        if key in outcomes and outcomes[key].status == "done"
        for planned in runs
    }
    return [made[planned.name] for planned in sweep.planned if planned.name in made]


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold a comparison's folder; raises BadInput when another process does, or when it cannot be written."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BadInput(f"{folder} is being written by another lorabbit compare; name another --out") from None
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from error
    try:
        yield
    finally:
        lock.release()
