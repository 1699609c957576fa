"""Usage of containers, as their Docker engine counts it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from docker.errors import DockerException
from docker.models.containers import Container
from requests import RequestException

from lorabbit_cli.scaling.engine import Engine
from lorabbit_cli.stress.usage import Reading

AT_ONCE = 8
MEGABYTE = 1e6
NANO = 1e9


class EngineUsage:
    """Reads tiers of containers; a tier is known by its labels."""

    def __init__(self, tiers: Mapping[str, list[str]]) -> None:
        """Reach the engine; `tiers` are labels, `name=value`, by tier. Raises BadInput where no engine answers."""
        self._engine, self._tiers = Engine(), dict(tiers)
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="usage")

    def __call__(self) -> Mapping[str, Reading]:
        """Read every tier that has a container."""
        found = {}
        for tier, labels in self._tiers.items():
            containers = self._engine.containers(labels)
            if containers:
                readings = [each for each in self._threads.map(self._read, containers) if each is not None]
                found[tier] = Reading(
                    sum(each.memory_mb for each in readings), sum(each.cpu_seconds for each in readings)
                )
        return found

    def _read(self, container: Container) -> Reading | None:
        """Read one container; None where it is gone by now."""
        try:
            stats: dict[str, Any] = self._engine.client.api.stats(str(container.id), stream=False, one_shot=True)
            memory = stats["memory_stats"]
            unused = memory.get("stats", {}).get("inactive_file", 0)  # pages that the kernel may drop
            cpu = stats["cpu_stats"]["cpu_usage"]["total_usage"]
            return Reading((memory["usage"] - unused) / MEGABYTE, cpu / NANO)
        except (DockerException, RequestException, KeyError):
            return None
