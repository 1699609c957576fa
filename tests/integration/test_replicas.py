"""Two servers on one volume: whoever has been replaced deletes nothing that the new one needs."""

from __future__ import annotations

import pytest
from server_rig import Paused, Rig

from lorabbit.jobspec import JobSpec
from lorabbit.types import TRAIN


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    for client in rig.clients:
        client.work = lambda _client, task: task.phase == TRAIN
    return rig


def files(rig):
    """Payload files on the server's volume."""
    return {path.name for path in (rig.settings.folder / "payloads").iterdir()}


def take_over(rig):
    """Let a second server on the same volume take the lease, as after the first one slept through it."""
    rig.store._redis.delete("lorabbit:{server}:lease")
    return rig.serve(owner="second")


def test_a_server_that_slept_through_its_lease_deletes_no_file_of_the_next_ones_job(rig):
    worker = Paused()
    rig.serve(owner="first", worker=worker)
    rig.start_clients()
    rig.service.submit(JobSpec(name="early", clients=2, rounds=1))
    rig.idle()
    worker.sleeps = True
    rig.service.cancel("early")
    rig.idle()
    second = take_over(rig)
    late = second.submit(JobSpec(name="late", clients=2, rounds=1))
    rig.pass_seconds(5)
    before = files(rig)
    assert before

    worker.wake()

    assert files(rig) == before
    for client in rig.clients:
        client.work = lambda _client, _task: False
        client.do(client.tasks[-1])
    rig.run_to_end(late)
    assert rig.report(late).status == "done"


def test_a_server_that_leads_still_deletes_what_nothing_needs(rig):
    worker = Paused()
    rig.serve(worker=worker)
    rig.start_clients()
    rig.service.submit(JobSpec(name="early", clients=2, rounds=1))
    rig.idle()
    assert files(rig)
    worker.sleeps = True
    rig.service.cancel("early")
    rig.idle()

    worker.wake()

    assert files(rig) == set()
