"""Pools of plain containers: client n of a pool has a volume of its own, and with it its identity and journal."""

from __future__ import annotations

import time
from dataclasses import dataclass

from docker.errors import NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest

from lorabbit.config.settings import child_environment, file_secrets
from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import PoolStatus, Scaler
from lorabbit_cli.scaling.docker_engine import DockerEngine, answers, pool_status

POOL, NUMBER = "lorabbit.pool", "lorabbit.number"
HOME = "/var/lib/lorabbit"
NANO = 10**9
KILL_SECONDS = 40.0
"""Time to finish or hand back a task before a container that was told to leave is killed."""
OWN = frozenset({"LORABBIT_FOLDER", "LORABBIT_ADDRESS", "LORABBIT_CLIENT", "LORABBIT_POOL", "LORABBIT_SERVER_URL"})


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """What a client's container is made of."""

    image: str
    network: str
    memory: str


class DockerScaler(Scaler):
    """Containers of the client's image, with the caller's LORABBIT_* settings. They are known by their labels.

    A client gets as many processors as it has threads, and the machine's GPUs where its device is one.
    """

    def __init__(self, recipe: ContainerSpec) -> None:
        """Reach the engine; raises BadInput where none answers."""
        self._engine, self._recipe = DockerEngine(), recipe
        self._leaving: dict[str, float] = {}

    def count(self, pool: str) -> int:
        """Count the containers that were not told to leave, those that have ended included."""
        return len(self._remaining(pool))

    def resize(self, pool: str, number: int) -> None:
        """Start the lowest numbers that are missing, or tell the highest to leave."""
        staying = self._remaining(pool)
        for each in staying[number:]:
            self._leaving[str(each.id)] = time.monotonic()
            if each.status == "running":
                with answers():
                    each.kill("SIGTERM")
        taken = {_number(each) for each in self._all(pool)}
        free = (n for n in range(number + len(taken)) if n not in taken)
        for _ in range(number - len(staying)):
            self._start(pool, next(free))

    def status(self, pool: str) -> PoolStatus:
        """Look at the containers; those that have left are removed."""
        left = [each for each in self._all(pool) if not self._has_gone(each)]
        return pool_status(left, lambda each: each.id in self._leaving)

    def _has_gone(self, container: Container) -> bool:
        """Remove a container that was told to leave and has ended, or does not end."""
        since = self._leaving.get(str(container.id))
        if since is None or (container.status == "running" and time.monotonic() - since < KILL_SECONDS):
            return False
        with answers():
            container.remove(force=True)
        return True

    def close(self) -> None:
        """Close the connection to the engine."""
        self._engine.close()

    def _all(self, pool: str) -> list[Container]:
        """Every container of a pool, by number."""
        return sorted(self._engine.containers([f"{POOL}={pool}"], all_states=True), key=_number)

    def _remaining(self, pool: str) -> list[Container]:
        return [each for each in self._all(pool) if each.id not in self._leaving]

    def _start(self, pool: str, number: int) -> None:
        """Start one client, with the rights that compose gives it."""
        name = f"lorabbit-{pool}-{number}"
        recipe, client = self._recipe, self._engine.client
        labels = {POOL: pool, NUMBER: str(number)}
        settings = settings_of(pool)
        every_gpu = [DeviceRequest(driver="nvidia", count=-1, capabilities=[["gpu"]])]
        with answers():
            try:
                client.volumes.get(name)
            except NotFound:
                client.volumes.create(name, labels=labels)
            client.containers.run(
                recipe.image,
                ["client"],
                name=name,
                hostname=name,
                labels=labels,
                environment=settings,
                network=recipe.network,
                volumes={name: {"bind": HOME, "mode": "rw"}},
                mem_limit=recipe.memory,
                nano_cpus=int(settings["LORABBIT_THREADS"]) * NANO,
                detach=True,
                init=True,
                read_only=True,
                tmpfs={"/tmp": ""},  # noqa: S108 - a file system of the container's own
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                restart_policy={"Name": "on-failure", "MaximumRetryCount": 5},
                device_requests=every_gpu if settings["LORABBIT_DEVICE"].startswith("cuda") else None,
            )


def settings_of(pool: str) -> dict[str, str]:
    """Return the caller's settings of a client, with the content of files that only this machine has."""
    inherited = child_environment({}, keeps_settings=True)
    given = {name: value for name, value in inherited.items() if name.startswith("LORABBIT_")}
    file_secrets(given)
    passed = {name: value for name, value in given.items() if name not in OWN and not name.endswith("_FILE")}
    if "LORABBIT_BROKER_URL" not in passed:
        raise BadInput(
            "LORABBIT_BROKER_URL: name the broker as the containers reach it, such as amqp://USER:PASSWORD@HOST/"
        )
    return {"LORABBIT_DEVICE": "cpu", "LORABBIT_THREADS": "1", **passed, "LORABBIT_POOL": pool}


def _number(container: Container) -> int:
    text = container.labels.get(NUMBER, "")
    return int(text) if text.isdigit() else 0
