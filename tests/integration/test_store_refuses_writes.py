"""A Redis that answers and takes no writes: no server ends for it, an operator is told, and all goes on afterwards."""

from __future__ import annotations

import contextlib
import time
from uuid import uuid4

import pytest
import redis
from server_rig import Rig
from services import Redis, free_port

from lorabbit.errors import StoreRefuses
from lorabbit.job.spec import JobSpec
from lorabbit.state.base import ClientEntry, StateChange
from lorabbit.state.redis import RedisStateStore
from lorabbit.types import TRAIN
from lorabbit_server.api.status import StatusService
from lorabbit_server.health.dependencies import STORE, DependencyHealth

pytestmark = pytest.mark.services
FULL, ROOM = "1mb", "0"
"""Less than an empty Redis uses, and no limit."""


@pytest.fixture
def admin(redis_server):
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
def store(redis_server):
    made = RedisStateStore.connect(redis_server.url, patience=1)
    yield made
    with contextlib.suppress(redis.RedisError):
        made.close()


def out_of_memory(admin: redis.Redis, _: Redis) -> None:
    admin.config_set("maxmemory", FULL)


def too_few_replicas(admin: redis.Redis, _: Redis) -> None:
    admin.config_set("min-replicas-to-write", 1)


def demoted(admin: redis.Redis, _: Redis) -> None:
    admin.replicaof("127.0.0.1", free_port())


def cut_off_from_its_master(admin: redis.Redis, server: Redis) -> None:
    admin.config_set("replica-serve-stale-data", "no")
    demoted(admin, server)


def without_a_snapshot(admin: redis.Redis, server: Redis) -> None:
    """Let a snapshot fail: a folder has its name."""
    if server.keep() is None:
        pytest.skip("its data lie in a container")
    (server.folder / "dump.rdb").mkdir()
    admin.config_set("save", "3600 1")
    admin.bgsave()
    deadline = time.monotonic() + 60
    while admin.info("persistence")["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() < deadline, "the snapshot did not fail"


@pytest.mark.parametrize(
    "befall", [out_of_memory, too_few_replicas, demoted, cut_off_from_its_master, without_a_snapshot]
)
def test_every_write_that_redis_refuses_is_one_to_try_again_and_nothing_of_it_is_kept(
    redis_server, admin, store, befall
):
    epoch = store.acquire_lease("a", 600.0)
    store.claim_job("job", epoch)
    befall(admin, redis_server)
    writes = {
        "renew_lease": lambda: store.renew_lease("a", epoch, 600.0),
        "lease_identity": lambda: store.lease_identity(ClientEntry("", "host"), now_ms=0, epoch=epoch),
        "touch_clients": lambda: store.touch_clients({"client-1": 5}),
        "enqueue": lambda: store.enqueue("job", "{}"),
        "claim_job": lambda: store.claim_job("job", epoch),
        "commit": lambda: store.commit("job", StateChange(uuid4().hex, epoch, 0, effects={"t": "5ha"}, events=["e"])),
        "log_progress": lambda: store.log_progress("job", ["p"]),
        "acquire_lease": lambda: store.acquire_lease("a", 600.0),
    }

    for write in writes.values():
        with pytest.raises(StoreRefuses, match=r"^Redis takes no writes: "):
            write()

    admin.replicaof("NO", "ONE")
    for setting, value in (("maxmemory", ROOM), ("min-replicas-to-write", 0), ("save", "")):
        admin.config_set(setting, value)
    assert (store.effect("job", "t"), store.events("job"), store.jobs()) == (None, [], {})
    assert store.clients() == {}
    for write in writes.values():
        write()


def test_a_server_lives_through_a_full_redis_says_so_and_goes_on_once_there_is_room(tmp_path, admin, store):
    rig = Rig(tmp_path)
    rig.store = store
    for client in rig.clients:
        client.work = lambda _client, task: task.phase == TRAIN
    server = rig.serve()
    rig.start_clients()
    job = server.submit(JobSpec(name="job", clients=2, rounds=2))
    rig.idle()

    admin.config_set("maxmemory", FULL)
    rig.clients[0].do(rig.clients[0].tasks[-1])
    rig.pass_seconds(5)
    led = server.is_leading
    with pytest.raises(StoreRefuses):
        server.submit(JobSpec(name="another", clients=2))
    status_service = StatusService(server, DependencyHealth(rig.broker, rig.store, server.now_ms), rig.store)
    told = status_service.status(job).waits[0]
    rig.pass_seconds(2 * rig.settings.lease_seconds)
    later = status_service.status(job).waits[0]
    admin.config_set("maxmemory", ROOM)
    for client in rig.clients:
        client.work = lambda _client, _task: False
    rig.pass_seconds(5)
    afterwards = status_service.status(job).waits
    rig.clients[1].do(rig.clients[1].tasks[-1])
    rig.run_to_end(job)

    assert not led
    assert told.owner == STORE
    assert "used memory > 'maxmemory'" in told.reason
    assert "takes writes again" in told.ends
    assert later.since_ms == told.since_ms
    assert STORE not in {wait.owner for wait in afterwards}
    assert rig.report(job).status == "done"
    assert [event.kind for event in rig.events].count("round-closed") == 2


def test_what_redis_has_of_a_job_that_is_over_may_be_deleted_to_make_room(tmp_path, admin, store):
    rig = Rig(tmp_path)
    rig.store = store
    report = rig.run(JobSpec(name="job", clients=2, rounds=1))

    kept = admin.keys("lorabbit:{job}:*")
    assert kept
    admin.delete(*kept)
    rig.kill()
    server = rig.serve()
    rig.idle()

    status = StatusService(server, DependencyHealth(rig.broker, rig.store, server.now_ms), rig.store).status("job")
    assert (status.status, status.waits) == ("done", ())
    assert rig.report("job") == report
    assert rig.run(JobSpec(name="job", clients=2, rounds=1)).job == "job-2"
