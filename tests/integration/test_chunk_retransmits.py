"""A chunk that arrives damaged is asked for again as soon as its client has sent the others, and not for ever."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from proxy import Proxy
from seen import Seen
from server_rig import Rig

from lorabbit.broker import topology
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.settings import ClientSettings, ServerSettings
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Commit, Grant, PayloadRef
from lorabbit.state.redis import RedisStateStore
from lorabbit.transfer.chunking import ChunkedPayload
from lorabbit.types import TRAIN
from lorabbit_client.agent import task_run
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.runners import InlineRunner
from lorabbit_client.executor import Executor
from lorabbit_server.server import Server
from lorabbit_server.transfer import uploads
from lorabbit_server.transfer.uploads import MAX_RETRANSMITS

TEN_MINUTES = 600.0
MIB = 2**20


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path, clients=1)
    made.clients[0].tensors_like = lambda value: {"a": np.full(900, value, np.float32)}
    yield made
    made.service.close()


def asked(client):
    """Which chunks a client was asked for, one grant after the other."""
    return [grant.missing for grant in client.received if isinstance(grant, Grant)]


def send(rig, client, grant, indices, *, damaged=()):
    """Send chunks of what a grant asks for, some of them with a wrong byte."""
    path = client.store.path(grant.sha256)
    ref = PayloadRef(sha256=grant.sha256, size_bytes=path.stat().st_size, chunk_bytes=1024)
    chunks = ChunkedPayload(ref, path, (topology.UP, topology.data_key(client.address)), {"task": grant.task})
    for index in indices:
        message = chunks.message(index)
        if index in damaged:
            message = replace(message, body=bytes([message.body[0] ^ 1]) + message.body[1:])
        rig.broker.send(message)


def commit(client, grant):
    client.send(Commit(job=grant.job, task=grant.task, client=grant.client, sha256=grant.sha256))


@pytest.mark.parametrize("first", ["chunks", "commit"])
def test_damaged_chunks_are_asked_for_again_in_no_time_and_alone(rig, first):
    times = []

    def spoil(client, grant):
        times.append(rig.now)
        if len(times) > 1:
            return False
        if first == "commit":
            commit(client, grant)
        send(rig, client, grant, grant.missing, damaged=(1, 3))
        if first == "chunks":
            commit(client, grant)
        return True

    rig.clients[0].on_grant = spoil
    report = rig.run(JobSpec(name="job", clients=1, rounds=1))

    retransmits = {"chunks": [(1, 3)], "commit": [(1,), (3,)]}[first]
    assert report.status == "done"
    assert asked(rig.clients[0])[: 1 + len(retransmits)] == [(0, 1, 2, 3), *retransmits]
    assert len(set(times[: 1 + len(retransmits)])) == 1


def test_a_client_that_is_still_sending_is_not_asked(rig):
    rig.clients[0].on_grant = lambda client, grant: send(rig, client, grant, (0, 1), damaged=(1,)) or True
    rig.serve()
    rig.start_clients()
    rig.service.submit(JobSpec(name="job", clients=1, rounds=1))
    rig.idle()

    assert asked(rig.clients[0]) == [(0, 1, 2, 3)]


def test_whoever_sends_damaged_chunks_for_ever_is_answered_a_few_times_and_then_as_one_that_stalls(rig):
    client = rig.clients[0]

    def spoil(client, grant):
        for _ in range(20):
            send(rig, client, grant, (0, 1, 2, 3), damaged=(0, 1, 2, 3))
            commit(client, grant)
        return True

    client.on_grant = spoil
    rig.serve()
    rig.start_clients()
    rig.service.submit(JobSpec(name="job", clients=1, rounds=1))
    rig.idle()
    at_once = asked(client)
    rig.pass_seconds(2 * uploads.STALLED_BEHIND_OTHERS_MS / 1000)
    later = asked(client)[len(at_once) :]

    assert len(at_once) <= 1 + MAX_RETRANSMITS * 4
    assert sum(len(chunks) for chunks in at_once[1:]) == MAX_RETRANSMITS * 4
    assert set(later) == {(0, 1, 2, 3)}
    assert len(later) <= 2 * uploads.STALLED_BEHIND_OTHERS_MS / uploads.STALLED_MS


def test_no_client_can_have_another_one_asked_that_brings_the_same_bytes(tmp_path):
    rig, grants = Rig(tmp_path), []
    meddler, victim = rig.clients
    for client in rig.clients:
        client.tensors = lambda task: {"a": np.full(900, 5.0 * task.round, np.float32)}
    meddler.on_grant = lambda client, grant: client.tasks[-1].phase == TRAIN and not grants.append(grant)
    rig.serve()
    rig.start_clients()
    rig.service.submit(JobSpec(name="job", clients=2, rounds=1))
    rig.idle()
    (own,) = grants
    (awaited,) = victim.offers.values()
    assert awaited.payload.sha256 == own.sha256

    for grant in (own.model_copy(update={"task": awaited.task}), own):
        send(rig, meddler, grant, (0,), damaged=(0,))
        commit(meddler, grant)
    rig.idle()
    rig.service.close()

    assert grants == [own, own.model_copy(update={"missing": (0,)})]
    assert asked(victim) == []


# ---- over RabbitMQ ----


@pytest.mark.services
def test_a_bit_that_flips_on_the_way_up_costs_its_chunk_and_no_waiting(empty_rabbitmq_url, tmp_path, monkeypatch):
    """Whatever else asks again does so after ten minutes: the watchdog of a minute has ended the test by then."""
    monkeypatch.setattr(uploads, "STALLED_MS", round(TEN_MINUTES * 1000))
    monkeypatch.setattr(uploads, "STALLED_BEHIND_OTHERS_MS", round(TEN_MINUTES * 1000))
    monkeypatch.setattr(task_run, "RETRY_SECONDS", TEN_MINUTES)
    link = Proxy(empty_rabbitmq_url)
    near, far = RabbitBroker(empty_rabbitmq_url, name="server"), RabbitBroker(link.url, name="client")
    settings = ServerSettings(folder=tmp_path / "server", durable=False, chunk_bytes=MIB // 4)
    service = Server(near, RedisStateStore.embedded(), settings, owner="server")
    of_client = ClientSettings(folder=tmp_path / "client", durable=False, address="site", device="cpu")
    ended, sizes = Seen(far), []

    def spoil(_, event):
        if event.kind == "task-sent" and event.phase == TRAIN:
            link.flip_a_bit(upwards=True)
        elif event.kind == "payload-published":
            sizes.append(event.size_bytes)

    service.listen(spoil)
    service.on_job_ended(lambda job: far.post(lambda: ended.add(job)))
    serving = threading.Thread(target=near.run)
    try:
        service.start()
        serving.start()
        far.post(Agent(far, InlineRunner(Executor()), of_client).start)
        job = service.submit(JobSpec(name="job", clients=1, rounds=1, model={"name": "null:4MB"}))
        ended.wait(1)
    finally:
        near.stop()
        serving.join()
        service.close()
        for each in (far, near, link):
            each.close()

    report = Report.model_validate_json((settings.folder / "runs" / job / "report.json").read_text())
    assert report.status == "done"
    assert link.has_flipped
    assert dict(service.refused) == {"chunk": 1}
    assert report.rounds[0].bytes_up == sizes[0] + MIB // 4
    assert report.rounds[0].rejected == {}
