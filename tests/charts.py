"""The Helm chart as its tests read it: rendered by Helm itself, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tree import ROOT

pytest.importorskip("helm_python", reason="there is no build of Helm's library for this platform")
from helm_python import Chart

CHART = ROOT / "helm" / "lorabbit"
READY = sorted(CHART.glob("values-*.yaml"))
CASES = [*READY, *sorted((CHART / "ci").glob("*-values.yaml"))]
RELEASE, NAMESPACE = "fed", "federation"
WORKLOADS = {"StatefulSet", "Deployment", "Job"}
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "RabbitmqCluster", "Certificate"}
Doc = dict[str, Any]


def values_of(path: Path) -> Doc:
    """The values of a file."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def render(
    values: Doc, *, name: str = RELEASE, namespace: str = NAMESPACE, chart: Path = CHART, **how: bool | int
) -> list[Doc]:
    """Every object that a release with these values consists of."""
    texts = Chart.load(chart).render(values, name=name, namespace=namespace, **how)
    return [doc for path, text in texts.items() if path.endswith(".yaml") for doc in yaml.safe_load_all(text) if doc]


@cache
def objects(path: Path) -> list[Doc]:
    """Every object of one values file."""
    return render(values_of(path))


def of_kind(docs: list[Doc], *kinds: str) -> list[Doc]:
    """The objects of some kinds."""
    return [doc for doc in docs if doc["kind"] in kinds]


def named(docs: list[Doc], kind: str, name: str) -> Doc:
    """One object."""
    (found,) = [doc for doc in of_kind(docs, kind) if doc["metadata"]["name"] == name]
    return found


def title(doc: Doc) -> str:
    """An object's kind and name."""
    return f"{doc['kind']}/{doc['metadata']['name']}"


def workloads(docs: list[Doc]) -> list[Doc]:
    """Everything that makes pods."""
    return of_kind(docs, *WORKLOADS)


def pod(workload: Doc) -> Doc:
    """The template of a workload's pods."""
    template: Doc = workload["spec"]["template"]
    return template


def containers(docs: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    """Every container with its place and its pod's template."""
    for workload in workloads(docs):
        for container in pod(workload)["spec"]["containers"]:
            yield f"{title(workload)} {container['name']}", container, pod(workload)


def environment(container: Doc) -> dict[str, Doc]:
    """A container's variables by name."""
    return {variable["name"]: variable for variable in container.get("env", [])}


def matches(selector: Doc, labels: dict[str, str]) -> bool:
    """Whether a pod selector takes a pod with these labels."""
    return selector.get("matchLabels", {}).items() <= labels.items()
