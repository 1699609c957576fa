"""What a client says of itself: its settings, and what this machine or container gives it, found without torch."""

from __future__ import annotations

import os
from pathlib import Path

import lorabbit
from lorabbit.messages import Hello
from lorabbit.settings import ClientSettings
from lorabbit.transport import KNOWN

GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder for each GPU that NVIDIA's driver holds."""
TEGRA = Path("/dev/nvhost-gpu")
"""The GPU of a Jetson board."""
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container (cgroup v2); ``max`` where there is none."""


def introduction(settings: ClientSettings, client: str | None, outbox: tuple[str, ...], process: str) -> Hello:
    """Make the hello of a client's `process`; `outbox` names the tasks whose results wait for a verdict."""
    return Hello(
        address=settings.address,
        client=client,
        device=device(settings.device),
        memory_bytes=memory_bytes(),
        tags=settings.tags,
        pool=settings.pool,
        max_rank=settings.max_rank,
        max_batch=settings.max_batch,
        dtype=settings.dtype,
        quantisation=settings.quantisation,
        version=lorabbit.__version__,
        codings=KNOWN,
        outbox=outbox,
        process=process,
    )


def device(setting: str) -> str:
    """Name the device that a client's setting leads to: ``auto`` is a GPU where the driver shows one."""
    if setting != "auto":
        return setting
    has_gpu = TEGRA.exists() or (GPUS.is_dir() and any(GPUS.iterdir()))
    return "cuda" if has_gpu else "cpu"


def memory_bytes() -> int:
    """Memory that this process may take: the machine's, or less where a container's limit is lower."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = LIMIT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole
