"""The chart and the product agree: settings, names, permissions, metrics, images, the README."""

from __future__ import annotations

import json
import re
import runpy
import ssl
from pathlib import Path
from urllib.parse import unquote, urlsplit

import certifi
import pytest
import redis
import yaml
from cases import for_each
from charts import (
    CASES,
    CHART,
    NAMESPACE,
    RELEASE,
    Doc,
    containers,
    environment,
    named,
    objects,
    of_kind,
    pod,
    render,
    values_of,
)
from helm_python import Chart
from prometheus_client.parser import text_string_to_metric_families
from tree import ROOT

from lorabbit import job_loader
from lorabbit.broker import topology
from lorabbit.broker.rabbitmq.connection import parameters_of
from lorabbit.config.network import TlsSettings
from lorabbit.config.settings import ClientSettings, OperatorSettings, ServerSettings, read_settings
from lorabbit_server.api.metrics import ServerMetrics

case = for_each(path=CASES)
KINDS = {"server": ServerSettings, "client": ClientSettings, "test": OperatorSettings}
POOLS = CHART / "ci" / "pools-values.yaml"
BUILTIN = CHART / "ci" / "builtin-values.yaml"


def plain(container: Doc) -> dict[str, str]:
    """LoRAbbit's variables of a container, as the kubelet would expand them for its first pod."""
    found = {}
    for name, variable in environment(container).items():
        value = variable.get("value", "0")
        found[name] = re.sub(r"\$\((\w+)\)", lambda match: found.get(match[1], "x"), value)
    return {name: value for name, value in found.items() if name.startswith("LORABBIT_")}


# ---- settings ----
@case
def test_every_variable_is_a_setting_that_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    for place, container, _ in containers(objects(path)):
        if container["name"] not in KINDS:
            continue
        kind = KINDS[container["name"]]
        variables = plain(container)
        known = {f"LORABBIT_{field.upper()}" for field in kind.model_fields}
        assert {name.removesuffix("_FILE") for name in variables} <= known, place
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                if not name.endswith("_FILE"):
                    patch.setenv(name, value)
            read_settings(kind)


@case
def test_a_secret_s_file_lies_where_the_variable_says(path: Path):
    for place, container, template in containers(objects(path)):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        files = {
            f"{mounts[volume['name']]}/{item['path']}"
            for volume in template["spec"]["volumes"]
            for item in volume.get("secret", {}).get("items", [])
        }
        named_files = {value for name, value in plain(container).items() if name.endswith("_FILE")}
        assert named_files <= files, place


def test_a_client_that_keeps_its_volume_is_named_after_its_pod():
    docs = objects(POOLS)
    holder = pod(named(docs, "StatefulSet", "fed-holder"))["spec"]["containers"][0]
    sim = pod(named(docs, "Deployment", "fed-sim"))["spec"]["containers"][0]

    assert environment(holder)["LORABBIT_CLIENT"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert "LORABBIT_CLIENT" not in environment(sim)


def test_the_client_of_an_index_is_named_after_it_and_leaves_in_the_end():
    (job,) = [doc for doc in of_kind(objects(POOLS), "Job") if "-finite-" in doc["metadata"]["name"]]
    variables = plain(pod(job)["spec"]["containers"][0])

    assert variables["LORABBIT_CLIENT"] == "fed-finite-0"
    assert float(variables["LORABBIT_IDLE_SECONDS"]) > 0
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)


def test_a_client_sees_the_folder_of_the_data_that_carries_its_name():
    holder = pod(named(objects(POOLS), "StatefulSet", "fed-holder"))["spec"]["containers"][0]
    (mount,) = [mount for mount in holder["volumeMounts"] if mount["name"] == "dataset"]

    assert mount["subPathExpr"] == "hospitals/$(LORABBIT_CLIENT)"
    assert mount["readOnly"] is True
    assert plain(holder)["LORABBIT_DATA_ROOT"] == mount["mountPath"]


def device_of(file: str, pool: str) -> tuple[Doc, Doc]:
    """A pool's pod and its container."""
    template = pod(named(objects(CHART / file), "StatefulSet", f"fed-{pool}"))["spec"]
    return template, template["containers"][0]


