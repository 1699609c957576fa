"""Whom a job waits for: every state that the engine can be in has an owner, a reason, and an end or what ends it."""

from __future__ import annotations

import errno
from dataclasses import replace
from itertools import count
from random import Random
from typing import get_args

import pytest

from lorabbit.errors import Fenced
from lorabbit.job import schedules as sc
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, PayloadRef
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN, ClientId
from lorabbit_cli.commands.jobs import lines, sentence, span_text
from lorabbit_server.engine import transitions
from lorabbit_server.engine.reducer import decide
from lorabbit_server.engine.state import JobState, ModelVersion, Stage, TaskState, TaskStatus, UploadOffer
from lorabbit_server.engine.wait_reasons import ClientObservations, wait_reasons
from lorabbit_server.health.server_faults import ServerFaults

NAMES = tuple(ClientId(f"client-{n}") for n in range(1, 5))
SCHEDULES = (
    "sync",
    sc.Quorum(quorum=0.5, deadline_seconds=5),
    sc.Quorum(quorum=0.75, late="keep"),
    sc.Buffered(buffer=1, concurrency=2, max_staleness=1),
    sc.Buffered(buffer=3),
)
SIGHT = ClientObservations(dict.fromkeys(NAMES, 1_000), 15_000)


def ref(number):
    return PayloadRef(sha256=f"{number:064x}", size_bytes=100, chunk_bytes=1024)


class Walk:
    """A job that is driven at random through everything that can happen to it."""

    def __init__(self, schedule, seed):
        self.random, self.files, self.now = Random(seed), count(1), 1_000
        spec = JobSpec(name="job", clients=4, rounds=3, schedule=schedule)
        self.state = JobState("job", spec)
        self.here = set()

    def version(self):
        return ModelVersion(ref(next(self.files)), ref(next(self.files)))

    def step(self):
        self.now += self.random.randrange(1, 4_000)
        event = self.random.choice(self.possible())
        if isinstance(event, transitions.HelloReceived | transitions.ClientDisconnected):
            self.here = set(event.present)
        self.state, _ = decide(self.state, event)
        return self.state

    def possible(self):
        """Everything that may happen next: clients come and go, results arrive, the server finishes a step."""
        found = [self.comes_or_goes()]
        if self.state.stage == "starting":
            found.append(transitions.MethodStarted(self.version(), 7, at_ms=self.now))
        if self.state.stage == "aggregating":
            found.append(transitions.RoundAggregated(self.state.round, self.version(), at_ms=self.now))
        if self.state.deadline_ms is not None:
            found.append(transitions.DeadlinePassed(self.state.round, self.now))
        return found + [event for task in self.state.tasks.values() for event in self.about(task)]

    def comes_or_goes(self):
        gone = [name for name in NAMES if name not in self.here]
        if gone and self.random.random() < 0.8:
            name = self.random.choice(gone)
            return transitions.HelloReceived(name, tuple(sorted({*self.here, name})), at_ms=self.now)
        name = self.random.choice(NAMES)
        return transitions.ClientDisconnected(name, tuple(sorted(self.here - {name})), self.now)

    def about(self, task: TaskState):
        if task.status == "offered":
            yield transitions.UpdateReceived(task.id, at_ms=self.now)
            if task.tries < 2:
                yield transitions.UpdateFailedValidation(task.id, "shapes", "they differ", at_ms=self.now)
        if task.status == "open" and task.client not in self.state.lost:
            payload = None if task.phase == EVALUATE else ref(next(self.files))
            offered = UploadOffer(Metrics(num_examples=10, loss=0.5), payload)
            yield transitions.OfferReceived(task.id, task.client, offered, at_ms=self.now)


