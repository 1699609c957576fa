from pathlib import Path

import numpy as np
import pytest
from scripted_server import CHUNK_BYTES, Rig, ScriptedRunner

from lorabbit.broker import topology
from lorabbit.broker.base import Delivery, OnDone, Outgoing
from lorabbit.protocol.messages import (
    AddressTaken,
    Alive,
    CancelTask,
    Commit,
    Deny,
    Goodbye,
    Grant,
    Hello,
    Offer,
    TaskAccepted,
    TaskFailed,
    TaskProgress,
    Verdict,
    Welcome,
)
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import ADAPTER, EVALUATE
from lorabbit_client.agent import task_run

RESULT = {"w": np.arange(1500, dtype=np.float32)}
IDS = {"job": "job", "task": "t-1", "client": "client-7"}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    rig.declare()
    return rig


def offered(rig: Rig) -> Offer:
    """The one result that a client offered last."""
    return rig.heard(Offer)[-1]


def payload_of(offer: Offer) -> str:
    assert offer.payload is not None
    return offer.payload.sha256


def all_chunks(offer: Offer) -> Grant:
    assert offer.payload is not None
    return Grant(**IDS, sha256=offer.payload.sha256, missing=tuple(range(offer.payload.chunks)))


def files(folder: Path) -> list[str]:
    """What a client keeps of its tasks."""
    return sorted(path.name for part in ("journal", "outbox") for path in (folder / part).iterdir())


# ---- being there ----
def test_a_client_says_hello_until_the_server_is_there(tmp_path: Path) -> None:
    rig, runner = Rig(tmp_path), ScriptedRunner()
    agent = rig.agent(runner)

    rig.run(seconds=60)
    rig.declare()
    rig.run(seconds=11)

    assert agent.client == "client-7"
    assert len(rig.heard(Hello)) == 1


def test_a_welcomed_client_renews_its_lease(rig: Rig) -> None:
    rig.agent(ScriptedRunner())

    rig.run(seconds=16)

    process = rig.heard(Hello)[0].process
    assert process
    assert rig.heard(Alive) == [Alive(address="somewhere", client="client-7", process=process)] * 3


def test_a_client_whose_address_was_taken_before_is_told_and_leaves(rig: Rig) -> None:
    left = list[str]()
    rig.agent(ScriptedRunner()).on_conflict(left.append)
    rig.run()

    rig.tell(AddressTaken(process=rig.heard(Hello)[0].process))
    rig.run()

    assert left == ["another client is at the address 'somewhere'; give this one its own with LORABBIT_ADDRESS"]


def test_a_client_whose_set_name_another_one_took_leaves(rig: Rig) -> None:
    left = list[str]()
    agent = rig.agent(ScriptedRunner(), client="client-7")
    agent.on_conflict(left.append)
    rig.run()
    before = list(left)

    rig.tell(Welcome(client="client-8", heartbeat_seconds=5.0))
    rig.run()

    assert before == []
    assert left == ["another client took the name 'client-7'; give this one its own with LORABBIT_CLIENT"]
    assert agent.client == "client-7"


def test_a_client_whose_address_another_one_took_says_what_it_has_done(rig: Rig) -> None:
    left, runner = list[str](), ScriptedRunner()
    rig.agent(runner).on_conflict(left.append)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()

    rig.tell(AddressTaken(process="another"))
    rig.run()

    assert left == []
    assert [hello.outbox for hello in rig.heard(Hello)] == [(), ("t-1",)]


def test_a_client_of_a_finite_run_leaves_some_time_after_its_last_task(rig: Rig) -> None:
    runner, left = ScriptedRunner(), list[str]()
    agent = rig.agent(runner, idle_seconds=60)
    agent.on_idle(lambda: left.append("left"))
    rig.run(seconds=200)
    early = list(left)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run(seconds=200)
    training = list(left)
    rig.tell(CancelTask(**IDS))
    rig.run(seconds=50)
    soon = list(left)

    rig.run(seconds=15)

    assert (early, training, soon, left) == ([], [], [], ["left"])


def test_a_client_that_is_to_leave_hands_its_result_in_and_takes_no_other_task(rig: Rig) -> None:
    runner, left = ScriptedRunner(), list[str]()
    agent = rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    agent.drain(lambda: left.append("left"))
    rig.tell(rig.task("t-2", rig.publish(2.0)))
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(all_chunks(offered(rig)))
    rig.run()
    before_the_verdict = list(left)
    rig.tell(Verdict(**IDS, accepted=True))
    rig.run()

    assert (before_the_verdict, left) == ([], ["left"])
    assert rig.heard(Commit) == [Commit(**IDS, sha256=payload_of(offered(rig)))]
    assert [each.task for each in rig.heard(TaskAccepted)] == ["t-1"]
    assert files(rig.folder / "somewhere") == []


