"""The HTTP interface, over a real uvicorn on a free port and a server with scripted clients."""

from __future__ import annotations

import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import SPEC, Served

from lorabbit.errors import BadInput
from lorabbit.events.job_events import EVENTS
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.types import TRAIN
from lorabbit_server.api.app import make_app
from lorabbit_server.http_server import HttpServer


@pytest.fixture
def bare(tmp_path):
    made = Served(tmp_path)
    yield made
    made.close()


@pytest.fixture
def served(bare):
    bare.lead()
    return bare


def error(answer, status):
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


# ---- jobs ----


def test_a_submitted_job_runs_and_everything_about_it_can_be_fetched(served):
    job = served.run()

    (listed,) = served.web.get("/jobs").json()
    status = served.web.get(f"/jobs/{job}").json()
    report = Report.model_validate(served.web.get(f"/jobs/{job}/report").json())
    files = {entry["path"]: entry["bytes"] for entry in served.web.get(f"/jobs/{job}/files").json()}
    weights = served.web.get(f"/jobs/{job}/files/adapter/adapter_model.safetensors").content
    written = Report.model_validate_json(served.web.get(f"/jobs/{job}/files/report.json").content)
    assert (listed["job"], listed["status"], listed["exit_code"]) == ("job", "done", 0)
    assert (status["stage"], status["round"], status["waits"]) == ("ended", 2, [])
    assert report.model_dump() == written.model_dump()
    assert files["adapter/adapter_model.safetensors"] == len(weights) == report.adapter.bytes
    assert files["report.json"] > 0


def test_a_watcher_is_woken_by_each_event_and_sees_all_of_them_once(served):
    job = served.web.post("/jobs", json=SPEC).json()["job"]
    seen, after = [], "0"
    threading.Timer(0.2, served.start_clients).start()

    while not seen or seen[-1].kind != "job-ended":
        page = served.web.get(f"/jobs/{job}/events", params={"after": after, "wait": 20}).json()
        seen += [EVENTS.validate_python(each["event"]) for each in page]
        after = page[-1]["id"] if page else after

    kinds = [event.kind for event in seen]
    assert kinds.count("round-closed") == kinds.count("round-evaluated") == 2
    assert served.web.get(f"/jobs/{job}/events", params={"after": after}).json() == []
    assert len(served.web.get(f"/jobs/{job}/events").json()) == len(seen)


def test_progress_is_told_to_those_who_want_it(served):
    def report_progress(client, task):
        if task.phase == TRAIN and task.round == 1:
            client.progress(task, 0.5)
            client.broker.after(1.0, lambda: client.do(task))
            return True
        return False

    served.clients[0].work = report_progress
    job = served.run()

    told = served.web.get(f"/jobs/{job}/events").json()
    progress = [each["event"] for each in told if each["event"]["kind"] == "task-progressed"]
    assert [(p["client"], p["fraction"], p["phase"]) for p in progress] == [("client-1", 0.5, "train")]
    plain = served.web.get(f"/jobs/{job}/events", params={"progress": "false"}).json()
    assert len(plain) == len(told) - 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": {"name": "fedavgg"}}, "method.name: there is no method 'fedavgg'; did you mean 'fedavg'?"),
        ({"method": {"name": "fedprox", "moo": 1}}, "method.moo: unknown key (known: mu)"),
        ({"rouns": 3}, "rouns: unknown key; did you mean 'rounds'?"),
        ({"rounds": 0}, "rounds: "),
        ({"cohort": 5}, "cohort is 5, but there are only 2 clients"),
    ],
)
def test_a_job_that_cannot_work_is_refused_with_the_command_lines_sentence(served, change, sentence):
    answer = served.web.post("/jobs", json={**SPEC, **change})

    assert sentence in error(answer, 400)
    assert served.web.get("/jobs").json() == []


