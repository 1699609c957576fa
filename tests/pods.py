"""Pods of the chart in plain containers: what a kubelet makes of a rendered template, as far as Docker can.

Image, command, arguments, environment, mounts, user, rights and the read-only root come from the
template; probes are asked as a kubelet asks them. A Service is a network alias, a claim an empty folder that
nobody gave to the container's user, as a hostPath volume is.
"""

# ruff: noqa: S603, S607 - docker, by name
from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from charts import NAMESPACE, Doc, environment, matches, named, of_kind, pod

ANSWER_SECONDS = 10.0
PATIENCE_SECONDS = 240.0
FEW_FILES, MOST_FILES = 1024, 16384
"""Descriptors that a process has at first and may ask for, as containerd gives them under systemd."""


def docker(*arguments: str, seconds: float = 120) -> str:
    """Run `docker ARGUMENTS`; its standard output. Raises AssertionError with its error."""
    run = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, f"docker {' '.join(arguments)}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run.stdout.strip()


class Pod:
    """One running container of a template."""

    def __init__(self, cluster: Cluster, workload: Doc, name: str) -> None:
        self.name, self._cluster = name, cluster
        self._template = pod(workload)
        self.spec = self._template["spec"]
        self._claims: dict[str, Path] = {}
        (self.container,) = self.spec["containers"]
        self.id = self._start()

    def _start(self) -> str:
        """Run what comes first to its end, then the container; its id."""
        for first in self.spec.get("initContainers", []):
            entry, *rest = first["command"]
            docker("run", "--rm", *self._flags(first), f"--entrypoint={entry}", first["image"], *rest)
        return docker(*self._command())

    def _command(self) -> list[str]:
        variables = self._variables()
        command = [self._expand(word, variables) for word in self.container.get("command", [])]
        arguments = [self._expand(word, variables) for word in self.container.get("args", [])]
        flags = ["--detach", "--hostname", self.name, "--network", self._cluster.network, *self._flags(self.container)]
        flags += [f"--network-alias={alias}" for alias in self._cluster.aliases(self._template)]
        flags += [f"--env={name}={value}" for name, value in variables.items()]
        flags += [f"--entrypoint={command[0]}"] if command else []
        return ["run", *flags, self.container["image"], *command[1:], *arguments]

    def _flags(self, container: Doc) -> list[str]:
        """Who a container runs as, what it may, and what it finds mounted."""
        shared, ours = self.spec["securityContext"], container["securityContext"]
        flags = [f"--user={ours.get('runAsUser', shared['runAsUser'])}:{shared['runAsGroup']}"]
        flags += [f"--ulimit=nofile={FEW_FILES}:{MOST_FILES}"]
        limits = container["resources"]["limits"]
        memory = bytes_of(limits["memory"])
        flags += [f"--memory={memory}", f"--memory-swap={memory}"]
        flags += [f"--cpus={min(processors_of(limits['cpu']), os.cpu_count() or 1)}"]
        flags += [f"--cap-drop={limits}" for limits in ours["capabilities"]["drop"]]
        flags += [f"--cap-add={limits}" for limits in ours["capabilities"].get("add", [])]
        flags += ["--read-only"] if ours["readOnlyRootFilesystem"] else []
        flags += [] if ours["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        return flags + [word for mount in container["volumeMounts"] for word in self._mount(mount)]

    def _variables(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, variable in environment(self.container).items():
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                found[name] = self._cluster.secret(source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]]
            elif "fieldRef" in source:
                found[name] = {"metadata.name": self.name}[source["fieldRef"]["fieldPath"]]
            else:
                found[name] = self._expand(variable["value"], found)
        return found

    @staticmethod
    def _expand(text: str, variables: dict[str, str]) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)

    def _mount(self, mount: Doc) -> list[str]:
        """Flags of one mount: made files read-only, scratch that all may write, a claim as a node's bare folder."""
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        volume = volumes.get(mount["name"], {})
        path = mount["mountPath"]
        if "secret" in volume:
            content = self._cluster.secret(volume["secret"]["secretName"])
            chosen = volume["secret"].get("items") or [{"key": key, "path": key} for key in content]
            items = {item["path"]: content[item["key"]] for item in chosen}
            return ["--volume", f"{self._cluster.folder(items)}:{path}:ro"]
        if "configMap" in volume:
            items = named(self._cluster.docs, "ConfigMap", volume["configMap"]["name"])["data"]
            return ["--volume", f"{self._cluster.folder(items)}:{path}:ro"]
        if "emptyDir" in volume:
            return ["--volume", f"{self._cluster.scratch(0o777)}:{path}"]
        if mount["name"] not in self._claims:
            self._claims[mount["name"]] = self._cluster.scratch(0o755)
        return ["--volume", f"{self._claims[mount['name']]}:{path}"]

    # ---- what a kubelet asks ----
    def passes(self, kind: str) -> bool:
        """Ask a probe once."""
        probe = self.container[kind]
        if "exec" in probe:
            run = subprocess.run(["docker", "exec", self.id, *probe["exec"]["command"]], check=False, timeout=60)
            return run.returncode == 0
        asked = probe.get("httpGet") or probe["tcpSocket"]
        (port,) = [p["containerPort"] for p in self.container["ports"] if p["name"] == asked["port"]]
        try:
            if "tcpSocket" in probe:
                socket.create_connection((self.address(), port), ANSWER_SECONDS).close()
            else:
                self.page(port, asked["path"])
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    def address(self) -> str:
        """Its address on the cluster's network."""
        return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.id)

    def page(self, port: int, path: str) -> str:
        """What it answers over HTTP; raises OSError."""
        with urllib.request.urlopen(f"http://{self.address()}:{port}{path}", timeout=ANSWER_SECONDS) as answer:
            text: str = answer.read().decode()
        return text

    def becomes(self, kind: str, *, passing: bool = True) -> bool:
        """Ask a probe until it says so, or patience ends, or the container does."""
        return comes_true(lambda: self.passes(kind) is passing, while_=self.runs)

    def runs(self) -> bool:
        """Whether its process is there."""
        return docker("inspect", "-f", "{{.State.Running}}", self.id) == "true"

    def wait(self, seconds: float) -> int:
        """Wait for its end; the exit code."""
        return int(docker("wait", self.id, seconds=seconds))

    def replace(self) -> None:
        """Kill it where it stands; another takes its name and its claims, and nothing else of it."""
        docker("rm", "--force", self.id)
        self.id = self._start()

    def logs(self) -> str:
        """What it said."""
        run = subprocess.run(["docker", "logs", self.id], check=False, capture_output=True, text=True, timeout=60)
        return run.stdout + run.stderr

    def run(self, *command: str, seconds: float = 300) -> str:
        """Run a command in it."""
        return docker("exec", self.id, *command, seconds=seconds)


