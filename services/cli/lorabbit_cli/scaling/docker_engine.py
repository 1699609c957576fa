"""The Docker engine: how it is reached, which containers it has, and what its refusals mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import OverQuota, PoolStatus

TIMEOUT_SECONDS = 60
FORBIDDEN = 403
QUOTAS = (
    "no space left",
    "cannot allocate memory",
    "resource temporarily unavailable",
    "address pools",
    "no available ip",
)
"""Parts of the engine's sentences when there is no room for another container."""


class DockerEngine:
    """An engine; every refusal of it becomes an error of ours."""

    def __init__(self) -> None:
        """Connect as the docker command does (DOCKER_HOST); raises BadInput where nothing answers."""
        with answers():
            self.client = docker.from_env(timeout=TIMEOUT_SECONDS)
            self.client.ping()

    def containers(self, labels: Iterable[str], *, all_states: bool = False) -> list[Container]:
        """Return the containers with these labels, oldest first; those that run, or in every state."""
        with answers():
            found = self.client.containers.list(
                filters={"label": list(labels)}, all=all_states, ignore_removed=True, sparse=False
            )
        return sorted(found, key=lambda each: str(each.attrs["Created"]))

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def pool_status(
    containers: Iterable[Container], is_leaving: Callable[[Container], bool] = lambda _: False
) -> PoolStatus:
    """How a pool of containers stands. Ready is running and, where the image says how to ask, healthy."""
    there = ready = 0
    trouble = ""
    for each in containers:
        there += 1
        state: dict[str, Any] = each.attrs["State"]
        health = state.get("Health", {}).get("Status", "healthy")
        if is_leaving(each):
            continue
        if state["Status"] == "running" and health == "healthy":
            ready += 1
        else:
            trouble = f"{each.name} is {state['Status']}, {health}: {_log_tail(each)}"
    return PoolStatus(there, ready, trouble)


def _log_tail(container: Container) -> str:
    """Return the last line of a container's log."""
    try:
        lines = container.logs(tail=1).decode(errors="replace").strip().splitlines()
    except (DockerException, requests.RequestException):
        return "its log cannot be read"
    return lines[-1][:300] if lines else "it has said nothing"


@contextmanager
def answers() -> Iterator[None]:
    """Turn whatever the engine or the way to it answers into one sentence; a container that is gone is no error."""
    try:
        yield
    except ImageNotFound as error:
        raise BadInput(f"--image: the Docker engine has no such image: {error.explanation}; build it first") from error
    except NotFound as error:
        raise BadInput(f"the Docker engine: {error.explanation}") from error
    except APIError as error:
        said = str(error.explanation or error)
        if any(part in said.lower() for part in QUOTAS):
            raise OverQuota(f"the Docker engine has no room for another client: {said}") from error
        if error.status_code == FORBIDDEN:
            raise BadInput(f"the Docker engine does not permit this: {said}") from error
        raise BadInput(f"the Docker engine refused: {said}") from error
    except (DockerException, requests.RequestException) as error:
        raise BadInput(no_engine(error)) from error


def no_engine(error: Exception) -> str:
    """Say why no engine answers, and what to do."""
    if "permission denied" in str(error).lower():
        return "no permission to use the Docker engine; join the group docker, or name another engine in DOCKER_HOST"
    return "no Docker engine answers; start it, or name one in DOCKER_HOST"