def test_a_cuda_client_gets_a_gpu_or_a_slice_of_one():
    spec, whole = device_of("values-gpu.yaml", "gpu")
    _, part = device_of("values-gpu.yaml", "mig")
    _, none = device_of("values-gpu.yaml", "cpu")

    assert whole["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert part["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert not any("nvidia" in name for name in none["resources"]["limits"])
    assert whole["image"] == "lorabbit-client:0.1.0-cuda"
    assert plain(whole)["LORABBIT_DEVICE"] == "cuda"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


def test_a_jetson_client_gets_its_gpu_by_the_runtime_class_alone():
    """The resource of a GPU, which the defaults name, is a cuda client's."""
    spec, container = device_of("values-jetson.yaml", "jetson")

    assert spec["runtimeClassName"] == "nvidia"
    assert spec["nodeSelector"] == {"kubernetes.io/arch": "arm64"}
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container["image"] == "lorabbit-client:0.1.0-jetson"


# ---- the broker ----
def permissions() -> dict[str, dict[str, str]]:
    (secret,) = [doc for doc in of_kind(objects(BUILTIN), "Secret") if doc["metadata"]["name"] == "fed-rabbitmq"]
    return {entry["user"]: entry for entry in json.loads(secret["stringData"]["definitions.json"])["permissions"]}


def test_a_client_may_read_inboxes_and_adapters_and_publish_to_the_server_alone():
    may = permissions()["lorabbit-client"]
    readable = [topology.inbox("fed-client-0").name, topology.adapter_stream("0" * 64).name]

    assert all(re.search(may["read"], name) for name in readable)
    assert not any(re.search(may["read"], queue.name) for queue in topology.QUEUES)
    assert [name for name in (*topology.EXCHANGES, "amq.default") if re.search(may["write"], name)] == [topology.UP]
    assert not any(re.search(may["configure"], name) for name in (*readable, *topology.EXCHANGES))


def test_the_server_may_do_what_it_does():
    may = permissions()["lorabbit-server"]
    names = [
        *topology.EXCHANGES,
        *(queue.name for queue in topology.QUEUES),
        topology.inbox("fed-client-0").name,
        topology.adapter_stream("0" * 64).name,
    ]

    assert all(re.search(may[right], name) for name in names for right in ("configure", "write", "read"))
    # Chunks go straight into their stream.
    assert re.search(may["write"], "amq.default")


def test_the_broker_is_configured_as_under_compose():
    ours = (ROOT / "services" / "rabbitmq" / "rabbitmq.conf").read_text(encoding="utf-8")

    assert (CHART / "files" / "rabbitmq.conf").read_text(encoding="utf-8") == ours


def test_the_broker_s_limits_are_those_of_the_values():
    room = {"resources": {"limits": {"memory": "5Gi"}}}
    docs = render({"rabbitmq": {"memoryHighWatermark": "3GiB", "diskFreeLimit": "7GB", **room}})
    conf = named(docs, "ConfigMap", "fed-rabbitmq")["data"]["rabbitmq.conf"]

    assert re.findall(r"^(?:vm_memory|disk_free).*= (.*)$", conf, re.MULTILINE) == ["3GiB", "7GB"]


def test_passwords_come_through_a_url_whatever_they_hold():
    password = "p@ss/word:%#? +2"
    docs = render({
        "rabbitmq": {"auth": {"serverPassword": password, "clientPassword": "c"}},
        "redis": {"auth": {"password": password}},
    })  # fmt: skip
    secrets = {doc["metadata"]["name"]: doc["stringData"] for doc in of_kind(docs, "Secret")}

    parameters = parameters_of(secrets["fed-rabbitmq"]["server-url"], "test", TlsSettings())

    assert (parameters.credentials.username, parameters.credentials.password) == ("lorabbit-server", password)
    assert (parameters.host, parameters.port) == ("fed-rabbitmq.federation.svc", 5672)
    assert json.loads(secrets["fed-rabbitmq"]["definitions.json"])["users"][0]["password"] == password
    store = redis.ConnectionPool.from_url(secrets["fed-redis"]["url"]).connection_kwargs
    assert (store["password"], store["host"], store["port"]) == (password, "fed-redis.federation.svc", 6379)


def test_a_password_comes_through_the_url_of_the_management_interface_too():
    password = "p@ss/word:%#? +2"
    docs = render({"enrolment": {"enabled": True}, "rabbitmq": {"auth": {"serverPassword": password}}})
    url = named(docs, "Secret", "fed-rabbitmq")["stringData"]["management-url"]

    assert unquote(urlsplit(url).password or "") == password  # as the server reads it


@pytest.mark.parametrize(("given", "made"), [("", None), ("-", ""), ("fast", "fast")])
def test_the_operator_is_told_the_storage_class_that_the_claims_of_the_built_in_broker_have(
    given: str, made: str | None
):
    values = {"persistence": {"storageClass": given}}
    (cluster,) = of_kind(render({"rabbitmq": {"mode": "operator", **values}}), "RabbitmqCluster")
    (claim,) = named(render({"rabbitmq": values}), "StatefulSet", "fed-rabbitmq")["spec"]["volumeClaimTemplates"]

    assert cluster["spec"]["persistence"].get("storageClassName") == made
    assert claim["spec"].get("storageClassName") == made


def test_over_tls_a_client_checks_the_broker_s_certificate_and_name():
    docs = objects(CHART / "values-prod.yaml")
    url = named(docs, "Secret", "fed-rabbitmq")["stringData"]["client-url"]
    (certificate,) = of_kind(docs, "Certificate")

    parameters = parameters_of(
        url.replace("%2Frun%2Florabbit%2Fbroker-ca%2Fca.crt", certifi.where()), "test", TlsSettings()
    )

    assert parameters.ssl_options is not None
    assert parameters.ssl_options.context.verify_mode is ssl.CERT_REQUIRED
    assert parameters.ssl_options.context.check_hostname is True
    assert parameters.port == 5671
    assert parameters.host in certificate["spec"]["dnsNames"]
    assert "%2Frun%2Florabbit%2Fbroker-ca%2Fca.crt" in url


def test_a_broker_that_speaks_tls_speaks_nothing_else():
    docs = objects(CHART / "values-prod.yaml")
    conf = named(docs, "ConfigMap", "fed-rabbitmq")["data"]["rabbitmq.conf"]
    container = pod(named(docs, "StatefulSet", "fed-rabbitmq"))["spec"]["containers"][0]

    assert "listeners.tcp = none" in conf
    assert {"name": "amqp", "containerPort": 5671} in container["ports"]


# ---- metrics ----
def test_alerts_dashboards_and_the_scaler_read_metrics_that_exist():
    exported = {
        line.split()[2] for line in ServerMetrics().text(is_leading=True).decode().splitlines() if line[:6] == "# TYPE"
    }
    known = exported | {f"{name}{end}" for name in exported for end in ("_bucket", "_total")}
    texts = [json.dumps(objects(CHART / "values-prod.yaml")), json.dumps(objects(POOLS))]

    read = set(re.findall(r"\blorabbit_[a-z_]+", " ".join(texts)))

    assert {"lorabbit_clients_required", "lorabbit_round_seconds_bucket", "lorabbit_updates_total"} <= read
    assert read <= known


def test_whatever_an_alert_reads_of_a_server_is_there_before_anything_happens():
    """An increase is seen in a series that was there before it, not in one that begins with it."""
    (rule,) = of_kind(objects(CHART / "values-prod.yaml"), "PrometheusRule")
    expressions = " ".join(entry["expr"] for group in rule["spec"]["groups"] for entry in group["rules"])
    asked = [
        (name, dict(re.findall(r'(\w+)="(.*?)"', selector)) | {"namespace": "", "service": ""})
        for name, selector in re.findall(r"(lorabbit_\w+)\{([^}]*)\}", expressions)
    ]
    families = text_string_to_metric_families(ServerMetrics().text(is_leading=True).decode())
    there = [(s.name, s.labels | {"namespace": "", "service": ""}) for family in families for s in family.samples]

    unseen = [(name, labels) for name, labels in asked
              if not any(name == each and labels.items() <= had.items() for each, had in there)]  # fmt: skip

    assert {"namespace": "", "service": "", "status": "failed"} in [labels for _, labels in asked]
    assert unseen == []


def test_every_alert_is_explained_to_operators():
    (rule,) = of_kind(objects(CHART / "values-prod.yaml"), "PrometheusRule")
    page = (ROOT / "docs" / "explanation" / "operations.md").read_text(encoding="utf-8")

    alerts = [entry["alert"] for group in rule["spec"]["groups"] for entry in group["rules"]]

    assert len(alerts) == 7
    assert [alert for alert in alerts if f"`{alert}`" not in page] == []


def test_a_scaled_pool_leaves_its_number_to_the_scaler():
    docs = objects(POOLS)
    for scaled in of_kind(docs, "ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        workload = named(docs, target["kind"], target["name"])
        assert "replicas" not in workload["spec"]
        assert workload["metadata"]["annotations"] == {"lorabbit/autoscaled": "true"}
    assert "annotations" not in named(docs, "StatefulSet", "fed-holder")["metadata"]


def test_a_client_tells_its_pool_and_what_the_pool_can_do():
    limits = {"maxRank": 4, "maxBatch": 2, "dtype": "bfloat16", "quantisation": "int4"}
    pools = [{"name": "small", "capability": limits}, {"name": "large"}]
    docs = render({"clientPools": pools})

    told = {name: {key.removeprefix("LORABBIT_"): each.get("value") for key, each in
                   environment(pod(named(docs, "StatefulSet", f"fed-{name}"))["spec"]["containers"][0]).items()}
            for name in ("small", "large")}  # fmt: skip

    asked = ("POOL", "MAX_RANK", "MAX_BATCH", "DTYPE", "QUANTISATION", "DRAIN_SECONDS")
    assert [told["small"].get(key) for key in asked] == ["small", "4", "2", "bfloat16", "int4", "20"]
    assert [told["large"].get(key) for key in asked] == ["large", None, None, "float32", "none", "20"]


@pytest.mark.parametrize(
    ("rabbitmq", "kept"),
    [
        ({"mode": "operator"}, "true"),
        ({"mode": "operator", "replicas": 1}, None),
        ({"mode": "builtin"}, None),
        ({"mode": "external", "external": {"existingSecret": "broker"}}, None),
    ],
)
def test_a_majority_of_several_nodes_keeps_every_queue(rabbitmq, kept):
    server = named(render({"rabbitmq": rabbitmq}), "StatefulSet", "fed-server")

    variables = environment(pod(server)["spec"]["containers"][0])
    assert variables.get("LORABBIT_REPLICATED_QUEUES", {}).get("value") == kept


# ---- the rest ----
def test_the_notes_name_what_is_there_and_scale_only_what_may_be_scaled():
    texts = Chart.load(CHART).render(values_of(POOLS), name=RELEASE, namespace=NAMESPACE)
    notes = texts["lorabbit/templates/NOTES.txt"]

    assert re.findall(r"lorabbit scale \d+ --pool (\S+)", notes) == ["holder", "finite"]
    assert re.findall(r"exec (?:-it )?(\S+)", notes) == ["fed-server-0"] * 2
    assert re.findall(r"svc/(\S+)", notes) == ["fed-server"]
    assert "(pool elastic follows the jobs: 1 to 5 clients)" in notes


def test_broker_and_store_are_the_images_of_compose():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    images = {container["name"]: container["image"] for _, container, _ in containers(render({}))}

    assert (images["rabbitmq"], images["redis"]) == (compose["rabbitmq"]["image"], compose["redis"]["image"])


def test_the_chart_has_the_version_of_the_product():
    from lorabbit import __version__  # noqa: PLC0415 - named where it is compared

    assert yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["appVersion"] == __version__


def test_the_job_of_helm_test_is_a_job():
    spec = job_loader.load(CHART / "files" / "round.yaml")

    assert (spec.rounds, spec.clients) == (1, 1)


def test_the_readme_says_what_the_values_say():
    made = runpy.run_path(str(ROOT / "helm" / "readme.py"))["readme"](CHART)

    assert (CHART / "README.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_every_value_is_explained():
    context = runpy.run_path(str(ROOT / "helm" / "readme.py"))
    explained = [entry.path for entry in context["entries"]((CHART / "values.yaml").read_text(encoding="utf-8"))]

    silent = [
        path
        for path in context["leaves"](values_of(CHART / "values.yaml"))
        if not any(path == known or path.startswith(f"{known}.") for known in explained)
    ]

    assert silent == []


def test_every_value_that_the_schema_knows_has_a_default_and_the_other_way_round():
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = values_of(CHART / "values.yaml")

    def known(part: Doc, path: str = "") -> set[str]:
        if "$ref" in part:
            part = schema["definitions"][part["$ref"].rpartition("/")[2]]
        if "properties" not in part:
            return {path}
        return {each for name, inner in part["properties"].items() for each in known(inner, f"{path}.{name}")}

    def given(value: object, path: str = "") -> set[str]:
        if path in leaves or not isinstance(value, dict):
            return {path}
        return {each for name, inner in value.items() for each in given(inner, f"{path}.{name}")}

    leaves = {re.sub(r"\.(requests|limits)$", r".\1", path) for path in known(schema)} - {".global"}

    assert given(values) == leaves
