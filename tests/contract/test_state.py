"""What every state store promises, over fakeredis (embedded runs) and over a real Redis."""

from __future__ import annotations

import threading
import time
from uuid import uuid4

import pytest

from lorabbit.errors import Fenced, StoreUnavailable
from lorabbit.state.base import START, ClientEntry, Conflict, StateChange
from lorabbit.state.redis import RedisStateStore

OWNER = "server-a"
RECORD = '{"device": "cuda with spaces"}'


@pytest.fixture(params=["embedded", pytest.param("redis", marks=pytest.mark.services)])
def store(request):
    if request.param == "embedded":
        made = RedisStateStore.embedded()
    else:
        made = RedisStateStore.connect(request.getfixturevalue("redis_url"))
        made._redis.flushdb()
    yield made
    made.close()


@pytest.fixture
def epoch(store):
    return store.acquire_lease(OWNER, 30.0)


def change(epoch, version, **what):
    return StateChange(uuid4().hex, epoch, version, **what)


# ---- lease ----


def test_one_server_at_a_time_holds_the_lease(store):
    first = store.acquire_lease("a", 30.0)

    assert first is not None
    assert store.acquire_lease("b", 30.0) is None
    assert store.lease_holder() == "a"


def test_every_acquisition_has_a_higher_epoch_and_fences_the_one_before(store):
    first = store.acquire_lease("a", 30.0)
    second = store.acquire_lease("a", 30.0)

    assert second > first
    with pytest.raises(Fenced):
        store.renew_lease("a", first, 30.0)
    store.renew_lease("a", second, 30.0)


def test_a_released_lease_is_free_at_once_and_only_its_holder_releases_it(store):
    epoch = store.acquire_lease("a", 30.0)

    store.release_lease("b", epoch)
    assert store.lease_holder() == "a"
    store.release_lease("a", epoch)

    assert store.acquire_lease("b", 30.0) > epoch


def test_a_lease_that_ran_out_goes_to_the_next_server_and_its_old_holder_is_fenced(store):
    old = store.acquire_lease("a", 0.001)
    deadline = time.monotonic() + 5
    new = None
    while new is None and time.monotonic() < deadline:
        new = store.acquire_lease("b", 30.0)

    assert new is not None
    with pytest.raises(Fenced):
        store.renew_lease("a", old, 30.0)


def test_the_newest_epoch_is_that_of_whoever_took_the_lease_last(store):
    assert store.newest_epoch() == 0
    epoch = store.acquire_lease("a", 30.0)
    assert store.newest_epoch() == epoch
    store.release_lease("a", epoch)
    assert store.newest_epoch() == epoch

    assert store.acquire_lease("b", 30.0) == store.newest_epoch()
    assert store.newest_epoch() > epoch


# ---- identities ----


def identity(store, address, wanted=None, *, now=0, expires=100):
    entry = ClientEntry(wanted or "", address, RECORD, expires)
    return store.lease_identity(entry, now_ms=now, epoch=store.newest_epoch())


def test_clients_without_an_identity_get_the_lowest_free_one(store):
    names = [identity(store, address) for address in ("h1", "h2", "h3")]

    assert names == ["client-1", "client-2", "client-3"]


def test_the_same_address_gets_the_same_identity_back_even_after_its_lease_ended(store):
    identity(store, "h1")
    identity(store, "h2")

    assert identity(store, "h2", now=500, expires=600) == "client-2"


def test_an_identity_whose_lease_ended_is_given_to_a_newcomer(store):
    identity(store, "h1", expires=100)
    identity(store, "h2", expires=900)

    assert identity(store, "h3", now=500, expires=900) == "client-1"
    assert identity(store, "h1", now=500, expires=900) == "client-3"


def test_a_client_that_said_goodbye_frees_its_identity_and_nobody_frees_it_for_another(store):
    identity(store, "h1")
    identity(store, "h2")

    store.free_identity("client-1", "h2", epoch=0)
    assert identity(store, "h3") == "client-3"
    store.free_identity("client-1", "h1", epoch=0)

    assert identity(store, "h4") == "client-1"


