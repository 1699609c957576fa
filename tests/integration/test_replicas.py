"""Two servers: on one volume, whoever has been replaced deletes nothing that the new one needs and writes nothing into
the run; on two, who has the files of a job goes on with it.
"""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
from scripted_client import ScriptedClient
from server_rig import Paused, Rig

from lorabbit.errors import StoreUnavailable
from lorabbit.job.spec import JobSpec
from lorabbit.state.redis import RedisStateStore
from lorabbit.types import TRAIN
from lorabbit_server.api.status import StatusService
from lorabbit_server.health.dependencies import DependencyHealth
from lorabbit_server.server import TICK_SECONDS

LEASE = "lorabbit:{server}:lease"


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
    rig.store._redis.delete(LEASE)
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


# ---- what a server that slept writes ----


class Drowsy(Paused):
    """Falls asleep at the n-th piece of work."""

    def __init__(self, number):
        super().__init__()
        self._left = number

    def submit(self, fn, /, *args, **kwargs):
        self.sleeps |= self._left == 0
        self._left -= 1
        return super().submit(fn, *args, **kwargs)


class Watched(RedisStateStore):
    """Does something behind the n-th look at the newest epoch, whose answer is an old one by then."""

    def behind_look(self, number, do):
        self._looks, self._do = number, do

    def newest_epoch(self):
        answer = super().newest_epoch()
        if getattr(self, "_do", None):
            self._looks -= 1
            if self._looks == 0:
                do, self._do = self._do, None
                do()
        return answer


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WORKS = 20
"""More than a server does in this job."""


@pytest.mark.slow
@pytest.mark.parametrize("look", [0, 1, 2, 3, 4])
def test_a_server_that_slept_changes_nothing_in_the_folder_of_a_run_that_another_one_ended(tmp_path, look):
    slept = [number for number in range(WORKS) if slept_at(tmp_path / str(number), number, look)]

    assert slept == list(range(len(slept)))
    assert len(slept) >= (8 if look < 4 else 4)


def slept_at(folder, work, look):
    """Let a server sleep at a piece of work, from before it or from behind a look at its lease, until the job is over.

    False where it does not get so far.
    """
    rig = Rig(folder)
    rig.store, worker = Watched.embedded(), Drowsy(work)
    first = rig.serve(owner="first", worker=worker)
    rig.start_clients()
    job = first.submit(JobSpec(name="job", clients=2, rounds=2, output={"keep_updates": True, "keep_checkpoints": 1}))
    rig.idle()
    found = []

    def sleep():
        take_over(rig)
        rig.run_to_end(job)
        rig.idle()
        found.append(contents(rig.runs(job)))

    if look:
        rig.store.behind_look(look, sleep)
    elif worker.sleeps:
        sleep()
    worker.wake()
    rig.pass_seconds(30)

    assert rig.report(job).status == "done"
    assert len(rig.report(job).rounds) == 2
    assert not found or contents(rig.runs(job)) == found[0]
    assert not list(rig.runs(job).rglob("*.part*"))
    return bool(found)


@pytest.mark.parametrize("look", range(1, 9))
def test_a_store_that_is_away_when_a_file_or_stream_is_about_to_be_made_costs_neither_and_ends_no_job(rig, look):
    def away():
        raise StoreUnavailable("Redis does not answer")

    rig.store = Watched.embedded()
    rig.serve()
    rig.start_clients()
    job = rig.service.submit(JobSpec(name="job", clients=2, rounds=1))
    rig.idle()
    rig.store.behind_look(look, away)
    for client in rig.clients:
        client.work = lambda _client, _task: False
        client.do(client.tasks[-1])
    rig.run_to_end(job)

    assert rig.report(job).status == "done"
    assert (rig.runs(job) / "adapter" / "adapter_model.safetensors").exists()
    assert len((rig.runs(job) / "rounds.jsonl").read_text().splitlines()) == 1


# ---- one that stands by ----


def beside(rig, lease_seconds):
    """A leader and a second server on its volume, which stands by."""
    rig.settings = rig.settings.model_copy(update={"lease_seconds": lease_seconds})
    first = rig.serve(owner="first")
    rig.idle()
    second = rig.serve(owner="second")
    rig.idle()
    assert (first.is_leading, second.is_leading) == (True, False)
    return first, second


def test_a_server_that_stands_by_leads_a_second_after_the_lease_was_given_up_however_long_it_is(rig):
    first, second = beside(rig, lease_seconds=600.0)
    rig.pass_seconds(30)
    assert not second.is_leading

    first.drain(lambda: None)
    rig.idle()
    rig.pass_seconds(TICK_SECONDS)

    assert (first.is_leading, second.is_leading) == (False, True)


@pytest.mark.services
def test_a_server_that_is_told_to_stop_while_the_store_is_away_stops(rig, redis_server):
    rig.store = RedisStateStore.connect(redis_server.url, patience=1)
    service, stopped = rig.serve(), []
    rig.idle()
    assert service.is_leading

    redis_server.kill()
    service.drain(lambda: stopped.append(service.is_leading))
    rig.idle()

    assert stopped == [False]


