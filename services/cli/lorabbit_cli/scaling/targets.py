"""Where clients can run, and the scaler of each place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import Scaler


class ScaleTarget(StrEnum):
    """What runs the clients."""

    COMPOSE = "compose"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"
    PROCESSES = "processes"


@dataclass(frozen=True, slots=True)
class TargetOptions:
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


def open_scaler(place: ScaleTarget, options: TargetOptions) -> Scaler:
    """Return the scaler of a place; raises BadInput where it cannot be reached, or its library is missing."""
    try:
        return _open(place, options)
    except ModuleNotFoundError as error:
        raise BadInput(f"--on {place}: {error.name} is not installed; pip install 'lorabbit[deploy]'") from error


def _open(place: ScaleTarget, options: TargetOptions) -> Scaler:
    """Import what one place needs, and nothing else."""
    match place:
        case ScaleTarget.PROCESSES:
            from lorabbit_cli.scaling.processes import ProcessScaler  # noqa: PLC0415 - imports psutil

            return ProcessScaler(options.folder)
        case ScaleTarget.DOCKER:
            from lorabbit_cli.scaling.docker import ContainerSpec, DockerScaler  # noqa: PLC0415 - imports docker

            return DockerScaler(ContainerSpec(options.image, options.network, options.memory))
        case ScaleTarget.COMPOSE:
            from lorabbit_cli.scaling.compose import ComposeScaler  # noqa: PLC0415 - as above

            return ComposeScaler(options.files, options.project)
        case ScaleTarget.KUBERNETES:
            from lorabbit_cli.scaling.kubernetes import KubernetesScaler  # noqa: PLC0415 - imports kubernetes
            from lorabbit_cli.scaling.kubernetes_api import find_access  # noqa: PLC0415 - as above

            return KubernetesScaler(find_access(options.context, options.namespace), options.release)