class Cluster:
    """Pods of one release on a network of their own."""

    def __init__(self, docs: list[Doc], folder: Path) -> None:
        self.docs, self._folder = docs, folder
        self.network = f"lorabbit-chart-{uuid4().hex[:8]}"
        self.pods: list[Pod] = []
        docker("network", "create", self.network)

    def start(self, kind: str, name: str, *, ordinal: int | None = 0) -> Pod:
        """Start a pod of a workload."""
        workload = named(self.docs, kind, name)
        self.pods.append(Pod(self, workload, name if ordinal is None else f"{name}-{ordinal}"))
        return self.pods[-1]

    def secret(self, name: str) -> dict[str, str]:
        """A secret's content."""
        found = named(self.docs, "Secret", name)
        plain = {key: base64.b64decode(value).decode() for key, value in found.get("data", {}).items()}
        return {**plain, **found.get("stringData", {})}

    def aliases(self, template: Doc) -> list[str]:
        """Names under which Services lead to a pod."""
        labels = template["metadata"]["labels"]
        services = [s for s in of_kind(self.docs, "Service") if s["spec"].get("clusterIP") != "None"]
        names = [s["metadata"]["name"] for s in services if matches({"matchLabels": s["spec"]["selector"]}, labels)]
        return [f"{name}{domain}" for name in names for domain in ("", f".{NAMESPACE}.svc")]

    def folder(self, items: dict[str, str]) -> Path:
        """A folder with these files, readable by everybody as a volume's group makes them."""
        made = self._folder / uuid4().hex[:8]
        made.mkdir(parents=True)
        for name, content in items.items():
            (made / name).write_text(content, encoding="utf-8")
            (made / name).chmod(0o444)
        return made

    def scratch(self, mode: int) -> Path:
        """An empty folder of this process's user."""
        made = self._folder / uuid4().hex[:8]
        made.mkdir(parents=True)
        made.chmod(mode)
        return made

    def remove(self, gone: Pod) -> None:
        """Remove one pod."""
        docker("rm", "--force", "--volumes", gone.id)
        self.pods.remove(gone)

    def close(self) -> None:
        """Remove everything."""
        for each in [*self.pods]:
            self.remove(each)
        docker("network", "rm", self.network)


def comes_true(condition: Callable[[], bool], while_: Callable[[], bool] = lambda: True) -> bool:
    """Ask until it is so; False when patience ends, or `while_` does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline or not while_():
            return False
        time.sleep(0.5)
    return True


def bytes_of(quantity: str) -> int:
    """A quantity of memory as Kubernetes writes it."""
    return int(quantity[:-2]) * 1024 ** (1 + "KMG".index(quantity[-2]))


def processors_of(quantity: str) -> float:
    """A quantity of processors as Kubernetes writes it."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def job_of(text: str) -> str:
    """The id in what `lorabbit submit --format json` says."""
    job: str = json.loads(text)["job"]
    return job
