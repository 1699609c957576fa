"""Pools of a Helm release on Kubernetes, by the API that the caller's kubeconfig or pod gives access to.

A StatefulSet or Deployment is resized by its scale subresource, an indexed Job by its parallelism. What the
controllers make of it is watched, from the resource version of a list on; a watch that ends is taken up where
it ended, and one that breaks or is too old begins with a new list.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import PoolStatus, Scaler, no_such_pool
from lorabbit_cli.scaling.kubernetes_api import ApiUnavailable, ClusterAccess, answers, asked, plain, refusal
from lorabbit_cli.scaling.kubernetes_pods import PodCache, WarningEvents, lines
from lorabbit_cli.scaling.kubernetes_workloads import Workload, WorkloadApi

WATCH_SECONDS = 5
"""How long one watch lasts at most; in between the controllers' events are read."""
BREATH_SECONDS = 0.5
GONE, CONFLICT = 410, 409
TRIES = 5


class KubernetesScaler(Scaler):
    """The pools of one namespace."""

    def __init__(self, access: ClusterAccess, release: str | None = None) -> None:
        """Use this access; `release` chooses where several have a pool of one name."""
        self._access, self._release = access, release
        self._core = client.CoreV1Api(access.api)
        self._pools = WorkloadApi(client.AppsV1Api(access.api), client.BatchV1Api(access.api), access.namespace)
        self._warnings = WarningEvents(self._core, access.namespace)
        self._found: dict[str, Workload] = {}

    def count(self, pool: str) -> int:
        """Return how many clients the workload asks for; raises BadInput where it is not there or scales itself."""
        workload = self._workload(pool)
        if workload.scales_itself:
            raise BadInput(
                f"--pool: {pool!r} follows the jobs (autoscaling.enabled); set autoscaling.min and max in its values"
            )
        with answers(f"read {workload}"):
            return self._pools.number(workload)

    def resize(self, pool: str, number: int) -> None:
        """Set the number; a conflict with another writer is tried again."""
        workload = self._workload(pool)
        self._warnings.begin()
        with answers(f"scale {workload}"):
            for rest in reversed(range(TRIES)):
                try:
                    self._pools.set_number(workload, number)
                except ApiException as error:
                    if error.status != CONFLICT or rest == 0:
                        raise
                    time.sleep(BREATH_SECONDS)
                else:
                    return

    def status(self, pool: str) -> PoolStatus:
        """List the pool's pods, and see whether the controllers were refused some."""
        workload, pods = self._workload(pool), PodCache()
        self._warnings.raise_over_quota(workload)
        self._list(workload, pods)
        return self._with_warnings(workload, pods)

    def watch(self, pool: str, deadline: float) -> Iterator[PoolStatus]:
        """Yield how the pool stands at first and after each change; an API that is away for a while is waited for."""
        workload, pods = self._workload(pool), PodCache()
        while True:
            try:
                if not pods.version:
                    self._list(workload, pods)
                yield pods.status()
                self._warnings.raise_over_quota(workload)
                yield from self._changes(workload, pods, min(WATCH_SECONDS, deadline - time.monotonic()))
            except ApiUnavailable:
                if time.monotonic() >= deadline:
                    raise
                pods.version = ""
                time.sleep(BREATH_SECONDS)
            if time.monotonic() >= deadline:
                yield self._with_warnings(workload, pods)
                return

    def close(self) -> None:
        """Close the connections."""
        self._access.api.close()

    # ---- what the API tells ----
    def _changes(self, workload: Workload, pods: PodCache, seconds: float) -> Iterator[PoolStatus]:
        """Follow the pods for a while; forget where that was if it is too old. Raises Away where the API is."""
        whole = max(1, round(seconds))
        what = f"watch the pods of {workload}"
        try:
            answer = asked(
                self._core.list_namespaced_pod,
                self._access.namespace,
                label_selector=workload.pods,
                watch=True,
                resource_version=pods.version,
                allow_watch_bookmarks=True,
                timeout_seconds=whole,
                _request_timeout=whole + 5,
            )
            with closing(answer):
                for line in lines(answer.stream()):
                    pods.take(line)
                    yield pods.status()
        except ApiException as error:
            if error.status != GONE:
                raise refusal(error, what) from error
            pods.version = ""
        except urllib3.exceptions.HTTPError as error:
            raise ApiUnavailable(f"the cluster's API broke off a command to {what}") from error

    def _with_warnings(self, workload: Workload, pods: PodCache) -> PoolStatus:
        """How the pool stands, with what the cluster said of it where the pods themselves tell no trouble."""
        standing = pods.status()
        return replace(standing, trouble=standing.trouble or self._warnings.newest(workload, pods.waiting))

    def _list(self, workload: Workload, pods: PodCache) -> None:
        with answers(f"list the pods of {workload}"):
            pods.put(plain(self._core.list_namespaced_pod, self._access.namespace, label_selector=workload.pods))

    # ---- which pool ----
    def _workload(self, pool: str) -> Workload:
        """Find a pool's workload, once."""
        if pool not in self._found:
            self._found[pool] = self._find(pool)
        return self._found[pool]

    def _find(self, pool: str) -> Workload:
        ours = [each for each in self._pools.all() if self._release in {None, each.release}]
        named = [each for each in ours if each.pool == pool]
        if not named:
            raise no_such_pool(pool, sorted({each.pool for each in ours}), f"namespace {self._access.namespace!r}")
        releases = sorted({each.release for each in named})
        if len(releases) > 1:
            raise BadInput(f"--release: {', '.join(releases)} have a pool {pool!r} each; name one of them")
        return max(named, key=lambda each: each.created)