def check(state, observations):
    """No state in which nothing happens and nothing is said."""
    waits = wait_reasons(state, observations)
    assert waits, state
    for wait in waits:
        assert wait.owner, wait
        assert wait.reason, wait
        assert wait.since_ms > 0, (wait, state)
        assert wait.deadline_ms is not None or wait.ends, wait
        text = sentence(wait.model_dump(), now_ms=60_000)
        assert text.startswith(wait.reason)
        assert "None" not in text
    unfinished = {task.client for task in state.tasks.values() if task.status != "accepted"}
    assert state.stage == "gathering" or unfinished <= {wait.owner for wait in waits}


def test_in_every_state_of_the_engine_something_is_waited_for_and_said():
    seen = set()
    for schedule in SCHEDULES:
        for seed in range(30):
            walk = Walk(schedule, seed)
            walk.state, _ = decide(walk.state, transitions.JobOpened((), 1_000))
            for _ in range(120):
                state = walk.step()
                if state.stage == "ended":
                    break
                check(state, SIGHT if seed % 2 else ClientObservations())
                seen.add(state.stage)
                seen |= {(t.phase, t.status) for t in state.tasks.values()}
                seen |= {(t.phase, "lost") for t in state.tasks.values() if t.client in state.lost}
            check(state, SIGHT)
            seen.add(state.stage)

    phases = {INITIALIZE, TRAIN, EVALUATE}
    assert set(get_args(Stage)) <= seen
    scores_bring_no_tensors = {(EVALUATE, "offered")}
    assert {(phase, status) for phase in phases for status in get_args(TaskStatus)} - scores_bring_no_tensors <= seen
    assert {(phase, "lost") for phase in phases} <= seen


def training(schedule="sync"):
    walk = Walk(schedule, 0)
    state, commands = decide(walk.state, transitions.JobOpened(NAMES, 1_000))
    (first,) = [c.task for c in commands if isinstance(c, transitions.SendTask)]
    state, _ = decide(
        state, transitions.OfferReceived(first.id, first.client, UploadOffer(Metrics(num_examples=1), ref(1)))
    )
    state, _ = decide(state, transitions.UpdateReceived(first.id, at_ms=2_000))
    state, _ = decide(state, transitions.MethodStarted(walk.version(), 7, at_ms=3_000))
    return state


def test_a_wait_for_a_client_says_how_far_it_is_when_it_was_seen_and_when_the_round_closes():
    observations = ClientObservations({"client-3": 57_000}, 15_000, {("client-3", TRAIN, 1): (56_000, 0.41)})

    found = {wait.owner: wait for wait in wait_reasons(training(sc.Quorum(deadline_seconds=177)), observations)}

    said = sentence(found["client-3"].model_dump(), now_ms=61_000)
    assert said == (
        "round 1 waits for client-3: training, 41 % done, last seen 4 s ago, for 58 s, deadline in 1 min 59 s"
    )
    assert found["client-3"].ends == "then the round closes with what there is"


def test_without_a_deadline_of_the_round_the_clients_lease_is_the_next_thing_to_happen():
    (wait, *_) = wait_reasons(training(), ClientObservations({"client-1": 57_000}, 15_000))

    assert wait.deadline_ms == 72_000
    assert wait.ends == (
        "if it stays silent until then it counts as lost; "
        "the round itself has no deadline: schedule sync waits for everybody"
    )
    assert wait.reason == "round 1 waits for client-1: asked, but it has told of no progress yet"


def test_progress_of_an_earlier_try_is_not_taken_for_that_of_this_one():
    observations = ClientObservations({}, 15_000, {("client-1", TRAIN, 1): (2_000, 0.9)})

    assert wait_reasons(training(), observations)[0].fraction is None


def test_progress_told_in_the_millisecond_in_which_a_try_began_is_that_of_this_one():
    observations = ClientObservations({}, 15_000, {("client-1", TRAIN, 1): (3_000, 0.1)})

    assert wait_reasons(training(), observations)[0].fraction == 0.1


def test_trainings_are_told_before_the_evaluations_of_earlier_versions():
    score = TaskState("score", EVALUATE, 1, NAMES[3], 3)
    train = TaskState("train", TRAIN, 2, NAMES[0], 0)
    state = replace(training(), round=2, tasks={"score": score, "train": train})

    assert [wait.owner for wait in wait_reasons(state)] == ["client-1", "client-4"]


