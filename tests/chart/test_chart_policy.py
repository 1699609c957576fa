"""What every rendered release keeps to: rights, limits, probes, labels, references, network edges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cases import for_each
from charts import (
    CASES,
    CHART,
    Doc,
    containers,
    matches,
    objects,
    of_kind,
    pod,
    render,
    title,
    values_of,
    workloads,
)

case = for_each(path=CASES)
HOSTPATH = CHART / "values-hostpath.yaml"
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
MADE_ELSEWHERE = {
    # by the RabbitMQ Cluster Operator, and by cert-manager
    "fed-rabbitmq-default-user": {"username", "password"},
    "fed-rabbitmq-tls": {"tls.crt", "tls.key", "ca.crt"},
    # by whoever installs, named in ci/
    "broker": {"server-url", "client-url", "definitions.json"},
    "broker-ca": {"ca.crt"},
    "broker-tls": {"tls.crt", "tls.key", "ca.crt"},
    "store": {"url", "password"},
    # by whoever lets clients in
    "fed-join": {"token"},
}


@case
def test_pods_keep_to_the_restricted_standard(path: Path):
    for workload in workloads(objects(path)):
        spec = pod(workload)["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, title(workload)
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert "initContainers" not in spec or values_of(path).get("volumePermissions")
        assert all(volume.keys() - {"name"} <= VOLUMES for volume in spec["volumes"])


@case
def test_containers_keep_to_the_restricted_standard_on_a_root_they_cannot_write(path: Path):
    for place, container, _ in containers(objects(path)):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, place
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, place  # noqa: S108


@case
def test_pods_get_no_token_and_no_variables_named_after_services(path: Path):
    specs = [pod(workload)["spec"] for workload in workloads(objects(path))]

    assert [spec["automountServiceAccountToken"] for spec in specs] == [False] * len(specs)
    assert [spec["enableServiceLinks"] for spec in specs] == [False] * len(specs)


@case
def test_images_have_a_version(path: Path):
    for place, container, _ in containers(objects(path)):
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        assert "@sha256:" in image or tag not in {"", "latest"}, f"{place} {image}"


@case
def test_containers_have_requests_and_limits(path: Path):
    for place, container, _ in containers(objects(path)):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys(), f"{place} {kind}"


@case
def test_whatever_runs_for_long_is_probed(path: Path):
    for place, container, _ in containers([doc for doc in objects(path) if "-test-" not in doc["metadata"]["name"]]):
        assert "readinessProbe" in container, place
        listens = {"startupProbe", "livenessProbe"} if "ports" in container else set()
        assert {"startupProbe", "livenessProbe"} & container.keys() == listens, place


@case
def test_a_probe_asks_a_port_that_the_container_has(path: Path):
    for place, container, _ in containers(objects(path)):
        names = {port["name"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container.get(kind, {})
            port = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port")
            assert port is None or port in names, f"{place} {kind}"


@case
def test_selectors_select_their_own_pods_alone(path: Path):
    kept = [doc for doc in workloads(objects(path)) if doc["kind"] != "Job"]
    for workload in kept:
        taken = [title(other) for other in workloads(objects(path))
                 if matches(workload["spec"]["selector"], pod(other)["metadata"]["labels"])]  # fmt: skip
        assert taken == [title(workload)]


@case
def test_services_and_budgets_find_pods_with_the_ports_they_name(path: Path):
    docs = objects(path)
    for service in of_kind(docs, "Service", "PodDisruptionBudget"):
        selector = service["spec"]["selector"]
        selector = selector if "matchLabels" in selector else {"matchLabels": selector}
        found = [workload for workload in workloads(docs) if matches(selector, pod(workload)["metadata"]["labels"])]
        ports = {p["name"] for w in found for c in pod(w)["spec"]["containers"] for p in c.get("ports", [])}
        assert found, title(service)
        assert {port["targetPort"] for port in service["spec"].get("ports", [])} <= ports, title(service)


@case
def test_monitors_find_services_with_the_port_they_read(path: Path):
    docs = objects(path)
    for monitor in of_kind(docs, "ServiceMonitor"):
        found = [s for s in of_kind(docs, "Service") if matches(monitor["spec"]["selector"], s["metadata"]["labels"])]
        (endpoint,) = monitor["spec"]["endpoints"]
        (service,) = found
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def references(docs: list[Doc], kind: str) -> Iterator[tuple[str, str, str | None]]:
    """(place, name, key) of every reference to a secret, config map or claim; no key takes all."""
    for workload in workloads(docs):
        for volume in pod(workload)["spec"]["volumes"]:
            source = volume.get(kind)
            name = source and (source.get("secretName") or source.get("name") or source.get("claimName"))
            if name:
                items = source.get("items")
                yield from ((title(workload), name, item["key"]) for item in items or [{"key": None}])
    if kind == "secret":
        for place, container, _ in containers(docs):
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {}).get("secretKeyRef")
                if source:
                    yield place, source["name"], source["key"]


@case
def test_every_reference_to_a_secret_resolves(path: Path):
    docs = objects(path)
    made = {doc["metadata"]["name"]: set(doc["stringData"]) for doc in of_kind(docs, "Secret")}
    given = {name: keys for name, keys in MADE_ELSEWHERE.items() if name not in made}
    found = list(references(docs, "secret"))

    for place, name, key in found:
        keys = made.get(name) or given.get(name) or set()
        assert keys, f"{place}: there is no secret {name}"
        assert key is None or key in keys, f"{place}: the secret {name} has no {key}"
    assert found


@case
def test_every_secret_that_is_made_is_used(path: Path):
    docs = objects(path)

    assert {doc["metadata"]["name"] for doc in of_kind(docs, "Secret")} <= {n for _, n, _ in references(docs, "secret")}


@case
def test_every_reference_to_a_config_map_and_a_claim_resolves(path: Path):
    docs = objects(path)
    maps = {doc["metadata"]["name"] for doc in of_kind(docs, "ConfigMap")}
    claims = {doc["metadata"]["name"] for doc in of_kind(docs, "PersistentVolumeClaim")} | {"datasets", "federation"}

    assert {name for _, name, _ in references(docs, "configMap")} <= maps
    assert {name for _, name, _ in references(docs, "persistentVolumeClaim")} <= claims


@case
def test_every_mount_has_its_volume_and_every_volume_a_mount(path: Path):
    for place, container, template in containers(objects(path)):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert volumes - mounts == set(), place
        assert mounts - volumes <= {"data"}, place  # of a StatefulSet's claim template


# ---- the network ----
def admits(rule: Doc, key: str, labels: dict[str, str], port: int) -> bool:
    """Whether one rule admits a peer in this namespace on a port."""
    ports = {entry["port"] for entry in rule.get("ports", [])}
    peers = rule.get(key)
    is_peer = peers is None or any("podSelector" in peer and matches(peer["podSelector"], labels) for peer in peers)
    return is_peer and (not ports or port in ports)


def allowed(docs: list[Doc], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Whether the release's policies let one of its pods reach another."""
    sides = []
    for key, direction, own, other in (("to", "egress", source, target), ("from", "ingress", target, source)):
        policies = [p for p in of_kind(docs, "NetworkPolicy") if matches(p["spec"]["podSelector"], own)]
        bound = [p for p in policies if direction.title() in p["spec"]["policyTypes"]]
        sides.append(not bound or any(
            admits(rule, key, other, port) for p in bound for rule in p["spec"].get(direction, [])
        ))  # fmt: skip
    return all(sides)


