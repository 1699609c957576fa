"""What a cluster says of clients that do not come: its events of type Warning, about a pool's workload and pods."""

from __future__ import annotations

from collections.abc import Collection

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import OverQuota
from lorabbit_cli.scaling.cluster_access import FORBIDDEN, QUOTA, Away, Json, answers, plain
from lorabbit_cli.scaling.cluster_pools import Workload

UNHEALTHY = "Unhealthy"
LONGEST = 400
"""Characters of the cluster's own words that a sentence takes over."""


class Warnings:
    """Warnings of one namespace. A caller who may not read events, or cannot now, does without."""

    def __init__(self, core: client.CoreV1Api, namespace: str) -> None:
        """Know of none yet."""
        self._core, self._namespace = core, namespace
        self._before: set[tuple[str, str]] = set()

    def begin(self) -> None:
        """Take what was said of workloads so far for the past's: it tells nothing of pods to come."""
        self._before = {_key(each) for each in self._told()}

    def raise_over_quota(self, workload: Workload) -> None:
        """Raise OverQuota where the workload's controller was refused a pod for a quota."""
        for event in self._told():
            message = str(event.get("message", ""))
            if self._is_new(event, workload) and QUOTA in message:
                raise OverQuota(f"--pool: the namespace's quota lets {workload} have no more clients: {message}")

    def newest(self, workload: Workload, waiting: Collection[str]) -> str:
        """Return the last that was said of a workload, or of these pods of it; empty where there is nothing."""
        about = [each for each in self._told() if self._is_new(each, workload) or _is_of_pod(each, waiting)]
        return _sentence(max(about, key=_when)) if about else ""

    def _is_new(self, event: Json, workload: Workload) -> bool:
        return _is_of(event, workload) and _key(event) not in self._before

    def _told(self) -> list[Json]:
        try:
            with answers("read events"):
                told = plain(self._core.list_namespaced_event, self._namespace, field_selector="type=Warning")
        except Away:
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
