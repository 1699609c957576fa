"""Jobs that do not wait for everybody: slow clients, deadlines, restarts, whole runs in one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
from server_rig import Fuse, Rig
from typer.testing import CliRunner

from lorabbit import job_loader
from lorabbit.errors import BadInput
from lorabbit.job.schedules import Buffered, Quorum
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Offer
from lorabbit.tensors import serialization
from lorabbit.types import INITIALIZE, TRAIN
from lorabbit_cli.__main__ import app
from lorabbit_cli.local.embedded_run import Callbacks, ComputeOptions, run_local
from lorabbit_cli.local.replay import replay


def spec(schedule, **what):
    return JobSpec(**{"name": "job", "clients": 3, "rounds": 3, "seed": 7, "schedule": schedule, **what})


def slow(rig, index, *, held):
    """Let a client keep its training tasks until somebody does them."""

    def work(_client, task):
        if task.phase == TRAIN:
            held.append(task)
            return True
        return False

    rig.clients[index].work = work


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, clients=3)
    yield rig
    if rig.service is not None:
        rig.service.close()


def test_a_quorum_does_not_wait_for_a_slow_client_and_refuses_what_it_brings_later(rig):
    rig.clients[2].on_grant = lambda _client, _grant: True

    def tell(_client, task):
        """The slow client offers its first update once the second round is under way."""
        if task.phase == TRAIN and task.round == 2:
            rig.clients[2].send(next(offer for id_, offer in rig.clients[2].offers.items() if ".r1." in id_))
        return False

    rig.clients[0].work = tell

    report = rig.run(spec(Quorum(quorum=0.6, over_select=1.0)))

    assert (report.status, [r.accepted for r in report.rounds]) == ("done", [2, 2, 2])
    assert [r.facts["late"] for r in report.rounds] == [1, 1, 1]
    assert [(v.task, v.reason) for v in rig.clients[2].verdicts if ".r1.train" in v.task] == [
        ("job.r1.train.k2", "stale")
    ]


def test_an_update_that_comes_late_is_kept_with_half_its_change(rig):
    held = []
    slow(rig, 2, held=held)
    rig.serve()
    rig.start_clients()
    schedule = Quorum(quorum=0.6, over_select=1.0, late="keep", staleness_exponent=1.0)
    job = rig.service.submit(spec(schedule, rounds=2, evaluation={"every": 2, "on": "central"}))

    def then(_client, task):
        """The second client waits in round 2 until the slow one's update of round 1 is there."""
        if task.phase == TRAIN and task.round == 2:
            rig.clients[2].do(held[0])
            return True
        return False

    rig.clients[1].work = then
    rig.run_to_end(job)

    # Round 1: mean of +1 and +2. Round 2: mean of +1 and, one version late, half of +3.
    adapter = serialization.read_tensors(rig.runs(job) / "adapter" / "adapter_model.safetensors")
    assert np.array_equal(adapter["a"], np.full((4, 3), 1.5 + (1 + 1.5) / 2, np.float32))
    assert rig.report(job).rounds[1].facts["staleness_max"] == 1


def test_a_deadline_closes_a_round_with_what_there_is(rig):
    slow(rig, 1, held=[])
    slow(rig, 2, held=[])

    report = rig.run(spec(Quorum(quorum=1.0, deadline_seconds=7), rounds=2))

    assert (report.status, [r.accepted for r in report.rounds]) == ("done", [1, 1])
    assert [r.seconds for r in report.rounds] == pytest.approx([7.0, 7.0], abs=0.5)


def test_a_deadline_holds_after_the_server_was_killed(rig):
    slow(rig, 1, held=[])
    slow(rig, 2, held=[])
    rig.serve()
    rig.start_clients()
    job = rig.service.submit(spec(Quorum(quorum=1.0, deadline_seconds=60), rounds=1))
    rig.pass_seconds(20)
    rig.kill()
    rig.serve()

    rig.run_to_end(job)

    (only,) = rig.report(job).rounds
    assert (only.accepted, only.seconds) == (1, pytest.approx(60.0, abs=0.5))