def parts(docs: list[Doc]) -> dict[str, dict[str, str]]:
    """Labels of one pod of every component."""
    return {(labels := pod(doc)["metadata"]["labels"])["app.kubernetes.io/component"]: labels
            for doc in workloads(docs)}  # fmt: skip


guarded = for_each(path=[path for path in CASES if path.stem != "open-values"])


@guarded
def test_every_pod_is_denied_what_no_policy_allows(path: Path):
    docs = objects(path)
    (deny,) = [policy for policy in of_kind(docs, "NetworkPolicy") if policy["metadata"]["name"] == "fed-deny"]

    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert deny["spec"]["ingress"] == []
    assert all(matches(deny["spec"]["podSelector"], labels) for labels in parts(docs).values())


@guarded
def test_every_port_is_opened_by_a_policy_and_no_other(path: Path):
    docs = objects(path)
    for workload in workloads(docs):
        labels = pod(workload)["metadata"]["labels"]
        ports = {port["containerPort"] for c in pod(workload)["spec"]["containers"] for port in c.get("ports", [])}
        opened = {
            port["port"]
            for policy in of_kind(docs, "NetworkPolicy")
            if matches(policy["spec"]["podSelector"], labels)
            for rule in policy["spec"].get("ingress", [])
            for port in rule["ports"]
        }
        assert opened == ports, title(workload)


def test_the_edges_are_those_that_the_product_needs_and_no_others():
    docs = objects(CHART / "ci" / "builtin-values.yaml")
    pods, ports = parts(docs), {"server": 8080, "rabbitmq": 5672, "redis": 6379}

    edges = {(one, other) for one in pods for other in ports if allowed(docs, pods[one], pods[other], ports[other])}

    assert edges == {("server", "rabbitmq"), ("server", "redis"), ("client", "rabbitmq"), ("test", "server")}


def test_clients_that_join_reach_the_server_and_the_server_alone_manages_the_broker():
    docs = objects(CHART / "ci" / "enrolment-values.yaml")
    pods, ports = parts(docs), {"server": 8080, "rabbitmq": 15671}

    edges = {(one, other) for one in pods for other in ports if allowed(docs, pods[one], pods[other], ports[other])}

    assert edges == {("client", "server"), ("test", "server"), ("server", "rabbitmq")}


