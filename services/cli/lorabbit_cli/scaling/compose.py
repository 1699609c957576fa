"""Pools of a compose project: compose itself starts and ends the clients, the engine says how they are.

Only compose may make containers of a project, so the number is set by its own command.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from docker.errors import APIError
from docker.models.containers import Container

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import OverQuota, PoolStatus, Scaler, no_such_pool
from lorabbit_cli.scaling.docker_engine import QUOTAS, DockerEngine, answers, pool_status

PROJECT, SERVICE = "com.docker.compose.project", "com.docker.compose.service"
FIRST = "client"
"""The service of the pool `client`; another pool's is client-<pool>."""
COMMAND_SECONDS = 600
UNNAMED = 64
"""Length of the names that the engine gives to volumes which have none."""


class ComposeScaler(Scaler):
    """The client services of one compose project."""

    def __init__(self, files: tuple[Path, ...], project: str | None) -> None:
        """Reach the engine and read the files, the later over the earlier; raises BadInput where either fails."""
        for file in files:
            if not file.is_file():
                raise BadInput(f"--file: {file} is not there; name the compose file of the federation")
        self._engine = DockerEngine()
        named = ["--project-name", project] if project else []
        self._command = ["docker", "compose", *(f"--file={file}" for file in files), *named, "--profile", "*"]
        self._services = self._run("config", "--services").split()
        self.project = project or self._name()

    def count(self, pool: str) -> int:
        """Count the service's containers; raises BadInput where it is not there or the project is not up."""
        service = self.service(pool)
        if not self._engine.containers([f"{PROJECT}={self.project}"]):
            raise BadInput(f"compose project {self.project!r} is not up; start it first: docker compose up --detach")
        return len(self._containers(service))

    def resize(self, pool: str, number: int) -> None:
        """Have compose start or end clients, and nothing else; it returns once those that leave are gone."""
        service = self.service(pool)
        before = {str(each.id): _volumes(each.attrs) for each in self._containers(service)}
        self._run(
            "up", "--detach", "--no-deps", "--no-recreate", "--no-build", "--scale", f"{service}={number}", service
        )
        stayed = {str(each.id) for each in self._containers(service)}
        for each in before.keys() - stayed:
            self._remove_volumes(before[each])

    def status(self, pool: str) -> PoolStatus:
        """Look at the service's containers."""
        return pool_status(self._containers(self.service(pool)))

    def close(self) -> None:
        """Close the connection to the engine."""
        self._engine.close()

    def service(self, pool: str) -> str:
        """Name the service of a pool; raises BadInput where the file has none."""
        name = FIRST if pool == FIRST else f"{FIRST}-{pool}"
        if name not in self._services:
            pools = [FIRST] if FIRST in self._services else []
            pools += [each.removeprefix(f"{FIRST}-") for each in self._services if each.startswith(f"{FIRST}-")]
            raise no_such_pool(pool, pools, f"compose project {self.project!r}")
        return name

    def _containers(self, service: str) -> list[Container]:
        return self._engine.containers([f"{PROJECT}={self.project}", f"{SERVICE}={service}"], all_states=True)

    def _name(self) -> str:
        """Return the project's name as compose understands the file."""
        for line in self._run("config", "--no-interpolate").splitlines():
            if line.startswith("name: "):
                return line.removeprefix("name: ").strip().strip("\"'")
        raise BadInput("--project: the compose file gives its project no name; name one")

    def _remove_volumes(self, names: list[str]) -> None:
        """Remove the unnamed volumes of a client that has left: no container could find them again."""
        for name in names:
            with answers(), suppress(APIError):
                self._engine.client.api.remove_volume(name)

    def _run(self, *arguments: str) -> str:
        """Run compose; its standard output."""
        try:
            run = subprocess.run(  # noqa: S603 - a fixed command
                [*self._command, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BadInput(f"docker compose cannot be run: {error}") from error
        if run.returncode == 0:
            return run.stdout
        why = (run.stderr.strip().splitlines() or ["it failed without a word"])[-1]
        if any(part in why.lower() for part in QUOTAS):
            raise OverQuota(f"the Docker engine has no room for another client: {why}")
        raise BadInput(f"docker compose: {why}")


def _volumes(attributes: dict[str, Any]) -> list[str]:
    """Names of a container's unnamed volumes: what the engine called by 64 digits itself."""
    names = [str(mount.get("Name", "")) for mount in attributes.get("Mounts", []) if mount.get("Type") == "volume"]
    return [name for name in names if len(name) == UNNAMED]
