"""The how-to for Kubernetes: its values render, its volumes are those that a release by hand claims."""

from __future__ import annotations

import re
import subprocess

import kubernetes_validate
import yaml
from cases import for_each
from charts import CHART, NAMESPACE, RELEASE, Doc, containers, named, objects, of_kind, render
from helm_python import Chart
from tree import ROOT

PAGE = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
CLIENTS = 6
"""The page says: with room for so many."""
VALUES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "apiVersion" not in text]


def volumes() -> list[Doc]:
    """What the page's shell lines hand to kubectl."""
    (script,) = [text for text in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "PersistentVolume" in text]
    alone = f"kubectl() {{ cat; }}; helm() {{ :; }}\n{script}"
    made = subprocess.run(["/bin/sh", "-c", alone], check=True, capture_output=True, text=True)  # noqa: S603 - our page
    return [doc for doc in yaml.safe_load_all(made.stdout) if doc]


def claims() -> dict[str, Doc]:
    """What a release on volumes made by hand claims, by name."""
    docs = objects(CHART / "values-hostpath.yaml")
    found = {doc["metadata"]["name"]: doc["spec"] for doc in of_kind(docs, "PersistentVolumeClaim")}
    for each in of_kind(docs, "StatefulSet"):
        number = CLIENTS if each["metadata"]["name"] == "fed-client" else each["spec"]["replicas"]
        for template in each["spec"].get("volumeClaimTemplates", []):
            name = f"{template['metadata']['name']}-{each['metadata']['name']}"
            found |= {f"{name}-{ordinal}": template["spec"] for ordinal in range(number)}
    return found


def gibibytes(quantity: str) -> int:
    """A size of a volume."""
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@for_each(text=VALUES)
def test_the_page_s_values_render(text: str):
    assert len(render(yaml.safe_load(text))) > 8


def test_there_is_a_volume_made_by_hand_for_every_claim_and_it_fits():
    made, wanted = volumes(), claims()

    for volume in made:
        kubernetes_validate.validate(volume, "1.32", strict=True)
        spec = volume["spec"]
        claim = wanted.pop(spec["claimRef"]["name"])
        assert spec["claimRef"]["namespace"] == "federation"
        assert spec["storageClassName"] == claim["storageClassName"] == ""
        assert set(claim["accessModes"]) <= set(spec["accessModes"])
        assert gibibytes(claim["resources"]["requests"]["storage"]) <= gibibytes(spec["capacity"]["storage"])
    assert wanted == {}
    assert len({volume["spec"]["hostPath"]["path"] for volume in made}) == len(made)


def test_the_page_takes_the_images_that_the_chart_wants():
    (saved,) = re.findall(r"docker save (.*?) >", PAGE)
    there = set(re.findall(r"docker (?:build .*-t|pull) (\S+)", PAGE))
    docs = objects(CHART / "values-hostpath.yaml")
    wanted = {
        container["image"]
        for doc in docs
        if "template" in doc.get("spec", {})
        for kind in ("containers", "initContainers")
        for container in doc["spec"]["template"]["spec"].get(kind, [])
    }

    assert set(saved.split()) == wanted
    assert wanted <= there


def test_every_image_for_the_cpu_is_built_with_torch_s_cpu_builds():
    builds = re.findall(r"^\$ (.*(?:--target cpu|docker buildx bake).*)$", PAGE, re.MULTILINE)

    assert len(builds) == 2
    assert all("TORCH_INDEX=" in build or "TORCH_CPU_INDEX=" in build for build in builds)


@for_each(where=("page", "notes"))
def test_the_join_token_s_secret_of_an_earlier_installation_is_replaced(where: str):
    values = {"enrolment": {"enabled": True}}
    texts = Chart.load(CHART).render(values, name=RELEASE, namespace=NAMESPACE)
    said = PAGE if where == "page" else texts["lorabbit/templates/NOTES.txt"]
    (command,) = re.findall(r"kubectl .* create secret generic fed-join .*", said)

    assert command.endswith(" --dry-run=client -o yaml | kubectl -n federation apply -f -")


def test_images_that_podman_built_are_found_as_the_page_says():
    (values,) = re.findall(r"podman and buildah .* install with `(\S+)`", PAGE)
    key, _, registry = values.partition("=")
    assert key == "image.registry"

    images = {container["image"] for _, container, _ in containers(render({"image": {"registry": registry}}))}

    assert {"localhost/lorabbit-server:0.1.0", "localhost/lorabbit-client:0.1.0", "redis:8"} <= images


def test_the_size_that_the_page_names_is_what_a_release_asks_for():
    asked = [
        (doc["spec"].get("replicas", 1), container["resources"]["requests"])
        for doc in of_kind(render({}), "StatefulSet")
        for container in doc["spec"]["template"]["spec"]["containers"]
    ]
    milli = sum(number * int(each["cpu"].removesuffix("m")) for number, each in asked)
    mebi = sum(number * int(each["memory"].removesuffix("Mi")) for number, each in asked)

    assert f"ask for {milli / 1000:.1f} processors and {mebi / 1024:.1f} GiB" in PAGE
    assert named(render({}), "StatefulSet", "fed-client")["spec"]["replicas"] == 3
