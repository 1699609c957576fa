"""Where clients can run, and the scaler of each place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import Scaler


class Place(StrEnum):
    """What runs the clients."""

    COMPOSE = "compose"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"
    PROCESSES = "processes"


@dataclass(frozen=True, slots=True)
class Options:
    """What a place needs to know; each reads its own."""

    folder: Path = Path("clients")
    """Processes: below it every client has its folder."""
    image: str = "lorabbit-client:dev"
    network: str = "bridge"
    memory: str = "2g"
    files: tuple[Path, ...] = (Path("compose.yaml"),)
    """Compose: the later over the earlier, as those that the federation was started with."""
    project: str | None = None
    namespace: str | None = None
    release: str | None = None
    context: str | None = None


def open_scaler(place: Place, options: Options) -> Scaler:
    """Return the scaler of a place; raises BadInput where it cannot be reached, or its library is missing."""
    try:
        return _open(place, options)
    except ModuleNotFoundError as error:
        raise BadInput(f"--on {place}: {error.name} is not installed; pip install 'lorabbit[deploy]'") from error


def _open(place: Place, options: Options) -> Scaler:
    """Import what one place needs, and nothing else."""
    match place:
        case Place.PROCESSES:
            from lorabbit_cli.scaling.processes import Processes  # noqa: PLC0415 - imports psutil

            return Processes(options.folder)
        case Place.DOCKER:
            from lorabbit_cli.scaling.docker import Containers, Recipe  # noqa: PLC0415 - imports docker

            return Containers(Recipe(options.image, options.network, options.memory))
        case Place.COMPOSE:
            from lorabbit_cli.scaling.compose import Compose  # noqa: PLC0415 - as above

            return Compose(options.files, options.project)
        case Place.KUBERNETES:
            from lorabbit_cli.scaling.kubernetes import Cluster  # noqa: PLC0415 - imports kubernetes
            from lorabbit_cli.scaling.kubernetes_api import find_access  # noqa: PLC0415 - as above

            return Cluster(find_access(options.context, options.namespace), options.release)
