"""`lorabbit scale --on kubernetes` against an API over HTTP whose controllers make, ready and end pods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes_api import Api, Fault, Refusal, serve
from typer.testing import CliRunner, Result

from lorabbit_cli.__main__ import app
from lorabbit_cli.scaling.base import OverQuota
from lorabbit_cli.scaling.kubernetes_api import find_access
from lorabbit_cli.scaling.kubernetes_pods import WarningEvents
from lorabbit_cli.scaling.kubernetes_workloads import Workload

Scale = Callable[..., Result]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    yield from serve(tmp_path)


@pytest.fixture
def scale(api: Api, monkeypatch: pytest.MonkeyPatch) -> Scale:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    return lambda *words: CliRunner().invoke(app, ["scale", *map(str, words), "--on", "kubernetes"])


def sentence(result: Result) -> str:
    """The one line of an error, which is bad input."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


@pytest.mark.parametrize("plural", ["statefulsets", "deployments", "jobs"])
def test_a_pool_grows_in_batches_until_everybody_is_ready(api: Api, scale: Scale, plural: str):
    api.cluster.add_pool(plural, "client", 3)

    result = scale(8, "--batch", 2, "--format", "json")

    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["pool"], said["on"], said["before"], said["clients"]) == ("client", "kubernetes", 3, 8)
    assert api.cluster.patches() == [5, 7, 8]
    assert len(api.cluster.pods) == 8


@pytest.mark.parametrize("plural", ["statefulsets", "deployments", "jobs"])
def test_a_pool_shrinks_at_once_and_the_command_waits_until_they_are_gone(api: Api, scale: Scale, plural: str):
    api.cluster.add_pool(plural, "client", 6)

    result = scale(0)

    assert result.exit_code == 0, result.output
    assert api.cluster.patches() == [0]
    assert api.cluster.pods == {}
    assert "6 leaving" in result.stderr


