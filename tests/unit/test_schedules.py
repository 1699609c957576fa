"""Quorum and buffered schedules in the round engine, transition by transition, and their closed forms."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabbit import job_loader
from lorabbit.aggregation.staleness import staleness_weight
from lorabbit.errors import BadInput
from lorabbit.job import schedules as sc
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.protocol.messages import Metrics, PayloadRef
from lorabbit.types import EVALUATE, TRAIN, ClientId
from lorabbit_server.engine import scheduling, transitions
from lorabbit_server.engine.reducer import decide, resume
from lorabbit_server.engine.state import JobState, ModelVersion, UploadOffer, dump_header, dump_task, load_state

NAMES = tuple(ClientId(f"client-{n}") for n in range(1, 5))


def job(schedule, **what):
    return JobSpec(**{"name": "job", "clients": 4, "rounds": 3, "schedule": schedule, **what})


def ref(text):
    return PayloadRef(sha256=text.encode().hex().rjust(64, "0"), size_bytes=100, chunk_bytes=1024)


def version(name):
    return ModelVersion(ref(f"s{name}"), ref(f"a{name}"))


def sent(commands, phase=TRAIN):
    return [c.task for c in commands if isinstance(c, transitions.SendTask) and c.task.phase == phase]


def of(commands, kind):
    return [c for c in commands if isinstance(c, kind)]


def events(commands, kind):
    return [c.event for c in of(commands, transitions.AppendEvent) if c.event.kind == kind]


def offered(state, task, at_ms=0):
    payload = None if task.phase == EVALUATE else ref(f"{task.round} {task.index} {task.turn}")
    result = UploadOffer(Metrics(num_examples=10, loss=0.5), payload)
    return decide(state, transitions.OfferReceived(task.id, task.client, result, at_ms=at_ms))


def answered(state, task, at_ms=0):
    state, first = offered(state, task, at_ms)
    state, second = decide(state, transitions.UpdateReceived(task.id, at_ms=at_ms))
    return state, (*first, *second)


def aggregated(state, at_ms=0):
    return decide(state, transitions.RoundAggregated(state.round, version(str(state.round)), at_ms=at_ms))


def training(spec, at_ms=0):
    """A job in its first round, and what was sent in it by client index."""
    state, commands = decide(JobState("job", spec), transitions.JobOpened(NAMES))
    state, _ = answered(state, sent(commands, "initialise")[0])
    state, commands = decide(state, transitions.MethodStarted(version("0"), 7, at_ms=at_ms))
    return state, {task.index: task for task in sent(commands)}, commands


# ---- the job file ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sync", "sync"),
        ("{kind: sync}", "sync"),
        ("quorum", sc.Quorum()),
        ("{kind: quorum, quorum: 0.5, late: keep}", sc.Quorum(quorum=0.5, late="keep")),
        ("buffered", sc.Buffered()),
        ("{kind: buffered, buffer: 1, max_staleness: 3}", sc.Buffered(buffer=1, max_staleness=3)),
    ],
)
def test_a_schedule_is_a_word_or_keys_and_values(text, expected):
    assert job_loader.parse(f"schedule: {text}").schedule == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule: fast", "schedule: there is no schedule 'fast'; choose one of sync, quorum, buffered"),
        ("schedule: 3", "schedule: expected sync, quorum or buffered"),
        ("schedule: {buffer: 3}", "schedule: it has no kind"),
        ("schedule: {kind: sync, late: keep}", "schedule: sync has no settings, but late stands there"),
        ("schedule: {kind: buffered, bufer: 1}", "schedule.bufer: unknown key; did you mean 'buffer'?"),
        ("schedule: {kind: buffered, quorum: 1}", "(known: buffer, concurrency, kind,"),
        ("schedule: {kind: quorum, quorum: 2.0}", "schedule.quorum: must be at most 1.0, not 2.0"),
        ("schedule: {kind: quorum, late: maybe}", "schedule.late: expected 'refuse' or 'keep'"),
        ("schedule: {kind: buffered, concurrency: 9}", "schedule.concurrency is 9, but there are only 4 clients"),
        ("schedule: buffered\ncohort: 2", "cohort: a buffered schedule has no rounds to ask a cohort for"),
        ("max_staleness: 3", "did you mean 'schedule.max_staleness'?"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_sentence(text, said):
    with pytest.raises(BadInput) as error:
        job_loader.parse(text)

    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["sync", "quorum", "{kind: buffered, buffer: 3}"])
def test_a_schedule_survives_the_way_through_a_job_file(text):
    spec = job_loader.parse(f"schedule: {text}")

    assert job_loader.parse(job_loader.dump(spec)) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


# ---- which method bears which schedule ----

EVERY = {"fedavg", "fedprox", "ffa-lora", "federa"}
NO_LATE = {"sa-fedlora", "slora", "adalora"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_runs_under_a_schedule_or_says_why_not(name):
    borne = METHODS[name].schedules

    assert (
        borne == {"sync", "quorum", "buffered"}
        if name in EVERY
        else borne == ({"sync", "quorum"} if name in NO_LATE else {"sync"})
    )
    for kind in {"quorum", "buffered"} - borne:
        with pytest.raises(BadInput, match=f"^schedule: {name} does not run under '{kind}': ") as error:
            build(JobSpec(schedule=kind, method={"name": name}))
        assert METHODS[name].because in str(error.value)


def test_a_method_whose_late_updates_have_an_older_rank_may_not_keep_them():
    with pytest.raises(BadInput, match=r"^schedule\.late: sa-fedlora cannot keep late updates: its rank falls"):
        build(JobSpec(schedule=sc.Quorum(late="keep"), method={"name": "sa-fedlora"}))


@pytest.mark.parametrize("rule", ["zero-padded", "exact"])
def test_an_aggregation_whose_coordinates_or_base_change_folds_no_late_updates(rule):
    build(JobSpec(schedule=sc.Quorum(), aggregation=rule))
    for late in (sc.Buffered(), sc.Quorum(late="keep")):
        with pytest.raises(BadInput, match=f"^aggregation: '{rule}' cannot fold late updates"):
            build(JobSpec(schedule=late, aggregation=rule))


# ---- closed forms ----


@pytest.mark.parametrize(("tau", "a", "worth"), [(0, 0.5, 1.0), (3, 0.5, 0.5), (1, 1.0, 0.5), (8, 0.0, 1.0)])
def test_an_update_is_worth_one_over_one_plus_its_staleness_to_the_a(tau, a, worth):
    assert staleness_weight(sc.Buffered(staleness_exponent=a), tau) == worth
    assert staleness_weight(sc.Quorum(staleness_exponent=a), tau) == worth


@pytest.mark.parametrize(
    ("share", "over", "cohort", "needed", "asked"),
    [(0.5, 1.0, 1.0, 2, 4), (0.8, 1.25, 1.0, 4, 4), (0.5, 1.5, 2, 1, 3), (1.0, 1.0, 3, 3, 3), (0.1, 1.0, 1, 1, 1)],
)
def test_a_quorum_is_a_share_of_the_cohort_and_more_are_asked(share, over, cohort, needed, asked):
    state, tasks, _ = training(job(sc.Quorum(quorum=share, over_select=over), cohort=cohort))

    assert (scheduling.required_updates(state), len(tasks)) == (needed, asked)


# ---- quorum ----


def test_a_round_closes_at_its_quorum_and_calls_the_rest_off():
    state, tasks, _ = training(job(sc.Quorum(quorum=0.5)))
    state, _ = answered(state, tasks[3])

    state, commands = answered(state, tasks[1])

    assert state.stage == "aggregating"
    assert [t.index for t in of(commands, transitions.Aggregate)[0].tasks] == [1, 3]
    assert {c.task for c in of(commands, transitions.SendCancelTask)} == {tasks[0].id, tasks[2].id}


def test_privacy_waits_for_everybody_and_a_defense_needs_the_clients_of_one_round():
    private = job({"kind": "quorum"}, privacy={"noise": 1.0})
    guarded = job({"kind": "buffered", "buffer": 2}, robust={"kind": "median"})

    with pytest.raises(BadInput, match=r"^schedule: the accountant of `privacy`"):
        build(private)
    with pytest.raises(BadInput, match=r"^schedule: `robust` compares the clients of one round"):
        build(guarded)


def test_a_late_result_of_a_quorum_that_refuses_is_stale_and_the_log_tells_who_was_late():
    state, tasks, _ = training(job(sc.Quorum(quorum=0.5)))
    for index in (0, 1):
        state, _ = answered(state, tasks[index])
    state, commands = aggregated(state)

    _, late = offered(state, tasks[2])

    assert of(late, transitions.DenyUpload)[0].reason == "stale"
    (closed,) = events(commands, "round-closed")
    assert closed.pace == {"late": 2, "too_stale": 0, "staleness_mean": 0.0, "staleness_max": 0}


def test_a_late_result_of_a_quorum_that_keeps_joins_the_next_round_from_its_own_base():
    state, tasks, _ = training(job(sc.Quorum(quorum=0.5, late="keep")))
    for index in (0, 1):
        state, commands = answered(state, tasks[index])
    assert not of(commands, transitions.SendCancelTask)
    state, commands = aggregated(state)
    again = {task.index: task for task in sent(commands)}
    assert set(again) == {0, 1}, "those who are late are not asked for more"
    assert state.version_for(tasks[2]) == version("0")

    state, _ = answered(state, tasks[2])
    state, commands = answered(state, again[0])

    assert [t.id for t in of(commands, transitions.Aggregate)[0].tasks] == [tasks[2].id, again[0].id]
    assert [scheduling.staleness(state, t) for t in of(commands, transitions.Aggregate)[0].tasks] == [1, 0]


def test_the_log_tells_the_mean_and_the_largest_staleness_of_a_rounds_updates():
    state, tasks, _ = training(job(sc.Quorum(quorum=0.5, late="keep")))
    for index in (0, 1):
        state, commands = answered(state, tasks[index])
    state, commands = aggregated(state)
    (again, _) = sent(commands)
    for task in (tasks[2], again):
        state, _ = answered(state, task)

    _, commands = aggregated(state)

    # One update started from the version before the last, the other from the last one.
    (closed,) = events(commands, "round-closed")
    assert (closed.pace["staleness_mean"], closed.pace["staleness_max"]) == (0.5, 1)


def test_a_round_that_passes_its_deadline_closes_with_what_there_is():
    state, tasks, commands = training(job(sc.Quorum(quorum=1.0, deadline_seconds=5)), at_ms=1_000)
    assert of(commands, transitions.SetDeadline) == [transitions.SetDeadline(1, 6_000)]
    state, _ = answered(state, tasks[2], at_ms=2_000)

    state, commands = decide(state, transitions.DeadlinePassed(1, at_ms=6_000))

    assert [t.index for t in of(commands, transitions.Aggregate)[0].tasks] == [2]
    assert state.deadline_ms is None


def test_a_deadline_with_nothing_to_fold_asks_those_who_are_free_and_is_set_again():
    spec = job(sc.Quorum(quorum=1.0, over_select=1.0, deadline_seconds=5), cohort=2)
    state, tasks, _ = training(spec, at_ms=1_000)

    state, commands = decide(state, transitions.DeadlinePassed(1, at_ms=6_000))

    assert {t.index for t in sent(commands)} == set(range(4)) - set(tasks)
    assert of(commands, transitions.SetDeadline) == [transitions.SetDeadline(1, 11_000)]


@pytest.mark.parametrize(
    "event", [transitions.DeadlinePassed(2, at_ms=99_000), transitions.DeadlinePassed(0, at_ms=99_000)]
)
def test_the_deadline_of_another_round_changes_nothing(event):
    state, _, _ = training(job(sc.Quorum(deadline_seconds=5)))

    assert decide(state, event) == (state, ())


def test_a_deadline_that_rings_early_is_set_again():
    state, _, _ = training(job(sc.Quorum(deadline_seconds=5)), at_ms=1_000)

    assert decide(state, transitions.DeadlinePassed(1, at_ms=5_999)) == (state, (transitions.SetDeadline(1, 6_000),))


def test_a_restarted_server_sets_the_deadline_again():
    state, _, _ = training(job(sc.Quorum(deadline_seconds=5)), at_ms=1_000)

    assert transitions.SetDeadline(1, 6_000) in resume(state)


def test_a_deadline_that_is_not_given_follows_from_the_speed_of_the_quorum():
    state, tasks, commands = training(job(sc.Quorum(quorum=0.5)), at_ms=1_000)
    assert not of(commands, transitions.SetDeadline), "nobody was measured yet"
    state, _ = answered(state, tasks[0], at_ms=3_000)
    state, _ = answered(state, tasks[1], at_ms=9_000)

    state, commands = aggregated(state, at_ms=10_000)

    assert of(commands, transitions.SetDeadline) == [
        transitions.SetDeadline(2, 10_000 + round(scheduling.DEADLINE_FACTOR * 2_000))
    ]


def test_clients_that_are_lost_are_asked_only_where_the_others_are_too_few():
    spec = job(sc.Quorum(quorum=0.5, over_select=1.0))
    state, tasks, _ = training(spec)
    state, _ = decide(state, transitions.ClientDisconnected(NAMES[3], NAMES[:3]))
    for index in (0, 1):
        state, _ = answered(state, tasks[index])

    state, commands = aggregated(state)

    assert {t.index for t in sent(commands)} == {0, 1, 2}


# ---- buffered ----


def test_a_client_that_never_waits_gets_its_next_task_as_soon_as_its_result_counts():
    state, tasks, _ = training(job(sc.Buffered(buffer=3)))

    state, commands = answered(state, tasks[2])

    (again,) = sent(commands)
    assert (again.index, again.round) == (2, 1)
    assert again.id != tasks[2].id


def test_every_k_arrivals_make_a_version_and_nobody_is_called_off():
    state, tasks, _ = training(job(sc.Buffered(buffer=2)))
    state, _ = answered(state, tasks[3])

    state, commands = answered(state, tasks[0])

    assert [t.index for t in of(commands, transitions.Aggregate)[0].tasks] == [0, 3]
    assert not of(commands, transitions.SendCancelTask)


def test_staleness_is_the_number_of_versions_since_the_one_a_task_started_from():
    state, tasks, _ = training(job(sc.Buffered(buffer=1), rounds=9))
    ages = []
    for index in (0, 1, 3):
        state, _ = answered(state, tasks[index])
        state, commands = aggregated(state)
        ages.append(events(commands, "round-closed")[0].pace["staleness_max"])

    assert ages == [0, 1, 2]
    assert state.version_for(tasks[2]) == version("0")
    assert set(state.bases) == {1, 2, 3} & {t.round for t in state.tasks.values() if t.phase == TRAIN}


def test_a_round_that_begins_after_a_restart_names_the_clients_that_train_already():
    state, tasks, _ = training(job(sc.Buffered(buffer=1)))
    state, _ = answered(state, tasks[0])
    stored = {id_: dump_task(task) for id_, task in state.tasks.items()}
    state = load_state(dump_header(state), state.spec, stored)

    _, commands = aggregated(state)

    (started,) = events(commands, "round-started")
    assert started.cohort == NAMES


def test_a_base_is_kept_as_long_as_a_task_under_way_started_from_it():
    state, tasks, _ = training(job(sc.Buffered(buffer=1), rounds=9))
    state, _ = answered(state, tasks[0])
    state, _ = aggregated(state)
    assert version("0").hashes <= state.payloads

    for index in (1, 2, 3):
        state, _ = answered(state, tasks[index])
        state, _ = aggregated(state)

    assert not version("0").hashes & state.payloads


def test_a_result_that_is_too_stale_is_refused_by_name_counted_and_its_client_starts_anew():
    state, tasks, _ = training(job(sc.Buffered(buffer=1, max_staleness=1), rounds=9))
    for index in (0, 1):
        state, _ = answered(state, tasks[index])
        state, _ = aggregated(state)

    state, commands = offered(state, tasks[2])

    assert of(commands, transitions.DenyUpload) == [transitions.DenyUpload(tasks[2].id, tasks[2].client, "too-stale")]
    assert [e.reason for e in events(commands, "update-rejected")] == ["too-stale"]
    assert [(t.index, t.round, t.tries) for t in sent(commands)] == [(2, 3, 1)]
    state, _ = answered(state, sent(commands)[0])
    _, commands = aggregated(state)
    assert events(commands, "round-closed")[0].pace["too_stale"] == 1


def test_a_result_that_grew_too_stale_while_it_traveled_is_refused_as_well():
    state, tasks, _ = training(job(sc.Buffered(buffer=1, max_staleness=0), rounds=9))
    state, _ = offered(state, tasks[2])
    state, _ = answered(state, tasks[0])

    state, commands = decide(state, transitions.UpdateReceived(tasks[2].id))

    assert of(commands, transitions.SendVerdict) == [
        transitions.SendVerdict(tasks[2].id, tasks[2].client, accepted=False, reason="too-stale")
    ]
    assert not of(commands, transitions.MarkAccepted)


def test_a_result_that_comes_while_a_version_is_made_belongs_to_the_next_one():
    state, tasks, _ = training(job(sc.Buffered(buffer=1)))
    state, first = answered(state, tasks[0])
    state, _ = answered(state, tasks[1])
    assert of(first, transitions.Aggregate) == [c for c in resume(state) if isinstance(c, transitions.Aggregate)]

    state, commands = aggregated(state)

    assert events(commands, "round-closed")[0].accepted == 1
    assert [t.id for t in of(commands, transitions.Aggregate)[0].tasks] == [tasks[1].id]
    assert scheduling.staleness(state, tasks[1]) == 1


def folding_again(schedule):
    """A job whose first version is folded again without the update that could not be, and the tasks of both."""
    state, tasks, _ = training(job(schedule, rounds=9, min_clients=1))
    state, first = answered(state, tasks[0])
    (alone,) = of(first, transitions.Aggregate)[0].tasks
    state, _ = answered(state, tasks[1])
    state, commands = decide(state, transitions.UpdatesUnusable(1, {alone.id: "scaling: not the server's"}))
    return state, tasks, of(commands, transitions.Aggregate)


KEEPS = sc.Quorum(quorum=0.25, over_select=4.0, late="keep")


@pytest.mark.parametrize("schedule", [sc.Buffered(buffer=1), KEEPS])
def test_what_came_while_a_useless_update_was_folded_is_folded_in_its_place_and_is_not_late(schedule):
    state, tasks, (again,) = folding_again(schedule)

    assert [t.id for t in again.tasks] == [tasks[1].id]
    assert scheduling.staleness(state, again.tasks[0]) == 0
    assert resume(state)[0] == again


@pytest.mark.parametrize("schedule", [sc.Buffered(buffer=1), KEEPS])
def test_what_comes_while_a_round_is_folded_a_second_time_belongs_to_the_next_version(schedule):
    state, tasks, (again,) = folding_again(schedule)
    state, _ = answered(state, tasks[2])
    assert resume(state)[0] == again, "the next server folds the same"

    state, commands = aggregated(state)

    assert events(commands, "round-closed")[0].accepted == 1
    assert [t.id for t in of(commands, transitions.Aggregate)[0].tasks] == [tasks[2].id]


def test_no_more_clients_train_at_a_time_than_the_job_says():
    state, tasks, _ = training(job(sc.Buffered(buffer=2, concurrency=2)))
    assert len(tasks) == 2

    state, _ = answered(state, next(iter(tasks.values())))

    assert sum(t.status == "open" for t in state.tasks.values()) == 2


def test_another_client_trains_in_the_place_of_one_that_is_lost():
    state, tasks, _ = training(job(sc.Buffered(buffer=2, concurrency=2)))
    gone = next(iter(tasks.values())).client

    _, commands = decide(state, transitions.ClientDisconnected(gone, tuple(c for c in NAMES if c != gone)))

    (task,) = sent(commands)
    assert task.client not in {t.client for t in tasks.values()}


def test_a_client_that_comes_back_with_too_old_a_task_gets_a_new_one():
    state, tasks, _ = training(job(sc.Buffered(buffer=1, max_staleness=0), rounds=9))
    state, _ = decide(state, transitions.ClientDisconnected(NAMES[2], NAMES))
    state, _ = answered(state, tasks[0])
    state, _ = aggregated(state)

    _, commands = decide(state, transitions.HelloReceived(NAMES[2], NAMES))

    assert of(commands, transitions.SendCancelTask) == [transitions.SendCancelTask(tasks[2].id, NAMES[2])]
    assert [(t.index, t.round) for t in sent(commands)] == [(2, 2)]


def test_a_client_that_was_lost_does_not_go_on_from_an_old_version_unless_it_has_the_result():
    state, tasks, _ = training(job(sc.Quorum(quorum=0.5, late="keep")))
    state, _ = decide(state, transitions.ClientDisconnected(NAMES[2], NAMES))
    for index in (0, 1):
        state, _ = answered(state, tasks[index])
    state, _ = aggregated(state)

    _, restarted = decide(state, transitions.HelloReceived(NAMES[2], NAMES))
    _, silent = decide(state, transitions.HelloReceived(NAMES[2], NAMES, outbox=frozenset({tasks[2].id})))

    assert of(restarted, transitions.SendCancelTask) == [transitions.SendCancelTask(tasks[2].id, NAMES[2])]
    assert not of(silent, transitions.SendCancelTask)


def test_a_buffered_job_ends_after_its_versions_and_calls_the_rest_off():
    state, tasks, _ = training(job(sc.Buffered(buffer=2), rounds=2, evaluation={"every": 2, "on": "central"}))
    for pair in ((0, 1), (2, 3)):
        for index in pair:
            state, commands = answered(state, tasks[index])
        if state.round == 2:
            assert {c.client for c in of(commands, transitions.SendCancelTask)} == set(NAMES[:3])
        state, commands = aggregated(state)

    state, commands = offered(state, sent(commands, EVALUATE)[0])

    assert (state.stage, state.outcome, state.payloads) == ("ended", "done", frozenset())


def test_a_state_with_bases_and_a_batch_survives_the_store():
    state, tasks, _ = training(job(sc.Buffered(buffer=1), rounds=9))
    state, _ = answered(state, tasks[0])
    state, _ = aggregated(state)
    state, _ = answered(state, tasks[1])

    kept = load_state(dump_header(state), state.spec, {id_: dump_task(task) for id_, task in state.tasks.items()})

    assert kept == state
    assert (set(kept.bases), len(kept.batch)) == ({1}, 1)


# ---- every order of arrival ----

SCHEDULES = (
    sc.Buffered(buffer=2),
    sc.Buffered(buffer=1, max_staleness=1, concurrency=2),
    sc.Buffered(buffer=5),
    sc.Quorum(quorum=0.5, late="keep", deadline_seconds=1),
    sc.Quorum(quorum=0.75),
)


@settings(deadline=None, max_examples=40)
@given(schedule=st.sampled_from(SCHEDULES), seed=st.integers(0, 2**32))
def test_whoever_answers_leaves_and_returns_every_counted_update_is_folded_once_and_none_is_too_old(schedule, seed):
    dice = Random(seed)
    state, _, _ = training(job(schedule, rounds=4, evaluation={"every": 4, "on": "central"}))
    counted, folded = [], []
    for now in range(200):
        if state.stage != "training":
            break
        task = dice.choice([t for t in state.tasks.values() if t.phase == TRAIN and t.status != "accepted"])
        state, commands = something_happens(state, task, dice.randrange(10), now)
        counted += [c.task for c in of(commands, transitions.MarkAccepted)]
        while state.stage == "aggregating":
            (command, *_) = [c for c in resume(state) if isinstance(c, transitions.Aggregate)]
            folded += [t.id for t in command.tasks]
            assert all(state.version_for(t) is not None for t in command.tasks)
            state, commands = aggregated(state, now)
            (closed,) = events(commands, "round-closed")
            assert closed.pace["staleness_max"] <= getattr(schedule, "max_staleness", 99)
        if len(state.lost) == len(NAMES):
            state, _ = decide(state, transitions.HelloReceived(NAMES[0], NAMES, at_ms=now))

    assert (state.stage, state.round) == ("scoring", 4)
    assert sorted(folded) == sorted(counted)
    assert len(set(folded)) == len(folded)


def something_happens(state, task, what, now):
    """Mostly a result; now and then a client leaves or comes back, or the deadline passes."""
    match what:
        case 0:
            return decide(state, transitions.ClientDisconnected(task.client, NAMES, now))
        case 1:
            return decide(state, transitions.HelloReceived(task.client, NAMES, at_ms=now))
        case 2:
            return decide(state, transitions.DeadlinePassed(state.round, state.deadline_ms or 0))
        case _:
            return answered(state, task, now)


# ---- scores of clients that are lost ----


def scoring(schedule, on):
    """A job of one round that is being scored, and who was asked to."""
    state, tasks, _ = training(job(schedule, rounds=1, evaluation={"on": on}))
    for task in tasks.values():
        if state.stage == "training":
            state, _ = answered(state, task)
    state, commands = aggregated(state)
    return state, sent(commands, EVALUATE)


@pytest.mark.parametrize("schedule", [sc.Quorum(quorum=1.0), sc.Buffered(buffer=4)])
def test_the_scores_of_a_lost_client_are_left_out_where_no_round_waits_for_everybody(schedule):
    state, asked = scoring(schedule, "clients")
    for task in asked[1:]:
        state, _ = answered(state, task)

    state, commands = decide(state, transitions.ClientDisconnected(NAMES[0], NAMES[1:], 9))

    assert of(commands, transitions.SendCancelTask) == [transitions.SendCancelTask(asked[0].id, NAMES[0])]
    assert len(events(commands, "round-evaluated")) == 1
    assert (state.stage, state.outcome) == ("ended", "done")


@pytest.mark.parametrize("schedule", [sc.Quorum(quorum=1.0), sc.Buffered(buffer=4)])
def test_central_scores_pass_on_from_a_lost_client_and_are_awaited_where_nobody_else_is_here(schedule):
    state, (asked,) = scoring(schedule, "central")

    for gone in range(3):
        assert asked.client == NAMES[gone]
        state, commands = decide(state, transitions.ClientDisconnected(NAMES[gone], NAMES[gone + 1 :], 9))
        (asked,) = sent(commands, EVALUATE)
    state, commands = decide(state, transitions.ClientDisconnected(NAMES[3], (), 9))

    assert sent(commands, EVALUATE) == []
    assert [task.client for task in state.tasks.values()] == [NAMES[3]]
    state, commands = decide(state, transitions.HelloReceived(NAMES[3], NAMES[3:], at_ms=10))
    state, _ = answered(state, sent(commands, EVALUATE)[0])
    assert (state.stage, state.outcome) == ("ended", "done")


@pytest.mark.parametrize("schedule", [sc.Quorum(quorum=1.0), sc.Buffered(buffer=4)])
@pytest.mark.parametrize("on", ["clients", "central"])
def test_when_all_were_lost_scores_wait_for_the_first_who_is_back_and_for_no_other(schedule, on):
    state, _ = scoring(schedule, on)
    for gone in range(4):
        state, _ = decide(state, transitions.ClientDisconnected(NAMES[gone], NAMES[gone + 1 :], 9))

    state, commands = decide(state, transitions.HelloReceived(NAMES[1], NAMES[1:2], at_ms=10))

    (asked,) = sent(commands, EVALUATE)
    assert (asked.client, tuple(state.tasks)) == (NAMES[1], (asked.id,))
    state, _ = answered(state, asked)
    assert (state.stage, state.outcome) == ("ended", "done")


def test_under_sync_scores_wait_for_everybody():
    state, asked = scoring("sync", "clients")
    for task in asked[1:]:
        state, _ = answered(state, task)

    state, commands = decide(state, transitions.ClientDisconnected(NAMES[0], NAMES[1:], 9))

    assert of(commands, transitions.SendCancelTask) == []
    assert state.stage == "scoring"
