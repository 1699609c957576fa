"""Uploads that nobody wants any more: what a server keeps of them, and whom it asks for them."""

from __future__ import annotations

import hashlib

import pytest
from server_rig import Paused, Rig

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Deny, Grant, Metrics, Offer, PayloadRef
from lorabbit.types import TRAIN


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    made.service.close()


def files(rig):
    """Payload files on the server's disk, whole and arriving."""
    return {path.name for path in (rig.settings.folder / "payloads").iterdir()}


def asked(client):
    """For which payloads a client was asked, and how often."""
    return [grant.sha256 for grant in client.received if isinstance(grant, Grant)]


def offer(client, task, content, size_bytes=1_000_000):
    """Offer what the client does not have."""
    ref = PayloadRef(sha256=hashlib.sha256(content.encode()).hexdigest(), size_bytes=size_bytes, chunk_bytes=1024)
    metrics = Metrics(num_examples=10, loss=0.5, steps=1)
    client.send(Offer(**client.about(task), payload=ref, metrics=metrics, base_sha256=client.base_sha256))
    return ref.sha256


def training(rig, worker=None):
    """A job whose clients have been asked to train, and do nothing about it."""
    for client in rig.clients:
        client.work = lambda _client, task: task.phase == TRAIN
    rig.serve(worker=worker)
    rig.start_clients()
    job = rig.service.submit(JobSpec(name="job", clients=2, rounds=2))
    rig.idle()
    assert {client.tasks[-1].phase for client in rig.clients} == {TRAIN}
    return job


def test_a_client_that_offers_one_task_under_many_hashes_has_one_upload_and_keeps_nobody_waiting(rig):
    job = training(rig)
    bad, good = rig.clients
    before = files(rig)

    bad.on_grant = lambda _client, _grant: True
    hashes = []
    for number in range(100):
        hashes.append(offer(bad, bad.tasks[-1], str(number)))
        rig.idle()
    assert files(rig) - before == {f"{hashes[-1]}.part", f"{hashes[-1]}.have"}

    bad.received.clear()
    bad.on_grant = lambda _client, grant: grant.sha256 in hashes
    for client in (bad, good):
        client.work = lambda _client, _task: False
        client.do(client.tasks[-1])
    now = rig.now
    rig.run_to_end(job)

    assert rig.now - now < 5
    assert not set(asked(bad)) & set(hashes)
    assert [round_.accepted for round_ in rig.report(job).rounds] == [2, 2]


def test_a_result_that_became_too_old_on_its_way_up_is_not_asked_for_any_more(tmp_path):
    """Buffered: a client dies while it sends, and comes back when its result is too old, five times."""
    rig = Rig(tmp_path)
    slow, fast = rig.clients
    held = []
    fast.work = lambda _client, task: task.phase == TRAIN and not held.append(task)
    slow.on_grant = lambda _client, grant: ".train." in grant.task
    rig.serve()
    rig.start_clients()
    schedule = {"kind": "buffered", "buffer": 1, "max_staleness": 0}
    rig.service.submit(JobSpec(name="job", clients=2, rounds=50, schedule=schedule))
    rig.idle()

    for _ in range(5):
        rig.pass_seconds(1)
        fast.do(held.pop())
        rig.pass_seconds(2)
        slow.stop()
        slow.start()
        rig.pass_seconds(2)
    denied = [answer.reason for answer in slow.verdicts if isinstance(answer, Deny)]
    slow.received.clear()
    rig.pass_seconds(30)
    rig.service.close()

    assert denied == ["too-stale"] * 5
    open_ = {offered.payload.sha256 for offered in slow.offers.values()}
    assert set(asked(slow)) <= open_
    assert {name for name in files(rig) if name.endswith(".part")} == {f"{sha256}.part" for sha256 in open_}


def test_the_file_of_an_offer_that_was_replaced_while_it_was_checked_goes(rig):
    worker = Paused()
    training(rig, worker=worker)
    client = rig.clients[0]
    before, task = files(rig), client.tasks[-1]

    worker.sleeps = True
    client.do(task)
    rig.idle()
    first = client.offers[task.task].payload.sha256
    assert files(rig) - before == {f"{first}.part", f"{first}.have"}
    client.offer(task, client.tensors_like(5.0))
    rig.idle()
    second = client.offers[task.task].payload.sha256
    worker.wake()
    rig.idle()

    assert [answer.accepted for answer in client.verdicts if answer.task == task.task] == [True]
    assert files(rig) - before == {f"{second}.safetensors"}
