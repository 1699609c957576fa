"""Pods of a pool as a list and the changes since tell of them.

What a cluster says of clients that do not come: its events of type Warning, about a pool's workload and pods.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import OverQuota, PoolStatus
from lorabbit_cli.scaling.kubernetes_api import FORBIDDEN, QUOTA, ApiUnavailable, Json, answers, plain
from lorabbit_cli.scaling.kubernetes_workloads import Workload

OVER = frozenset({"Succeeded", "Failed"})


class PodCache:
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

    def status(self) -> PoolStatus:
        """Count: a pod that has ended well is there as little as one that failed for good."""
        staying = self._remaining()
        waiting = [pod for pod in staying if not _is_ready(pod)]
        troubles = filter(None, map(_trouble, waiting))
        return PoolStatus(len(self._alive()), len(staying) - len(waiting), next(troubles, ""))

    @property
    def waiting(self) -> frozenset[str]:
        """Names of the pods that are to stay and are not ready."""
        return frozenset(pod["metadata"]["name"] for pod in self._remaining() if not _is_ready(pod))

    def _alive(self) -> list[Json]:
        return [pod for pod in self._pods.values() if pod.get("status", {}).get("phase") not in OVER]

    def _remaining(self) -> list[Json]:
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


UNHEALTHY = "Unhealthy"
LONGEST = 400
"""Characters of the cluster's own words that a sentence takes over."""


class WarningEvents:
    """Warnings of one namespace. A caller who may not read events, or cannot now, does without."""

    def __init__(self, core: client.CoreV1Api, namespace: str) -> None:
        """Know of none yet."""
        self._core, self._namespace = core, namespace
        self._before: set[tuple[str, str]] = set()

    def begin(self) -> None:
        """Take what was said of workloads so far for the past's: it tells nothing of pods to come."""
        self._before = {_key(each) for each in self._events()}

    def raise_over_quota(self, workload: Workload) -> None:
        """Raise OverQuota where the workload's controller was refused a pod for a quota."""
        for event in self._events():
            message = str(event.get("message", ""))
            if self._is_new(event, workload) and QUOTA in message:
                raise OverQuota(f"--pool: the namespace's quota lets {workload} have no more clients: {message}")

    def newest(self, workload: Workload, waiting: Collection[str]) -> str:
        """Return the last that was said of a workload, or of these pods of it; empty where there is nothing."""
        about = [each for each in self._events() if self._is_new(each, workload) or _is_of_pod(each, waiting)]
        return _sentence(max(about, key=_when)) if about else ""

    def _is_new(self, event: Json, workload: Workload) -> bool:
        return _is_of(event, workload) and _key(event) not in self._before

    def _events(self) -> list[Json]:
        try:
            with answers("read events"):
                told = plain(self._core.list_namespaced_event, self._namespace, field_selector="type=Warning")
        except ApiUnavailable:
            return []
        except BadInput as error:
            if isinstance(error.__cause__, ApiException) and error.__cause__.status == FORBIDDEN:
                return []  # the pods tell enough, only later
            raise
        found: list[Json] = told["items"]
        return found


def _key(event: Json) -> tuple[str, str]:
    """Which event it is, and how often it was said."""
    return event["metadata"]["uid"], event["metadata"]["resourceVersion"]


def _when(event: Json) -> str:
    """When it was said last; the times of one cluster are in one order as texts."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")


def _is_of(event: Json, workload: Workload) -> bool:
    """Whether it is about the workload, or a Deployment's ReplicaSet, which is named after it and has a hash."""
    kind, name = event["involvedObject"].get("kind"), str(event["involvedObject"].get("name", ""))
    is_set = workload.kind == "Deployment" and kind == "ReplicaSet" and name.rpartition("-")[0] == workload.name
    return is_set or (kind, name) == (workload.kind, workload.name)


def _is_of_pod(event: Json, names: Collection[str]) -> bool:
    return event["involvedObject"].get("kind") == "Pod" and event["involvedObject"].get("name") in names


def _sentence(event: Json) -> str:
    about, reason = event["involvedObject"], event.get("reason", "")
    name = f"{str(about['kind']).lower()}/{about['name']}"
    said = f"{name}, {reason}: " + " ".join(str(event.get("message", "")).split())[:LONGEST]
    if reason == UNHEALTHY:
        said += f" (a client is ready while it holds a connection to the broker; kubectl logs {name} says why not)"
    return said
