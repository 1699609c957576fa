"""Rules that an API server holds a release to and no schema states: names, labels, ports, what is immutable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import kubernetes_validate
from cases import for_each
from charts import (
    CASES,
    CHART,
    CUSTOM,
    Doc,
    containers,
    matches,
    named,
    objects,
    of_kind,
    pod,
    render,
    title,
    values_of,
    workloads,
)

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=[-a-z0-9]{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LONG = 63
# A release and a pool whose names are as long as the chart takes them.
RELEASE, POOL = "a" * 30, "b" * 17
each_case = for_each(path=CASES)


def longest() -> list[Doc]:
    """A release with names as long as they may be, in every kind of pool."""
    pools = [
        {"name": f"{POOL[:-1]}{n}", "kind": kind} for n, kind in enumerate(("StatefulSet", "IndexedJob", "Deployment"))
    ]
    return render({"clientPools": pools, "scaler": {"create": True}}, name=RELEASE)


def labels_of(docs: list[Doc]) -> Iterator[tuple[str, str, str]]:
    """Every label with the object that has it, or selects by it."""
    for doc in docs:
        found = [doc["metadata"].get("labels", {})]
        if doc["kind"] in {"StatefulSet", "Deployment", "Job"}:
            found += [pod(doc)["metadata"]["labels"], doc["spec"].get("selector", {}).get("matchLabels", {})]
        for labels in found:
            yield from ((title(doc), key, value) for key, value in labels.items())


def wrong_names(docs: list[Doc]) -> list[str]:
    """Names that an API server refuses, or that leave no room for what controllers append."""
    wrong = []
    for doc in docs:
        name = doc["metadata"]["name"]
        rule = SERVICE_NAME if doc["kind"] == "Service" else DNS_LABEL
        # A StatefulSet's pods have <name>-<hash of 10> as a label, an indexed Job's <name>-<index> as their host name.
        room = {"StatefulSet": 11, "Job": 6}.get(doc["kind"], 0)
        if not rule.fullmatch(name) or len(name) > LONG - room:
            wrong.append(title(doc))
    return wrong


@each_case
def test_names_are_such_as_an_api_server_takes(path):
    assert wrong_names(objects(path)) == []


def test_the_longest_names_leave_room_for_what_controllers_append():
    assert wrong_names(longest()) == []


def test_a_name_that_is_too_long_is_noticed():
    assert wrong_names([{"kind": "StatefulSet", "metadata": {"name": "a" * 60}}]) == ["StatefulSet/" + "a" * 60]


@each_case
def test_labels_are_such_as_an_api_server_takes(path):
    docs = [*objects(path), *longest()]

    assert [
        each for each in labels_of(docs) if not LABEL_KEY.fullmatch(each[1]) or not LABEL_VALUE.fullmatch(each[2])
    ] == []


WORDS = ["on", "no", "true", "null", "e5"]
"""Names that are something else where YAML reads them bare."""


@for_each(word__enrolled=[*product(WORDS, (True, False))])
def test_a_name_is_a_name_whatever_else_yaml_takes_it_for(word: str, enrolled: bool):  # noqa: FBT001 - a parameter
    data = {"existingClaim": word, "subPath": word}
    kinds = [("StatefulSet", word), ("Deployment", "sim")]
    if not enrolled:
        kinds.append(("IndexedJob", f"{word}-1"))
    pools = [{"name": name, "kind": kind, "data": data if name != "sim" else {}, "runtimeClassName": word}
             for kind, name in kinds]  # fmt: skip
    values = {
        "clientPools": pools,
        "image": {"pullSecrets": [word]},
        "clientDefaults": {"persistence": {"storageClass": word}},
        "server": {"persistence": {"existingClaim": word}},
        "rabbitmq": {"auth": {"existingSecret": word}, "tls": {"enabled": True, "existingSecret": word}},
        "redis": {"auth": {"existingSecret": word}, "persistence": {"storageClass": word}},
        "enrolment": {"enabled": enrolled, "tokenSecret": word},
        "scaler": {"create": True},
    }

    docs = [doc for doc in render(values, name=word, namespace="1234") if doc["kind"] not in CUSTOM]

    for doc in docs:
        kubernetes_validate.validate(doc, "1.32", strict=True)
    assert {value for _, key, value in labels_of(docs) if key == "app.kubernetes.io/instance"} == {word}


@each_case
def test_a_pod_that_never_became_ready_is_replaced_by_an_upgrade(path):
    """The controller of a StatefulSet waits for its pods in their order first, unless it treats them all alike."""
    sets = of_kind(objects(path), "StatefulSet")

    assert {each["spec"].get("podManagementPolicy") for each in sets} == {"Parallel"}


@each_case
def test_ports_volumes_and_variables_have_possible_names(path):
    docs = objects(path)
    ports = [port["name"] for _, container, _ in containers(docs) for port in container.get("ports", [])]
    ports += [port["name"] for service in of_kind(docs, "Service") for port in service["spec"].get("ports", [])]
    volumes = [volume["name"] for workload in workloads(docs) for volume in pod(workload)["spec"].get("volumes", [])]
    variables = [each["name"] for _, container, _ in containers(docs) for each in container.get("env", [])]

    assert [name for name in ports if not PORT_NAME.fullmatch(name)] == []
    assert [name for name in volumes if not DNS_LABEL.fullmatch(name) or len(name) > LONG] == []
    assert [name for name in variables if not VARIABLE.fullmatch(name)] == []
    assert all(len(names) == len(set(names)) for names in _names_of_each_pod(docs))


def test_a_variable_of_the_values_takes_the_place_of_the_chart_s():
    """An API server keeps one variable of a name, and refuses two or takes either."""
    extra = [{"name": "LORABBIT_LOG_FORMAT", "value": "text"}, {"name": "MORE", "value": "1"}]
    docs = render({"server": {"extraEnv": extra}, "clientDefaults": {"extraEnv": extra}})
    ours = [container for _, container, _ in containers(docs) if container["name"] in {"server", "client"}]

    assert len(ours) == 2
    for container in ours:
        assert container["env"][-2:] == extra
    assert all(len(names) == len(set(names)) for names in _names_of_each_pod(docs))


def _names_of_each_pod(docs: list[Doc]) -> Iterator[list[str]]:
    """Names that must differ within one pod or container."""
    for workload in workloads(docs):
        yield [volume["name"] for volume in pod(workload)["spec"].get("volumes", [])]
    for _, container, _ in containers(docs):
        yield [each["name"] for each in container.get("env", [])]
        yield [each["mountPath"] for each in container["volumeMounts"]]


@each_case
def test_a_statefulset_is_governed_by_a_service_that_is_there(path):
    docs = objects(path)
    headless = {
        each["metadata"]["name"] for each in of_kind(docs, "Service") if each["spec"].get("clusterIP") == "None"
    }

    assert {each["spec"]["serviceName"] for each in of_kind(docs, "StatefulSet")} <= headless


@each_case
def test_whoever_reads_an_address_reads_one_that_a_service_has(path):
    docs = objects(path)
    names = {each["metadata"]["name"] for each in of_kind(docs, "Service")}
    hosts = set(re.findall(r"([-a-z0-9]+)\.federation\.svc", str(docs)))

    assert hosts <= names | {"fed-rabbitmq"}


def test_the_first_test_bears_pods_that_are_still_starting():
    """A Job's pod that fails comes again after ten seconds, and each time after twice as long."""
    first = named(render({}), "Job", "fed-test-connection")["spec"]

    waits = sum(10 * 2**attempt for attempt in range(first["backoffLimit"]))

    assert 300 <= waits < first["activeDeadlineSeconds"]


