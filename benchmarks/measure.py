"""What the benchmarks share: a process measured, a table shown, the machine named."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

import psutil
import yaml


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children used."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    """Largest sum of proportional set sizes (shared pages counted once) over the process tree."""


@dataclass
class Sampler:
    """Sample the memory of named process groups a few times a second, in a thread."""

    groups: Mapping[str, Sequence[psutil.Process]]
    interval_seconds: float = 0.2
    peaks_mb: dict[str, float] = field(default_factory=dict)
    largest_mb: dict[str, float] = field(default_factory=dict)
    """Per group: the largest single process."""

    def __enter__(self) -> Self:
        """Start sampling."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last sample and stop."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            for name, processes in self.groups.items():
                sizes = [memory_mb(tree(p)) for p in processes]
                self.peaks_mb[name] = max(self.peaks_mb.get(name, 0.0), sum(sizes))
                self.largest_mb[name] = max(self.largest_mb.get(name, 0.0), max(sizes, default=0.0))
            if self._stop.wait(self.interval_seconds):
                return


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all its children."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_mb(processes: Iterable[psutil.Process]) -> float:
    """Sum of proportional set sizes, MB of 10^6 bytes: a page shared by two counts half for each."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return total / 1e6


def run_measured(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end; raises SystemExit with its output when it fails."""
    began, before = time.perf_counter(), os.times()
    with subprocess.Popen(  # noqa: S603, SIM117 - our own command; the sampler needs its pid
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})}
    ) as process:
        with Sampler({"all": [psutil.Process(process.pid)]}) as sampler:
            output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{output[-4000:]}")
    after = os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Usage(time.perf_counter() - began, cpu, sampler.peaks_mb["all"])


def yaml_file(path: Path, content: Mapping[str, object]) -> Path:
    """Write a job file."""
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return path


LOAD_BEFORE = os.getloadavg()[0]
"""Load of the machine (1 minute) when the script started."""
REPOSITORY = Path(__file__).resolve().parent.parent


def machine() -> dict[str, str]:
    """Name what the figures depend on."""
    return {
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load before": f"{LOAD_BEFORE:.1f}",
        "python": platform.python_version(),
        "lorabbit": version("lorabbit"),
    }


def stamp() -> dict[str, str]:
    """Name the commit that was measured and the date; a checkout with changes says so."""
    commit = _git("rev-parse", "--short=10", "HEAD") or "unknown"
    # Results of other benchmarks may have been written since the commit.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/stress", ":!docs")
    date = datetime.now(tz=UTC).strftime("%Y-%m-%d")
    return {"commit": f"{commit} with changes" if changed else commit, "date": date}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True)  # noqa: S603, S607
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one measurement."""

    title: str
    rows: Sequence[Mapping[str, object]]
    facts: Mapping[str, str]

    def markdown(self) -> str:
        """The rows as a Markdown table."""
        head = list(self.rows[0])
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(_show(row[name]) for name in head) + " |" for row in self.rows]
        facts = ", ".join(f"{name} {value}" for name, value in {**stamp(), **self.facts}.items())
        return f"### {self.title}\n\n" + "\n".join(lines) + f"\n\n{facts}\n"

    def show(self, out: Path | None) -> None:
        """Print the table; with `out`, keep it as Markdown and JSON beside each other."""
        print(self.markdown())
        if out is not None:
            out.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
            rows = [dict(row) for row in self.rows]
            content = {"title": self.title, **stamp(), "facts": dict(self.facts), "rows": rows}
            out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