def test_another_pool_of_the_release_is_left_alone(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.add_pool("deployments", "sim", 1)

    assert scale(4, "--pool", "sim").exit_code == 0

    assert (api.cluster.number("fed-client"), api.cluster.number("fed-sim")) == (3, 4)


def test_a_quota_that_refuses_pods_puts_the_pool_back_to_what_it_was(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.quota = 5

    said = sentence(scale(8))

    assert "quota" in said
    assert "limited: pods=5" in said
    assert api.cluster.patches() == [8, 3]


def test_a_quota_of_yesterday_is_not_taken_for_one_of_today(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.quota = 5
    sentence(scale(8))
    api.cluster.quota = 1000

    assert scale(8).exit_code == 0


def test_a_quota_that_refuses_the_change_itself_is_named(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    refusal = Refusal(403, 'statefulsets.apps "fed-client" is forbidden: exceeded quota: small')
    api.cluster.faults.append(Fault("PATCH", "/scale", refusal))

    assert "quota does not let this command scale statefulset/fed-client" in sentence(scale(8))


@pytest.mark.parametrize(
    ("verb", "path", "what"),
    [
        ("GET", "/statefulsets\\?", "list the StatefulSets of namespace 'federation'"),
        ("PATCH", "/scale", "scale statefulset/fed-client"),
        ("GET", "/pods\\?.*watch", "watch the pods of statefulset/fed-client"),
    ],
)
def test_a_right_that_is_lacking_is_named(api: Api, scale: Scale, verb: str, path: str, what: str):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.faults.append(Fault(verb, path, Refusal(403, 'User "me" cannot do this'), times=100))

    said = sentence(scale(4))

    assert f"no permission to {what}" in said
    assert "scaler.create" in said


def test_events_that_may_not_be_read_are_done_without(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.faults.append(Fault("GET", "/events", Refusal(403, "no"), times=100))

    assert scale(4).exit_code == 0


def test_a_pool_that_is_not_there_is_answered_with_those_that_are(api: Api, scale: Scale):
    assert "there is none" in sentence(scale(4))
    api.cluster.add_pool("statefulsets", "hospital", 3)
    api.cluster.add_pool("jobs", "sim", 3)

    said = sentence(scale(4, "--pool", "clinic"))

    assert "namespace 'federation' has no pool 'clinic'; there are hospital, sim" in said


def test_a_pool_that_vanishes_meanwhile_is_an_error_and_no_trace(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.faults.append(Fault("PATCH", "/scale", Refusal(404, 'statefulsets.apps "fed-client" not found')))

    assert 'statefulsets.apps "fed-client" not found' in sentence(scale(4))


def test_a_conflict_is_tried_again(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.faults.append(Fault("PATCH", "/scale", Refusal(409, "the object has been modified"), times=2))

    assert scale(4).exit_code == 0
    assert api.cluster.patches() == [4, 4, 4]


def test_a_conflict_that_does_not_end_is_told(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.faults.append(Fault("PATCH", "/scale", Refusal(409, "the object has been modified"), times=100))

    assert "the object has been modified" in sentence(scale(4))


def test_a_pod_without_a_node_ends_the_wait_with_the_schedulers_reason(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.unschedulable = frozenset({"fed-client-3"})

    result = scale(5, "--patience", 1)

    assert result.exit_code == 1, result.output
    assert "4 of 5 clients are ready after 1 s: fed-client-3 has no node" in result.stderr
    assert "Insufficient memory" in result.stderr


@pytest.mark.parametrize(
    ("plural", "maker"),
    [
        ("statefulsets", "statefulset/fed-client"),
        ("deployments", "replicaset/fed-client-6d4cf56db6"),
        ("jobs", "job/fed-client-1a2b3c4d"),
    ],
)
def test_pods_that_may_not_be_made_end_the_wait_with_the_controllers_reason(
    api: Api, scale: Scale, plural: str, maker: str
):
    api.cluster.add_pool(plural, "client", 3)
    api.cluster.forbidden = 'violates PodSecurity "restricted": runAsNonRoot != true'

    result = scale(6, "--patience", 1)

    assert result.exit_code == 1, result.output
    assert f"3 of 6 clients are ready after 1 s: {maker}, FailedCreate: " in result.stderr
    assert 'violates PodSecurity "restricted": runAsNonRoot != true' in result.stderr


@pytest.mark.parametrize(
    ("reason", "message", "hint"),
    [
        ("FailedMount", 'MountVolume.SetUp failed for volume "broker" : secret "fed-join" not found', ""),
        ("Unhealthy", "Readiness probe failed: ", "kubectl logs pod/fed-client-4 says why not"),
    ],
)
def test_a_pod_that_is_held_up_ends_the_wait_with_what_the_node_said_of_it(
    api: Api, scale: Scale, reason: str, message: str, hint: str
):
    api.cluster.add_pool("statefulsets", "client", 3)
    api.cluster.held = {"fed-client-4": (reason, message)}

    result = scale(5, "--patience", 1)

    assert result.exit_code == 1, result.output
    assert f"4 of 5 clients are ready after 1 s: pod/fed-client-4, {reason}: {message.strip()}" in result.stderr
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [("StatefulSet", "StatefulSet/fed-client", "StatefulSet/fed-client-gpu"),
     ("Deployment", "ReplicaSet/fed-client-6d4cf56db6", "ReplicaSet/fed-client-gpu-6d4cf56db6"),
     ("StatefulSet", "StatefulSet/fed-client", "Pod/fed-client-gpu-0")],
)  # fmt: skip
def test_what_is_said_of_a_pool_with_a_longer_name_is_not_taken_for_this_one_s(
    api: Api, kind: str, own: str, others: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig))
    access = find_access(None, None)
    warnings = WarningEvents(client.CoreV1Api(access.api), access.namespace)
    workload = Workload(kind, "fed-client", "fed", "client", "2026-01-01T00:00:00Z", scales_itself=False)

    api.cluster.tell(*others.split("/"), "FailedCreate", "exceeded quota: theirs")
    warnings.raise_over_quota(workload)
    before = warnings.newest(workload, {"fed-client-0"})
    api.cluster.tell(*own.split("/"), "FailedCreate", "exceeded quota: ours")

    with pytest.raises(OverQuota, match="ours"):
        warnings.raise_over_quota(workload)
    assert before == ""
    assert warnings.newest(workload, {"fed-client-0"}).endswith("exceeded quota: ours")
    access.api.close()


@pytest.mark.parametrize("condition", ["Complete", "Failed"])
def test_a_finite_pool_whose_run_is_over_is_left_alone_with_what_to_do(api: Api, scale: Scale, condition: str):
    api.cluster.add_pool("jobs", "client", 3)
    conditions = [{"type": "Suspended", "status": "False"}, {"type": condition, "status": "True"}]
    api.cluster.workloads["jobs", "fed-client-1a2b3c4d"]["status"] = {"conditions": conditions}

    said = sentence(scale(6))

    assert f"job/fed-client-1a2b3c4d is over ({condition})" in said
    assert "kubectl delete job/fed-client-1a2b3c4d, and helm upgrade" in said
    assert api.cluster.patches() == []


def test_a_watch_that_ends_goes_on_where_it_ended(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 1)
    api.cluster.watching.ends_after = 2

    assert scale(5).exit_code == 0

    first, second, *_ = (int(each.query["resourceVersion"]) for each in api.cluster.asked("watch"))
    assert second > first
    assert len(api.cluster.asked("list")) == 1


@pytest.mark.parametrize("how", ["expired", "breaks"])
def test_a_watch_that_is_too_old_or_breaks_begins_with_a_new_list(api: Api, scale: Scale, how: str):
    api.cluster.add_pool("statefulsets", "client", 1)
    setattr(api.cluster.watching, how, True)

    assert scale(5).exit_code == 0

    assert len(api.cluster.asked("list")) == 2


def test_an_api_that_is_away_for_a_moment_is_waited_for(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 1)
    api.cluster.faults.append(Fault("GET", "/pods", Refusal(503, "the API is starting"), times=2))

    assert scale(3).exit_code == 0


def test_a_pool_of_two_releases_takes_the_one_that_is_named(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 1, release="fed")
    api.cluster.add_pool("statefulsets", "client", 1, release="trial")

    assert "--release: fed, trial have a pool 'client' each" in sentence(scale(2))
    assert scale(2, "--release", "trial").exit_code == 0
    assert (api.cluster.number("fed-client"), api.cluster.number("trial-client")) == (1, 2)


def test_a_pool_that_follows_the_jobs_is_left_to_its_autoscaler(api: Api, scale: Scale):
    api.cluster.add_pool("statefulsets", "client", 1, **{"lorabbit/autoscaled": "true"})

    assert "follows the jobs (autoscaling.enabled)" in sentence(scale(2))
    assert api.cluster.patches() == []


def test_a_wrong_token_is_a_missing_permission(api: Api, scale: Scale):
    api.kubeconfig.write_text(api.kubeconfig.read_text().replace("let-me-in", "guessed"))

    assert "no permission to list" in sentence(scale(2))


def test_without_a_cluster_the_error_says_where_one_is_looked_for(
    tmp_path: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    assert "no cluster: there is no kubeconfig" in sentence(scale(2))


def test_a_cluster_that_does_not_answer_is_told_and_a_context_that_is_not_there_too(api: Api, scale: Scale):
    assert "--context: the kubeconfig has no usable context 'moon'" in sentence(scale(2, "--context", "moon"))
    text = api.kubeconfig.read_text()
    api.kubeconfig.write_text(text.replace("http://127.0.0.1", "http://127.0.0.2").replace("127.0.0.2:", "127.0.0.2:1"))

    assert "the cluster's API cannot be reached" in sentence(scale(2))
