"""A running server and peers that send what no client sends: it counts them and finishes its job."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_rig import Fuse, Rig

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing
from lorabbit.job.spec import JobSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import FROM_CLIENT, Hello, Metrics, Offer, PayloadRef, TaskFailed
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN
from lorabbit_server.transfer.traffic_meter import MAX_TASKS, TrafficMeter

HEADERS = st.dictionaries(
    st.sampled_from(["sha256", "index", "task", "size", "epoch"]),
    st.none()
    | st.integers()
    | st.text(max_size=8)
    | st.booleans()
    | st.floats(allow_subnormal=False)
    | st.binary(max_size=4),
)

FACTORS = {"m.lora_A.weight": np.ones((2, 3), np.float32), "m.lora_B.weight": np.ones((4, 2), np.float32)}


def spec(**what):
    return JobSpec(**{"name": "job", "clients": 2, "rounds": 2, "seed": 7, **what})


def throw(rig, key, type_name, body, headers=None):
    rig.broker.send(Outgoing(topology.UP, key, type_name, body, headers or {}))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    thrown=st.lists(
        st.tuples(st.sampled_from([*(m.type_name() for m in FROM_CLIENT), "", "x"]), st.binary(max_size=60), HEADERS),
        max_size=6,
    )
)
def test_no_message_and_no_chunk_stops_a_server(tmp_path_factory, thrown):
    rig = Rig(tmp_path_factory.mktemp("rig"))
    rig.serve()
    rig.idle()
    for type_name, body, headers in thrown:
        throw(rig, topology.up_key("host-1"), type_name, body, headers)
        throw(rig, topology.data_key("host-1"), type_name, body, headers)
    rig.start_clients()

    assert rig.run(spec(rounds=1)).status == "done"
    rig.service.close()


def test_refused_messages_are_counted_by_reason(rig):
    rig.serve()
    rig.idle()
    throw(rig, topology.up_key("host-1"), "lorabbit.offer.v9", b"{}")
    throw(rig, topology.up_key("host-1"), Offer.type_name(), b"{")
    throw(rig, topology.up_key("host-1"), "lorabbit.alive.v1", json.dumps({"address": "b", "client": "c"}).encode())
    rig.idle()

    assert dict(rig.service.refused) == {"unknown-type": 1, "malformed": 1, "forged": 1}


class Breaking(Fuse):
    """A store with a fault: the server breaks where a client of this address says hello."""

    def effect(self, function):
        def effect(*arguments, **more):
            if function.__name__ == "lease_identity" and arguments[0].address == "poison":
                raise TypeError("a fault of the server")
            return function(*arguments, **more)

        return effect


def test_a_message_that_breaks_the_server_is_a_dead_letter_and_counted_once(rig):
    rig.serve(Breaking())
    rig.start_clients()
    rig.idle()
    dead = []
    rig.broker.subscribe(topology.DEAD_QUEUE.name, dead.append)
    hello = Hello(address="poison")
    throw(rig, topology.up_key("poison"), hello.type_name(), codec.encode(hello))

    report = rig.run(spec(rounds=1))

    assert report.status == "done"
    assert [(letter.type, letter.body) for letter in dead] == [(hello.type_name(), codec.encode(hello))]
    assert dict(rig.service.refused) == {"broke-server": 1}


@pytest.mark.parametrize("index", ["0", True, None, 1.0, "x"])
def test_a_chunk_whose_index_is_no_whole_number_is_refused_and_counted(rig, index):
    def chunk_first(client, grant):
        headers = {"sha256": grant.sha256, "index": index, "task": grant.task}
        throw(rig, topology.data_key(client.address), "lorabbit.chunk.v1", b"x", headers)
        return False

    rig.serve()
    rig.clients[0].on_grant = chunk_first
    rig.start_clients()

    assert rig.run(spec(rounds=1)).status == "done"
    assert rig.service.refused["chunk"] == 2  # of the first adapter and of round 1


def test_a_manifest_of_a_billion_chunks_is_refused_before_memory_is_taken(rig):
    def answer(client, task):
        if task.phase != TRAIN:
            return False
        ref = PayloadRef(sha256="a" * 64, size_bytes=2**40, chunk_bytes=1024)
        client.send(Offer(**client.about(task), payload=ref, metrics=Metrics(num_examples=1)))
        return True

    rig.clients[0].work = answer
    report = rig.run(spec())

    assert report.rounds[0].rejected == {"too-large": 3}


def test_scores_that_overflow_in_the_mean_are_left_out_of_it(rig):
    def answer(client, task):
        if task.phase == EVALUATE:
            client.tell(task, accuracy=1.7e308)
        return task.phase == EVALUATE

    rig.clients[0].work = answer
    report = rig.run(spec())

    assert report.status == "done"
    assert "accuracy" not in report.final.metrics
    assert "loss" in report.final.metrics


def test_a_queue_that_somebody_writes_to_directly_does_not_stop_the_server():
    assert topology.address_of("lorabbit") == ""


def test_names_that_clients_make_up_do_not_fill_the_meter():
    meter = TrafficMeter()
    for number in range(MAX_TASKS + 10):
        meter.up(f"t{number}", overhead=1)
    meter.up("x" * 10**6, overhead=1)

    assert meter.read("t0").overhead_up == 1
    assert meter.read(f"t{MAX_TASKS}").overhead_up == 0
    assert meter.read("x" * 10**6).overhead_up == 0


def test_what_a_task_tells_of_itself_is_what_the_codec_reads():
    offer = Offer(job="j", task="t", client="c", payload=None, metrics=Metrics(num_examples=2**53))

    assert codec.decode(offer.type_name(), codec.encode(offer)) == offer


def three(folder):
    made = Rig(folder, 3)
    made.serve()
    made.start_clients()
    return made


def test_one_client_of_three_that_sends_nonsense_is_set_aside_and_the_job_is_done(tmp_path):
    rig = three(tmp_path)

    def nonsense(client, task):
        if task.phase == TRAIN:
            client.offer(task, {name: value * np.nan for name, value in client.tensors_like(1.0).items()})
        return task.phase == TRAIN

    rig.clients[1].work = nonsense
    report = rig.run(spec(clients=3))
    rig.service.close()

    assert report.status == "done"
    assert [round_.accepted for round_ in report.rounds] == [2, 2]
    assert report.rounds[0].rejected == {"not-finite": 3}
    assert list(report.set_aside) == ["client-2"]
    assert "client-2 brought no usable result" in report.set_aside["client-2"]


def test_one_client_of_three_that_calls_the_job_bad_is_set_aside_and_the_job_is_done(tmp_path):
    rig = three(tmp_path)

    def refuse(client, task):
        client.send(TaskFailed(**client.about(task), reason="I do not like it", bad_input=True))
        return True

    rig.clients[0].work = refuse  # it is the one that is asked for the first adapter
    report = rig.run(spec(clients=3))
    rig.service.close()

    assert report.status == "done"
    assert report.set_aside == {"client-1": "I do not like it"}


def test_one_client_of_three_with_facts_that_do_not_fit_is_set_aside_and_its_update_left_out(tmp_path):
    rig = three(tmp_path)

    def another_scaling(client, task):
        if task.phase != TRAIN:
            return False
        ref = client.store.add_tensors(FACTORS, chunk_bytes=1024)
        told = Metrics(num_examples=10, loss=0.5, facts={"scaling": 9.0, "rank": 2})
        client.offers[task.task] = Offer(**client.about(task), payload=ref, metrics=told)
        client.send(client.offers[task.task])
        return True

    def with_factors(client, task):
        if task.phase == INITIALIZE:
            client.offer(task, FACTORS)
        elif task.phase == EVALUATE:
            client.tell(task, accuracy=0.5)
        return task.phase != TRAIN

    def factors_of_another_scaling(client, task):
        return with_factors(client, task) or another_scaling(client, task)

    for client in rig.clients:
        client.work = with_factors
    rig.clients[2].work = factors_of_another_scaling
    report = rig.run(spec(clients=3))
    rig.service.close()

    assert report.status == "done"
    assert report.rounds[0].rejected == {"scaling": 1}
    assert list(report.set_aside) == ["client-3"]
    assert [round_.accepted for round_ in report.rounds] == [2, 2]


def test_offers_that_nobody_asked_for_are_denied_and_counted_by_reason(tmp_path):
    rig = three(tmp_path)

    def more(client, task):
        if task.phase == TRAIN and task.round == 1:
            for job, task_id in (("no-such-job", "x"), (task.job, "no-such-task")):
                about = {"job": job, "task": task_id, "client": client.client}
                client.send(Offer(**about, payload=None, metrics=Metrics(num_examples=1)))
            other = task.task.replace(f".k{task.index}", f".k{(task.index + 1) % 3}")
            client.send(Offer(**{**client.about(task), "task": other}, payload=None, metrics=Metrics(num_examples=1)))
        return False

    rig.clients[0].work = more
    report = rig.run(spec(clients=3))
    refused = dict(rig.service.refused)
    rig.service.close()

    assert report.status == "done"
    assert refused == {"job-ended": 1, "stale": 1, "not-yours": 1}