@pytest.mark.parametrize("lease_seconds", [0.75, 2.0, 15.0])
def test_a_server_that_leads_renews_its_lease_before_it_ends_however_short_it_is(rig, lease_seconds):
    renewed = []

    class Noting(RedisStateStore):
        def renew_lease(self, *args):
            renewed.append(rig.now)
            super().renew_lease(*args)

    rig.store = Noting.embedded()
    rig.settings = rig.settings.model_copy(update={"lease_seconds": lease_seconds})
    rig.serve()
    rig.idle()
    begun = rig.now
    while rig.now < begun + 4 * lease_seconds:
        rig.now += 0.05
        rig.idle()

    gaps = [later - earlier for earlier, later in pairwise([begun, *renewed])]
    assert len(gaps) >= 4
    assert max(gaps) < lease_seconds * 0.8


# ---- a job whose files are elsewhere ----


def half_way(rig):
    """A job whose first round waits for its clients, and whose server is dead."""
    rig.serve(owner="first")
    rig.start_clients()
    job = rig.service.submit(JobSpec(name="job", clients=2, rounds=2))
    rig.idle()
    assert rig.clients[0].tasks[-1].phase == TRAIN
    rig.kill()
    rig.store._redis.delete(LEASE)
    return job


def elsewhere(rig):
    """Start a server on an empty volume, and let it lead."""
    rig.settings = rig.settings.model_copy(update={"folder": rig.folder / "elsewhere"})
    other = rig.serve(owner="other")
    rig.idle()
    return other


def told(rig, service):
    """Whom the job waits for, as an operator is told."""
    status_service = StatusService(service, DependencyHealth(rig.broker, rig.store, service.now_ms), rig.store)
    return status_service.status("job").waits


def test_a_server_without_a_jobs_files_says_so_and_leaves_it_to_the_one_that_has_them(rig):
    job = half_way(rig)
    home = rig.settings
    other = elsewhere(rig)

    (first, *others) = told(rig, other)
    assert first.owner == "server"
    assert "job job stands on " in first.reason
    assert f"are not in {rig.folder / 'elsewhere' / 'payloads'}" in first.reason
    assert 0 < first.since_ms <= other.now_ms()
    assert "start the server on the volume" in first.ends
    assert {wait.owner for wait in others} == {"client-1", "client-2"}

    rig.settings = home
    for client in rig.clients:
        client.work = lambda _client, _task: False
    again = rig.serve(owner="first")
    rig.pass_seconds(2 * home.lease_seconds)
    assert again.is_leading
    for client in rig.clients:
        client.do(client.tasks[-1])
    rig.run_to_end(job)

    assert rig.report(job).status == "done"


def test_a_job_whose_files_nobody_has_can_be_cancelled_and_the_next_one_runs(rig):
    job = half_way(rig)
    other = elsewhere(rig)
    for client in rig.clients:
        client.work = lambda _client, _task: False

    assert other.cancel(job)
    rig.run_to_end(job)

    assert rig.store.jobs()[job].status == "cancelled"
    assert rig.run(JobSpec(name="next", clients=2, rounds=1)).status == "done"
    assert other.faults.current(other.now_ms()) is None


def test_a_server_whose_volume_was_lost_waits_for_it_and_goes_on_once_it_is_back(rig):
    job = half_way(rig)
    payloads = rig.settings.folder / "payloads"
    shutil.move(payloads, rig.folder / "kept")
    server = rig.serve(owner="first")
    rig.pass_seconds(5)
    assert "are not in" in told(rig, server)[0].reason

    shutil.copytree(rig.folder / "kept", payloads, dirs_exist_ok=True)
    for client in rig.clients:
        client.work = lambda _client, _task: False
    rig.pass_seconds(2 * rig.settings.lease_seconds)
    for client in rig.clients:
        client.do(client.tasks[-1])
    rig.run_to_end(job)

    assert rig.report(job).status == "done"


# ---- clocks that differ ----


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_server_whose_clock_is_hours_off_goes_on_with_the_job_and_still_notices_who_falls_silent(rig, hours):
    job = half_way(rig)
    rig.now += 3600 * hours
    rig.serve(owner="second")
    rig.pass_seconds(30)
    assert [event.kind for event in rig.events].count("client-lost") == 0

    rig.clients[1].stop()
    rig.pass_seconds(30)
    assert [event.client for event in rig.events if event.kind == "client-lost"] == ["client-2"]

    back = ScriptedClient(rig.broker, "host-2", rig.folder / "fresh-disk")
    back.start()
    rig.clients[0].work = lambda _client, _task: False
    rig.clients[0].do(rig.clients[0].tasks[-1])
    rig.run_to_end(job)
    assert rig.report(job).status == "done"
