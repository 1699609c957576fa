"""Usage: memory and processor time of the tiers of a federation, sampled while it works.

Usage of containers, as their Docker engine counts it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import psutil
from docker.errors import DockerException
from docker.models.containers import Container
from requests import RequestException

from lorabbit_cli.scaling.docker_engine import DockerEngine

MEGABYTE = 1e6
OVERHEAD = 30
"""Sampling pauses for so many times the time that a sample took, so that it costs little at any size."""
SHORTEST_PAUSE = 0.3
TIERS = ("server", "broker", "store", "clients")


@dataclass(frozen=True, slots=True)
class UsageSample:
    """What one tier uses at a moment."""

    memory_mb: float
    cpu_seconds: float
    """Since it was started."""


Meter = Callable[[], Mapping[str, UsageSample]]
"""Reads every tier that can be read; a broker on another machine is left out."""


def read_processes(tiers: Mapping[str, Iterable[int]]) -> dict[str, UsageSample]:
    """Read process trees by tier. Memory is the proportional set size: a page that two share counts half for each."""
    return {tier: _sum(pids) for tier, pids in tiers.items()}


def _sum(pids: Iterable[int]) -> UsageSample:
    memory = cpu = 0.0
    for process in _trees(pids):
        try:
            with process.oneshot():
                times = process.cpu_times()
                memory += process.memory_full_info().pss / MEGABYTE
                cpu += times.user + times.system
        except psutil.Error:
            continue
    return UsageSample(memory, cpu)


def _trees(pids: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        try:
            root = psutil.Process(pid)
            found += [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
    return found


@dataclass
class UsageSampler:
    """Keeps the largest memory of each tier, and the processor time between begin and end; use it as a context."""

    meter: Meter
    peaks_mb: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Take the first sample and begin."""
        self._stop = threading.Event()
        self._before = dict(self._sample())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last sample and end."""
        self._stop.set()
        self._thread.join()
        after = self._sample()
        self.cpu_seconds = {
            tier: reading.cpu_seconds - self._before[tier].cpu_seconds
            for tier, reading in after.items()
            if tier in self._before
        }

    def _run(self) -> None:
        pause = SHORTEST_PAUSE
        while not self._stop.wait(pause):
            began = time.perf_counter()
            self._sample()
            pause = max(SHORTEST_PAUSE, OVERHEAD * (time.perf_counter() - began))

    def _sample(self) -> Mapping[str, UsageSample]:
        readings = self.meter()
        for tier, reading in readings.items():
            self.peaks_mb[tier] = max(self.peaks_mb.get(tier, 0.0), reading.memory_mb)
        return readings


AT_ONCE = 8
MEGABYTE = 1e6
NANO = 1e9


class ContainerUsage:
    """Reads tiers of containers; a tier is known by its labels."""

    def __init__(self, tiers: Mapping[str, list[str]]) -> None:
        """Reach the engine; `tiers` are labels, `name=value`, by tier. Raises BadInput where no engine answers."""
        self._engine, self._tiers = DockerEngine(), dict(tiers)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="usage")

    def __call__(self) -> Mapping[str, UsageSample]:
        """Read every tier that has a container."""
        found = {}
        for tier, labels in self._tiers.items():
            containers = self._engine.containers(labels)
            if containers:
                readings = [each for each in self._threads.map(self._read, containers) if each is not None]
                found[tier] = UsageSample(
                    sum(each.memory_mb for each in readings), sum(each.cpu_seconds for each in readings)
                )
        return found

    def _read(self, container: Container) -> UsageSample | None:
        """Read one container; None where it is gone by now."""
        try:
            stats: dict[str, Any] = self._engine.client.api.stats(str(container.id), stream=False, one_shot=True)
            memory = stats["memory_stats"]
            unused = memory.get("stats", {}).get("inactive_file", 0)  # pages that the kernel may drop
            cpu = stats["cpu_stats"]["cpu_usage"]["total_usage"]
            return UsageSample((memory["usage"] - unused) / MEGABYTE, cpu / NANO)
        except (DockerException, RequestException, KeyError):
            return None