def test_a_server_that_was_replaced_gives_and_frees_no_identity(store, epoch):
    identity(store, "h1")
    before = store.clients()
    store.acquire_lease(OWNER, 30.0)

    with pytest.raises(Fenced):
        store.free_identity("client-1", "h1", epoch=epoch)
    with pytest.raises(Fenced):
        store.lease_identity(ClientEntry("client-1", "h2", RECORD, 100), now_ms=0, epoch=epoch)

    assert store.clients() == before


def test_a_client_that_names_its_identity_gets_it_wherever_it_comes_from(store):
    assert identity(store, "h1", "hospital-a") == "hospital-a"
    assert identity(store, "h2", "hospital-a") == "hospital-a"

    assert store.clients()["hospital-a"].address == "h2"
    assert identity(store, "h1") == "client-1"


def test_renewed_leases_and_declarations_are_remembered(store):
    identity(store, "h1")

    store.touch_clients({"client-1": 5_000, "client-9": 5_000})

    entry = store.clients()["client-1"]
    assert (entry.address, entry.record, entry.expires_ms) == ("h1", RECORD, 5_000)
    assert "client-9" not in store.clients()


# ---- queue ----


def test_jobs_stay_in_the_order_of_submission_and_a_used_name_is_numbered(store):
    names = [store.enqueue("b", "{}"), store.enqueue("a", "{}"), store.enqueue("b", "{}"), store.enqueue("b", "{}")]

    assert names == ["b", "a", "b-2", "b-3"]
    assert list(store.jobs()) == names


def test_names_taken_elsewhere_are_not_used(store):
    assert store.enqueue("b", "{}", taken=["b", "b-2"]) == "b-3"


def test_the_same_submission_twice_is_one_job(store):
    first = store.enqueue("b", '{"x": "é"}', operation="once")

    assert store.enqueue("b", '{"x": "é"}', operation="once") == first
    assert [entry.spec for entry in store.jobs().values()] == ['{"x": "é"}']


def test_a_job_is_marked_by_the_leader_alone_and_never_after_its_end(store, epoch):
    job = store.enqueue("b", "{}")

    with pytest.raises(Fenced):
        store.mark_job(job, "running", epoch=epoch - 1)
    store.mark_job(job, "running", epoch=epoch)
    assert store.request_cancel(job)
    store.mark_job(job, "failed", epoch=epoch, reason="no luck", exit_code=1)
    store.mark_job(job, "done", epoch=epoch)

    entry = store.jobs()[job]
    assert (entry.status, entry.reason, entry.exit_code, entry.cancel_requested) == ("failed", "no luck", 1, True)
    assert not store.request_cancel(job)
    assert not store.request_cancel("no-such-job")


# ---- commit ----


def test_a_step_writes_everything_it_names_and_nothing_else(store, epoch):
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, header="one", tasks={"t1": "a", "t2": "b"}))

    answer = store.commit(
        "j",
        change(epoch, 1, tasks={"t1": None, "t3": "c"}, effects={"t2": "5ha"}, events=["e1", "e2"], outbox=["m1"]),
    )

    record = store.load_job("j")
    assert (record.version, record.header, dict(record.tasks)) == (2, "one", {"t2": "b", "t3": "c"})
    assert store.effect("j", "t2") == "5ha"
    assert store.effect("j", "t3") is None
    assert [each.event for each in store.events("j")] == ["e1", "e2"]
    assert store.outbox("j") == [(answer.outbox_ids[0], "m1")]


def test_a_repeated_step_returns_its_first_answer_and_changes_nothing(store, epoch):
    store.claim_job("j", epoch)
    step = change(epoch, 0, header="one", effects={"t": "5ha"}, events=["e"], outbox=["m"])

    first = store.commit("j", step)

    assert store.commit("j", step) == first
    assert len(store.events("j")) == len(store.outbox("j")) == store.load_job("j").version == 1


def test_a_step_from_an_old_version_is_a_conflict_and_changes_nothing(store, epoch):
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, header="one"))

    with pytest.raises(Conflict, match="version 1"):
        store.commit("j", change(epoch, 0, header="two", events=["e"]))

    assert store.load_job("j").header == "one"
    assert store.events("j") == []


def test_a_result_counts_once_whatever_step_brings_it(store, epoch):
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, effects={"t": "5ha"}))

    with pytest.raises(Conflict, match="counts already"):
        store.commit("j", change(epoch, 1, header="x", tasks={"t": "again"}, effects={"u": "1", "t": "0ther"}))

    assert store.effect("j", "t") == "5ha"
    assert store.effect("j", "u") is None
    assert store.load_job("j").header is None


