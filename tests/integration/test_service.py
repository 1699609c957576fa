"""The server with scripted clients, over the shipped in-memory broker and store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scripted_client import SHAPES, ScriptedClient
from server_rig import Rig

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Deny, Grant, Offer, TaskFailed, Verdict
from lorabbit.tensors import serialization
from lorabbit.transfer.chunking import ChunkedPayload
from lorabbit.types import EVALUATE, TRAIN
from lorabbit_server.api.status import status_of


def spec(**what):
    return JobSpec(**{"name": "job", "clients": 2, "rounds": 2, "seed": 7, **what})


def started(rig, job=None):
    rig.serve()
    rig.start_clients()
    rig.idle()
    return rig.service.submit(job or spec())


def adapter(folder):
    return serialization.read_tensors(folder / "adapter_model.safetensors")


# ---- a whole job ----


def test_a_job_runs_to_its_end_and_leaves_a_complete_run_folder(rig):
    report = rig.run(spec(rounds=3))

    runs = rig.runs("job")
    names = {str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file()}
    folders = ("adapter", "best", "checkpoint-2", "checkpoint-3")
    assert names == {f"{f}/{n}" for f in folders for n in ("adapter_model.safetensors", "adapter_config.json")} | {
        "report.json",
        "rounds.jsonl",
        "job.yaml",
        "best/round.json",
    }
    assert (report.status, report.best.round, len(report.rounds)) == ("done", 3, 3)
    assert not list(rig.settings.folder.joinpath("payloads").iterdir())


def test_the_adapter_is_the_mean_that_paper_says_and_its_hash_is_the_reported_one(rig):
    report = rig.run(spec(rounds=3))

    # client k adds k + 1 to every value: the mean over two clients is 1.5 a round
    tensors = adapter(rig.runs("job") / "adapter")
    for name, shape in SHAPES.items():
        assert np.array_equal(tensors[name], np.full(shape, 4.5, np.float32))
    written = (rig.runs("job") / "adapter" / "adapter_model.safetensors").read_bytes()
    assert report.adapter.sha256 == report.rounds[2].sha256 == hashlib.sha256(written).hexdigest()
    assert (report.adapter.bytes, report.adapter.parameters, report.adapter.rank) == (len(written), 15, 2)
    assert json.loads((rig.runs("job") / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_clients_weigh_as_many_examples_as_they_have(rig):
    rig.clients[1].examples = 30

    rig.run(spec(rounds=1))

    assert np.array_equal(adapter(rig.runs("job") / "adapter")["b"], np.full(3, (10 * 1 + 30 * 2) / 40, np.float32))


def test_the_resolved_job_file_is_the_job(rig):
    job = spec(method={"name": "fedprox", "mu": 0.25})

    rig.run(job)

    text = (rig.runs("job") / "job.yaml").read_text()
    assert JobSpec.model_validate(yaml.safe_load(text)) == job
    assert "lorabbit 0" in text


def test_rounds_jsonl_has_one_final_line_a_round(rig):
    report = rig.run(spec(rounds=4, evaluation={"every": 2}))

    lines = [json.loads(line) for line in (rig.runs("job") / "rounds.jsonl").read_text().splitlines()]
    assert lines == [json.loads(r.model_dump_json()) for r in report.rounds]
    assert [bool(line["metrics"]) for line in lines] == [False, True, False, True]


def test_evaluation_overlaps_the_next_rounds_training(rig):
    rig.run(spec(rounds=2))

    phases = [(task.phase, task.round) for task in rig.clients[0].tasks]
    assert phases == [("initialise", 0), (TRAIN, 1), (TRAIN, 2), (EVALUATE, 1), (EVALUATE, 2)]


def test_bytes_are_counted_payload_and_overhead_apart(rig):
    report = rig.run(spec(rounds=1))

    size = rig.clients[0].store.add_tensors({n: np.zeros(s, np.float32) for n, s in SHAPES.items()}).size_bytes
    (first,) = report.rounds
    assert [(c.bytes_up, c.bytes_down) for c in first.per_client] == [(size, size)] * 2
    assert (first.bytes_up, first.bytes_down) == (2 * size, 2 * size)
    assert first.overhead_up > 0
    assert first.overhead_down > 0


def test_a_second_job_waits_for_the_first_and_takes_a_free_name(rig):
    rig.serve()
    first, second = rig.service.submit(spec()), rig.service.submit(spec())
    rig.idle()
    waits = status_of(rig.store, second).waits
    rig.start_clients()
    rig.run_to_end(second)

    assert (first, second) == ("job", "job-2")
    assert waits[0].owner == "job job"
    assert rig.ended == ["job", "job-2"]
    assert rig.report("job").adapter.sha256 == rig.report("job-2").adapter.sha256


def test_a_run_folder_that_is_there_is_never_written_into(rig):
    rig.runs("job").mkdir(parents=True)

    rig.serve()

    assert rig.service.submit(spec()) == "job-2"


def test_a_method_that_cannot_work_is_refused_when_it_is_submitted(rig):
    rig.serve()

    with pytest.raises(BadInput, match="did you mean 'fedavg'"):
        rig.service.submit(spec(method={"name": "fedavgg"}))
    assert rig.store.jobs() == {}


def test_the_first_task_waits_for_nobody_but_the_population(rig):
    started(rig, spec(clients=3))
    rig.idle()
    late = ScriptedClient(rig.broker, "host-3", rig.folder / "clients")
    before = status_of(rig.store, "job").waits[0].reason

    late.start()
    rig.run_to_end("job")

    assert before == "job job waits for 1 more client: 2 of 3 needed are connected"
    assert rig.report("job").clients == ["client-1", "client-2", "client-3"]


# ---- refusals ----


def test_a_refused_update_is_counted_and_the_round_goes_on(rig):
    tries = []

    def answer(client, task):
        if task.phase != TRAIN or task.round != 1 or len(tries) == 2:
            return False
        tries.append(task.task)
        bad = {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}
        client.offer(task, bad)
        return True

    rig.clients[0].work = answer
    report = rig.run(spec())

    assert report.rounds[0].rejected == {"not-finite": 2}
    assert (report.status, report.rounds[0].accepted) == ("done", 2)
    assert tries == ["job.r1.train.k0", "job.r1.train.k0.try2"]
    assert [v.reason for v in rig.clients[0].verdicts if not getattr(v, "accepted", False)] == ["not-finite"] * 2
    assert np.array_equal(adapter(rig.runs("job") / "adapter")["b"], np.full(3, 3.0, np.float32))


@pytest.mark.parametrize(
    ("reason", "tensors"),
    [
        ("names", {"a": np.zeros((4, 3), np.float32)}),
        ("shape", {"a": np.zeros((3, 4), np.float32), "b": np.zeros(3, np.float32)}),
        ("dtype", {"a": np.zeros((4, 3), np.float64), "b": np.zeros(3, np.float32)}),
        ("too-large", {"a": np.zeros((4, 3), np.float32), "b": np.zeros(2**20, np.float32)}),
    ],
)
def test_every_kind_of_unusable_update_ends_the_job_with_its_name_when_nothing_else_comes(rig, reason, tensors):
    def answer(client, task):
        if task.phase == TRAIN:
            client.offer(task, tensors)
        return task.phase == TRAIN

    rig.clients[1].work = answer
    report = rig.run(spec())

    assert report.status == "failed"
    assert report.reason.startswith("client-2 brought no usable result for the train task of round 1 in 3 tries")
    assert f": {reason}: " in report.reason
    assert report.rounds[0].rejected == {reason: 3}
    assert rig.store.jobs()["job"].exit_code == 1


def test_a_client_on_another_base_model_is_refused(rig):
    rig.clients[1].base_sha256 = "0ff" + "0" * 61

    report = rig.run(spec())

    assert report.rounds[0].rejected == {"base-model": 3}


def test_bad_input_found_by_a_client_ends_the_job_with_its_sentence(rig):
    def answer(client, task):
        client.send(TaskFailed(**client.about(task), reason="data.fields: there is no column 'txt'", bad_input=True))
        return True

    rig.clients[0].work = answer
    report = rig.run(spec())

    assert (report.status, report.reason) == ("failed", "data.fields: there is no column 'txt'")
    assert rig.store.jobs()["job"].exit_code == 2


def test_an_update_in_somebody_elses_name_is_a_dead_letter_and_changes_nothing(rig):
    dead = []

    def answer(client, task):
        if task.phase == TRAIN and task.round == 1:
            forged = {**client.about(task), "client": "client-2", "task": "job.r1.train.k1"}
            metrics = Offer(**forged, payload=None, metrics={"num_examples": 10**6})
            client.send(metrics)
        return False

    rig.serve()
    rig.idle()
    rig.broker.subscribe(topology.DEAD_QUEUE.name, dead.append)
    rig.start_clients()
    rig.clients[0].work = answer
    report = rig.run(spec())

    assert [delivery.type for delivery in dead] == ["lorabbit.offer.v1"]
    assert report.status == "done"
    assert np.array_equal(adapter(rig.runs("job") / "adapter")["b"], np.full(3, 3.0, np.float32))


def test_garbage_is_a_dead_letter_and_the_server_goes_on(rig):
    rig.serve()
    rig.idle()
    for type_name, body in (("lorabbit.offer.v9", b"{}"), ("lorabbit.offer.v1", b"\xff\x00"), ("", b"")):
        rig.broker.send(Outgoing(topology.UP, topology.up_key("host-1"), type_name, body))
    rig.broker.send(Outgoing(topology.UP, topology.data_key("host-1"), "lorabbit.chunk.v1", b"xx", {"sha256": "no"}))
    rig.start_clients()

    assert rig.run(spec()).status == "done"


def test_chunks_of_a_client_that_was_not_asked_do_not_spoil_an_upload(rig):
    spoiled = []

    def answer(client, task):
        if task.phase == TRAIN and not spoiled:
            victim = rig.clients[1]
            for offer in victim.offers.values():
                spoiled.append(offer.task)
                headers = {
                    "sha256": offer.payload.sha256,
                    "index": 0,
                    "size": offer.payload.size_bytes,
                    "task": offer.task,
                }
                body = b"\x00" * offer.payload.size_bytes
                key = topology.data_key(client.address)
                rig.broker.send(Outgoing(topology.UP, key, "lorabbit.chunk.v1", body, headers))
        return False

    rig.clients[0].work = answer
    report = rig.run(spec(rounds=4))

    assert report.status == "done"
    assert all(r.rejected == {} for r in report.rounds)


@pytest.mark.parametrize("what", ["body", "index"])
def test_a_chunk_that_is_damaged_on_its_way_is_sent_again_alone(rig, what):
    def spoil(client, grant):
        if asked:
            asked.append(grant)
            return False
        asked.append(grant)
        place = topology.UP, topology.data_key(client.address)
        chunks = ChunkedPayload(
            client.offers[grant.task].payload, client.store.path(grant.sha256), place, {"task": grant.task}
        )
        for index in grant.missing:
            message = chunks.message(index)
            if index == 1 and what == "body":
                message = replace(message, body=b"\x01" + message.body[1:])
            elif index == 1:
                message = replace(message, headers={**message.headers, "index": 2})
            rig.broker.send(message)
        return True

    asked = []
    for client in rig.clients:
        client.tensors_like = lambda value: {"a": np.full(900, value, np.float32)}
        client.on_grant = spoil
    report = rig.run(spec(rounds=1))

    assert report.status == "done"
    assert [grant.missing for grant in asked if grant.task == asked[0].task] == [(0, 1, 2, 3), (1,)]
    assert dict(rig.service.refused) == {"chunk": 1}
    assert "update-rejected" not in rig.kinds()


def test_a_payload_that_is_not_what_was_announced_is_sent_once_more_whole(rig):
    def spoil(client, grant):
        asked.append(grant)
        path = client.store.path(grant.sha256)
        if len(asked) == 1:
            right.append(path.read_bytes())
            path.write_bytes(bytes(len(right[0])))
        elif len(asked) == 2:
            path.write_bytes(right[0])
        return False

    asked, right = [], []
    for client in rig.clients:
        client.on_grant = spoil
    report = rig.run(spec(rounds=1))

    assert report.status == "done"
    assert asked[1] == asked[0]
    assert dict(rig.service.refused) == {"corrupt": 1}
    assert "update-rejected" not in rig.kinds()


def test_an_upload_whose_bytes_are_not_what_was_announced_is_corrupt(rig):
    cheated = []

    def answer(client, task):
        if task.phase != TRAIN or cheated:
            return False
        cheated.append(task.task)
        ref = client.store.add_tensors(client.tensors_like(77.0), chunk_bytes=1024)
        other = client.store.add_tensors(client.tensors_like(78.0), chunk_bytes=1024)
        client.store.path(ref.sha256).write_bytes(client.store.path(other.sha256).read_bytes())
        offer = Offer(**client.about(task), payload=ref, metrics={"num_examples": 10, "loss": 0.5})
        client.offers[task.task] = offer
        client.send(offer)
        return True

    rig.clients[0].work = answer
    report = rig.run(spec())

    assert report.rounds[0].rejected == {"corrupt": 1}
    assert report.status == "done"


# ---- duplicates ----


def test_a_result_that_is_offered_again_after_its_verdict_is_accepted_again_and_counts_once(rig):
    report = rig.run(spec())
    offers = [offer for offer in rig.clients[0].sent if isinstance(offer, Offer)]
    before = rig.report("job")
    rig.clients[0].verdicts.clear()

    for offer in offers:
        rig.clients[0].send(offer)
    rig.idle()

    assert [v.accepted for v in rig.clients[0].verdicts] == [True] * len(offers)
    assert rig.report("job") == before == report


def test_an_offer_that_never_was_wanted_is_denied_so_that_the_client_forgets_it(rig):
    rig.run(spec())
    client = rig.clients[0]
    client.verdicts.clear()

    client.send(
        Offer(job="job", task="job.r9.train.k0", client=client.client, payload=None, metrics={"num_examples": 1})
    )
    client.send(
        Offer(job="gone", task="gone.r1.train.k0", client=client.client, payload=None, metrics={"num_examples": 1})
    )
    rig.idle()

    assert [(type(v), v.reason) for v in client.verdicts] == [(Deny, "job-ended")] * 2


def test_every_message_twice_changes_nothing(rig, tmp_path):
    twin = Rig(tmp_path / "twin")
    expected = twin.run(spec(rounds=3))
    twin.service.close()
    for client in rig.clients:
        client.stutter = 2

    report = rig.run(spec(rounds=3))

    assert report.adapter == expected.adapter
    assert [(r.accepted, r.rejected, r.metrics) for r in report.rounds] == [
        (r.accepted, r.rejected, r.metrics) for r in expected.rounds
    ]


def test_the_same_bytes_from_two_clients_move_once_and_count_twice(rig):
    same = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}

    def answer(client, task):
        if task.phase == TRAIN:
            client.offer(task, same)
        return task.phase == TRAIN

    for client in rig.clients:
        client.work = answer
    report = rig.run(spec(rounds=1))

    assert report.rounds[0].accepted == 2
    assert np.array_equal(adapter(rig.runs("job") / "adapter")["a"], same["a"])


# ---- clients that go and come ----


def test_a_client_that_dies_is_reported_lost_and_gets_its_task_again_when_it_comes_back(rig):
    def die(client, task):
        if task.phase == TRAIN and task.round == 1:
            client.stop()
            return True
        return False

    rig.clients[1].work = die
    started(rig)
    rig.pass_seconds(30)
    status = status_of(rig.store, "job")
    back = ScriptedClient(rig.broker, "host-2", rig.folder / "fresh-disk")
    back.start()
    rig.run_to_end("job")

    assert "client-lost" in rig.kinds()
    assert status.lost == ("client-2",)
    assert status.waits[0].owner == "client-2"
    assert "waits for client-2: lost; start it again" in status.waits[0].reason
    assert (back.tasks[0].task, back.tasks[0].attempt) == ("job.r1.train.k1", 2)
    assert np.array_equal(adapter(rig.runs("job") / "adapter")["b"], np.full(3, 3.0, np.float32))


def test_a_server_that_was_stopped_for_longer_than_a_lease_loses_no_client_that_spoke(rig):
    rig.clients[1].work = lambda _, task: task.phase == TRAIN
    started(rig)
    rig.pass_seconds(2)
    for _ in range(4):
        rig.now += 15.0
        for client in rig.clients:
            client.alive()
    rig.idle()

    assert "client-lost" not in rig.kinds()
    assert status_of(rig.store, "job").lost == ()


def test_a_client_whose_identity_goes_back_to_another_one_keeps_what_it_declared(rig):
    stayed, returned = rig.clients
    stayed.declared = {"device": "cuda", "tags": ("fast",), "max_rank": 4, "quantisation": "int4"}
    rig.serve()
    stayed.start()
    rig.idle()

    returned.wanted = "client-1"
    returned.start()
    rig.idle()
    stayed.alive()
    rig.idle()

    found = {entry.address: (name, json.loads(entry.record)) for name, entry in rig.store.clients().items()}
    assert (stayed.client, found["host-1"][0], found["host-2"][0]) == ("client-2", "client-2", "client-1")
    assert found["host-1"][1] == found["host-1"][1] | stayed.declared | {"tags": ["fast"]}
    assert "fast" not in found["host-2"][1]["tags"]


def test_a_client_that_fell_silent_while_the_server_was_stopped_is_lost_a_lease_later(rig):
    rig.clients[1].work = lambda _, task: task.phase == TRAIN
    started(rig)
    rig.clients[1].stop()
    rig.now += 60.0
    rig.pass_seconds(30)

    assert status_of(rig.store, "job").lost == ("client-2",)


def falls_silent(rig):
    """Let the second client die in its first training."""

    def die(client, task):
        if task.phase == TRAIN:
            client.stop()
        return task.phase == TRAIN

    rig.clients[1].work = die


def test_a_client_that_is_lost_for_longer_than_the_job_is_patient_is_set_aside_and_the_job_ends(rig):
    falls_silent(rig)

    report = rig.run(spec(patience_seconds=40, min_clients=1))

    assert report.status == "done"
    assert [entry.accepted for entry in report.rounds] == [1, 1]
    assert report.set_aside == {"client-2": "client-2 was lost for 40 s (patience_seconds)"}
    times = {event.kind: event.at_ms for event in rig.events if event.kind in {"client-lost", "client-set-aside"}}
    assert 20_000 <= times["client-set-aside"] - times["client-lost"] <= 30_000  # its lease is part of the patience


def test_a_job_that_cannot_do_without_a_lost_client_ends_with_its_name_when_patience_is_over(rig):
    falls_silent(rig)

    report = rig.run(spec(patience_seconds=40))

    assert report.status == "failed"
    assert report.reason.startswith("client-2 was lost for 40 s (patience_seconds); 1 of 2 clients are left")


def test_patience_with_a_lost_client_begins_anew_with_the_server(rig):
    falls_silent(rig)
    started(rig, spec(patience_seconds=40, min_clients=1))
    rig.pass_seconds(10)
    rig.kill()
    rig.now += 1_000
    rig.serve()
    rig.pass_seconds(30)
    before = rig.kinds().count("client-set-aside")
    rig.pass_seconds(30)

    assert (before, rig.kinds().count("client-set-aside")) == (0, 1)


def test_another_process_takes_the_place_of_a_lost_client(rig):
    def die(client, task):
        if task.phase == TRAIN:
            client.stop()
        return task.phase == TRAIN

    rig.clients[1].work = die
    started(rig)
    rig.pass_seconds(30)
    other = ScriptedClient(rig.broker, "host-9", rig.folder / "clients")
    other.start()
    rig.run_to_end("job")

    assert other.client == "client-2"
    assert rig.report("job").adapter.sha256 == rig.report("job").rounds[-1].sha256
    assert np.array_equal(adapter(rig.runs("job") / "adapter")["b"], np.full(3, 3.0, np.float32))


def test_a_client_that_says_goodbye_frees_its_place_at_once(rig):
    started(rig, spec(clients=3))
    rig.clients[0].leave()
    rig.idle()
    other = ScriptedClient(rig.broker, "host-9", rig.folder / "clients")
    other.start()
    rig.idle()

    assert other.client == "client-1"


def test_a_client_that_the_server_forgot_is_welcomed_again_when_it_renews_its_lease(rig):
    rig.serve()
    rig.start_clients()
    rig.idle()
    rig.kill()
    rig.store._redis.flushall()
    rig.serve()

    for client in rig.clients:
        client.alive()
    report = rig.run(spec())

    assert report.clients == ["client-1", "client-2"]


def test_a_client_that_was_away_for_longer_than_its_inbox_is_kept_gets_another(rig):
    rig.serve()
    rig.start_clients()
    rig.idle()
    away = rig.clients[1]
    inbox = topology.inbox(away.address)
    away.leave()
    for _ in range(10):
        rig.now += inbox.expires_ms / 1000 / 8
        rig.idle()
    assert inbox.name not in rig.broker._queues

    away.start()
    rig.service.submit(spec())
    rig.run_to_end("job")

    assert rig.report("job").status == "done"


def test_a_lost_chunk_is_asked_for_again_after_a_while(rig):
    lost = []

    def swallow(_, grant):
        if ".train." in grant.task and not lost:
            lost.append(grant.task)
            return True
        return False

    rig.clients[0].on_grant = swallow
    report = rig.run(spec())

    assert report.status == "done"
    assert len([m for m in rig.clients[0].received if isinstance(m, Grant) and m.task == lost[0]]) == 2


def test_an_update_that_is_offered_again_while_chunks_arrive_is_granted_once_it_is_quiet(rig):
    grants = []

    def late(client, grant):
        if ".train." in grant.task:
            grants.append(grant.task)
        if grants == [grant.task]:  # the chunks are on their way, behind those of the other client
            client.send(client.offers[grant.task])
        return len(grants) == 1

    rig.clients[0].on_grant = late
    started(rig)
    rig.idle()
    before = len(grants)
    rig.run_to_end("job")

    assert before == 1
    assert grants[0] == grants[1]
    assert rig.report("job").rounds[0].accepted == 2


# ---- cancelling ----


def test_a_running_job_is_cancelled_and_keeps_its_last_version(rig):
    def stall(_, task):
        return task.phase == TRAIN and task.round == 2

    rig.clients[0].work = stall
    job = started(rig)
    rig.idle()
    assert rig.service.cancel(job)
    rig.run_to_end(job)

    assert rig.store.jobs()[job].status == "cancelled"
    assert rig.report(job).status == "cancelled"
    assert np.array_equal(adapter(rig.runs(job) / "adapter")["b"], np.full(3, 1.5, np.float32))
    assert "CancelTask" in {type(m).__name__ for m in rig.clients[0].received}
    assert not rig.service.cancel(job)


def test_a_queued_job_is_cancelled_without_running(rig):
    rig.serve()
    first, second = rig.service.submit(spec()), rig.service.submit(spec())
    rig.idle()
    rig.service.cancel(second)
    rig.start_clients()
    rig.run_to_end(second)

    assert rig.ended == [first, second]
    assert rig.store.jobs()[second].status == "cancelled"
    assert all(not task.task.startswith(second) for task in rig.clients[0].tasks)


# ---- replicas ----


def test_a_second_server_stands_by_and_takes_over_when_the_first_gives_up(rig):
    first = rig.serve(owner="first")
    rig.start_clients()
    rig.idle()
    second = rig.serve(owner="second")
    rig.idle()
    assert (first.is_leading, second.is_leading) == (True, False)

    first.close()
    rig.pass_seconds(10)

    assert second.is_leading
    assert rig.run(spec()).status == "done"


def test_a_server_that_lost_its_lease_stops_writing_and_stands_by(rig):
    first = rig.serve(owner="first")
    rig.start_clients()
    rig.idle()
    rig.store._redis.delete("lorabbit:{server}:lease")
    second = rig.serve(owner="second")
    rig.idle()
    assert second.is_leading

    rig.pass_seconds(10)

    assert not first.is_leading
    assert rig.run(spec()).status == "done"


def test_verdicts_and_tasks_reach_a_client_in_the_order_they_were_decided(rig):
    rig.run(spec(rounds=3))

    kinds = [type(m).__name__ for m in rig.clients[0].received if isinstance(m, Verdict) or type(m).__name__ == "Task"]
    assert kinds[:4] == ["Task", "Verdict", "Task", "Verdict"]
