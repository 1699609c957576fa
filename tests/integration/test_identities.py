"""Who keeps an identity: the client that is alive, whatever comes late, twice, or in its name."""

from __future__ import annotations

import pytest
from scripted_client import ScriptedClient
from server_rig import Rig

from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Goodbye
from lorabbit.types import TRAIN

LEASE = "lorabbit:{server}:lease"


@pytest.fixture
def rig(tmp_path):
    """Two clients, of the processes `now-1` and `now-2`, that have a task."""
    rig = Rig(tmp_path)
    for number, client in enumerate(rig.clients, 1):
        client.work = lambda _client, task: task.phase == TRAIN
        client.declared = {"process": f"now-{number}", "device": "cuda"}
    rig.serve(owner="first")
    rig.start_clients()
    rig.service.submit(JobSpec(name="job", clients=2, rounds=1))
    rig.idle()
    return rig


def newcomer(rig, **named):
    client = ScriptedClient(rig.broker, "host-9", rig.folder / "new", **named)
    client.work = lambda _client, _task: True
    client.start()
    rig.idle()
    return client


def finish(rig):
    for client in rig.clients:
        client.work = lambda _client, _task: False
        client.do(client.tasks[-1])
    rig.run_to_end("job")
    report = rig.report("job")
    assert report.status == "done"
    assert (report.rounds[-1].cohort, report.rounds[-1].accepted) == (["client-1", "client-2"], 2)
    assert not rig.service.refused


def test_a_goodbye_of_a_former_process_that_comes_late_takes_nothing_from_the_present_one(rig):
    rig.clients[0].send(Goodbye(address="host-1", client="client-1", process="before"))
    rig.idle()

    assert newcomer(rig).client == "client-3"
    assert "client-lost" not in rig.kinds()
    finish(rig)


def test_a_client_whose_lease_was_ended_has_it_again_as_soon_as_it_speaks(rig):
    rig.clients[0].send(Goodbye(address="host-1", client="client-1", process="now-1"))
    rig.pass_seconds(30)

    (entry,) = (each for each in rig.store.clients().values() if each.client == "client-1")
    assert entry.expires_ms > rig.now * 1000
    assert '"device": "cuda"' in entry.record
    assert newcomer(rig).client == "client-3"
    finish(rig)


def test_a_server_that_slept_with_a_goodbye_in_its_hands_ends_no_lease_of_the_next_one(rig):
    first, held = rig.service, []
    guard, first._loop.guard = first._loop.guard, held.append
    rig.clients[0].send(Goodbye(address="host-1", client="client-1", process="now-1"))
    rig.idle()
    for subscription in first._subscriptions:
        subscription.cancel()
    rig.store._redis.delete(LEASE)
    rig.serve(owner="second")
    rig.idle()
    rig.clients[0].declared["process"] = "later"
    rig.clients[0].hello()
    rig.pass_seconds(12)

    first._loop.guard = guard
    guard(held[0])
    rig.idle()

    assert not first.is_leading
    assert newcomer(rig).client == "client-3"
    finish(rig)