def test_a_body_that_is_no_json_is_refused_with_a_sentence(served):
    assert "JSON" in error(served.web.post("/jobs", content=b"rounds: 3"), 400)


def test_what_a_job_waits_for_has_an_owner_a_reason_and_a_time(served):
    job = served.web.post("/jobs", json=SPEC).json()["job"]

    served.web.get(f"/jobs/{job}/events", params={"wait": 20})
    (wait,) = served.web.get(f"/jobs/{job}").json()["waits"]

    assert wait["owner"] == "operator"
    assert wait["reason"] == "job job waits for 2 more clients: 0 of 2 needed are connected"
    assert wait["since_ms"] > 0


def test_a_job_that_no_server_leads_waits_for_the_lease_first(bare):
    job = bare.web.post("/jobs", json=SPEC).json()["job"]

    said = bare.web.get("/status").json()

    assert (said["job"], said["status"]) == (job, "queued")
    assert [wait["owner"] for wait in said["waits"]] == ["lease", "server"]
    assert said["waits"][0]["reason"] == "no server leads: nobody holds the lease"
    assert 0 < said["waits"][0]["since_ms"] <= said["now_ms"]
    assert said["server"] == "this server stands by, and knows of no server that leads"


def test_a_server_that_stands_by_names_the_one_that_leads(bare):
    bare.store.acquire_lease("another", 60)
    bare.web.post("/jobs", json=SPEC)

    said = bare.web.get("/status").json()

    assert said["server"] == "this server stands by: the lease is held by another"
    assert [wait["owner"] for wait in said["waits"]] == ["server"]


def test_how_far_clients_are_is_told_with_the_job(served):
    def begin(client, task):
        if task.phase == TRAIN:
            client.progress(task, 0.41)
        return task.phase == TRAIN

    for client in served.clients:
        client.work = begin
    job = served.web.post("/jobs", json=SPEC).json()["job"]
    served.start_clients()
    told, after = 0, "0"
    while told < 2:
        page = served.web.get(f"/jobs/{job}/events", params={"after": after, "wait": 20}).json()
        told += sum(each["event"]["kind"] == "task-progressed" for each in page)
        after = page[-1]["id"] if page else after

    waits = served.web.get(f"/jobs/{job}").json()["waits"]

    assert [(wait["owner"], wait["fraction"]) for wait in waits] == [("client-1", 0.41), ("client-2", 0.41)]
    assert all(wait["seen_ms"] and wait["deadline_ms"] > wait["seen_ms"] for wait in waits)


def test_a_job_is_cancelled_once(served):
    job = served.web.post("/jobs", json=SPEC).json()["job"]

    first = served.web.post(f"/jobs/{job}/cancel").json()
    assert served.ended.wait(20)
    second = served.web.post(f"/jobs/{job}/cancel").json()

    assert (first["cancelled"], second["cancelled"]) == (True, False)
    assert served.web.get(f"/jobs/{job}").json()["status"] == "cancelled"


# ---- what is not there ----


@pytest.mark.parametrize("path", ["", "/events", "/report"])
def test_an_unknown_job_is_named(served, path):
    assert "there is no job 'nope'" in error(served.web.get(f"/jobs/nope{path}"), 404)


def test_files_outside_of_the_run_folder_are_not_served(served, tmp_path):
    job = served.run()
    (tmp_path / "server" / "secret").write_text("secret")
    (tmp_path / "server" / "runs" / job / "link").symlink_to(tmp_path / "server" / "secret")

    for path in ("..%2f..%2fsecret", "%2e%2e/%2e%2e/secret", "/etc/passwd", "link", "no-such-file"):
        assert "has no file" in error(served.web.get(f"/jobs/{job}/files/{path}"), 404)
    for outside in ("/jobs/job/files/../../secret", "/jobs/..%2f..%2f/files", "/jobs/../files/secret"):
        error(served.web.get(outside), 404)
    assert "no run folder" in error(served.web.get("/jobs/nope/files"), 404)


