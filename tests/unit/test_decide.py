"""The round engine, transition by transition, and whole jobs in every order of arrival."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_methods import register

from lorabbit.events import job_events as ev
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, PayloadRef
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN, ClientId
from lorabbit_server.engine import reducer, transitions
from lorabbit_server.engine.client_selection import ClientSampler, population
from lorabbit_server.engine.reducer import decide, resume
from lorabbit_server.engine.results import MAX_TRIES
from lorabbit_server.engine.rounds import mean_over_clients, pool_metrics
from lorabbit_server.engine.scheduling import budget_reason
from lorabbit_server.engine.state import JobState, ModelVersion, UploadOffer, dump_header, dump_task, load_state

A, B, C = ClientId("client-1"), ClientId("client-2"), ClientId("client-3")
BASE = "ba5e" * 16


def spec(**what):
    return JobSpec(**{"clients": 3, "rounds": 2, "name": "job", **what})


def ref(text):
    return PayloadRef(sha256=text.encode().hex().rjust(64, "0"), size_bytes=100, chunk_bytes=1024)


def version(name):
    return ModelVersion(ref(f"state {name}"), ref(f"adapter {name}"))


def metrics(**what):
    return Metrics(**{"num_examples": 10, "loss": 0.5, **what})


def offer(task, *, base=BASE, **what):
    """What a client would offer for a task, made of nothing but the task itself."""
    if task.phase == EVALUATE:
        return UploadOffer(metrics(values={"accuracy": task.index / 10}, **what), None, base)
    return UploadOffer(metrics(**what), ref(f"{task.phase} {task.round} {task.index}"), base)


def offered(state, task, **what):
    return decide(state, transitions.OfferReceived(task.id, task.client, offer(task, **what)))


def answered(state, task):
    """Let a client's result be offered and pass admission."""
    state, first = offered(state, task)
    if task.phase == EVALUATE:
        return state, first
    state, second = decide(state, transitions.UpdateReceived(task.id))
    return state, (*first, *second)


def sent(commands):
    return [command.task for command in commands if isinstance(command, transitions.SendTask)]


def told(commands):
    return [command.event.kind for command in commands if isinstance(command, transitions.AppendEvent)]