def test_whoever_may_read_the_broker_s_metrics_can_without_the_prometheus_operator():
    prometheus = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    docs = render({"networkPolicy": {"metricsFrom": prometheus}})
    (policy,) = [p for p in of_kind(docs, "NetworkPolicy") if p["metadata"]["name"] == "fed-rabbitmq"]
    (service,) = [doc for doc in of_kind(docs, "Service") if doc["metadata"]["name"] == "fed-rabbitmq"]
    (broker,) = [container for place, container, _ in containers(docs) if place.startswith("StatefulSet/fed-rabbitmq")]

    assert {"ports": [{"port": 15692}], "from": prometheus} in policy["spec"]["ingress"]
    assert 15692 in {port["port"] for port in service["spec"]["ports"]}
    assert 15692 in {port["containerPort"] for port in broker["ports"]}


def test_an_external_broker_and_store_are_reached_in_their_networks_alone():
    docs = objects(CHART / "ci" / "external-values.yaml")
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(docs, "NetworkPolicy")}
    broker = {"ports": [{"port": 5671}], "to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}]}
    store = {"ports": [{"port": 6380}], "to": [{"ipBlock": {"cidr": "10.2.0.0/16"}}]}

    assert policies["fed-server"]["egress"] == [broker, store]
    assert policies["fed-client"]["egress"] == [broker, {"ports": [{"port": 443}]}]
    assert {"fed-rabbitmq", "fed-redis"} & policies.keys() == set()


def test_the_model_hub_can_be_shut():
    docs = render({"networkPolicy": {"modelHub": False}})
    (client,) = [p for p in of_kind(docs, "NetworkPolicy") if p["metadata"]["name"] == "fed-client"]

    assert [rule["ports"] for rule in client["spec"]["egress"]] == [[{"port": 5672}]]


# ---- rights ----
def test_nothing_has_rights_but_the_scaler_and_it_only_scales():
    docs = objects(CHART / "ci" / "pools-values.yaml")
    (role,) = of_kind(docs, "Role")
    finite = next(doc["metadata"]["name"] for doc in of_kind(docs, "Job") if "-test-" not in doc["metadata"]["name"])
    changing = [rule for rule in role["rules"] if {"patch", "update", "create", "delete", "*"} & set(rule["verbs"])]

    assert of_kind(render({}), "Role", "RoleBinding", "ClusterRole", "ServiceAccount") == []
    assert [(rule["resourceNames"], rule["verbs"]) for rule in changing] == [
        ([name], ["get", "patch"]) for name in ("fed-holder", finite, "fed-sim", "fed-elastic")
    ]
    assert not any("secrets" in rule["resources"] for rule in role["rules"])


def test_volumes_without_a_group_are_given_to_their_users_and_nothing_else_runs_as_root():
    pools = [{"name": "client"}, {"name": "sim", "kind": "Deployment"}]
    docs = render({**values_of(HOSTPATH), "clientPools": pools})
    found = {title(doc): pod(doc)["spec"]["initContainers"] for doc in workloads(docs)
             if "initContainers" in pod(doc)["spec"]}  # fmt: skip

    assert {name: each[0]["command"] for name, each in found.items()} == {
        "StatefulSet/fed-client": ["chown", "10001:10001", "/var/lib/lorabbit"],
        "StatefulSet/fed-server": ["chown", "10001:10001", "/var/lib/lorabbit"],
        "StatefulSet/fed-rabbitmq": ["chown", "999:999", "/var/lib/rabbitmq"],
        "StatefulSet/fed-redis": ["chown", "999:999", "/data"],
    }
    assert all(each[0]["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
               for each in found.values())  # fmt: skip


def test_volumes_made_by_hand_are_taken_by_claims_of_no_class():
    docs = objects(HOSTPATH)
    sets = [
        doc["spec"]["volumeClaimTemplates"][0]
        for doc in of_kind(docs, "StatefulSet")
        if doc["spec"].get("volumeClaimTemplates")
    ]
    (claim,) = of_kind(docs, "PersistentVolumeClaim")

    assert [each["spec"]["storageClassName"] for each in (*sets, claim)] == [""] * 4
    (default,) = of_kind(render({}), "PersistentVolumeClaim")
    assert "storageClassName" not in default["spec"]


@for_each(keep=(True, False))
def test_volumes_stay_or_go_with_the_release_as_the_values_say(keep: bool):  # noqa: FBT001 - a parameter
    word = "Retain" if keep else "Delete"
    docs = render({
        "server": {"persistence": {"retain": keep}},
        "clientDefaults": {"persistence": {"whenDeleted": word}},
        "rabbitmq": {"persistence": {"whenDeleted": word}},
        "redis": {"persistence": {"whenDeleted": word}},
    })  # fmt: skip
    (claim,) = of_kind(docs, "PersistentVolumeClaim")
    sets = [doc["spec"] for doc in of_kind(docs, "StatefulSet") if "volumeClaimTemplates" in doc["spec"]]

    assert (claim["metadata"].get("annotations") == {"helm.sh/resource-policy": "keep"}) == keep
    assert [spec["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] for spec in sets] == [word] * 3


def test_production_keeps_everything():
    values = values_of(CHART / "values-prod.yaml")

    kept = [values[part]["persistence"]["whenDeleted"] for part in ("clientDefaults", "rabbitmq", "redis")]

    assert (kept, values["server"]["persistence"]["retain"]) == (["Retain"] * 3, True)