def test_a_buffered_job_makes_its_versions_while_one_client_is_slow(rig):
    held = []
    slow(rig, 2, held=held)

    report = rig.run(spec(Buffered(buffer=2), rounds=4))

    assert (report.status, [r.accepted for r in report.rounds]) == ("done", [2, 2, 2, 2])
    assert len(held) == 1


def test_with_a_buffer_of_one_every_update_makes_a_version_worth_what_its_age_leaves(rig):
    held = []
    slow(rig, 2, held=held)
    rig.serve()
    rig.start_clients()
    job = rig.service.submit(
        spec(Buffered(buffer=1, staleness_exponent=1.0), rounds=4, evaluation={"every": 4, "on": "central"})
    )

    def first_twice(_client, task):
        return task.phase == TRAIN and task.round > 2

    rig.clients[0].work = first_twice
    rig.clients[1].work = lambda _client, task: task.phase == TRAIN
    rig.idle()
    rig.clients[2].do(held[0])
    rig.idle()
    rig.clients[2].do(held[1])
    rig.run_to_end(job)

    # +1, +1, then +3 two versions late, then +3 in time.
    adapter = serialization.read_tensors(rig.runs(job) / "adapter" / "adapter_model.safetensors")
    assert np.array_equal(adapter["a"], np.full((4, 3), 1 + 1 + 3 / 3 + 3, np.float32))
    assert [r.facts["staleness_max"] for r in rig.report(job).rounds] == [0, 0, 2, 0]


