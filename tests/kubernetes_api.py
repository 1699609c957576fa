"""A small Kubernetes API over HTTP, with controllers that make pods: what `lorabbit scale --on kubernetes` speaks to.

Lists, watches with resource versions and bookmarks, the scale subresource, merge patches, events of refused
pods, and the refusals that a real API gives: 401, 403, 404, 409, 410. A pod becomes ready, or goes, only while
somebody watches, so that a scaler that does not watch never ends.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Json = dict[str, Any]
NAMESPACE, TOKEN = "federation", "let-me-in"
GROUPS = {"statefulsets": "apps", "deployments": "apps", "jobs": "batch", "pods": "", "events": ""}
KINDS = {"statefulsets": "StatefulSet", "deployments": "Deployment", "jobs": "Job"}
MERGES = {"application/merge-patch+json", "application/strategic-merge-patch+json"}
PATH = re.compile(r"/(?:api/v1|apis/(apps|batch)/v1)/namespaces/([^/]+)/(\w+)(?:/([^/]+))?(/scale)?")


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


@dataclass
class Fault:
    """Refuses what matches, so many times."""

    verb: str
    path: str
    refusal: Refusal
    times: int = 1


@dataclass
class Watching:
    """How watches go wrong: the first ends after `ends_after` changes, `breaks` in the middle of a line, `expired`."""

    ends_after: int | None = None
    breaks: bool = False
    expired: bool = False


@dataclass
class Request:
    """One request as it came."""

    verb: str
    path: str
    query: dict[str, str]
    body: Json | None = None


@dataclass
class Cluster:
    """Everything the API keeps. Guarded by `changed`."""

    workloads: dict[tuple[str, str], Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    history: list[tuple[int, str, Json]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    watching: Watching = field(default_factory=Watching)
    quota: int = 1000
    unschedulable: frozenset[str] = frozenset()
    forbidden: str = ""
    """Why no pod can be made."""
    held: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Pods that are made and never ready: reason and message of the event that says so."""
    version: int = 100
    watchers: int = 0
    stopped: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    # ---- what a test sets up ----
    def add_pool(self, plural: str, pool: str, number: int, *, release: str = "fed", **annotations: str) -> None:
        """A pool with all its pods ready."""
        labels = {
            "app.kubernetes.io/name": "lorabbit", "app.kubernetes.io/instance": release,
            "app.kubernetes.io/component": "client", "lorabbit/pool": pool,
        }  # fmt: skip
        name = f"{release}-{pool}" + ("-1a2b3c4d" if plural == "jobs" else "")
        spec = {"parallelism": number, "completions": number} if plural == "jobs" else {"replicas": number}
        created = "2026-01-01T00:00:00Z"
        meta = {"name": name, "labels": labels, "annotations": annotations, "creationTimestamp": created}
        with self.changed:
            self.workloads[plural, name] = {"kind": KINDS[plural], "metadata": meta, "spec": spec}
            for index in range(number):
                self._put("ADDED", self._pod(name, index, labels, ready=True))

    def wanted(self, workload: Json) -> int:
        """How many pods a workload asks for."""
        return int(workload["spec"].get("parallelism", workload["spec"].get("replicas")))

    def number(self, name: str) -> int:
        """How many pods the workload of a name asks for."""
        return next(self.wanted(each) for (_, known), each in self.workloads.items() if known == name)

    def patches(self) -> list[int]:
        """The numbers that were asked for, in order."""
        specs = [request.body["spec"] for request in self.requests if request.verb == "PATCH" and request.body]
        return [int(spec.get("parallelism", spec.get("replicas"))) for spec in specs]

    def asked(self, what: str) -> list[Request]:
        """Requests for pods: `list` or `watch`."""
        pods = [each for each in self.requests if each.path.endswith("/pods")]
        return [each for each in pods if ("watch" in each.query) is (what == "watch")]

    # ---- controllers ----
    def control(self) -> None:
        """Bring pods to what workloads ask for, one change at a time, until stopped."""
        with self.changed:
            while not self.stopped:
                if not (self._make() or (self.watchers and self._move())):
                    self.changed.wait()

    def _make(self) -> bool:
        """Make one missing pod, or be refused one."""
        for (plural, name), workload in self.workloads.items():
            mine = {pod for pod in self.pods if self.pods[pod]["metadata"]["ownerReferences"][0]["name"] == name}
            for index in range(self.wanted(workload)):
                if f"{name}-{index}" in mine:
                    continue
                if len(mine) >= self.quota or self.forbidden:
                    return self._refuse(plural, name, index)
                pod = f"{name}-{index}"
                self._put("ADDED", self._pod(name, index, workload["metadata"]["labels"], ready=False))
                if pod in self.held:
                    self.tell("Pod", pod, *self.held[pod])
                return True
        return False

    def _refuse(self, plural: str, name: str, index: int) -> bool:
        """Tell of a pod that may not be made; False when that was told already."""
        why = self.forbidden or f"exceeded quota: small, requested: pods=1, limited: pods={self.quota}"
        said = f'pods "{name}-{index}" is forbidden: {why}'
        if any(event["message"] == said for event in self.events):
            return False
        kind, maker = ("ReplicaSet", f"{name}-6d4cf56db6") if plural == "deployments" else (KINDS[plural], name)
        self.tell(kind, maker, "FailedCreate", said)
        return True

    def tell(self, kind: str, name: str, reason: str, message: str) -> None:
        """Add an event, of the type Warning."""
        with self.changed:
            self.version += 1
            meta = {"name": f"{name}.{self.version}", "uid": str(self.version), "resourceVersion": str(self.version)}
            self.events.append({
                "metadata": meta, "involvedObject": {"kind": kind, "name": name}, "type": "Warning", "reason": reason,
                "message": message, "lastTimestamp": f"2026-01-01T00:00:{self.version % 60:02}Z",
            })  # fmt: skip
            self.changed.notify_all()

    def _move(self) -> bool:
        """Make one pod ready, or let one go that nobody wants."""
        for pod in list(self.pods.values()):
            name, owner = pod["metadata"]["name"], pod["metadata"]["ownerReferences"][0]["name"]
            index = int(name.rpartition("-")[2])
            if index >= self.number(owner):
                if pod["metadata"].get("deletionTimestamp"):
                    self._put("DELETED", pod)
                else:
                    leaving = {**pod["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
                    self._put("MODIFIED", {**pod, "metadata": leaving})
                return True
            if not _is_ready(pod) and name not in self.unschedulable | self.held.keys():
                self._put("MODIFIED", self._pod(owner, index, pod["metadata"]["labels"], ready=True))
                return True
        return False

    def _pod(self, owner: str, index: int, labels: dict[str, str], *, ready: bool) -> Json:
        name = f"{owner}-{index}"
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        if name in self.unschedulable:
            said = "0/1 nodes are available: 1 Insufficient memory."
            conditions.append({"type": "PodScheduled", "status": "False", "message": said})
        meta = {"name": name, "labels": labels, "ownerReferences": [{"name": owner}]}
        state = {"running": {}} if ready else {"waiting": {"reason": "ContainerCreating"}}
        status = {"phase": "Running" if ready else "Pending", "containerStatuses": [{"name": "client", "state": state}]}
        return {"metadata": meta, "status": {**status, "conditions": conditions}}

    def _put(self, kind: str, pod: Json) -> None:
        self.version += 1
        pod = {**pod, "metadata": {**pod["metadata"], "resourceVersion": str(self.version)}}
        self.history.append((self.version, kind, pod))
        if kind == "DELETED":
            del self.pods[pod["metadata"]["name"]]
        else:
            self.pods[pod["metadata"]["name"]] = pod
        self.changed.notify_all()


def _is_ready(pod: Json) -> bool:
    return {"type": "Ready", "status": "True"} in pod["status"]["conditions"]


def _chosen(query: dict[str, str], thing: Json) -> bool:
    """Whether selectors take a thing: of labels `key=value` and `key` alone, of fields `key=value`."""
    labels = thing["metadata"].get("labels", {})
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        if thing[key] != value:
            return False
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if key not in labels or (value and labels[key] != value):
            return False
    return True


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = (
            json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))) if self.command == "PATCH" else None
        )
        request = Request(self.command, parts.path, query, body)
        with self.cluster.changed:
            self.cluster.requests.append(request)
        try:
            self._refuse_by_fault(request)
            self._refuse_by_type(request)
            if query.get("watch", "").lower() == "true":
                self._watch(query)
            else:
                self._send(200, self._found(request))
        except Refusal as refusal:
            status = {"kind": "Status", "status": "Failure", "message": refusal.message, "code": refusal.status}
            self._send(refusal.status, status)

    def _refuse_by_fault(self, request: Request) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized")
        with self.cluster.changed:
            for fault in self.cluster.faults:
                if fault.times and fault.verb == request.verb and re.search(fault.path, self.path):
                    fault.times -= 1
                    raise fault.refusal

    def _refuse_by_type(self, request: Request) -> None:
        """A change is told as a merge; anything else an API server does not take, or reads as a list of operations."""
        kind = self.headers.get("Content-Type")
        if request.verb == "PATCH" and kind not in MERGES:
            raise Refusal(415, f"the body of the request was in an unknown format: {kind}")

    def _found(self, request: Request) -> Json:
        match = PATH.fullmatch(request.path)
        if match is None or GROUPS.get(match[3]) != (match[1] or "") or match[2] != NAMESPACE:
            raise Refusal(404, f"the server could not find {request.path}")
        plural, name, cluster = match[3], match[4], self.cluster
        with cluster.changed:
            if plural in {"pods", "events"}:
                things = list(cluster.pods.values()) if plural == "pods" else cluster.events
                return self._listed([each for each in things if _chosen(request.query, each)])
            if name is None:
                mine = [each for (kind, _), each in cluster.workloads.items() if kind == plural]
                return self._listed([each for each in mine if _chosen(request.query, each)])
            workload = cluster.workloads.get((plural, name))
            if workload is None:
                raise Refusal(404, f'{plural}.apps "{name}" not found')
            if request.body is not None:
                self._patch(plural, workload, request.body)
            if match[5]:
                return {"kind": "Scale", "metadata": {"name": name}, "spec": {"replicas": cluster.wanted(workload)}}
            return json.loads(json.dumps(workload))

    def _patch(self, plural: str, workload: Json, body: Json) -> None:
        """Merge; an indexed Job's completions may change to what its parallelism becomes, and to nothing else."""
        spec = {**workload["spec"], **body["spec"]}
        if plural == "jobs" and "completions" in body["spec"] and spec["completions"] != spec["parallelism"]:
            raise Refusal(422, "completions: field is immutable unless it equals parallelism")
        workload["spec"] = spec
        self.cluster.changed.notify_all()

    def _listed(self, items: list[Json]) -> Json:
        return {"kind": "List", "metadata": {"resourceVersion": str(self.cluster.version)}, "items": items}

    def _send(self, status: int, content: Json) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    # ---- watches ----
    def _watch(self, query: dict[str, str]) -> None:
        cluster = self.cluster
        if cluster.watching.expired:
            cluster.watching.expired = False
            raise Refusal(410, "too old resource version")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with cluster.changed:
            cluster.watchers += 1
            cluster.changed.notify_all()
        try:
            for change in self._changes(query):
                line = json.dumps(change).encode() + b"\n"
                if cluster.watching.breaks:
                    cluster.watching.breaks = False
                    self.wfile.write(b"%x\r\n%b" % (len(line), line[: len(line) // 2]))
                    self.close_connection = True
                    return
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True
        finally:
            with cluster.changed:
                cluster.watchers -= 1

    def _changes(self, query: dict[str, str]) -> Iterator[Json]:
        """Changes after a version, for as long as the watch lasts; the first watch of some tests lasts less long."""
        cluster, seen, sent = self.cluster, int(query["resourceVersion"]), 0
        limit, cluster.watching.ends_after = cluster.watching.ends_after, None
        while limit is None or sent < limit:
            with cluster.changed:
                found = [each for each in cluster.history if each[0] > seen and _chosen(query, each[2])]
                if not found:
                    came = cluster.changed.wait(float(query["timeoutSeconds"]))
                    if not came or cluster.stopped:
                        return
                    continue
            seen, kind, pod = found[0]
            sent += 1
            yield {"type": kind, "object": pod}


@dataclass
class Api:
    """A running API and the kubeconfig that leads to it."""

    cluster: Cluster
    kubeconfig: Path


def serve(folder: Path) -> Iterator[Api]:
    """Run an API; yields it once."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    threads = [threading.Thread(target=run, daemon=True) for run in (server.serve_forever, cluster.control)]
    for thread in threads:
        thread.start()
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin", "namespace": NAMESPACE}}],
    }), encoding="utf-8")  # fmt: skip
    try:
        yield Api(cluster, kubeconfig)
    finally:
        with cluster.changed:
            cluster.stopped = True
            cluster.changed.notify_all()
        server.shutdown()
        server.server_close()
        with suppress(RuntimeError):
            threads[1].join(10)
