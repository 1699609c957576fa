"""Streams that go, or lose a part, once confirmed: whoever still reads gets the payload all the same."""

from __future__ import annotations

import pytest
from server_rig import AtOnce, Rig

from lorabbit.broker import topology
from lorabbit.config.settings import ClientSettings
from lorabbit.job.spec import JobSpec
from lorabbit.state.redis import RedisStateStore
from lorabbit.transfer.chunked_transfer import PATIENCE_SECONDS
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.runners import InlineRunner
from lorabbit_client.executor import Executor
from lorabbit_server.context import ServerOverrides
from lorabbit_server.server import Server

LEASE = "lorabbit:{server}:lease"
SPEC = JobSpec.model_validate({
    "name": "job", "clients": 3, "rounds": 2, "model": {"name": "null:20KB"}, "evaluation": {"on": "central"},
})  # fmt: skip


class Streams(Rig):
    """Three clients that train nothing over real agents; one of them, `late`, can be away for a while."""

    def __init__(self, folder):
        super().__init__(folder, clients=0)
        self.agents = [self.agent(f"host-{number}") for number in (1, 2, 3)]
        self.late = self.agents[-1]

    def agent(self, address):
        settings = ClientSettings(address=address, folder=self.folder / address, durable=False)
        return Agent(self.broker, InlineRunner(Executor()), settings)

    def start_clients(self):
        for agent in self.agents:
            self.broker.post(agent.start)

    def beat(self):
        """Half a second later; agents renew their leases themselves."""
        self.now += 0.5

    def leave(self):
        """Let the late client read nothing."""
        self.late._inbox.cancel()

    def come_back(self):
        self.late._inbox = self.broker.subscribe(topology.inbox("host-3").name, self.late._on_delivery)

    def streams(self):
        """The streams that there are, and how many chunks each of them holds."""
        queues = self.broker._queues.items()
        return {name: queue for name, queue in queues if name.startswith(topology.ADAPTERS)}

    def held(self):
        return {name: len(queue.messages) for name, queue in self.streams().items()}

    def told(self, kind):
        return [event for event in self.events if event.kind == kind]


@pytest.fixture
def rig(tmp_path):
    rig = Streams(tmp_path)
    yield rig
    rig.service.close()


def lose(rig, name):
    rig.broker.delete_queue(name)


def cut(rig, name):
    messages = rig.streams()[name].messages
    while len(messages) > 5:
        messages.pop()


@pytest.mark.parametrize("harm", [lose, cut])
def test_a_stream_that_goes_or_loses_its_tail_once_confirmed_is_published_again_for_whoever_comes_late(rig, harm):
    service = rig.serve()
    service.listen(lambda _, event: event.kind == "round-started" and event.round == 2 and rig.leave())
    rig.start_clients()
    job = service.submit(SPEC)
    rig.pass_seconds(5)
    (stream,) = rig.streams()
    assert rig.held()[stream] == 22

    harm(rig, stream)
    rig.come_back()
    rig.run_to_end(job, patience_seconds=6 * PATIENCE_SECONDS)

    assert rig.report(job).status == "done"
    (failure,) = rig.told("update-rejected")
    assert (failure.client, failure.reason) == ("client-3", "task-failed")
    assert "chunks that the server announced are not there" in failure.detail
    assert rig.told("client-set-aside") == []
    assert {entry.client for entry in rig.told("update-accepted") if entry.round == 2} == {
        "client-1", "client-2", "client-3",
    }  # fmt: skip
    assert rig.streams() == {}


def test_a_server_that_slept_after_a_commit_destroys_no_stream_of_its_successor(rig):
    """It wakes with the answer to its commit in hand, and would publish what another server published by then."""
    servers = []

    class Sleepy(RedisStateStore):
        """Sleeps once, for longer than the lease, between a commit and its answer."""

        def commit(self, job, change):
            answer = super().commit(job, change)
            if len(servers) == 1 and any('"round-started"' in e and '"round":2' in e for e in change.events):
                rig.leave()
                for open_end in (*first._subscriptions, *first._timers):
                    open_end.cancel()
                rig.store._redis.delete(LEASE)
                servers.append(rig.serve(owner="second"))
                rig.pass_seconds(16)
                servers.append(rig.held())
                rig.broker.post(lambda: first._loop.guard(first._tick))  # overdue when it wakes
            return answer

    rig.store = Sleepy.embedded()
    overrides = ServerOverrides(now_ms=lambda: round(rig.now * 1000), worker=AtOnce())
    first = Server(rig.broker, rig.store, rig.settings, owner="first", overrides=overrides)
    rig.service = first
    first.start()
    servers.append(first)
    rig.start_clients()
    job = first.submit(SPEC)
    rig.idle()
    _, second, before = servers

    assert (first.is_leading, second.is_leading) == (False, True)
    assert rig.held() == before
    assert list(before.values()) == [22]
    rig.come_back()
    rig.run_to_end(job)
    assert rig.report(job).status == "done"
    assert rig.told("update-rejected") == []
