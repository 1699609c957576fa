"""The broker comes back without queues, exchanges and messages, at any moment: the job ends as if that had not been."""

from __future__ import annotations

import threading

import pytest
from cases import tiered
from mortal_rig import MortalRig, new_executor
from server_rig import Fuse

from lorabbit.config.settings import ClientSettings, ServerSettings
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.state.redis import RedisStateStore
from lorabbit.types import TRAIN
from lorabbit_client.agent.agent import Agent
from lorabbit_client.execution.runners import InlineRunner
from lorabbit_client.executor import Executor
from lorabbit_server.server import Server

SPEC = JobSpec(name="job", clients=2, rounds=2, seed=7, model={"name": "null:3KB"})
EVERY = 3


class Emptying(Fuse):
    """Empties the broker after the server's effect number `at`, of which nobody dies."""

    def __init__(self, broker, at):
        super().__init__()
        self.broker, self.moment = broker, at

    def effect(self, function):
        def effect(*args, **kwargs):
            result = function(*args, **kwargs)
            self.count += 1
            if self.count == self.moment:
                self.broker.empty()
            return result

        return effect


class Gated(Executor):
    """Trains once the gate is open."""

    def __init__(self, gate):
        super().__init__(threads=1, device="cpu")
        self._gate = gate

    def execute(self, work, on_progress):
        if work.task.phase == TRAIN:
            self._gate.wait(120.0)
        return super().execute(work, on_progress)


def play(folder, at=None):
    """Run the job, with the broker emptied after so many effects; the report, and how many effects there were."""
    rig = MortalRig(folder, SPEC, new_executor())
    fuse = Emptying(rig.broker, at)
    rig.serve(fuse)
    for number in range(1, SPEC.clients + 1):
        rig.start_agent(f"host-{number}", rig.executor)
    rig.run_to_end(rig.service.submit(SPEC))
    rig.service.close()
    return rig.report("job"), fuse.count


def outcome(report):
    return report.status, report.adapter, [(each.accepted, each.rejected, each.sha256) for each in report.rounds]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return play(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("part", tiered(range(EVERY), slow=[1]))
def test_a_broker_that_is_emptied_after_any_effect_of_the_server_changes_nothing(undisturbed, tmp_path, part):
    expected, count = undisturbed
    assert expected.status == "done"

    for at in range(1 + part, count, EVERY):
        report, _ = play(tmp_path / str(at), at)
        assert outcome(report) == outcome(expected), f"emptied after effect {at}"


@pytest.mark.slow
@pytest.mark.services
def test_rabbitmq_that_lost_its_volume_in_the_middle_of_a_job_costs_nothing_but_time(
    empty_rabbitmq_url, shared_rabbitmq, connect, undisturbed, tmp_path
):
    """RabbitMQ loses everything while one client trains and the other one's update is counted already."""
    server, store = connect(empty_rabbitmq_url), RedisStateStore.embedded()
    settings = ServerSettings(folder=tmp_path / "server", durable=False, heartbeat_seconds=0.2)
    service = Server(server, store, settings, owner="server")
    ended, counted, lost = threading.Event(), threading.Event(), threading.Event()
    service.on_job_ended(lambda _: ended.set())
    service.listen(lambda _, event: counted.set() if event.kind == "update-accepted" else None)
    brokers = [server]
    for address in ("host-1", "host-2"):
        of_client = ClientSettings(folder=tmp_path / address, durable=False, address=address, device="cpu")
        brokers.append(connect(empty_rabbitmq_url))
        executor = new_executor() if address == "host-1" else Gated(lost)
        brokers[-1].post(Agent(brokers[-1], InlineRunner(executor), of_client).start)
    threads = [threading.Thread(target=each.run) for each in brokers]
    service.start()
    for thread in threads:
        thread.start()

    job = service.submit(SPEC)
    counted.wait(60.0)
    shared_rabbitmq.empty(empty_rabbitmq_url)
    lost.set()
    has_ended = ended.wait(120.0)
    for each, thread in zip(brokers, threads, strict=True):
        each.stop()
        thread.join()
    service.close()

    assert has_ended
    report = Report.model_validate_json((settings.folder / "runs" / job / "report.json").read_text())
    assert outcome(report) == outcome(undisturbed[0])