def test_bytes_of_late_updates_are_counted(rig):
    report = rig.run(spec(Buffered(buffer=1), rounds=6))

    accepted = [e for e in rig.events if e.kind == "update-accepted" and e.phase != "initialise"]
    assert sum(r.bytes_up for r in report.rounds) == sum(e.bytes_up for e in accepted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        Buffered(buffer=2),
        Buffered(buffer=1, max_staleness=1),
        Quorum(quorum=0.5, over_select=1.0, late="keep", deadline_seconds=30),
    ],
)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("share", range(1, 10))
def test_a_job_whose_server_is_killed_ends_with_every_file_swept_and_every_update_counted_once(
    tmp_path, schedule, after, share
):
    calm = Rig(tmp_path / "calm", clients=3)
    fuse = Fuse()
    calm.serve(fuse)
    calm.start_clients()
    calm.run_to_end(calm.service.submit(spec(schedule, output={"keep_updates": True})))
    calm.service.close()

    rig = Rig(tmp_path / "killed", clients=3)
    rig.serve(Fuse(fuse.count * share // 10, after=after))
    rig.start_clients()
    job = rig.service.submit(spec(schedule, output={"keep_updates": True}))
    rig.run_to_end_over_death(job)

    report = rig.report(job)
    events = [e.event for e in rig.store.events(job, progress=False)]
    assert (report.status, len(report.rounds)) == ("done", 3)
    assert sum('"round-closed"' in e for e in events) == 3
    assert sorted(rig.service.payloads.folder.iterdir()) == []
    assert [name for name in rig.broker._queues if "adapter" in name] == []
    again = list(replay(rig.runs(job)))
    assert [(v.updates, v.is_same) for v in again] == [(r.accepted, True) for r in report.rounds]
    assert sum(r.accepted for r in report.rounds) <= sum('"update-accepted"' in e and '"train"' in e for e in events)
    rig.service.close()


NULL = "name: walk\nmodel: {name: 'null:40KB'}\nrounds: 4\nclients: 4\nevaluation: {every: 4, on: central}\n"


@pytest.mark.parametrize("schedule", ["{kind: buffered, buffer: 2}", "{kind: quorum, quorum: 0.5, late: keep}"])
def test_a_job_in_one_process_ends_and_tells_how_old_its_updates_were(tmp_path, schedule):
    lines = []

    ended = run_local(
        job_loader.parse(f"{NULL}schedule: {schedule}\n"),
        tmp_path,
        compute=ComputeOptions(),
        callbacks=Callbacks(on_event=lines.append),
    )

    assert (ended.exit_code, len(ended.report.rounds)) == (0, 4)
    assert [line.kind for line in lines].count("round-closed") == 4
    assert all({"late", "too_stale", "staleness_mean", "staleness_max"} <= set(r.facts) for r in ended.report.rounds)


def test_a_sync_round_tells_nothing_of_staleness(tmp_path):
    ended = run_local(job_loader.parse(NULL), tmp_path, compute=ComputeOptions())

    assert all(not r.facts for r in ended.report.rounds)


KEPT = "output: {keep_updates: true}\n"


@pytest.mark.parametrize(
    "schedule", ["sync", "{kind: buffered, buffer: 1}", "{kind: buffered, buffer: 3}", "{kind: quorum, late: keep}"]
)
def test_a_run_that_kept_its_updates_is_made_again_to_the_same_sha256(tmp_path, schedule):
    ended = run_local(job_loader.parse(f"{NULL}{KEPT}schedule: {schedule}\n"), tmp_path, compute=ComputeOptions())

    versions = list(replay(ended.folder))

    assert [(v.round, v.is_same) for v in versions] == [(number, True) for number in (1, 2, 3, 4)]
    assert versions[-1].sha256 == ended.report.adapter.sha256


FACTORS = {"m.lora_A.weight": np.ones((2, 3), np.float32), "m.lora_B.weight": np.ones((4, 2), np.float32)}


def one_from_another_start(rig):
    """Let clients make factors of a layer; the first client says that its own are of a start that nobody knows."""

    def work(client, task):
        if task.phase == TRAIN:
            start = "0" * 64 if task.index == 0 else task.settings["init"]
            ref = client.store.add_tensors({name: value + task.round for name, value in FACTORS.items()})
            told = Metrics(num_examples=10, loss=0.5, facts={"init": start})
            client.offers[task.task] = Offer(**client.about(task), payload=ref, metrics=told)
            client.send(client.offers[task.task])
        elif task.phase == INITIALIZE:
            client.offer(task, FACTORS)
        else:
            client.tell(task, accuracy=0.5)
        return True

    for client in rig.clients:
        client.work = work


@pytest.mark.parametrize("schedule", ["sync", Buffered(buffer=1), Buffered(buffer=2), Quorum(quorum=0.3, late="keep")])
def test_a_run_in_which_an_update_could_not_be_folded_is_made_again_from_the_others(rig, schedule):
    one_from_another_start(rig)

    report = rig.run(spec(schedule, rounds=4, method={"name": "federa"}, output={"keep_updates": True}))

    assert (report.status, list(report.set_aside)) == ("done", ["client-1"])
    assert [v.is_same for v in replay(rig.runs(report.job))] == [True] * 4


def test_an_update_that_was_changed_after_the_run_shows_in_the_replay(tmp_path):
    folder = run_local(job_loader.parse(NULL + KEPT), tmp_path, compute=ComputeOptions()).folder
    path = min((folder / "updates").glob("*.safetensors"))
    tensors = {name: np.array(value) + 1 for name, value in serialization.read_tensors(path).items()}
    serialization.write_tensors(path, tensors)

    result = CliRunner().invoke(app, ["replay", str(folder)])

    assert result.exit_code == 1
    assert "differs: the run made" in result.output


def test_a_run_that_kept_no_updates_cannot_be_made_again(tmp_path):
    folder = run_local(job_loader.parse(NULL), tmp_path, compute=ComputeOptions()).folder

    assert not (folder / "updates").exists()
    with pytest.raises(BadInput, match=r"kept no updates; run the job with --set output\.keep_updates=true"):
        list(replay(folder))


def test_replay_prints_its_versions(tmp_path):
    folder = run_local(job_loader.parse(f"{NULL}{KEPT}schedule: buffered\n"), tmp_path, compute=ComputeOptions()).folder

    text = CliRunner().invoke(app, ["replay", str(folder)])
    told = CliRunner().invoke(app, ["replay", str(folder), "--format", "json"])

    assert (text.exit_code, text.output.count(", same\n")) == (0, 4)
    assert [version["same"] for version in json.loads(told.output)] == [True] * 4