def test_a_server_that_was_replaced_can_not_commit_any_more(store):
    old = store.acquire_lease("a", 30.0)
    store.claim_job("j", old)
    store.commit("j", change(old, 0, header="one"))
    new = store.acquire_lease("a", 30.0)
    record = store.claim_job("j", new)

    with pytest.raises(Fenced):
        store.commit("j", change(old, 1, header="two"))
    with pytest.raises(Fenced):
        store.claim_job("j", old)

    assert (record.version, record.header) == (1, "one")
    assert store.load_job("j").header == "one"


def test_confirmed_messages_leave_the_outbox_and_the_others_stay_in_order(store, epoch):
    store.claim_job("j", epoch)
    first = store.commit("j", change(epoch, 0, outbox=["m1", "m2"]))
    second = store.commit("j", change(epoch, 1, outbox=["m3"], relayed=[first.outbox_ids[0]]))

    assert store.outbox("j") == [(first.outbox_ids[1], "m2"), (second.outbox_ids[0], "m3")]


def test_a_step_of_thousands_of_tasks_is_one_step(store, epoch):
    store.claim_job("j", epoch)
    tasks = {f"t{i}": str(i) for i in range(5_000)}

    store.commit("j", change(epoch, 0, tasks=tasks, effects=tasks))
    store.commit("j", change(epoch, 1, tasks=dict.fromkeys(tasks)))

    assert store.load_job("j").tasks == {}
    assert store.effect("j", "t4999") == "4999"


# ---- events ----


def test_a_reader_goes_on_behind_the_last_event_it_saw(store, epoch):
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, events=["e1", "e2"]))
    seen = store.events("j")
    store.commit("j", change(epoch, 1, events=["e3"]))

    assert [each.event for each in store.events("j", seen[0].cursor)] == ["e2", "e3"]
    assert [each.event for each in store.events("j", seen[-1].cursor)] == ["e3"]


def test_progress_comes_in_between_for_those_who_want_it(store, epoch):
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, events=["e1"]))
    store.log_progress("j", ["p1", "p2"])
    seen = store.events("j")
    store.commit("j", change(epoch, 1, events=["e2"]))

    assert sorted(each.event for each in seen) == ["e1", "p1", "p2"]
    assert [each.event for each in store.events("j", seen[-1].cursor)] == ["e2"]
    assert [each.event for each in store.events("j", START, progress=False)] == ["e1", "e2"]


def test_a_waiting_reader_is_woken_by_the_event(store, epoch):
    store.claim_job("j", epoch)
    found = []
    reader = threading.Thread(target=lambda: found.extend(store.events("j", wait_seconds=20.0)))
    began = time.monotonic()
    reader.start()

    store.commit("j", change(epoch, 0, events=["e1"]))
    reader.join(15.0)

    assert [each.event for each in found] == ["e1"]
    assert time.monotonic() - began < 10


def test_a_reader_that_waits_in_vain_comes_back_with_nothing(store):
    assert store.events("j", wait_seconds=0.05) == []


# ---- the store itself ----


def test_a_store_that_is_not_there_says_so():
    store = RedisStateStore.connect("redis://127.0.0.1:1/0", patience=1)

    with pytest.raises(StoreUnavailable, match="does not answer"):
        store.ping()
    store.close()


@pytest.mark.services
def test_a_killed_redis_has_lost_nothing_and_calls_go_on_once_it_is_back(redis_server):
    store = RedisStateStore.connect(redis_server.url)
    epoch = store.acquire_lease(OWNER, 60.0)
    store.claim_job("j", epoch)
    store.commit("j", change(epoch, 0, header="one", effects={"t": "5ha"}, events=["e"], outbox=["m"]))

    redis_server.kill()
    again = threading.Thread(target=redis_server.start)
    again.start()
    answer = store.commit("j", change(epoch, 1, header="two"))
    again.join()

    assert answer.version == 2
    assert store.effect("j", "t") == "5ha"
    assert [each.event for each in store.events("j")] == ["e"]
    assert [text for _, text in store.outbox("j")] == ["m"]
    store.close()