def test_a_late_update_is_told_with_the_version_that_it_started_from():
    train = TaskState("train", TRAIN, 3, NAMES[0], 0)
    state = replace(training(sc.Buffered(buffer=3)), round=5, tasks={"train": train})

    (wait,) = wait_reasons(state)

    # The training of round 3 starts from what round 2 made.
    assert wait.reason.startswith("an update that started from version 2 is awaited from client-1:")


@pytest.mark.parametrize(
    ("patience", "fewest", "deadline_ms", "ends"),
    [
        (60.0, None, 67_000, "then it is set aside (patience_seconds), and the job goes on with the others"),
        (60.0, 4, 67_000, "then it is set aside (patience_seconds), and the job ends, for too few clients are left"),
        (None, None, None, "no deadline (patience_seconds: null); only its return, or cancelling the job, ends"),
    ],
)
def test_a_lost_client_is_awaited_for_as_long_as_the_job_says_and_what_ends_that_is_said(
    patience, fewest, deadline_ms, ends
):
    state, _ = decide(training(), transitions.ClientDisconnected(NAMES[2], NAMES[:2], 9_000))
    spec = state.spec.model_copy(update={"patience_seconds": patience, "min_clients": fewest})
    observations = replace(SIGHT, silent_ms={"client-3": 7_000})

    wait = next(wait for wait in wait_reasons(replace(state, spec=spec), observations) if wait.owner == "client-3")

    assert wait.reason == "round 1 waits for client-3: lost; start it again, or another client in its place"
    assert wait.deadline_ms == deadline_ms
    assert wait.ends.startswith(ends)


def test_a_client_that_lives_and_does_not_move_is_told_from_one_that_works():
    observations = ClientObservations({"client-3": 907_000}, 15_000, {("client-3", TRAIN, 1): (307_000, 0.41)})

    wait = next(wait for wait in wait_reasons(training(), observations) if wait.owner == "client-3")

    said = sentence(wait.model_dump(), now_ms=911_000)
    assert "training, 41 % done, no progress for 10 min 4 s, last seen 4 s ago" in said


def test_a_gathering_job_says_how_many_clients_it_lacks():
    state, _ = decide(Walk("sync", 0).state, transitions.JobOpened(NAMES[:3], 1_000))

    (wait,) = wait_reasons(state)

    assert wait.reason == "job job waits for 1 more client: 3 of 4 needed are connected"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (4, "4 s"),
        (61, "1 min 1 s"),
        (120, "2 min"),
        (3900, "1 h 5 min"),
        (266_400, "3 d 2 h"),
        (-5, "0 s"),
    ],
)
def test_a_span_of_time_is_told_in_two_units_at_most(seconds, text):
    assert span_text(round(seconds * 1000)) == text


def test_a_full_disk_is_told_from_its_begin_for_as_long_as_it_comes_again():
    faults = ServerFaults(lease_ms=15_000)
    full = OSError(errno.ENOSPC, "No space left on device")

    for now_ms in (1_000, 2_000, 20_000):
        faults.record(full, now_ms)
    wait = faults.current(21_000)

    assert (wait.owner, wait.since_ms) == ("server", 1_000)
    assert "disk is full" in wait.reason
    assert "once there is room" in wait.ends
    assert faults.current(60_000) is None


def test_a_lease_that_went_to_another_server_is_no_setback_of_this_ones():
    faults = ServerFaults(lease_ms=15_000)

    faults.record(Fenced("another server leads"), 1_000)

    assert faults.current(1_001) is None


def test_why_says_that_a_job_that_is_over_waits_for_nobody():
    told = lines({"job": "job", "status": "failed", "reason": "no disk", "waits": []})

    assert list(told) == ["job job is failed: no disk; it waits for nobody"]
