"""Every values file renders, lints, packages, and is what two versions of Kubernetes accept."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cases import for_each
from charts import CASES, CHART, CUSTOM, Doc, named, objects, of_kind, render, title, values_of, workloads
from helm_python import Chart, HelmValuesError, lint, package
from jsonschema import Draft7Validator

KUBERNETES = ["1.29", "1.32", "1.37"]
"""The oldest that the chart allows, one that is widely run, and a new one."""
ENROLLMENT: Doc = {"enrolment": {"enabled": True}}
AUTOSCALED: Doc = {"name": "a", "autoscaling": {"enabled": True}}
case = for_each(path=CASES)


@case
def test_helm_finds_nothing_to_complain_of(path: Path):
    found = lint(CHART, values_of(path), strict=True)

    assert found["errors"] == []
    assert [message for message in found["messages"] if message["severity"] > 1] == []


@for_each(path__version=[*zip(CASES, cycle(KUBERNETES), strict=False), *product(CASES[:1], KUBERNETES)])
def test_kubernetes_knows_every_field(path: Path, version: str):
    checked = [doc for doc in objects(path) if doc["kind"] not in CUSTOM]

    for doc in checked:
        kubernetes_validate.validate(doc, version, strict=True)

    assert len(checked) > 8


def test_a_field_that_kubernetes_does_not_know_is_noticed():
    doc = {**objects(CASES[0])[0], "spek": {}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(doc, KUBERNETES[0], strict=True)


@case
def test_no_two_objects_have_one_name(path: Path):
    titles = [title(doc) for doc in objects(path)]

    assert len(titles) == len(set(titles))


def test_the_package_renders_as_the_folder_does(tmp_path: Path):
    values = values_of(CHART / "values-dev.yaml")

    archive = Path(package(CHART, destination=tmp_path))

    assert archive.name == "lorabbit-0.1.0.tgz"
    assert render(values, chart=archive) == render(values)


def test_a_second_rendering_with_given_passwords_is_the_same():
    values = values_of(CHART / "ci" / "builtin-values.yaml")

    assert render(values) == render(values)


def test_passwords_that_are_not_given_are_long_and_differ():
    first, second = (of_kind(render({}), "Secret") for _ in range(2))

    passwords = [
        value
        for secret in (*first, *second)
        for key, value in secret["stringData"].items()
        if key.endswith("password")
    ]  # fmt: skip
    assert len(set(passwords)) == 6
    assert min(map(len, passwords)) >= 32


def test_values_satisfy_their_schema_in_another_reader_too():
    schema = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))
    validator = Draft7Validator(schema)

    complaints = [
        (path.name, error.message)
        for path in [CHART / "values.yaml", *CASES]
        for error in validator.iter_errors(values_of(path))
    ]
    assert complaints == []


def closed(schema: Doc) -> bool:
    """Whether every object with properties refuses others."""
    inner = [part for part in schema.values() if isinstance(part, dict)]
    is_closed = "properties" not in schema or schema.get("additionalProperties") is False or "required" in schema
    return is_closed and all(closed(part) for part in inner)


def test_every_part_of_the_values_refuses_unknown_keys():
    schema = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))

    assert schema["additionalProperties"] is False
    assert closed(schema)


def test_nothing_immutable_depends_on_the_version_of_the_chart(tmp_path: Path):
    values = values_of(CHART / "ci" / "pools-values.yaml") | values_of(CHART / "ci" / "builtin-values.yaml")
    newer = package(CHART, destination=tmp_path, version="9.9.9", app_version="9.9.9")
    fixed = ("selector", "serviceName", "volumeClaimTemplates", "podManagementPolicy")

    before, after = (
        {
            title(doc): {key: doc["spec"].get(key) for key in fixed}
            for doc in workloads(render(values, chart=chart))
            if doc["kind"] != "Job"
        }
        for chart in (CHART, Path(newer))
    )

    assert before == after
    assert len(before) == 6


def test_an_upgrade_replaces_a_finite_pool_only_where_its_clients_change():
    def job(**pool: object) -> Doc:
        (found,) = of_kind(render({"clientPools": [{"name": "f", "kind": "IndexedJob", **pool}]}), "Job")[:1]
        return found

    same, other = job(), job(threads=2)

    assert job()["metadata"]["name"] == same["metadata"]["name"]
    assert other["metadata"]["name"] != same["metadata"]["name"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"clientPols": []}, "'clientPols' not allowed"),
        ({"clientPools": [{"name": "a", "device": "tpu"}]}, "must be one of 'cpu', 'cuda', 'jetson'"),
        ({"clientPools": [{"name": "a", "rank": 4}]}, "/clientPools/0.*'rank' not allowed"),
        ({"clientPools": [{"replicas": 4}]}, "missing property 'name'"),
        ({"clientPools": [{"name": "1st"}]}, "/clientPools/0/name': '1st' does not match pattern"),
        ({"clientPools": [{"name": "a", "replicas": "many"}]}, "/replicas': got string, want integer"),
        ({"rabbitmq": {"mode": "bitnami"}}, "'builtin', 'operator', 'external'"),
        ({"server": {"resources": {"limits": {"memory": "lots"}}}}, "/server/resources/limits/memory"),
        ({"server": {"resources": {"requests": {"memory": "10K"}}}}, "/server/resources/requests/memory"),
        ({"redis": {"persistence": {"size": "10K"}}}, "/redis/persistence/size"),
        ({"redis": {"maxMemory": "0"}}, "/redis/maxMemory"),
        ({"enrolment": {"httpToken": "short"}}, "/enrolment/httpToken"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_path(values: Doc, said: str):
    with pytest.raises(HelmValuesError, match=said):
        render(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"server": {"image": {"tag": "latest"}}}, "image lorabbit-server: the tag latest"),
        ({"clientPools": [{"name": "redis"}]}, 'a pool cannot be named "redis"'),
        ({"clientPools": [{"name": "a"}, {"name": "a"}]}, 'two pools named "a"'),
        ({"clientPools": [{"name": "a", "kind": "Deployment", "data": {"subPath": "x"}}]}, "no lasting identity"),
        ({"clientPools": [{"name": "a", "kind": "IndexedJob", "autoscaling": {"enabled": True}}]}, "fixed number"),
        ({"clientPools": [{"name": "a", "kind": "IndexedJob", "replicas": 0}]}, "an IndexedJob of 0 clients is over"),
        ({"clientPools": [{"name": "a", "data": {"subPath": "x"}}]}, "name that too"),
        ({"clientPools": [{"name": "a", "capability": {"dtype": "float16"}}]}, "float16 is for GPUs"),
        ({"clientPools": [{"name": "a", "device": "jetson"}]}, "set runtimeClassName, such as nvidia"),
        (
            {"clientPools": [AUTOSCALED | {"autoscaling": {"enabled": True, "min": 5, "max": 2}}]},
            "5, is more than .*, 2",
        ),
        ({"clientPools": [AUTOSCALED]}, "autoscaling needs networkPolicy.httpFrom: say where KEDA runs"),
        (
            {"clientPools": [{"name": "a", "kind": "IndexedJob"}], **ENROLLMENT},
            "with enrolment.enabled a client's password",
        ),
        (
            {"clientDefaults": {"persistence": {"enabled": False}}, **ENROLLMENT},
            "with enrolment.enabled a client's password",
        ),
        ({"clientDefaults": {"persistence": {"whenScaled": "Delete"}}, **ENROLLMENT}, "persistence.whenScaled: Retain"),
        ({"server": {"replicas": 2}}, "accessMode to ReadWriteMany from the first installation on"),
        ({"server": {"heartbeatSeconds": 30}}, "server.clientLeaseSeconds: at least twice .* which is 30"),
        ({"redis": {"maxMemory": "4gb"}}, "redis.maxMemory: 4gb is not below redis.resources.limits.memory, 512Mi"),
        ({"redis": {"maxMemory": "512mb"}}, "redis.maxMemory: 512mb is not below"),
        ({"rabbitmq": {"memoryHighWatermark": "10GiB"}}, "10GiB is more than 60 % of .*, 2Gi"),
        ({"rabbitmq": {"memoryHighWatermark": "1300MB"}}, "1300MB is more than 60 % of .*, 2Gi"),
        (
            {"rabbitmq": {"mode": "operator", "auth": {"serverPassword": "s"}}},
            "rabbitmq.auth: of the built-in broker alone",
        ),
        ({"rabbitmq": {"mode": "external"}}, "rabbitmq.external.existingSecret: name the secret"),
        ({"redis": {"mode": "external"}}, "redis.auth.existingSecret: name the secret"),
        ({"rabbitmq": {"tls": {"enabled": True}}}, "rabbitmq.tls: name a secret in existingSecret"),
        ({"enrolment": {"enabled": True}, "rabbitmq": {"mode": "operator"}}, "enrolment.enabled: the chart gives"),
        ({"monitoring": {"serviceMonitor": True}}, "networkPolicy.httpFrom: say where Prometheus runs"),
    ],
)
def test_values_that_do_not_go_together_are_refused_in_a_sentence(values: Doc, said: str):
    with pytest.raises(Exception, match=said):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"redis": {"maxMemory": "511mb"}},
        {"redis": {"maxMemory": "8gb", "resources": {"limits": {"memory": None}}}, "rabbitmq": {"resources": None}},
        {"redis": {"maxMemory": "600mb", "resources": {"limits": {"memory": 1000000000}}}},
        {"rabbitmq": {"memoryHighWatermark": "1280MB"}},
        {"rabbitmq": {"memoryHighWatermark": "1200MiB"}},
        {"server": {"heartbeatSeconds": 7.5, "resources": {"requests": {"cpu": 0.5, "memory": "1k"}}}},
        {"clientPools": [{"name": "sim", "kind": "Deployment", "persistence": {"enabled": False}}], **ENROLLMENT},
        {"clientPools": [AUTOSCALED], "networkPolicy": {"enabled": False}},
    ],
)
def test_values_that_go_together_only_just_are_taken(values: Doc):
    docs = [doc for doc in render(values) if doc["kind"] not in CUSTOM]

    for doc in docs:
        kubernetes_validate.validate(doc, KUBERNETES[0], strict=True)
    assert len(docs) > 8


@pytest.mark.parametrize("name", ["1", "1fed", "my.release"])
def test_a_release_whose_services_could_have_no_name_is_refused(name: str):
    with pytest.raises(Exception, match="release name"):
        render({}, name=name)


def test_a_name_that_leaves_kubernetes_no_room_is_refused():
    with pytest.raises(Exception, match="48 at most"):
        render({"clientPools": [{"name": "p" * 40}]}, name="a-release-of-some-length")


def test_a_pool_overrides_with_empty_values_too():
    (pool,) = [doc for doc in workloads(render({
        "clientDefaults": {"replicas": 5, "persistence": {"enabled": True}},
        "clientPools": [{"name": "a", "replicas": 0, "persistence": {"enabled": False}}],
    })) if doc["metadata"]["name"] == "fed-a"]  # fmt: skip

    assert pool["spec"]["replicas"] == 0
    assert "volumeClaimTemplates" not in pool["spec"]


def test_the_chart_names_its_images_and_its_license():
    metadata = Chart.load(CHART).metadata
    shown = {entry["image"] for entry in yaml.safe_load(metadata["annotations"]["artifacthub.io/images"])}

    assert shown == {c["image"] for doc in workloads(render({})) for c in doc["spec"]["template"]["spec"]["containers"]}
    assert metadata["annotations"]["artifacthub.io/license"] == "Apache-2.0"
    assert named(render({}), "Service", "fed-server")["spec"]["ports"][0]["port"] == 8080
