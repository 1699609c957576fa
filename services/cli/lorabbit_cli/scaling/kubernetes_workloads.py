"""The pools of a namespace: StatefulSets, Deployments and indexed Jobs with the chart's labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.kubernetes_api import Json, answers, plain

NAME, RELEASE, COMPONENT, POOL = (
    "app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component", "lorabbit/pool",
)  # fmt: skip
CLIENTS = f"{NAME}=lorabbit,{COMPONENT}=client,{POOL}"
AUTOSCALED = "lorabbit/autoscaled"
"""Annotation of a pool whose number follows the jobs."""
OVER = frozenset({"Complete", "Failed", "SuccessCriteriaMet", "FailureTarget"})
"""Conditions of a Job that has ended, or will once its last pods have."""


@dataclass(frozen=True, slots=True)
class WorkloadApi:
    """Where the API keeps what pools are made of, in one namespace."""

    apps: client.AppsV1Api
    batch: client.BatchV1Api
    namespace: str

    def all(self) -> list[Workload]:
        """Return every pool; raises BadInput."""
        lists: tuple[tuple[str, Callable[..., Any]], ...] = (
            ("StatefulSet", self.apps.list_namespaced_stateful_set),
            ("Deployment", self.apps.list_namespaced_deployment),
            ("Job", self.batch.list_namespaced_job),
        )
        found = []
        for kind, listing in lists:
            with answers(f"list the {kind}s of namespace {self.namespace!r}"):
                listed = plain(listing, self.namespace, label_selector=CLIENTS)["items"]
            found += [Workload.of(kind, each["metadata"]) for each in listed]
        return found

    def number(self, workload: Workload) -> int:
        """Return how many clients a workload asks for; raises ApiException, and BadInput for a Job that is over."""
        if workload.kind == "Job":
            job = plain(self.batch.read_namespaced_job, workload.name, self.namespace)
            for condition in job.get("status", {}).get("conditions") or []:
                if condition["type"] in OVER and condition["status"] == "True":
                    raise BadInput(
                        f"--pool: {workload} is over ({condition['type']}) and takes no more clients; "
                        f"kubectl delete {workload}, and helm upgrade makes it anew"
                    )
            return int(job["spec"]["parallelism"])
        read = {
            "StatefulSet": self.apps.read_namespaced_stateful_set_scale,
            "Deployment": self.apps.read_namespaced_deployment_scale,
        }[workload.kind]
        return int(plain(read, workload.name, self.namespace)["spec"].get("replicas", 0))

    def set_number(self, workload: Workload, number: int) -> None:
        """Ask for so many clients; raises ApiException. An indexed Job gets as many indices."""
        spec = {"replicas": number}
        if workload.kind == "Job":
            spec = {"parallelism": number, **({"completions": number} if number else {})}
        patch: Callable[..., Any] = {
            "StatefulSet": self.apps.patch_namespaced_stateful_set_scale,
            "Deployment": self.apps.patch_namespaced_deployment_scale,
            "Job": self.batch.patch_namespaced_job,
        }[workload.kind]
        plain(patch, workload.name, self.namespace, body={"spec": spec})


@dataclass(frozen=True, slots=True)
class Workload:
    """What makes the pods of one pool."""

    kind: str
    name: str
    release: str
    pool: str
    created: str
    scales_itself: bool

    @classmethod
    def of(cls, kind: str, metadata: Json) -> Workload:
        """Read an object's metadata."""
        labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
        return cls(
            kind,
            metadata["name"],
            labels.get(RELEASE, ""),
            labels.get(POOL, ""),
            metadata["creationTimestamp"],
            annotations.get(AUTOSCALED) == "true",
        )

    @property
    def pods(self) -> str:
        """Selector of its pods."""
        return f"{NAME}=lorabbit,{RELEASE}={self.release},{COMPONENT}=client,{POOL}={self.pool}"

    def __str__(self) -> str:
        """Name it as kubectl does."""
        return f"{self.kind.lower()}/{self.name}"
