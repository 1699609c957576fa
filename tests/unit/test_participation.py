"""Which clients take part, how much each of them does, and who may join later: deterministic for a seed and facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorabbit import job_loader
from lorabbit.aggregation import partial_work
from lorabbit.errors import BadInput
from lorabbit.job.schedules import Buffered, Quorum
from lorabbit.job.spec import JobSpec, LocalSpec, SelectionSpec
from lorabbit.methods import compatibility
from lorabbit.methods.registry import METHODS, build
from lorabbit.protocol.messages import Metrics, PayloadRef
from lorabbit.types import EVALUATE, TRAIN, ClientCapabilities, ClientId
from lorabbit_server.engine import client_selection, scheduling, transitions
from lorabbit_server.engine.reducer import decide
from lorabbit_server.engine.state import (
    JobState,
    ModelVersion,
    UploadOffer,
    dump_header,
    dump_task,
    load_state,
)
from lorabbit_server.engine.wait_reasons import wait_reasons

NAMES = tuple(ClientId(f"client-{n}") for n in range(1, 7))
OWN = {"partition": {"kind": "own"}}
GPU = ClientCapabilities(device="cuda:0", memory_bytes=16 * 1024**3, tags=("gpu", "fast"), pool="mig")


def ref(number):
    return PayloadRef(sha256=f"{number:064x}", size_bytes=100, chunk_bytes=1024)


def version(number):
    return ModelVersion(ref(number), ref(number + 1))


def sent(commands, phase=TRAIN):
    return [c.task for c in commands if isinstance(c, transitions.SendTask) and c.task.phase == phase]


def answered(state, task, at_ms=0, *, seconds=0.0, steps_done=0):
    payload = None if task.phase == EVALUATE else ref(1000 + task.round * 100 + task.index)
    metrics = Metrics(num_examples=10, loss=0.5, seconds=seconds, steps=steps_done)
    state, first = decide(
        state, transitions.OfferReceived(task.id, task.client, UploadOffer(metrics, payload), at_ms=at_ms)
    )
    state, second = decide(state, transitions.UpdateReceived(task.id, at_ms=at_ms))
    return state, (*first, *second)


def training(spec, names=NAMES, declared=None):
    """A job in its first round, and what was sent in it."""
    state, commands = decide(JobState("job", spec), transitions.JobOpened(names, 0, declared or {}))
    state, _ = answered(state, sent(commands, "initialise")[0])
    state, commands = decide(state, transitions.MethodStarted(version(1), 7))
    return state, sent(commands)


def job(clients=6, **what):
    given = {"name": "job", "rounds": 9, "evaluation": {"every": 9, "on": "central"}, **what}
    return JobSpec(**given, clients=clients)


def rounds(state, asked, number, at_ms=0):
    """Play whole rounds; the clients asked in each."""
    cohorts = []
    for _ in range(number):
        cohorts.append([task.index for task in asked])
        for task in asked:
            state, _ = answered(state, task, at_ms)
        state, commands = decide(
            state, transitions.RoundAggregated(state.round, version(2 * state.round + 10), at_ms=at_ms)
        )
        asked = sent(commands)
    return state, cohorts


# ---- who is taken in ----


@pytest.mark.parametrize(
    ("selection", "suits"),
    [
        ({}, True),
        ({"tags": ["gpu"]}, True),
        ({"tags": ["gpu", "eu"]}, False),
        ({"devices": ["cuda"]}, True),
        ({"devices": ["cpu"]}, False),
        ({"pools": ["mig", "jetson"]}, True),
        ({"pools": ["jetson"]}, False),
        ({"memory_gib": 16}, True),
        ({"memory_gib": 16.1}, False),
    ],
)
def test_a_client_suits_a_job_by_all_that_it_declared(selection, suits):
    assert client_selection.matches(SelectionSpec.model_validate(selection), GPU) is suits


def test_a_job_gathers_clients_that_suit_it_and_says_which_are_lacking():
    spec = job(clients=2, selection={"tags": ["gpu"], "memory_gib": 8})
    state, _ = decide(JobState("job", spec), transitions.JobOpened(NAMES[:3], 1, {NAMES[1]: GPU}))
    (wait,) = wait_reasons(state)
    state = load_state(dump_header(state), spec, {})
    state, _ = decide(state, transitions.HelloReceived(NAMES[4], NAMES[:5], declared=GPU))

    assert wait.reason == (
        "job job waits for 1 more client with tags gpu and 8 GiB of memory: 1 of 2 needed are connected; "
        "2 others are here, but not such"
    )
    assert state.clients == (NAMES[1], NAMES[4])
    assert state.declared == {}


def test_a_client_below_the_one_rank_of_an_aggregation_is_left_out_with_the_reason():
    spec, small = job(clients=2, model={"lora": {"rank": 8}}), ClientCapabilities(max_rank=4)
    state, _ = decide(JobState("job", spec), transitions.JobOpened(NAMES[:2], 1, {NAMES[0]: small, NAMES[1]: GPU}))
    (wait,) = wait_reasons(state)
    state = load_state(dump_header(state), spec, {})
    state, _ = decide(state, transitions.HelloReceived(NAMES[2], NAMES[:3], declared=ClientCapabilities(max_rank=8)))

    assert wait.reason == (
        "job job waits for 1 more client with a LORABBIT_MAX_RANK of at least 8, the one rank of this aggregation: "
        "1 of 2 needed are connected; 1 others are here, but not such"
    )
    assert state.clients == (NAMES[1], NAMES[2])


def test_a_client_with_a_quantized_base_is_left_out_of_a_job_that_needs_the_base_whole():
    spec, less = job(clients=2, aggregation="stack"), ClientCapabilities(quantisation="int4")
    state, _ = decide(JobState("job", spec), transitions.JobOpened(NAMES[:2], 1, {NAMES[0]: less, NAMES[1]: GPU}))
    (wait,) = wait_reasons(state)
    state = load_state(dump_header(state), spec, {})
    state, _ = decide(state, transitions.HelloReceived(NAMES[2], NAMES[:3], declared=ClientCapabilities()))

    assert wait.reason == (
        "job job waits for 1 more client with LORABBIT_QUANTISATION none, since aggregation 'stack' changes the base "
        "model: 1 of 2 needed are connected; 1 others are here, but not such"
    )
    assert state.clients == (NAMES[1], NAMES[2])


def test_a_client_with_a_quantized_base_does_not_join_a_running_job_that_needs_it_whole():
    spec = job(clients=1, data={"partition": {"kind": "own"}}, model={"trainable": "head"})
    state, _ = training(spec)

    left_out, _ = decide(
        state, transitions.HelloReceived(NAMES[1], NAMES[:2], declared=ClientCapabilities(quantisation="int8"))
    )
    taken_in, _ = decide(state, transitions.HelloReceived(NAMES[1], NAMES[:2], declared=ClientCapabilities()))

    assert (left_out.clients, taken_in.clients) == (NAMES[:1], NAMES[:2])


def test_quantized_clients_are_taken_in_where_lora_leaves_the_base_alone():
    declared = {NAMES[0]: ClientCapabilities(quantisation="int4"), NAMES[1]: ClientCapabilities(quantisation="int8")}

    state, _ = decide(JobState("job", job(clients=2)), transitions.JobOpened(NAMES[:2], 1, declared))

    assert state.clients == NAMES[:2]


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        ({"name": "federa"}, False),
        ({"name": "slora"}, False),
        ({"name": "pfedlora"}, False),
        ({"name": "sa-fedlora"}, False),
        ({"name": "sa-fedlora", "initiating": "lora"}, True),
        ({"name": "sa-fedlora", "initiating": "lora", "shrink": "merge-reinit"}, False),
        ({"name": "fibecfed"}, True),
    ],
)
def test_a_method_says_whether_it_needs_the_base_whole(method, taken):
    assert (
        client_selection.matches(
            None, ClientCapabilities(quantisation="int8"), client_selection.requirements_of(JobSpec(method=method))
        )
        is taken
    )


@pytest.mark.parametrize(
    "what", [{"aggregation": "svd"}, {"model": {"trainable": "head"}}, {"model": {"lora": {"rank": 4}}}]
)
def test_a_small_rank_is_enough_where_ranks_may_differ_or_there_is_none(what):
    declared = {NAMES[0]: ClientCapabilities(max_rank=4), NAMES[1]: GPU}

    state, _ = decide(JobState("job", job(clients=2, **what)), transitions.JobOpened(NAMES[:2], 1, declared))

    assert state.clients == NAMES[:2]


# ---- who is asked ----


def test_a_fair_selection_asks_everybody_equally_often():
    state, asked = training(job(cohort=2, selection={"order": "fair"}))

    _, cohorts = rounds(state, asked, 6)

    for number in (3, 6):
        times = [sum(index in each for each in cohorts[:number]) for index in range(6)]
        assert max(times) == min(times), cohorts


def test_a_choice_is_the_same_for_the_same_seed_and_facts_and_another_for_another_seed():
    def cohorts(seed):
        state, asked = training(job(cohort=2, seed=seed, selection={"order": "fair"}))
        return rounds(state, asked, 4)[1]

    assert cohorts(1) == cohorts(1)
    assert cohorts(1) != cohorts(2)


def test_a_fast_selection_measures_everybody_once_and_then_asks_the_fastest():
    speeds = {
        0: partial_work.ClientSpeed(10, 0, 10),
        1: partial_work.ClientSpeed(30, 0, 10),
        2: partial_work.ClientSpeed(20, 50, 10),
        3: partial_work.ClientSpeed(1, 500, 10),
    }
    in_no_time = {0: partial_work.ClientSpeed(0, 0, 10)}

    assert client_selection.ClientSampler(0, 1, "fast", speeds=in_no_time).choose(range(2), 1) == (1,)
    assert client_selection.ClientSampler(0, 1, "fast", speeds=speeds).choose(range(4), 2) == (0, 2)
    assert 4 in client_selection.ClientSampler(0, 1, "fast", speeds=speeds).choose(range(5), 1)


def test_clients_that_are_lost_are_passed_over_where_the_others_are_enough():
    state, asked = training(job(cohort=2, selection={"order": "fair"}))
    for name in NAMES[:3]:
        state, _ = decide(state, transitions.ClientDisconnected(name, NAMES[3:]))

    state = replace(state, tasks={})

    assert set(scheduling.select_clients(state)) <= {3, 4, 5}
    assert len(asked) == 2


def test_a_job_that_selects_nothing_is_drawn_as_ever():
    state, asked = training(job(cohort=3, seed=5))

    assert tuple(task.index for task in asked) == client_selection.ClientSampler(5, 1).choose(range(6), 3)
    assert (state.asked, state.speeds, state.declared) == ({}, {}, {})


# ---- how much each does ----


@pytest.mark.parametrize(
    ("within_ms", "share"),
    [(None, 1.0), (2_000, 1.0), (1_000, 0.8), (500, 0.35), (100, 0.1)],
)
def test_the_share_of_a_client_is_what_fits_into_nine_tenths_of_the_time(within_ms, share):
    spec = job(work={"within_seconds": 1})
    speed = partial_work.ClientSpeed(step_ms=10, rest_ms=100, steps=100)

    assert partial_work.share(spec, speed, within_ms) == share
    assert partial_work.share(spec, None, within_ms) == 1.0


def test_a_speed_is_taken_from_a_training_of_any_share():
    speed = partial_work.ClientSpeed.measured(took_ms=1_500, training_seconds=1.0, steps=50, share=0.5)

    assert speed == partial_work.ClientSpeed(step_ms=20.0, rest_ms=500.0, steps=100.0)
    assert partial_work.ClientSpeed.measured(took_ms=10, training_seconds=99.0, steps=1, share=1.0).rest_ms == 0
    assert partial_work.ClientSpeed.measured(took_ms=10, training_seconds=1.0, steps=0, share=1.0) is None


@pytest.mark.parametrize(
    ("local", "part", "expected"),
    [
        (LocalSpec(steps=10), 0.35, LocalSpec(steps=4)),
        (LocalSpec(steps=2), 0.1, LocalSpec(steps=1)),
        (LocalSpec(epochs=2), 0.25, LocalSpec(epochs=0.5)),
        (LocalSpec(), 0.5, LocalSpec(epochs=0.5)),
        (LocalSpec(), 1.0, LocalSpec()),
    ],
)
def test_a_share_shortens_steps_or_epochs(local, part, expected):
    assert partial_work.shortened(local, part) == expected


def test_a_slow_client_is_asked_for_less_in_the_next_round_and_all_of_it_again_once_it_is_fast():
    spec = job(clients=2, schedule=Quorum(quorum=1.0, deadline_seconds=10), work={})
    state, asked = training(spec, NAMES[:2])
    first = [task.share for task in asked]
    state, _ = answered(state, asked[0], 5_000, seconds=4.0, steps_done=40)
    state, _ = answered(state, asked[1], 21_000, seconds=20.0, steps_done=40)
    state, commands = decide(state, transitions.RoundAggregated(1, version(20), at_ms=21_000))
    second = sent(commands)
    state = load_state(dump_header(state), spec, {t.id: dump_task(t) for t in state.tasks.values()})
    state, _ = answered(state, second[0], 25_000, seconds=4.0, steps_done=40)
    state, _ = answered(state, second[1], 22_000, seconds=0.8, steps_done=16)
    _, commands = decide(state, transitions.RoundAggregated(2, version(30), at_ms=30_000))

    assert first == [1.0, 1.0]
    assert [task.share for task in second] == [1.0, 0.4]
    assert [task.share for task in sent(commands)] == [1.0, 1.0]


def test_changes_count_per_step_done_so_that_the_fixed_point_is_that_of_the_examples():
    """FedNova for gradient descent: one client does half of the steps, and w+ is that of equal steps, but shorter."""
    spec = job(work={"within_seconds": 1})
    shares, examples = [1.0, 0.5], [30, 10]
    gradients = [3.0, -5.0]
    changes = [part * gradient for part, gradient in zip(shares, gradients, strict=True)]

    scaled = [f * change for f, change in zip(partial_work.factors(spec, examples, shares), changes, strict=True)]
    mean = sum(n * change for n, change in zip(examples, scaled, strict=True)) / 40

    effective = (30 * 1.0 + 10 * 0.5) / 40
    assert mean == pytest.approx(effective * (30 * 3.0 + 10 * -5.0) / 40)


@pytest.mark.parametrize("weighting", ["normalised", "examples"])
def test_equal_shares_leave_every_update_as_it_came(weighting):
    spec = job(work={"within_seconds": 1, "weighting": weighting})

    assert partial_work.factors(spec, [3, 4], [0.5, 0.5]) == [1.0, 1.0]
    assert partial_work.factors(job(), [3, 4], [1.0, 0.5]) == [1.0, 1.0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_scales_updates_or_refuses_it_in_the_terms_of_its_paper(method):
    # What carries over a late update, the change on top of another start, is what scaling needs, too.
    spec = job(
        method={"name": method},
        model={"task": "image-classification", "name": "tiny:vit"},
        work={"within_seconds": 1},
        evaluation={},
    )
    if "buffered" in METHODS[method].schedules:
        build(spec)
        return
    with pytest.raises(BadInput, match=r"work\.weighting") as error:
        build(spec)
    assert METHODS[method].because in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("work: {}", "work.within_seconds: only a quorum has a deadline"),
        ("work: {within_seconds: 9}\naggregation: exact", "work.weighting: an update of fedavg cannot be scaled"),
        ("work: {within_seconds: 9}\nrobust: {kind: median}", "robust compares the updates as they came"),
        ("work: {within_seconds: 9}\nprivacy: {noise: 1.0}", "privacy bounds every update as it came"),
        ("work: {within_seconds: 0}", "work.within_seconds"),
        ("selection: {order: best}", "selection.order: expected 'random', 'fair' or 'fast'"),
        ("selection: {memory_gib: -1}", "selection.memory_gib"),
        ("join: true", "join: no client can join this job once it runs: data.partition 'iid' deals one dataset"),
        ("join: true\nmethod: {name: fibecfed}\ndata: {partition: {kind: own}}", "hears every client in round 0"),
        ("join: true\nprivacy: {noise: 1.0}\ndata: {partition: {kind: own}}", "counts on a fixed population"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(text, said):
    with pytest.raises(BadInput) as error:
        job_loader.parse(text)
    assert said in str(error.value)


# ---- who joins later ----


@pytest.mark.parametrize(
    ("spec", "joins"),
    [
        (job(data=OWN), True),
        (job(data=OWN, join=False), False),
        (job(), False),
        (job(data=OWN, privacy={"noise": 1.0}), False),
    ],
)
def test_clients_with_data_of_their_own_join_and_those_of_a_partition_do_not(spec, joins):
    assert compatibility.takes_in(spec, prepares=False) is joins


def test_a_client_that_comes_later_gets_the_next_index_and_is_asked_from_the_next_round_on():
    state, asked = training(job(clients=2, data=OWN), NAMES[:2])

    state, commands = decide(state, transitions.HelloReceived(NAMES[2], NAMES[:3]))
    (told,) = [c.event for c in commands if isinstance(c, transitions.AppendEvent)]
    _, cohorts = rounds(state, asked, 2)

    assert (told.kind, told.client, told.index) == ("client-joined", NAMES[2], 2)
    assert cohorts == [[0, 1], [0, 1, 2]]


def test_where_clients_never_wait_one_that_comes_later_is_asked_at_once():
    state, _ = training(job(clients=2, data=OWN, schedule=Buffered(buffer=2)), NAMES[:2])

    _, commands = decide(state, transitions.HelloReceived(NAMES[2], NAMES[:3]))

    assert [task.client for task in sent(commands)] == [NAMES[2]]


def test_a_share_of_the_population_grows_with_those_who_join():
    state, asked = training(job(clients=2, data=OWN, cohort=0.5), NAMES[:2])
    for place in range(2, 6):
        state, _ = decide(state, transitions.HelloReceived(NAMES[place], NAMES[: place + 1]))

    _, cohorts = rounds(state, asked, 2)

    assert [len(each) for each in cohorts] == [1, 3]


@pytest.mark.parametrize("what", [{}, {"data": OWN, "selection": {"tags": ["gpu"]}}, {"data": OWN, "join": False}])
def test_a_client_that_does_not_suit_or_has_no_part_of_the_data_changes_nothing(what):
    declared = dict.fromkeys(NAMES, GPU)
    state, _ = training(job(clients=2, **what), NAMES[:2], declared)

    assert decide(state, transitions.HelloReceived(NAMES[2], NAMES[:3])) == (state, ())