FIXED = ("selector", "serviceName", "volumeClaimTemplates", "podManagementPolicy")
"""What a StatefulSet or a Deployment keeps for life."""
UPGRADES = [
    {"server": {"logLevel": "DEBUG", "extraEnv": [{"name": "MORE", "value": "1"}], "image": {"tag": "0.2.0"}}},
    {"clientPools": [{"name": "client", "replicas": 6, "threads": 2}, {"name": "more", "kind": "IndexedJob"}]},
    {"clientDefaults": {"persistence": {"whenDeleted": "Retain", "whenScaled": "Delete"}, "replicas": 1}},
    {"rabbitmq": {"tls": {"enabled": True, "existingSecret": "tls"}, "memoryHighWatermark": "512MiB"}},
    {
        "enrolment": {"enabled": True},
        "volumePermissions": {"enabled": True},
        "networkPolicy": {"enabled": False},
        "clientPools": [{"name": "client"}],
    },
    {"redis": {"auth": {"existingSecret": "store"}, "maxMemory": "128mb"}, "scaler": {"create": True}},
]


def kept_for_life(docs: list[Doc]) -> dict[str, object]:
    """What an API server lets no upgrade change, by object; hooks are made anew each time."""
    kept: dict[str, object] = {}
    for doc in docs:
        if doc["kind"] in {"StatefulSet", "Deployment"}:
            kept[title(doc)] = {key: doc["spec"].get(key) for key in FIXED}
        elif doc["kind"] == "Job" and "helm.sh/hook" not in doc["metadata"].get("annotations", {}):
            kept[title(doc)] = pod(doc)
        elif doc["kind"] == "PersistentVolumeClaim":
            kept[title(doc)] = doc["spec"]
        elif doc["kind"] == "Service":
            kept[title(doc)] = doc["spec"].get("clusterIP")
        elif doc["kind"] == "RoleBinding":
            kept[title(doc)] = doc["roleRef"]
    return kept