def of(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


def opened(job=None):
    state, commands = decide(JobState("job", job or spec()), transitions.JobOpened((C, A, B), at_ms=5))
    return state, commands


def training(job=None):
    """A job in its first round, and the tasks of that round."""
    state, commands = opened(job)
    state, _ = answered(state, sent(commands)[0])
    state, commands = decide(state, transitions.MethodStarted(version("0"), 7, {"rank": 2}))
    return state, sent(commands)


def aggregating():
    state, tasks = training()
    for task in tasks:
        state, _ = answered(state, task)
    return state


# ---- gathering ----


def test_the_handler_of_an_event_has_the_events_name():
    handlers = {event.__name__: handler.__name__ for event, handler in reducer._HANDLERS.items()}

    assert handlers == {name: "on" + re.sub(r"(?=[A-Z])", "_", name).lower() for name in handlers}


def test_a_job_waits_until_its_population_is_complete():
    state, commands = decide(JobState("job", spec()), transitions.JobOpened((A,)))
    state, more = decide(state, transitions.HelloReceived(B, (A, B)))

    assert commands == ()
    assert told(more) == ["client-joined"]
    assert (state.stage, state.present) == ("gathering", 2)


def test_a_client_that_says_hello_twice_while_gathering_joined_once():
    state, _ = decide(JobState("job", spec()), transitions.JobOpened((A,)))

    _, commands = decide(state, transitions.HelloReceived(A, (A,), is_new=False))

    assert commands == ()


def test_a_complete_population_is_ordered_naturally_and_its_first_client_builds_the_model():
    state, commands = opened()

    assert state.clients == (A, B, C)
    assert told(commands) == ["job-started", "task-sent"]
    assert [(t.phase, t.round, t.client, t.index) for t in sent(commands)] == [(INITIALIZE, 0, A, 0)]


def test_more_clients_than_the_job_asks_for_stay_idle():
    many = [ClientId(f"client-{i}") for i in (10, 2, 1, 9)]

    assert population(many, 3) == ("client-1", "client-2", "client-9")


# ---- results ----


def test_an_offer_is_granted_and_its_arrival_counts_with_a_verdict():
    state, (task, *_) = training()

    state, first = offered(state, task)
    state, second = decide(state, transitions.UpdateReceived(task.id, transitions.PayloadTraffic(3, 2, 1)))

    assert of(first, transitions.GrantUpload)[0].task.id == task.id
    assert second[0] == transitions.MarkAccepted(task.id, offer(task).payload.sha256)
    accepted = second[1].event
    assert (accepted.bytes_up, accepted.overhead_up, accepted.overhead_down) == (3, 2, 1)
    assert second[2] == transitions.SendVerdict(task.id, task.client, accepted=True)
    assert state.tasks[task.id].status == "accepted"


def test_a_result_that_arrives_twice_counts_once():
    state, (task, *_) = training()
    state, _ = answered(state, task)

    assert decide(state, transitions.UpdateReceived(task.id)) == (state, ())
    assert offered(state, task) == (state, (transitions.SendVerdict(task.id, task.client, accepted=True),))


def test_an_offer_for_a_task_of_a_past_round_is_accepted_again_if_it_counted_and_stale_if_not():
    state, _ = training()
    late = transitions.OfferReceived("job.r0.train.k0", A, offer(replace(state.tasks["job.r1.train.k0"])))

    assert decide(state, replace(late, was_accepted=True))[1] == (transitions.SendVerdict(late.task, A, accepted=True),)
    assert decide(state, late)[1] == (transitions.DenyUpload(late.task, A, "stale"),)


def test_an_offer_in_somebody_elses_name_changes_nothing():
    state, (task, *_) = training()

    after, commands = decide(state, transitions.OfferReceived(task.id, B, offer(task)))

    assert after == state
    assert commands == (transitions.DenyUpload(task.id, B, "not-yours"),)


def test_a_training_result_without_tensors_is_refused():
    state, (task, *_) = training()

    state, commands = decide(state, transitions.OfferReceived(task.id, task.client, UploadOffer(metrics())))

    assert of(commands, transitions.DenyUpload)[0].reason == "payload"
    assert told(commands) == ["update-rejected", "task-sent"]


def test_an_update_on_another_base_model_is_refused():
    state, (task, *_) = training()

    state, commands = offered(state, task, base="0ther" * 12 + "0the")

    assert of(commands, transitions.DenyUpload)[0].reason == "base-model"


def test_a_refused_result_is_asked_for_again_under_a_new_name():
    state, (task, *_) = training()
    state, _ = offered(state, task)

    state, commands = decide(state, transitions.UpdateFailedValidation(task.id, "not-finite", "it holds NaN"))

    assert commands[0] == transitions.SendVerdict(task.id, task.client, accepted=False, reason="not-finite")
    assert told(commands) == ["update-rejected", "task-sent"]
    assert task.id not in state.tasks
    assert (sent(commands)[0].tries, sent(commands)[0].id) == (2, f"{task.id}.try2")


def test_a_late_duplicate_of_a_refused_result_is_not_counted_against_the_client_again():
    state, (task, *_) = training()
    state, _ = decide(state, transitions.UpdateFailedValidation(task.id, "not-finite", "it holds NaN"))

    assert decide(state, transitions.UpdateFailedValidation(task.id, "not-finite", "it holds NaN")) == (state, ())
    assert offered(state, task)[1] == (transitions.DenyUpload(task.id, task.client, "stale"),)


def fail(state, index, *, phase=TRAIN, reason="out of memory"):
    """Let a client fail its task until nobody asks it any more."""
    seen = []
    for _ in range(MAX_TRIES):
        task = next(t for t in state.tasks.values() if t.index == index and t.phase == phase)
        state, commands = decide(state, transitions.TaskFailureReceived(task.id, task.client, reason, at_ms=9))
        seen += commands
    return state, seen


def test_a_client_that_brings_nothing_usable_is_set_aside_and_the_others_go_on():
    state, tasks = training()
    state, commands = fail(state, 0)

    assert told(commands)[-2:] == ["update-rejected", "client-set-aside"]
    assert (state.stage, state.aside) == ("training", (A,))
    for task in tasks[1:]:
        state, commands = answered(state, task)
    assert [task.client for task in of(commands, transitions.Aggregate)[0].tasks] == [B, C]
    state, commands = decide(state, transitions.RoundAggregated(1, version("1")))
    assert {task.client for task in sent(commands)} == {B, C}


def test_the_last_client_that_a_round_waits_for_closes_it_by_being_set_aside():
    state, tasks = training()
    for task in tasks[1:]:
        state, _ = answered(state, task)
    state, commands = fail(state, 0)

    assert state.stage == "aggregating"
    assert [task.client for task in of(commands, transitions.Aggregate)[0].tasks] == [B, C]


@pytest.mark.parametrize(("fewest", "ends_with"), [(3, 0), (2, 1), (1, 2)])
def test_a_job_ends_when_fewer_clients_are_left_than_it_wants(fewest, ends_with):
    state, _ = training(spec(min_clients=fewest))
    for index in range(ends_with):
        state, _ = fail(state, index)
        assert state.stage == "training"
    state, commands = fail(state, ends_with)

    assert (state.stage, state.outcome, state.exit_code) == ("ended", "failed", 1)
    assert f"client-{ends_with + 1} brought no usable result" in state.reason
    assert "out of memory" in state.reason
    assert state.reason.endswith(f"; {fewest - 1} of 3 clients are left, and min_clients is {fewest}")
    assert told(commands)[-3:] == ["update-rejected", "client-set-aside", "job-ended"]


def test_more_than_half_of_the_clients_must_stay_unless_the_job_says_otherwise():
    assert [spec(clients=n).fewest_clients for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


def test_a_first_client_that_cannot_build_the_model_leaves_it_to_the_next():
    state, _ = opened()
    state, commands = fail(state, 0, phase=INITIALIZE)

    assert [(task.client, task.phase) for task in sent(commands)][-1] == (B, INITIALIZE)
    state, _ = answered(state, sent(commands)[-1])
    state, commands = decide(state, transitions.MethodStarted(version("0"), 7, {"rank": 2}))
    assert {task.client for task in sent(commands)} == {B, C}


def test_a_first_adapter_that_is_none_is_left_out_and_the_next_client_makes_one():
    state, commands = opened()
    state, _ = answered(state, sent(commands)[0])
    state, commands = decide(
        state, transitions.UpdatesUnusable(0, {next(iter(state.tasks)): "first-adapter: no factors"})
    )

    assert told(commands) == ["update-rejected", "client-set-aside", "task-sent"]
    assert [(task.client, task.phase) for task in sent(commands)] == [(B, INITIALIZE)]
    assert state.stage == "initialising"


def test_a_result_that_cannot_be_folded_is_left_out_with_its_client_and_the_others_are_folded():
    state = aggregating()
    bad = next(task for task in state.tasks.values() if task.index == 1)
    state, commands = decide(
        state, transitions.UpdatesUnusable(1, {bad.id: "scaling: factors with scaling 9 have no mean"})
    )

    rejected = next(c.event for c in of(commands, transitions.AppendEvent))
    assert (rejected.client, rejected.reason) == (B, "scaling")
    assert state.aside == (B,)
    assert [task.client for task in of(commands, transitions.Aggregate)[0].tasks] == [A, C]


def test_useless_results_of_another_round_change_nothing():
    state = aggregating()

    assert decide(state, transitions.UpdatesUnusable(9, {next(iter(state.tasks)): "scaling: 9"})) == (state, ())


def test_a_client_that_scores_nothing_is_set_aside_and_the_score_is_the_others():
    state, commands = decide(aggregating(), transitions.RoundAggregated(1, version("1")))
    scores = [task for task in sent(commands) if task.phase == EVALUATE]
    for task in scores[:2]:
        state, _ = answered(state, task)
    state, commands = fail(state, 2, phase=EVALUATE)

    scored = next(c.event for c in of(commands, transitions.AppendEvent) if isinstance(c.event, ev.RoundEvaluated))
    assert scored.metrics["accuracy"] == pytest.approx(0.05)
    assert {task.client for task in state.tasks.values()} == {A, B}


def test_central_scores_pass_to_the_next_client():
    state, tasks = training(spec(evaluation={"on": "central"}))
    for task in tasks:
        state, _ = answered(state, task)
    state, _ = decide(state, transitions.RoundAggregated(1, version("1")))
    state, commands = fail(state, 0, phase=EVALUATE)

    assert [(task.client, task.phase) for task in sent(commands)][-1] == (B, EVALUATE)


def test_a_revoked_client_is_not_awaited():
    state, tasks = training()
    for task in tasks[1:]:
        state, _ = answered(state, task)
    state, commands = decide(state, transitions.ClientExcluded(A, (B, C), f"{A} was revoked", at_ms=9))

    assert told(commands) == ["client-lost", "client-set-aside"]
    assert of(commands, transitions.SendCancelTask) == [transitions.SendCancelTask(tasks[0].id, A)]
    assert [task.client for task in of(commands, transitions.Aggregate)[0].tasks] == [B, C]


def test_a_client_that_was_set_aside_is_asked_for_nothing_when_it_comes_back():
    state, _ = fail(training()[0], 0)
    state, _ = decide(state, transitions.ClientDisconnected(A, (B, C)))

    state, commands = decide(state, transitions.HelloReceived(A, (A, B, C)))

    assert sent(commands) == []
    assert all(task.client != A for task in state.tasks.values())


@pytest.mark.parametrize("schedule", [{"kind": "quorum", "quorum": 1.0}, {"kind": "buffered", "buffer": 2}])
def test_other_schedules_go_on_without_a_client_too(schedule):
    state, tasks = training(spec(schedule=schedule))
    state, _ = fail(state, 0)
    for task in tasks[1:]:
        state, commands = answered(state, task)

    assert state.stage == "aggregating"
    assert [task.client for task in of(commands, transitions.Aggregate)[0].tasks] == [B, C]
    state, commands = decide(state, transitions.RoundAggregated(1, version("1")))
    assert A not in {task.client for task in sent(commands)}


def test_one_client_that_calls_the_job_bad_does_not_end_it():
    state, tasks = training()

    state, commands = decide(
        state, transitions.TaskFailureReceived(tasks[1].id, B, "data file x has no field 'label'", bad_input=True)
    )

    assert (state.stage, state.aside) == ("training", (B,))
    assert told(commands) == ["client-set-aside"]


def test_a_job_that_most_clients_call_bad_ends_with_the_sentence_and_the_code_of_bad_input():
    state, tasks = training()
    for task in tasks[:2]:
        said = transitions.TaskFailureReceived(task.id, task.client, "data file x has no field 'label'", bad_input=True)
        state, commands = decide(state, said)

    assert (state.outcome, state.exit_code, state.reason) == ("failed", 2, "data file x has no field 'label'")
    assert {c.client for c in of(commands, transitions.SendCancelTask)} == {B, C}
    assert isinstance(commands[-1], transitions.EndJob)


# ---- rounds ----


def test_the_first_version_opens_the_first_round_and_fixes_the_base_model():
    state, tasks = training()

    assert (state.stage, state.round, state.head, state.base_sha256) == ("training", 1, version("0"), BASE)
    assert [(t.phase, t.index) for t in tasks] == [(TRAIN, 0), (TRAIN, 1), (TRAIN, 2)]


def test_a_sync_round_is_aggregated_once_the_last_of_its_cohort_has_answered():
    state, tasks = training()
    for task in reversed(tasks[1:]):
        state, commands = answered(state, task)
        assert not of(commands, transitions.Aggregate)

    state, commands = answered(state, tasks[0])

    assert state.stage == "aggregating"
    assert [t.index for t in of(commands, transitions.Aggregate)[0].tasks] == [0, 1, 2]


def test_a_closed_round_opens_the_next_one_and_scores_its_version_meanwhile():
    state = aggregating()

    state, commands = decide(state, transitions.RoundAggregated(1, version("1"), at_ms=1_500))

    assert (state.stage, state.round, state.head, state.scored) == ("training", 2, version("1"), {1: version("1")})
    assert told(commands)[0] == "round-closed"
    assert [(t.phase, t.round) for t in sent(commands)] == [(TRAIN, 2)] * 3 + [(EVALUATE, 1)] * 3


def test_a_round_that_is_closed_twice_is_closed_once():
    state, _ = decide(aggregating(), transitions.RoundAggregated(1, version("1")))

    assert decide(state, transitions.RoundAggregated(1, version("other"))) == (state, ())


def test_rounds_between_two_evaluations_are_not_scored_and_central_evaluation_asks_one_client():
    job = spec(rounds=3, evaluation={"every": 3, "on": "central"})
    state, tasks = training(job)
    scored = []
    for number in (1, 2, 3):
        for task in tasks:
            state, _ = answered(state, task)
        state, commands = decide(state, transitions.RoundAggregated(number, version(str(number))))
        tasks = [t for t in sent(commands) if t.phase == TRAIN]
        scored += [(t.round, t.index) for t in sent(commands) if t.phase == EVALUATE]

    assert scored == [(3, 0)]


def test_scores_are_pooled_by_examples_and_perplexity_from_the_pooled_loss():
    _, tasks = training()
    parts = [(1, 0.0, {"accuracy": 1.0, "perplexity": 1.0}), (3, 2.0, {"accuracy": 0.0, "perplexity": math.exp(2)})]
    scored = [
        replace(task, offered=UploadOffer(Metrics(num_examples=n, loss=loss, values=values)))
        for task, (n, loss, values) in zip(tasks, parts, strict=False)
    ]

    assert pool_metrics(scored) == pytest.approx({"accuracy": 0.25, "loss": 1.5, "perplexity": math.exp(1.5)})


def test_a_task_without_a_result_leaves_the_scores_of_those_after_it_in():
    _, (empty, scored, _) = training()
    scored = replace(scored, offered=UploadOffer(Metrics(num_examples=4, loss=0.5)))

    assert pool_metrics([empty, scored]) == {"loss": 0.5}


def test_over_clients_each_client_counts_once_and_one_without_examples_not_at_all():
    _, tasks = training()
    parts = [(1, 1.0), (3, 0.5), (0, 0.0)]
    scored = [
        replace(tasks[0], offered=UploadOffer(Metrics(num_examples=n, values={"accuracy": value})))
        for n, value in parts
    ]

    assert mean_over_clients(scored) == {"mean_accuracy_of_clients": 0.75}


def test_a_job_of_many_rounds_ends_with_the_last_one_too():
    state, tasks = training(spec(rounds=1_000))
    state = replace(state, round=1_000, tasks={task.id: task for task in tasks})
    for task in tasks:
        state, _ = answered(state, task)

    state, commands = decide(state, transitions.RoundAggregated(int("1000"), version("1000")))

    assert state.stage == "scoring"
    assert {task.phase for task in sent(commands)} == {EVALUATE}


@pytest.mark.parametrize(("number", "is_told"), [(1, True), (2, False)])
def test_a_budget_that_is_spent_is_told_as_the_reason_only_before_the_last_round(number, is_told):
    state, _ = training(spec(rounds=2, privacy={"noise": 4.0, "epsilon": 2.0}))
    state = replace(state, round=number, retired=state.clients)

    assert bool(budget_reason(state)) is is_told


def test_the_job_is_done_once_the_last_version_is_scored():
    state, tasks = training(spec(rounds=1))
    for task in tasks:
        state, _ = answered(state, task)
    state, commands = decide(state, transitions.RoundAggregated(1, version("1")))
    assert state.stage == "scoring"

    for task in sent(commands):
        state, commands = answered(state, task)

    assert (state.stage, state.outcome, state.exit_code) == ("ended", "done", 0)
    assert told(commands) == ["update-accepted", "round-evaluated", "job-ended"]
    assert state.payloads == frozenset()


# ---- methods that ask for more ----


@pytest.fixture
def wide(monkeypatch):
    register(monkeypatch)


@pytest.mark.usefixtures("wide")
def test_a_preparation_asks_everybody_and_opens_the_first_round_unscored():
    state, tasks = training(spec(cohort=1, method={"name": "surveying"}))
    for task in tasks:
        state, commands = answered(state, task)

    state, commands = decide(state, transitions.RoundAggregated(0, version("0b")))

    assert [(t.phase, t.round, t.index) for t in tasks] == [(TRAIN, 0, 0), (TRAIN, 0, 1), (TRAIN, 0, 2)]
    assert [(t.phase, t.round) for t in sent(commands)] == [(TRAIN, 1)]
    assert (state.round, state.scored) == (1, {})


@pytest.mark.usefixtures("wide")
def test_a_preparation_with_a_quorum_calls_off_who_has_not_answered():
    state, tasks = training(spec(method={"name": "surveying", "quorum": 0.6}))
    state, _ = answered(state, tasks[2])

    state, commands = answered(state, tasks[0])

    assert of(commands, transitions.SendCancelTask) == [transitions.SendCancelTask(tasks[1].id, B)]
    assert [t.index for t in of(commands, transitions.Aggregate)[0].tasks] == [0, 2]
    assert offered(state, tasks[1])[1] == (transitions.DenyUpload(tasks[1].id, B, "stale"),)


@pytest.mark.usefixtures("wide")
def test_methods_whose_scores_read_private_state_are_scored_before_they_train():
    state, tasks = training(spec(method={"name": "hoarding"}))
    for task in tasks:
        state, _ = answered(state, task)

    _, commands = decide(state, transitions.RoundAggregated(1, version("1")))

    assert [(t.phase, t.round) for t in sent(commands)] == [(EVALUATE, 1)] * 3 + [(TRAIN, 2)] * 3


@pytest.mark.parametrize(("wants", "reason"), [(False, []), (None, []), (True, ["payload"])])
def test_a_result_without_tensors_counts_where_the_method_wants_none(wants, reason):
    state, (task, *_) = training()

    state, commands = decide(state, transitions.OfferReceived(task.id, A, UploadOffer(metrics()), wants_tensors=wants))

    assert [command.reason for command in of(commands, transitions.DenyUpload)] == reason
    assert [command.sha256 for command in of(commands, transitions.MarkAccepted)] == ([] if reason else ["-"])


def test_tensors_that_the_method_does_not_want_are_refused_before_they_move():
    state, (task, *_) = training()

    _, commands = decide(state, transitions.OfferReceived(task.id, A, offer(task), wants_tensors=False))

    assert of(commands, transitions.DenyUpload)[0].reason == "payload"


# ---- clients come and go ----


def test_a_lost_client_is_told_once_and_its_return_sends_its_open_tasks_again():
    state, tasks = training()
    state, _ = answered(state, tasks[0])
    state, lost = decide(state, transitions.ClientDisconnected(B, (A, C)))
    again = decide(state, transitions.ClientDisconnected(B, (A, C)))

    state, commands = decide(state, transitions.HelloReceived(B, (A, B, C), "cuda"))

    assert told(lost) == ["client-lost"]
    assert again[1] == ()
    assert told(commands) == ["client-joined", "task-sent"]
    assert [(t.id, t.attempt) for t in sent(commands)] == [(tasks[1].id, 2)]
    assert state.lost == ()


def test_a_returned_client_is_not_asked_for_what_it_holds_or_what_counted():
    state, tasks = training()
    state, _ = answered(state, tasks[1])
    state, _ = decide(state, transitions.RoundAggregated(1, version("1")))

    _, commands = decide(state, transitions.HelloReceived(B, (A, B, C), outbox=frozenset({tasks[1].id})))

    assert sent(commands) == []


def test_a_stranger_changes_nothing_in_a_job_that_has_started():
    state, _ = training()
    stranger = ClientId("client-9")

    assert decide(state, transitions.HelloReceived(stranger, (A, B, C, stranger))) == (state, ())
    assert decide(state, transitions.ClientDisconnected(stranger, (A, B, C))) == (state, ())


# ---- the end ----


def test_a_cancelled_job_calls_everything_off():
    state, _ = training()

    state, commands = decide(state, transitions.CancelRequested(at_ms=7))

    assert (state.stage, state.outcome, state.exit_code) == ("ended", "cancelled", 130)
    assert len(of(commands, transitions.SendCancelTask)) == 3
    assert told(commands) == ["job-ended"]


def test_the_servers_own_failure_ends_the_job_with_its_reason():
    state, _ = decide(aggregating(), transitions.ServerWorkFailed("aggregating round 1 failed: disk full"))

    assert (state.outcome, state.reason) == ("failed", "aggregating round 1 failed: disk full")


def test_after_the_end_offers_are_answered_and_nothing_else_happens():
    running, tasks = training()
    state, _ = decide(running, transitions.CancelRequested())
    late = transitions.OfferReceived(tasks[0].id, A, offer(tasks[0]))

    assert decide(state, late) == (state, (transitions.DenyUpload(tasks[0].id, A, "job-ended"),))
    assert decide(state, replace(late, was_accepted=True))[1] == (
        transitions.SendVerdict(tasks[0].id, A, accepted=True),
    )
    assert decide(state, transitions.CancelRequested()) == (state, ())
    assert decide(state, transitions.HelloReceived(A, (A,))) == (state, ())


# ---- restarts ----


def test_a_restarted_server_gives_exactly_the_commands_again_that_nothing_on_the_wire_holds():
    gathering, commands = opened()
    starting, _ = answered(gathering, sent(commands)[0])
    running, tasks = training()
    awaiting, _ = offered(running, tasks[2])

    assert resume(gathering) == ()
    assert [type(c) for c in resume(starting)] == [transitions.StartMethod]
    assert resume(running) == ()
    assert [c.task.id for c in resume(awaiting)] == [tasks[2].id]
    assert [len(c.tasks) for c in resume(aggregating())] == [3]


def test_every_state_comes_back_from_the_store_as_it_was():
    running, tasks = training()
    awaiting, _ = offered(running, tasks[2])
    scoring, _ = decide(aggregating(), transitions.RoundAggregated(1, version("1"), 0.25, at_ms=99))
    ended, _ = decide(running, transitions.CancelRequested(at_ms=7))

    for state in (JobState("job", spec()), opened()[0], awaiting, scoring, ended):
        kept = {id_: dump_task(task) for id_, task in state.tasks.items()}
        assert load_state(dump_header(state), state.spec, kept) == state


# ---- cohorts ----


def test_a_cohort_hangs_on_seed_and_round_alone_and_is_ascending():
    drawn = [ClientSampler(7, r).choose(range(100), 10) for r in range(1, 50)]

    assert drawn == [ClientSampler(7, r).choose(range(100), 10) for r in range(1, 50)]
    assert all(list(indices) == sorted(set(indices)) and len(indices) == 10 for indices in drawn)
    assert len(set(drawn)) == 49
    assert ClientSampler(7, 1).choose(range(4), 4) == (0, 1, 2, 3)


# ---- whole jobs ----


def play(job, choose):
    """Run a job to its end; `choose(n)` picks which of n waiting clients answers next."""
    state, commands = opened(job)
    waiting, log, aggregations = [], [], []
    for _ in range(10_000):
        for command in commands:
            match command:
                case transitions.SendTask(task):
                    waiting.append(task)
                case transitions.AppendEvent(event):
                    log.append(event)
                case transitions.StartMethod():
                    waiting.append(transitions.MethodStarted(version("0"), 7))
                case transitions.Aggregate(number, tasks):
                    aggregations.append((number, tuple(t.id for t in tasks)))
                    waiting.append(transitions.RoundAggregated(number, version(str(number))))
        if not waiting:
            return state, log, aggregations
        step = waiting.pop(choose(len(waiting)))
        if isinstance(step, transitions.MethodStarted | transitions.RoundAggregated):
            state, commands = decide(state, step)
        else:
            state, commands = answered(state, step)
    raise AssertionError("the job does not end")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rounds=st.integers(1, 3), cohort=st.sampled_from([1, 2, 1.0]), every=st.integers(1, 3))
def test_whatever_the_order_of_arrival_the_job_ends_in_the_same_state(data, rounds, cohort, every):
    job = spec(rounds=rounds, cohort=cohort, evaluation={"every": every})
    expected, log, aggregations = play(job, lambda _: 0)

    state, other_log, other_aggregations = play(job, lambda n: data.draw(st.integers(0, n - 1)))

    assert state == expected
    assert expected.outcome == "done"
    assert other_aggregations == aggregations
    assert sorted(map(repr, other_log)) == sorted(map(repr, log))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_duplicates_late_arrivals_and_returning_clients_do_not_change_the_outcome(data):
    _, _, aggregations = play(spec(), lambda _: 0)
    past, seen = [], []

    def disturb(state):
        """Bring back something old, or let a client come back; only tasks may be sent again."""
        if not past or not data.draw(st.booleans()):
            return state, []
        old = data.draw(st.sampled_from(past))
        state, commands = decide(state, data.draw(st.sampled_from([old, transitions.HelloReceived(B, (A, B, C))])))
        assert not of(commands, transitions.MarkAccepted | transitions.Aggregate | transitions.EndJob)
        return state, sent(commands)

    state, commands = opened()
    waiting = []
    while state.stage != "ended":
        waiting += sent(commands)
        for command in of(commands, transitions.StartMethod):
            waiting.append(transitions.MethodStarted(version("0"), len(command.task.id)))
        for command in of(commands, transitions.Aggregate):
            seen.append((command.round, tuple(task.id for task in command.tasks)))
            waiting.append(transitions.RoundAggregated(command.round, version(str(command.round))))
        step = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        if isinstance(step, transitions.MethodStarted | transitions.RoundAggregated):
            state, commands = decide(state, step)
            past.append(step)
        else:
            state, commands = answered(state, step)
            past.append(transitions.UpdateReceived(step.id))
        state, again = disturb(state)
        ids = {task.id for task in again}
        waiting = [each for each in waiting if getattr(each, "id", None) not in ids] + again

    assert state.outcome == "done"
    assert seen == aggregations


def test_the_log_of_a_job_tells_every_transition():
    _, log, _ = play(spec(rounds=1, clients=1), lambda _: 0)

    assert [event.kind for event in log] == [
        "job-started",
        "task-sent",
        "update-accepted",
        "adapter-initialised",
        "round-started",
        "task-sent",
        "update-accepted",
        "round-closed",
        "task-sent",
        "update-accepted",
        "round-evaluated",
        "job-ended",
    ]
    assert isinstance(log[-1], ev.JobEnded)