def test_a_client_without_work_leaves_at_once(rig: Rig) -> None:
    left = list[str]()

    rig.agent(ScriptedRunner()).drain(lambda: left.append("left"))

    assert left == ["left"]


def test_a_client_keeps_its_identity_over_a_restart(rig: Rig) -> None:
    rig.agent(ScriptedRunner()).close()
    rig.run()

    rig.agent(ScriptedRunner())

    assert [hello.client for hello in rig.heard(Hello)] == [None, "client-7"]
    before, after = (hello.process for hello in rig.heard(Hello))
    assert rig.heard(Goodbye) == [Goodbye(address="somewhere", client="client-7", process=before)]
    assert after != before


def test_a_message_that_cannot_be_read_becomes_a_dead_letter(rig: Rig) -> None:
    rig.agent(ScriptedRunner())
    dead: list[bytes] = []
    rig.broker.subscribe(topology.DEAD_QUEUE.name, lambda delivery: dead.append(delivery.body))

    rig.broker.send(Outgoing(topology.CONTROL, topology.control_key("somewhere"), "lorabbit.task.v9", b"{}"))
    rig.run()

    assert dead == [b"{}"]


# ---- a task ----
def test_a_task_goes_from_order_to_verdict(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.5)

    rig.tell(rig.task("t-1", ref))
    rig.run()
    got = serialization.read_tensors(runner.work["t-1"][0].inputs[ADAPTER])["w"]
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(all_chunks(offered(rig)))
    rig.run()
    rig.tell(Verdict(**IDS, accepted=True))
    rig.run()

    assert rig.heard(TaskAccepted) == [TaskAccepted(**IDS)]
    assert got[0] == 1.5
    assert offered(rig).bytes_down == ref.size_bytes
    assert rig.received() == payload_of(offered(rig)) == serialization.tensors_sha256(RESULT)
    assert all(len(chunk.body) <= CHUNK_BYTES for chunk in rig.chunks)
    assert rig.heard(Commit) == [Commit(**IDS, sha256=payload_of(offered(rig)))]
    assert files(rig.folder / "somewhere") == []


