"""What this machine, or the container, gives a client: found without torch, for the server's list of clients."""

from __future__ import annotations

import os
from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder for each GPU that NVIDIA's driver holds."""
TEGRA = Path("/dev/nvhost-gpu")
"""The GPU of a Jetson board."""
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container (cgroup v2); ``max`` where there is none."""


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
