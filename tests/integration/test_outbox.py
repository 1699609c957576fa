"""Tasks wait for the streams of their payloads, and nothing overtakes them, on a broker that takes chunks late."""

from __future__ import annotations

import pytest
from server_rig import Rig

from lorabbit.broker.base import OnDone, Outgoing
from lorabbit.broker.memory import MemoryBroker
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import CancelTask, Task
from lorabbit.types import TRAIN

SPEC = JobSpec(name="job", clients=2, rounds=1)


class SlowStreams(MemoryBroker):
    """Takes chunks for streams only once it is told to."""

    takes_chunks = False

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._held: list[tuple[Outgoing, OnDone | None]] = []

    def send(self, message: Outgoing, on_done: OnDone | None = None) -> None:
        if message.exchange or self.takes_chunks:
            super().send(message, on_done)
        else:
            self._held.append((message, on_done))

    def take_chunks(self) -> None:
        self.takes_chunks = True
        for message, on_done in self._held:
            super().send(message, on_done)
        self._held = []


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path, broker=SlowStreams)
    rig.serve()
    rig.start_clients()
    rig.service.submit(SPEC)
    rig.idle()
    return rig


def training(client):
    """The training tasks that a client has been told of."""
    return [task for task in client.tasks if task.phase == TRAIN]


def test_a_task_is_told_once_its_payload_can_be_read(rig):
    assert [training(client) for client in rig.clients] == [[], []]

    rig.broker.take_chunks()
    rig.run_to_end("job")

    assert [len(training(client)) for client in rig.clients] == [1, 1]
    assert rig.report("job").status == "done"


def test_a_restarted_server_makes_the_stream_before_it_tells_the_task(rig):
    assert rig.store.outbox("job")
    rig.kill()
    rig.serve()
    rig.idle()
    assert [training(client) for client in rig.clients] == [[], []]

    rig.broker.take_chunks()
    rig.run_to_end("job")

    assert rig.report("job").status == "done"


def test_a_cancellation_does_not_overtake_the_task_that_waits(rig):
    rig.service.cancel("job")
    rig.run_to_end("job")

    for client in rig.clients:
        about = [type(message) for message in client.received if isinstance(message, Task | CancelTask)]
        assert about[-2:] == [Task, CancelTask]


def test_a_client_that_comes_back_is_told_at_once_what_is_in_a_stream_already(rig):
    rig.clients[0].work = lambda _client, task: task.phase == TRAIN
    rig.broker.take_chunks()
    rig.idle()
    rig.broker.takes_chunks = False

    rig.clients[0].hello()
    rig.idle()

    assert len(training(rig.clients[0])) == 2