@for_each(values=UPGRADES)
def test_an_upgrade_changes_nothing_that_an_api_server_keeps_for_life(values: Doc):
    finite = [{"name": "client"}, {"name": "finite", "kind": "IndexedJob"}]
    before = kept_for_life(render({"clientPools": finite}))

    after = kept_for_life(render({"clientPools": finite, **values}))

    assert len(before.keys() & after.keys()) >= 8
    assert {name: each for name, each in after.items() if name in before} == {
        name: each for name, each in before.items() if name in after
    }


def test_of_a_finite_pool_only_numbers_change_when_it_is_scaled():
    """An API server lets an indexed Job's completions become what its parallelism is: they begin equal."""
    jobs = [doc for doc in objects(CHART / "ci" / "pools-values.yaml") if doc["kind"] == "Job"
            and doc["spec"].get("completionMode") == "Indexed"]  # fmt: skip

    assert jobs
    assert all(job["spec"]["completions"] == job["spec"]["parallelism"] for job in jobs)


@each_case
def test_an_uninstall_leaves_nothing_but_what_the_values_keep(path):
    values, docs = values_of(path), objects(path)
    hooks = [doc for doc in docs if "helm.sh/hook" in doc["metadata"].get("annotations", {})]
    kept = {
        title(doc) for doc in docs if doc["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }

    # Helm forgets hooks: each is removed when it has passed, before it runs again, and by the cluster when it failed.
    assert {doc["kind"] for doc in hooks} == {"Job"}
    for hook in hooks:
        policy = hook["metadata"]["annotations"]["helm.sh/hook-delete-policy"].split(",")
        assert set(policy) >= {"before-hook-creation", "hook-succeeded"}
        assert hook["spec"]["ttlSecondsAfterFinished"] <= 3600
    retains = values.get("server", {}).get("persistence", {}).get("retain", False)
    assert kept == ({"PersistentVolumeClaim/fed-server"} if retains else set())
    assert {doc["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] for doc in of_kind(docs, "StatefulSet")
            if doc["spec"].get("volumeClaimTemplates")} <= {"Delete", "Retain"}  # fmt: skip


# ---- where pods are, and how they are found ----
def test_servers_that_lead_and_stand_by_keep_to_different_nodes_where_there_are_some():
    (spread,) = pod(named(objects(CHART / "values-prod.yaml"), "StatefulSet", "fed-server"))["spec"][
        "topologySpreadConstraints"
    ]
    labels = pod(named(objects(CHART / "values-prod.yaml"), "StatefulSet", "fed-server"))["metadata"]["labels"]

    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert matches(spread["labelSelector"], labels)
    assert "topologySpreadConstraints" not in pod(named(render({}), "StatefulSet", "fed-server"))["spec"]


@for_each(headless=(True, False))
def test_a_name_leads_to_a_pod_or_to_an_address_as_the_values_say(headless: bool):  # noqa: FBT001 - a parameter
    services = of_kind(render({"services": {"headless": headless}}), "Service")

    without = {each["metadata"]["name"] for each in services if each["spec"].get("clusterIP") == "None"}

    assert without == ({"fed-server", "fed-rabbitmq", "fed-redis"} if headless else set()) | {"fed-pods"}


@each_case
def test_a_service_has_the_ports_of_its_pods(path):
    """Nobody translates one into the other where a name leads to the pods themselves."""
    docs = objects(path)
    for service in of_kind(docs, "Service"):
        for port in service["spec"].get("ports", []):
            found = [
                listening["containerPort"]
                for workload in of_kind(docs, "StatefulSet")
                if matches({"matchLabels": service["spec"]["selector"]}, pod(workload)["metadata"]["labels"])
                for container in pod(workload)["spec"]["containers"]
                for listening in container.get("ports", [])
                if listening["name"] == port["targetPort"]
            ]
            assert found == [port["port"]]
