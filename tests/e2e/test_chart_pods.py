"""The chart's pods for real: every part runs as rendered, its probes answer, a job goes through."""

# ruff: noqa: S603, S607 - docker, by name
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from charts import CHART, Doc, render, values_of
from pods import MOST_FILES, Cluster, comes_true, docker, job_of
from tree import ROOT

LESS = ["--set", "rounds=2", "--set", "data.limit=400", "--set", "local.steps=6", "--set", "clients=2"]
BUILD_SECONDS = 900
pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(BUILD_SECONDS + 900)]


def has_engine() -> bool:
    """Tell whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def tag() -> Iterator[str]:
    """Images of this very tree; LORABBIT_TEST_TAG names some that are there already."""
    if not has_engine():
        if os.environ.get("CI") == "true":
            pytest.fail("no Docker engine answers")
        pytest.skip("no Docker engine answers")
    if given := os.environ.get("LORABBIT_TEST_TAG"):
        yield given
        return
    made = f"chart-{uuid4().hex[:8]}"
    environment = {**os.environ, "LORABBIT_TAG": made, "DOCKER_BUILDKIT": "1"}
    subprocess.run(["docker", "compose", "build", "--quiet"], check=True, cwd=ROOT, env=environment)
    yield made
    images = [f"lorabbit-{part}:{made}" for part in ("server", "client")]
    subprocess.run(["docker", "image", "rm", *images], check=False, capture_output=True)


def by_hand(tag: str) -> Doc:
    """Values of a release on volumes that are nobody's but root's, with these images."""
    values = values_of(CHART / "values-hostpath.yaml")
    for part in ("server", "clientDefaults"):
        values[part]["image"] = {"tag": tag}
    return values


@pytest.fixture(scope="module")
def cluster(tag: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(render(by_hand(tag)), tmp_path_factory.mktemp("volumes"))
    try:
        # In an order that nobody would choose: each waits for what it needs.
        for name, ordinal in (("client", 0), ("client", 1), ("server", 0), ("redis", 0), ("rabbitmq", 0)):
            made.start("StatefulSet", f"fed-{name}", ordinal=ordinal)
        yield made
    finally:
        made.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Doc:
    """The secret that cert-manager would make, signed by itself."""
    host = "fed-rabbitmq.federation.svc"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={host}",
         "-addext", f"subjectAltName=DNS:{host}", "-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    files = {name: (tmp_path / name).read_text(encoding="utf-8") for name in ("tls.crt", "tls.key")}
    content = {**files, "ca.crt": files["tls.crt"]}
    return {"kind": "Secret", "metadata": {"name": "broker-tls"}, "stringData": content}


def test_over_tls_and_nothing_else_a_client_joins_and_has_a_broker_user_of_its_own(
    tag: str, certificate: Doc, tmp_path: Path
):
    values = by_hand(tag) | {"enrolment": {"enabled": True}}
    values["rabbitmq"]["tls"] = {"enabled": True, "existingSecret": "broker-tls"}
    made = Cluster([*render(values), certificate], tmp_path / "volumes")
    try:
        broker, _, server = (made.start("StatefulSet", f"fed-{name}") for name in ("rabbitmq", "redis", "server"))
        assert server.becomes("readinessProbe"), server.logs()[-4000:]
        token = server.run("lorabbit", "token")
        made.docs.append({"kind": "Secret", "metadata": {"name": "fed-join"}, "stringData": {"token": token}})
        client = made.start("StatefulSet", "fed-client")
        assert client.becomes("readinessProbe"), client.logs()[-4000:]
        listeners = broker.run("rabbitmq-diagnostics", "-q", "listeners")
        assert "port: 5671," in listeners
        assert "port: 5672," not in listeners
        assert comes_true(lambda: "fed-client-0" in server.run("lorabbit", "clients"))
        users = {line.split()[0] for line in broker.run("rabbitmqctl", "-q", "list_users").splitlines()[1:]}
        assert users == {"lorabbit-server", "fed-client-0"}
        assert "pass  broker      RabbitMQ at amqps://fed-client-0:***@" in client.run("lorabbit", "doctor")
    finally:
        made.close()


def test_every_pod_starts_and_becomes_ready_as_rendered(cluster: Cluster):
    for pod in cluster.pods:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in pod.container:
                assert pod.becomes(probe), f"{pod.name} {probe}\n{pod.logs()[-4000:]}"


@pytest.mark.parametrize("name", ["server", "client"])
def test_a_pod_that_is_told_to_leave_while_it_starts_leaves(cluster: Cluster, name: str):
    """The first process of a container hears only what it has a handler for: it must not be ours."""
    early = cluster.start("StatefulSet", f"fed-{name}", ordinal=9)

    docker("exec", early.id, "sh", "-c", "kill -TERM 1")

    assert early.wait(30) in {0, 143}
    cluster.remove(early)


def test_no_pod_runs_as_root_or_can_write_its_image(cluster: Cluster):
    for pod in cluster.pods:
        who = pod.run("sh", "-c", "id -u; touch /usr/here 2>/dev/null && echo written || echo refused")
        assert who.split() == [str(pod.spec["securityContext"]["runAsUser"]), "refused"]


def test_the_broker_takes_as_many_descriptors_as_it_may(cluster: Cluster):
    broker = next(pod for pod in cluster.pods if pod.name == "fed-rabbitmq-0")

    limits = broker.run("grep", "open files", "/proc/1/limits").split()

    assert limits[3:5] == [str(MOST_FILES)] * 2


def test_the_broker_exports_what_alerts_and_dashboards_read(cluster: Cluster):
    broker = next(pod for pod in cluster.pods if pod.name == "fed-rabbitmq-0")
    assert broker.becomes("readinessProbe")
    exported = set(re.findall(r"^# TYPE (\w+)", broker.page(15692, "/metrics"), re.MULTILINE))

    read = set(re.findall(r"\brabbitmq_[a-z_]+", json.dumps(render(values_of(CHART / "values-prod.yaml")))))

    assert "rabbitmq_alarms_memory_used_watermark" in read
    assert read - {"rabbitmq_prometheus"} <= exported


@pytest.mark.parametrize("name", ["connection", "round"])
def test_the_chart_s_own_tests_pass(cluster: Cluster, name: str):
    assert all(pod.becomes("readinessProbe") for pod in cluster.pods if "readinessProbe" in pod.container)
    test = cluster.start("Job", f"fed-test-{name}", ordinal=None)

    assert test.wait(300) == 0, test.logs()[-4000:]


@pytest.mark.thorough
def test_the_quickstart_ends_though_a_pod_of_every_kind_is_replaced_in_it(cluster: Cluster):
    pods = {pod.name: pod for pod in cluster.pods}
    server, client = pods["fed-server-0"], pods["fed-client-1"]
    job = job_of(server.run("lorabbit", "submit", "/examples/quickstart.yaml", *LESS, "--format", "json"))

    assert comes_true(lambda: json.loads(server.run("lorabbit", "status", job, "--format", "json"))["round"] > 0)
    for pod in (client, server, pods["fed-rabbitmq-0"], pods["fed-redis-0"]):
        pod.replace()
    assert server.becomes("readinessProbe"), server.logs()[-4000:]
    watched = server.run("lorabbit", "watch", job, seconds=600)

    assert "job done" in watched
    report = json.loads(server.run("lorabbit", "report", job, "--format", "json"))
    assert [entry["accepted"] for entry in report["rounds"]] == [2, 2]
    assert report["clients"] == ["fed-client-0", "fed-client-1"]


def test_what_a_job_made_is_fetched_as_the_how_to_says(cluster: Cluster):
    server = next(pod for pod in cluster.pods if pod.name == "fed-server-0")
    job = json.loads(server.run("lorabbit", "jobs", "--format", "json"))[-1]["job"]
    resolved = server.run("cat", f"runs/{job}/job.yaml")

    server.run("lorabbit", "report", job)
    server.run("lorabbit", "export", job, "--out", "/tmp/adapter")  # noqa: S108
    copied = server.run("sh", "-c", f"tar cf - /tmp/adapter runs/{job} | tar tf -").split()  # as kubectl cp does

    assert {"tmp/adapter/adapter_model.safetensors", f"runs/{job}/report.html"} <= set(copied)
    assert server.run("cat", f"runs/{job}/job.yaml") == resolved


def test_the_doctor_finds_nothing_wrong_in_any_pod_of_ours(cluster: Cluster):
    for pod in [pod for pod in cluster.pods if pod.container["name"] in {"server", "client"}]:
        assert "fail " not in pod.run("lorabbit", "doctor")


def test_a_client_loses_its_readiness_with_the_broker_and_keeps_running(cluster: Cluster):
    pods = {pod.name: pod for pod in cluster.pods}
    subprocess.run(["docker", "kill", pods["fed-rabbitmq-0"].id], check=True, capture_output=True)

    assert pods["fed-client-0"].becomes("readinessProbe", passing=False)
    assert pods["fed-server-0"].becomes("readinessProbe", passing=False)
    assert pods["fed-server-0"].passes("livenessProbe")
    assert pods["fed-client-0"].runs()
