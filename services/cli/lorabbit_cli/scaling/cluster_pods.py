"""Pods of a pool as a list and the changes since tell of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from kubernetes.client.exceptions import ApiException

from lorabbit_cli.scaling.base import Standing

Json = dict[str, Any]
OVER = frozenset({"Succeeded", "Failed"})


class Pods:
    """Pods by name, and the resource version up to which they are known; empty once that is too old."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.version = ""
        self._pods: dict[str, Json] = {}

    def put(self, listed: Json) -> None:
        """Take a whole list."""
        self._pods = {pod["metadata"]["name"]: pod for pod in listed["items"]}
        self.version = listed["metadata"]["resourceVersion"]

    def take(self, change: Json) -> None:
        """Take one change: ADDED, MODIFIED, DELETED, or BOOKMARK, which moves nothing but the version.

        Raises ApiException for an ERROR, by which a watch says that its version is too old.
        """
        kind, pod = change["type"], change["object"]
        if kind == "ERROR":
            raise ApiException(status=pod.get("code", 0), reason=pod.get("message", ""))
        self.version = pod["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self._pods.pop(pod["metadata"]["name"], None)
        elif kind != "BOOKMARK":
            self._pods[pod["metadata"]["name"]] = pod

    def standing(self) -> Standing:
        """Count: a pod that has ended well is there as little as one that failed for good."""
        staying = self._staying()
        waiting = [pod for pod in staying if not _is_ready(pod)]
        troubles = filter(None, map(_trouble, waiting))
        return Standing(len(self._alive()), len(staying) - len(waiting), next(troubles, ""))

    @property
    def waiting(self) -> frozenset[str]:
        """Names of the pods that are to stay and are not ready."""
        return frozenset(pod["metadata"]["name"] for pod in self._staying() if not _is_ready(pod))

    def _alive(self) -> list[Json]:
        return [pod for pod in self._pods.values() if pod.get("status", {}).get("phase") not in OVER]

    def _staying(self) -> list[Json]:
        return [pod for pod in self._alive() if not pod["metadata"].get("deletionTimestamp")]


def lines(parts: Iterable[bytes]) -> Iterator[Json]:
    """Cut what a watch sends into its lines, each of which is JSON; half a line at the end is dropped."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from (json.loads(line) for line in whole if line.strip())


def _is_ready(pod: Json) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _trouble(pod: Json) -> str:
    """Say what keeps a pod from being ready, where the cluster says so."""
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for each in status.get("conditions") or []:
        if each["type"] == "PodScheduled" and each["status"] == "False":
            return f"{name} has no node: {each.get('message') or each.get('reason', '')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = container.get("state") or {}
        held = state.get("waiting") or state.get("terminated")
        if held and held.get("reason") not in {None, "ContainerCreating", "PodInitializing", "Completed"}:
            said = f": {held['message']}" if held.get("message") else ""
            return f"{name} is held up, {held['reason']}{said}"
    return ""
