"""Limits of the machine: what stops a stress test before, or while, it asks for too much."""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

MEGABYTE = 1e6
MEMORY_RESERVE = 0.08
"""Share of the machine's memory that stays free, so that nothing is killed for want of it."""
DISK_RESERVE_MB = 2000.0
COPIES = 4
"""Files of one payload per client at a time, at most: its download, its result, and both at the server or broker."""
CONNECTIONS = 2
"""A client publishes over one connection and reads over another, so that an alarm blocks only the first."""
DESCRIPTORS_BESIDE = 400
"""What a broker opens besides connections: files of queues and streams, listeners."""
THREADS = 4
"""Of a client: one for each connection, its loop, and a share in the training thread."""
FIRST_GUESS_MB = 25.0
"""Memory of one light client and its broker connections, until a smaller size has shown it."""


class LimitReached(Exception):
    """The machine gives no more; the text says which limit, in one sentence."""


@dataclass(frozen=True, slots=True)
class ResourceDemand:
    """What a measurement asks of the machine."""

    clients: int
    payload_mb: float
    mb_per_client: float = FIRST_GUESS_MB


def raise_descriptors() -> int:
    """Allow this process, and all that it starts, as many open files as it may have; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def check(demand: ResourceDemand, folder: Path, *, descriptors: int) -> None:
    """Raise LimitReached where a measurement would not fit."""
    clients = demand.clients
    memory = psutil.virtual_memory()
    free_mb = (memory.available - MEMORY_RESERVE * memory.total) / MEGABYTE
    needed_mb = clients * demand.mb_per_client
    if needed_mb > free_mb:
        raise LimitReached(
            f"memory: {clients} clients need about {needed_mb:,.0f} MB, and {max(0.0, free_mb):,.0f} MB may be used"
        )
    open_files = CONNECTIONS * clients + DESCRIPTORS_BESIDE
    if open_files > descriptors:
        raise LimitReached(
            f"file descriptors: the broker needs about {open_files:,} for {clients} clients, and may open "
            f"{descriptors:,} (ulimit -n)"
        )
    threads = THREADS * clients
    most = _most_threads()
    if most is not None and threads > most:
        raise LimitReached(f"threads: {clients} clients need about {threads:,}, and {most:,} may be started")
    disk_mb = shutil.disk_usage(folder).free / MEGABYTE - DISK_RESERVE_MB
    files_mb = COPIES * clients * demand.payload_mb
    if files_mb > disk_mb:
        raise LimitReached(
            f"disk: {clients} clients with {demand.payload_mb:g} MB each need up to {files_mb:,.0f} MB of files, and "
            f"{max(0.0, disk_mb):,.0f} MB of {folder} may be used"
        )


def watch() -> None:
    """Raise LimitReached where the machine runs out while a measurement goes on."""
    memory = psutil.virtual_memory()
    if memory.available < MEMORY_RESERVE / 2 * memory.total:
        raise LimitReached(f"memory: only {memory.available / MEGABYTE:,.0f} MB are left on the machine")


def _most_threads() -> int | None:
    """How many threads this user may still start; None where nothing says."""
    found = []
    for path in (Path("/proc/sys/kernel/threads-max"), Path("/sys/fs/cgroup/pids.max")):
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        found.append(soft)
    return min(found) if found else None