def test_an_unknown_address_and_a_wrong_parameter_are_answered_in_one_sentence(served):
    job = served.web.post("/jobs", json=SPEC).json()["job"]

    assert error(served.web.get("/nope"), 404)
    assert "wait" in error(served.web.get(f"/jobs/{job}/events", params={"wait": "soon"}), 400)


# ---- clients and health ----


def test_clients_are_listed_with_their_address(served):
    served.run()

    listed = {entry["client"]: (entry["address"], entry["present"]) for entry in served.web.get("/clients").json()}

    assert listed == {"client-1": ("host-1", True), "client-2": ("host-2", True)}


def test_a_client_is_listed_with_what_it_declared_and_what_it_does(served):
    first, second = served.clients
    first.work = lambda _client, task: task.phase == TRAIN
    first.declared = {"pool": "eu", "device": "cuda", "tags": ("fast",), "max_rank": 64, "quantisation": "int8"}
    served.web.post("/jobs", json=SPEC)
    served.start_clients()

    listed = until(
        lambda: clients_of(served), lambda found: found.get("client-1", {}).get("state") == "trains, round 1"
    )

    asked = ("pool", "device", "tags", "max_rank", "quantisation", "present")
    shown = {name: listed["client-1"][name] for name in asked}
    assert shown == {**first.declared, "tags": ["fast"], "present": True}
    assert listed["client-1"]["seen_ms"] <= served.service.now_ms()

    served.broker.post(second.leave)
    listed = until(lambda: clients_of(served), lambda found: found["client-2"]["state"] == "left")
    assert listed["client-2"]["present"] is False


def clients_of(served):
    return {entry["client"]: entry for entry in served.web.get("/clients").json()}


def until(look, holds, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not holds(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def test_a_server_is_ready_once_it_leads_and_says_why_while_it_does_not(bare):
    assert bare.web.get("/healthz").json()["alive"] is True
    before = bare.web.get("/readyz")
    bare.lead()

    assert before.status_code == 503
    assert "stands by" in before.json()["error"]
    assert bare.web.get("/readyz").json()["ready"] is True


def test_a_server_that_stands_by_is_ready_for_whoever_takes_that(bare):
    answer = bare.web.get("/readyz", params={"standby": True})

    assert answer.status_code == 200
    assert answer.json()["checks"] == {"broker": None, "store": None, "lease": None}


def test_the_clients_of_the_job_under_way_are_wanted_until_it_ends(served):
    def wanted():
        lines = served.web.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("lorabbit_clients_required "))

    before = wanted()
    served.web.post("/jobs", json={**SPEC, "clients": 2})
    during = wanted()
    served.start_clients()
    assert served.ended.wait(60)

    assert (before, during, wanted()) == (0, 2, 0)


def test_metrics_count_what_happened_without_a_label_per_client(served):
    served.run()

    text = served.web.get("/metrics").text

    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["lorabbit_updates_total", "accepted", "train"] == 4
    assert samples["lorabbit_updates_total", "accepted", "evaluate"] == 4
    assert samples["lorabbit_jobs_total", "done"] == 1
    assert samples["lorabbit_round_seconds_count",] == 2
    assert samples["lorabbit_leader",] == 1
    assert samples["lorabbit_clients_connected",] == 2
    assert "client-1" not in text


def test_a_port_that_is_taken_is_a_clear_error(served):
    with pytest.raises(BadInput, match="cannot listen on"):
        HttpServer(make_app(served.service, served.measures), "127.0.0.1", served.http.port)


def test_a_spec_comes_through_as_it_was_submitted(served):
    spec = JobSpec(**SPEC, seed=2**62, method={"name": "fedprox", "mu": 0.1})

    job = served.web.post("/jobs", content=spec.model_dump_json()).json()["job"]

    assert JobSpec.model_validate_json(served.store.jobs()[job].spec) == spec