def test_only_the_chunks_that_are_missing_are_sent(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()

    rig.tell(Grant(**IDS, sha256=payload_of(offered(rig)), missing=(1, 3)))
    rig.run()

    assert [int(chunk.headers["index"]) for chunk in rig.chunks] == [1, 3]


def test_a_result_that_the_server_has_already_is_committed_without_sending(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()

    rig.tell(Grant(**IDS, sha256=payload_of(offered(rig)), missing=()))
    rig.run()

    assert rig.chunks == []
    assert len(rig.heard(Commit)) == 1


def test_a_payload_that_is_held_is_not_read_again(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    frozen, first, second = rig.publish(1.0), rig.publish(2.0), rig.publish(3.0)

    for name, payloads in {"t-1": (first, frozen), "t-2": (second, frozen)}.items():
        rig.tell(rig.task(name, *payloads))
        rig.run()
        runner.finish(name)
        rig.run()
        rig.tell(Verdict(job="job", task=name, client="client-7", accepted=True))
        rig.run()

    assert [offer.bytes_down for offer in rig.heard(Offer)] == [
        first.size_bytes + frozen.size_bytes,
        second.size_bytes,
    ]
    kept = {path.name.removesuffix(".safetensors") for path in (rig.folder / "somewhere" / "payloads").iterdir()}
    assert kept == {second.sha256, frozen.sha256}


def test_a_training_waits_for_the_score_that_was_asked_for_first(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    scored, trained = rig.publish(1.0), rig.publish(2.0)

    rig.tell(rig.task("score", scored, phase=EVALUATE))
    rig.tell(rig.task("train", trained))
    rig.run()
    waiting = set(runner.work)
    runner.finish("score")
    rig.run()

    assert waiting == {"score"}
    assert set(runner.work) == {"train"}


def test_a_score_does_not_wait_for_the_training_that_was_asked_for_first(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)

    rig.tell(rig.task("train", ref))
    rig.tell(rig.task("score", ref, phase=EVALUATE))
    rig.run()

    assert set(runner.work) == {"score", "train"}


def test_a_training_goes_on_when_the_score_before_it_is_called_off(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)

    rig.tell(rig.task("score", ref, phase=EVALUATE))
    rig.tell(rig.task("train", ref))
    rig.run()
    rig.tell(CancelTask(job="job", task="score", client="client-7"))
    rig.run()

    assert set(runner.work) == {"score", "train"}


def test_scoring_and_training_share_one_adapter(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)

    rig.tell(rig.task("score", ref, phase=EVALUATE))
    rig.tell(rig.task("train", ref))
    rig.run()
    runner.finish("score")
    rig.run()
    runner.finish("train", RESULT)
    rig.run()

    assert [offer.bytes_down for offer in rig.heard(Offer)] == [ref.size_bytes, 0]
    assert [offer.bytes_by_role for offer in rig.heard(Offer)] == [{"adapter": ref.size_bytes}, {}]
    assert [offer.payload is None for offer in rig.heard(Offer)] == [True, False]


def test_progress_is_told_twice_a_second_at_most(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, clock = ScriptedRunner(), [100.0]
    monkeypatch.setattr("lorabbit_client.agent.task_run.time.monotonic", lambda: clock[0])
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    on_progress = runner.work["t-1"][1]

    for step in range(1, 31):
        clock[0] = 100.0 + step / 10
        on_progress(step / 30, 1.0)
        rig.run()

    told = [message for message in rig.said if message.kind == "task-progress"]
    assert len(told) == 6


# ---- what comes twice, late or not at all ----
def test_an_order_that_comes_twice_is_done_once(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    order = rig.task("t-1", rig.publish(1.0))

    rig.tell(order)
    rig.tell(order)
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(Verdict(**IDS, accepted=True))
    rig.tell(order)
    rig.run()

    assert runner.submitted == ["t-1"]


def test_an_order_that_the_broker_delivers_again_is_done_once(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))

    rig.broker.run_until_idle()
    rig.broker.reconnect()
    rig.run()

    assert runner.submitted == ["t-1"]


def test_an_order_given_again_on_purpose_after_its_end_is_done_again(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)
    rig.tell(rig.task("t-1", ref))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(Verdict(**IDS, accepted=False, reason="non-finite"))

    rig.tell(rig.task("t-1", ref, attempt=2))
    rig.run()

    assert runner.submitted == ["t-1", "t-1"]


def test_an_order_that_was_called_off_is_done_when_it_is_given_again(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    order = rig.task("t-1", rig.publish(1.0))
    rig.tell(order)
    rig.run()
    rig.tell(CancelTask(**IDS))

    rig.tell(order)
    rig.run()

    assert runner.submitted == ["t-1", "t-1"]


def test_an_order_of_a_server_that_lost_its_lease_is_ignored(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)

    rig.tell(rig.task("new", ref, epoch=3))
    rig.tell(rig.task("old", ref, epoch=2))
    rig.run()

    assert runner.submitted == ["new"]


def test_a_server_whose_store_was_emptied_is_obeyed_once_it_welcomes_the_client(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)
    rig.tell(rig.task("before", ref, epoch=3))
    rig.run()

    rig.tell(Welcome(client="client-7", heartbeat_seconds=5.0))
    rig.tell(rig.task("after", ref, epoch=1))
    rig.run()

    assert runner.submitted == ["before", "after"]


def test_an_offer_without_an_answer_is_made_again(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)

    rig.run(seconds=9)
    before = len(rig.heard(Offer))
    rig.run(seconds=12)

    assert before == 1
    assert len(rig.heard(Offer)) >= 2


def test_a_commit_without_a_verdict_is_followed_by_another_offer(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(all_chunks(offered(rig)))

    rig.run(seconds=11)

    assert len(rig.heard(Commit)) == 1
    assert len(rig.heard(Offer)) == 2


def test_chunks_that_got_lost_are_sent_when_they_are_granted_again(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()
    rig.tell(all_chunks(offered(rig)))
    rig.run()
    sent = len(rig.chunks)

    rig.tell(Grant(**IDS, sha256=payload_of(offered(rig)), missing=(2,)))
    rig.run()

    assert [int(chunk.headers["index"]) for chunk in rig.chunks[sent:]] == [2]
    assert len(rig.heard(Commit)) == 2


def test_a_denied_result_is_forgotten(rig: Rig) -> None:
    runner = ScriptedRunner()
    agent = rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()

    rig.tell(Deny(**IDS, reason="stale"))
    rig.run(seconds=60)

    assert len(rig.heard(Offer)) == 1
    assert files(rig.folder / "somewhere") == []
    assert agent.is_idle


def test_a_failed_task_is_handed_back_with_its_sentence(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    runner.finish("t-1", error="the training process was killed by SIGKILL")
    rig.run()

    assert rig.heard(TaskFailed) == [TaskFailed(**IDS, reason="the training process was killed by SIGKILL")]
    assert files(rig.folder / "somewhere") == []


@pytest.mark.parametrize("restarts", [False, True])
def test_what_a_failed_task_read_is_counted_with_the_next_one(rig: Rig, restarts: bool) -> None:  # noqa: FBT001
    runner = ScriptedRunner()
    agent = rig.agent(runner)
    first, second = rig.publish(1.0), rig.publish(2.0)
    rig.tell(rig.task("t-1", first))
    rig.run()
    runner.finish("t-1", error="the training process was killed by SIGKILL")
    rig.run()
    if restarts:
        rig.kill(agent)
        rig.agent(runner)
        rig.run()

    for name, refs in {"t-2": (first, second), "t-3": (second,)}.items():
        rig.tell(rig.task(name, *refs))
        rig.run()
        runner.finish(name)
        rig.run()

    assert [offer.bytes_down for offer in rig.heard(Offer)] == [first.size_bytes + second.size_bytes, 0]


def test_a_task_without_memory_is_handed_back_after_a_rest(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    runner.finish("t-1", error="no memory", retry_delay_seconds=5.0)
    rig.run(seconds=4.9)
    assert rig.heard(TaskFailed) == []
    rig.run(seconds=0.1)

    assert rig.heard(TaskFailed) == [TaskFailed(**IDS, reason="no memory")]


def test_of_progress_made_while_the_broker_is_away_only_the_newest_is_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_run, "PROGRESS_SECONDS", 0.0)
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    kept: list[tuple[Outgoing, OnDone | None]] = []
    monkeypatch.setattr(rig.broker, "send", lambda message, on_done=None: kept.append((message, on_done)))

    _, on_progress, _ = runner.work["t-1"]
    for step in range(1000):
        on_progress(step / 1000, 1.0)
        rig.run()
    assert [message.type for message, _ in kept] == [TaskProgress.type_name()]
    monkeypatch.undo()
    for message, on_done in kept:
        rig.broker.send(message, on_done)
    rig.run()

    assert [told.fraction for told in rig.heard(TaskProgress)] == [0.0, 0.999]


def test_a_payload_that_is_corrupt_fails_the_task(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    ref = rig.publish(1.0)
    wrong = ref.model_copy(update={"sha256": "0" * 64})
    stream = topology.adapter_stream(wrong.sha256)
    rig.broker.declare_queue(stream)
    for index in range(wrong.chunks):
        size = min(CHUNK_BYTES, wrong.size_bytes - index * CHUNK_BYTES)
        rig.broker.send(Outgoing("", stream.name, "chunk", b"x" * size, {"index": index, "sha256": wrong.sha256}))

    rig.tell(rig.task("t-1", wrong))
    rig.run()

    assert "could not be read" in rig.heard(TaskFailed)[0].reason
    assert rig.heard(TaskFailed)[0].damaged == wrong
    assert runner.submitted == []


def test_a_message_that_breaks_a_client_does_not_break_the_next_process(rig: Rig) -> None:
    class Broken(ScriptedRunner):
        def cancel(self, task: str) -> None:
            raise TypeError(f"a fault of the client: {task}")

    runner = Broken()
    agent = rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    dead: list[Delivery] = []
    rig.broker.subscribe(topology.DEAD_QUEUE.name, dead.append)
    rig.tell(CancelTask(**IDS))

    with pytest.raises(TypeError, match="a fault of the client"):
        rig.run()
    rig.kill(agent)
    rig.agent(ScriptedRunner())
    rig.run()

    assert [letter.type for letter in dead] == [CancelTask.type_name()]


@pytest.mark.parametrize("stage", ["running", "offered"])
def test_a_cancelled_task_is_dropped_whatever_its_stage(rig: Rig, stage: str) -> None:
    runner = ScriptedRunner()
    agent = rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    if stage == "offered":
        runner.finish("t-1", RESULT)
        rig.run()

    rig.tell(CancelTask(**IDS))
    rig.run()

    assert runner.cancelled == (["t-1"] if stage == "running" else [])
    assert agent.is_idle
    assert files(rig.folder / "somewhere") == []


def test_a_result_that_comes_after_the_cancellation_is_not_offered(rig: Rig) -> None:
    runner = ScriptedRunner()
    rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    rig.tell(CancelTask(**IDS))
    rig.run()
    runner.finish("t-1", RESULT)
    rig.run()

    assert rig.heard(Offer) == []


# ---- a restart: what a process leaves behind when it is killed is its folder ----
def test_a_task_that_was_running_at_the_crash_is_done_again(rig: Rig) -> None:
    before, after = ScriptedRunner(), ScriptedRunner()
    first = rig.agent(before)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    rig.kill(first)
    rig.agent(after)
    after.finish("t-1", RESULT)
    rig.run()

    assert before.submitted == after.submitted == ["t-1"]
    assert [payload_of(offer) for offer in rig.heard(Offer)] == [serialization.tensors_sha256(RESULT)]
    assert offered(rig).bytes_down == 8104  # read once, before the crash, and told by nobody yet


def test_a_result_in_the_outbox_is_offered_again_after_the_crash(rig: Rig) -> None:
    before, after = ScriptedRunner(), ScriptedRunner()
    first = rig.agent(before)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()
    before.finish("t-1", RESULT)
    rig.run()

    rig.kill(first)
    rig.agent(after)
    rig.tell(all_chunks(offered(rig)))
    rig.run()

    assert after.submitted == []
    assert rig.heard(Hello)[-1].outbox == ("t-1",)
    assert rig.received() == serialization.tensors_sha256(RESULT)


def test_a_result_whose_file_was_cut_short_is_made_again(rig: Rig) -> None:
    before, after = ScriptedRunner(), ScriptedRunner()
    first = rig.agent(before)
    order = rig.task("t-1", rig.publish(1.0))
    rig.tell(order)
    rig.run()
    kept = (rig.folder / "somewhere" / "journal" / "t-1.json").read_bytes()
    before.finish("t-1", RESULT)
    rig.run()
    (rig.folder / "somewhere" / "journal" / "t-1.json").write_bytes(kept)
    (rig.folder / "somewhere" / "outbox" / "t-1.safetensors").write_bytes(b"short")

    rig.kill(first)
    rig.agent(after)

    assert after.submitted == ["t-1"]


def test_what_belongs_to_no_result_goes_from_the_outbox_when_a_client_starts(rig: Rig) -> None:
    before, after = ScriptedRunner(), ScriptedRunner()
    first = rig.agent(before)
    for name in ("t-1", "t-2"):
        rig.tell(rig.task(name, rig.publish(1.0)))
    rig.run()
    before.finish("t-1", RESULT)
    rig.run()
    rig.kill(first)
    for left in ("t-0.safetensors", "t-2.safetensors", "t-2.safetensors.tmp"):
        (rig.folder / "somewhere" / "outbox" / left).write_bytes(b"a task that was cancelled, or killed as it wrote")

    rig.agent(after)

    assert files(rig.folder / "somewhere") == ["t-1.json", "t-1.safetensors", "t-2.json"]
    assert after.submitted == ["t-2"]


def test_a_journal_entry_that_was_cut_short_is_left_out(rig: Rig) -> None:
    runner = ScriptedRunner()
    folder = rig.folder / "somewhere" / "journal"
    folder.mkdir(parents=True)
    (folder / "t-1.json").write_bytes(b'{"job": "jo')
    (folder / "t-2.json.tmp").write_bytes(b"{")

    agent = rig.agent(runner)

    assert runner.submitted == []
    assert agent.is_idle


def test_work_for_an_identity_that_another_client_has_now_is_dropped(rig: Rig) -> None:
    runner = ScriptedRunner()
    agent = rig.agent(runner)
    rig.tell(rig.task("t-1", rig.publish(1.0)))
    rig.run()

    rig.tell(Welcome(client="client-2", heartbeat_seconds=5.0))
    rig.tell(rig.task("t-2", rig.publish(2.0)))
    rig.run()

    assert agent.client == "client-2"
    assert agent.is_idle
    assert runner.submitted == ["t-1"]


def test_payloads_that_nobody_wants_any_more_go_at_the_next_start(rig: Rig) -> None:
    orphan = PayloadStore(rig.folder / "somewhere" / "payloads", durable=False).add_tensors(RESULT)

    rig.agent(ScriptedRunner())

    assert not (rig.folder / "somewhere" / "payloads" / f"{orphan.sha256}.safetensors").exists()
