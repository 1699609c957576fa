"""SA-FedLoRA against closed forms and dense products; its invariants by their ids in the specification."""

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.components import two_stage
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.methods.shared_model.sa_fedlora import SaFedLora
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import size_bytes
from lorabbit.tensors.lora_math import Factors
from lorabbit.tensors.serialization import read_facts, read_tensors, write_tensors
from lorabbit.types import ADAPTER, BASE, SHIFT, ClientUpdate, ServerState

SHAPES = {"base_model.model.q": (7, 9), "base_model.model.v": (12, 6)}
HEAD = "base_model.model.classifier.weight"
WHOLE = {"q.weight": (7, 9), "v.weight": (12, 6), "classifier.weight": (2, 3)}
RANK = 8


def job(*, rounds=12, alpha=16, client_ranks=None, aggregation="factors", **settings):
    return JobSpec.model_validate(
        {
            "rounds": rounds,
            "aggregation": aggregation,
            "model": {"lora": {"rank": RANK, "alpha": alpha, "client_ranks": client_ranks}},
            "method": {"name": SaFedLora.name, "t0": 2, "r_min": 2, **settings},
        }
    )


def drawn(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapter_shapes(rank=RANK):
    shapes = {HEAD: (2, 3)}
    for module, (d_out, d_in) in SHAPES.items():
        shapes |= {f"{module}.lora_A.weight": (rank, d_in), f"{module}.lora_B.weight": (d_out, rank)}
    return shapes


def client(index, *, eta=0.1, num_examples=None, steps=3):
    return QuadraticSession(
        {name: drawn(shape, (index, 1)) for name, shape in adapter_shapes().items()},
        eta=eta,
        steps=steps,
        num_examples=num_examples or 10 * (index + 1),
        client=profile(index),
        scaling=2.0,
        whole={name: drawn(shape, (index, 2)) for name, shape in WHOLE.items()},
        base={module: drawn(shape, 6) for module, shape in SHAPES.items()},
    )


def first_payload():
    return {name: np.zeros(shape, np.float32) for name, shape in adapter_shapes().items()} | {
        two_stage.WHOLE + name: drawn(shape, 5) for name, shape in WHOLE.items()
    }


def one_round(method, state, clients=3):
    sessions = [client(k) for k in range(clients)]
    return method.aggregate(state, [method.local_update(method.plan(state, s.client), s) for s in sessions])


def after(method, rounds):
    state = method.start(first_payload())
    for _ in range(rounds):
        state = one_round(method, state)
    return state


def rank_in(state):
    return state.tensors["base_model.model.q.lora_B.weight"].shape[1]


def product(tensors, module="base_model.model.q", scaling=2.0):
    return lora_math.read(tensors, module, scaling).product()


def test_U1_the_schedule_of_a_job_of_fifty_rounds_is_the_golden_one():
    method = build(JobSpec.model_validate({"rounds": 50, "model": {"lora": {"rank": 32}},
                                           "method": {"name": "sa-fedlora"}}))  # fmt: skip

    schedule = method.ranks_by_round

    assert (schedule.start, schedule.heat, schedule.cool, schedule.lowest) == (3, 5, 10, 4)
    assert sum(schedule.rank(t) for t in range(3, 50)) == 565


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r_min": 16}, r"method\.schedule: r_min is 16, above r_max"),
        ({"t_heat": 6, "t_cool": 4}, "leave none to fall in"),
        ({"t0": 12}, r"method\.t0: 12 leaves no round"),
        ({"ranks": [8, 4, 2]}, r"method\.schedule: 'cubic' reads no list of ranks"),
    ],
)
def test_U1_a_schedule_without_sense_is_bad_input(settings, named):
    with pytest.raises(BadInput, match=named):
        build(job(**settings))


def test_U2_the_first_stage_trains_every_parameter_and_the_second_one_none_of_the_base():
    method, session = build(job()), client(0)
    state = method.start(first_payload())
    first = method.local_update(method.plan(state, session.client), session)
    later, session = after(method, 3), client(0)

    method.local_update(method.plan(later, session.client), session)

    assert set(first.tensors) == set(WHOLE)
    assert all(not np.array_equal(first.tensors[name], state.tensors[name]) for name in WHOLE)
    session.select("whole")
    assert two_stage.digest(session.tensors()) == later.facts["base_hash"]


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("prox", lambda w, w0: 0.3 * (w - w0)),
        ("l2", lambda w, _: 0.3 * w),
        ("l1prox", lambda w, w0: 0.3 * np.sign(w - w0)),
    ],
)
def test_U3_the_penalty_adds_its_gradient(penalty, expected):
    w, start = drawn((4, 3), 1), drawn((4, 3), 2)

    added = build(job(mu=0.3, penalty=penalty))._penalty(client(0))("q.weight", w, start)

    np.testing.assert_allclose(added, expected(w, start), rtol=1e-6)


def test_U3_the_fisher_penalty_pulls_each_number_by_its_share_of_the_information():
    method, session = build(job(mu=0.3, penalty="fisher-prox")), client(0)
    session.select("whole")
    squares = {name: drawn(shape, (0, 2)) ** 2 for name, shape in WHOLE.items()}
    most = max(value.max() for value in squares.values())
    w, start = drawn((7, 9), 1), drawn((7, 9), 2)

    added = method._penalty(session)("q.weight", w, start)

    np.testing.assert_allclose(added, 0.3 * squares["q.weight"] / most * (w - start), rtol=1e-5)


def test_U3_without_a_penalty_the_first_stage_is_fedavg_to_the_bit():
    method = build(job(mu=0))
    state, plain = method.start(first_payload()), FedAvg()
    whole = ServerState(state.tensors)
    sessions = [QuadraticSession(client(k).whole, steps=3, num_examples=10 * (k + 1), client=profile(k))
                for k in range(3)]  # fmt: skip

    ours = one_round(method, state)
    theirs = plain.aggregate(whole, [plain.local_update(plain.plan(whole, s.client), s) for s in sessions])

    assert all(np.array_equal(ours.tensors[name], value) for name, value in theirs.tensors.items())


@pytest.mark.parametrize("penalty", ["prox", "fisher-prox"])
def test_U3_clients_drift_less_the_stronger_the_penalty(penalty):
    drifts = []
    for mu in (0.0, 1.0, 4.0):
        method, session = build(job(mu=mu, penalty=penalty)), client(0)
        state = method.start(first_payload())
        update = method.local_update(method.plan(state, session.client), session)
        drifts.append(sum(np.sum((update.tensors[n] - state.tensors[n]) ** 2) for n in WHOLE))

    assert drifts[0] > drifts[1] > drifts[2] > 0


@pytest.mark.parametrize(("kept", "is_same"), [(False, True), (True, False)])
def test_U3_the_penalty_ends_with_the_first_stage_unless_it_is_to_stay(kept, is_same):
    updates = []
    for mu in (0.0, 2.0):
        method = build(job(mu=mu, prox_in_annealing=kept))
        state = after(build(job(mu=0.0)), 2)
        updates.append(method.local_update(method.plan(state, profile(0)), client(0)).tensors)

    plain, pulled = updates
    assert all(np.array_equal(plain[name], pulled[name]) for name in plain) == is_same


@pytest.mark.parametrize(
    "settings",
    [{"initiating_learning_rate": 0.01}, {"annealing_learning_rate": 0.01, "prox_in_annealing": True}],
)
def test_U3_a_penalty_that_makes_its_own_steps_diverge_is_bad_input(settings):
    other = {"initiating_learning_rate": 1e-5, "annealing_learning_rate": 1e-5}

    with pytest.raises(BadInput, match=r"method\.mu: .* must be below 1"):
        build(job(mu=200.0, **{**other, **settings}))


def test_U3_the_rate_of_a_stage_without_the_penalty_does_not_matter_to_it():
    assert build(job(mu=200.0, initiating_learning_rate=1e-5, annealing_learning_rate=0.1)).mu == 200.0


@pytest.mark.parametrize("rounds", [0, 3])
def test_U4_one_client_is_the_mean_and_equal_clients_are_any_of_them(rounds):
    method = build(job(schedule="constant"))
    state = after(method, rounds)
    one = method.local_update(method.plan(state, profile(0)), client(0))
    twin = ClientUpdate(profile(1).client, 1, one.tensors, one.num_examples, 0.0, one.facts)

    alone, both = method.aggregate(state, [one]), method.aggregate(state, [one, twin])

    for name, value in one.tensors.items():
        np.testing.assert_array_equal(alone.tensors[name], value)
        np.testing.assert_array_equal(both.tensors[name], value)


def test_U5_attaching_the_factors_leaves_the_model_as_the_first_stage_left_it():
    state = after(build(job()), 2)

    assert all(not state.tensors[name].any() for name in state.tensors if ".lora_B." in name)
    assert np.array_equal(state.tensors[HEAD], state.shared[BASE]["classifier.weight"])
    assert state.tensors["base_model.model.q.lora_A.weight"].any()


def test_U6_shrinking_loses_exactly_the_tail():
    adapter = {name: drawn(shape, 3) for name, shape in adapter_shapes().items()}
    setting = build(job()).aggregation(3)

    changed, told = two_stage.change_rank(adapter, 3, setting, by="svd")

    tails = {m: np.linalg.svd(product(adapter, m))[1][3:] for m in SHAPES}
    for module, tail in tails.items():
        missed = np.linalg.norm(product(adapter, module) - product(changed, module))
        assert missed == pytest.approx(np.linalg.norm(tail), rel=1e-5)
    whole = sum(np.sum(product(adapter, m) ** 2) for m in SHAPES)
    assert told["lost"] == pytest.approx(np.sqrt(sum(np.sum(t**2) for t in tails.values()) / whole), rel=1e-5)
    most = max(np.linalg.norm(tail) / np.linalg.norm(product(adapter, m)) for m, tail in tails.items())
    assert told["lost_most"] == pytest.approx(most, rel=1e-5)


def test_U6_the_same_rank_changes_nothing():
    adapter = {name: drawn(shape, 3) for name, shape in adapter_shapes().items()}

    changed, told = two_stage.change_rank(adapter, RANK, build(job()).aggregation(RANK), by="svd")

    assert changed is adapter
    assert told == {"lost": 0.0}


def test_U6_a_prefix_of_the_shrunk_factors_is_the_truncation_to_its_rank():
    adapter = {name: drawn(shape, 3) for name, shape in adapter_shapes().items()}
    setting = build(job()).aggregation(5)

    nested = two_stage.change_rank(adapter, 5, setting, by="svd")[0]
    module = "base_model.model.q"
    prefix = Factors(nested[f"{module}.lora_A.weight"][:2], nested[f"{module}.lora_B.weight"][:, :2], 2.0)

    best = lora_math.truncate(lora_math.read(adapter, module, 2.0), 2).factors.product()
    np.testing.assert_allclose(prefix.product(), best, atol=1e-5)


def test_U6_the_scaling_stays_when_the_rank_falls():
    method = build(job())

    exports = [method.export(after(method, rounds)).config for rounds in (2, 8, 12)]

    assert exports[0]["r"] > exports[-1]["r"]
    assert {config["lora_alpha"] / config["r"] for config in exports} == {2.0}


def test_dropping_the_least_components_loses_at_least_as_much_as_the_svd():
    adapter = {name: drawn(shape, 3) for name, shape in adapter_shapes().items()}
    setting = build(job()).aggregation(3)

    by_svd, by_norm = (two_stage.change_rank(adapter, 3, setting, by=by)[1]["lost"] for by in ("svd", "importance"))

    assert 0 < by_svd < by_norm < 1


@pytest.mark.parametrize("initiating", ["full", "lora"])
def test_U6_merging_before_a_lower_rank_loses_nothing_and_begins_anew(initiating):
    method = build(job(shrink="merge-reinit", initiating=initiating, schedule="explicit", ranks=[8, 8, 4]))
    before = after(method, 3)
    sessions = [client(k) for k in range(3)]
    updates = [method.local_update(method.plan(before, s.client), s) for s in sessions]
    plain = build(job(shrink="svd", initiating=initiating, schedule="constant")).aggregate(before, updates)

    merged = method.aggregate(before, updates)

    assert rank_in(merged) == 4
    assert not np.any(product(merged.tensors))
    for module in SHAPES:
        np.testing.assert_allclose(product(merged.shared[SHIFT], module), product(plain.tensors, module), atol=1e-5)
    exported = method.export(merged)
    for module in SHAPES:
        whole = lora_math.read(exported.tensors, module, exported.config["lora_alpha"] / exported.config["r"]).product()
        np.testing.assert_allclose(whole, product(plain.tensors, module), atol=1e-5)
    assert (exported.base is not None) == (initiating == "full")


def test_U6_merges_add_up_and_travel_as_a_shift_of_the_base():
    method = build(job(shrink="merge-reinit", schedule="explicit", ranks=[8, 8, 4, 4, 2]))
    state = after(method, 5)
    first = state.shared[SHIFT]
    state = one_round(method, state)
    later = one_round(method, state)

    assert first["base_model.model.q.lora_B.weight"].shape[1] == 7  # of eight components, all that a 7 x 9 weight holds
    assert SHIFT in method.plan(state, profile(0)).payloads
    assert later.facts["merged"] == 2
    assert not np.allclose(product(later.shared[SHIFT]), product(first))


def test_an_update_that_stands_on_fewer_merges_is_refused():
    method = build(job(shrink="merge-reinit", schedule="reverse"))
    old = after(method, 5)
    late = method.local_update(method.plan(old, profile(0)), client(0))
    new = old
    while new.facts.get("merged") == old.facts.get("merged"):
        new = one_round(method, new)

    with pytest.raises(Refused, match="another base"):
        method.aggregate(new, [late])


def test_U7_products_of_mixed_ranks_are_the_truncation_of_the_dense_mean():
    method = build(job(aggregation="svd", client_ranks=[8, 4, 2], schedule="constant"))
    state = after(method, 2)
    updates = [method.local_update(method.plan(state, profile(k)), client(k)) for k in range(3)]

    folded = method.aggregate(state, updates)

    assert [u.facts["rank"] for u in updates] == [8, 4, 2]
    for module in SHAPES:
        mean = sum((k + 1) / 6 * product(u.tensors, module) for k, u in enumerate(updates))
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        np.testing.assert_allclose(product(folded.tensors, module), (u[:, :8] * s[:8]) @ vt[:8], atol=1e-4)


def test_averaged_factors_are_not_diluted_by_clients_that_did_not_train_them():
    method = build(job(client_ranks=[8, 2, 2], schedule="constant"))
    state = after(method, 2)
    updates = [method.local_update(method.plan(state, profile(k)), client(k)) for k in range(3)]

    folded = method.aggregate(state, updates)

    a = "base_model.model.q.lora_A.weight"
    np.testing.assert_array_equal(folded.tensors[a][2:], updates[0].tensors[a][2:])


def test_U8_what_travels_is_the_formula_of_the_ledger():
    method, rounds = build(job(schedule="linear")), 12
    state, sent = method.start(first_payload()), 0
    for _ in range(rounds):
        sent += size_bytes(method.plan(state, profile(0)).payloads[ADAPTER])
        assert size_bytes(method.uploads(state, profile(0))) == size_bytes(
            method.plan(state, profile(0)).payloads[ADAPTER]
        )
        state = one_round(method, state)

    p, head = sum(int(np.prod(shape)) for shape in WHOLE.values()), 6
    c = [rank * sum(sum(shape) for shape in SHAPES.values()) + head
         for rank in (method.ranks_by_round.rank(t) for t in range(2, rounds))]  # fmt: skip
    assert sent == 4 * (2 * p + sum(c))


def test_U8_the_base_is_sent_under_a_role_of_its_own_and_is_one_object():
    method = build(job())

    one, two = after(method, 2), None
    two = one_round(method, one)

    assert method.plan(one, profile(0)).payloads[BASE] is method.plan(two, profile(1)).payloads[BASE]


def test_U10_an_update_of_another_rank_is_refused():
    method = build(job())
    old = after(method, 2)
    late = method.local_update(method.plan(old, profile(0)), client(0))

    with pytest.raises(Refused, match="rank"):
        method.aggregate(after(method, 9), [late])


def test_an_update_on_another_base_is_refused():
    method = build(job())
    state = after(method, 3)
    update = method.local_update(method.plan(state, profile(0)), client(0))
    forged = ClientUpdate(update.client, 0, update.tensors, 1, 0.0, {**update.facts, "base_hash": "0" * 64})

    with pytest.raises(Refused, match="base"):
        method.aggregate(state, [forged])


def test_a_client_refuses_a_base_that_is_not_the_one_named():
    method = build(job())
    plan = method.plan(after(method, 3), profile(0))
    wrong = {name: value + 1 for name, value in plan.payloads[BASE].items()}

    with pytest.raises(Refused, match="base"):
        method.restore(type(plan)(plan.phase, {**plan.payloads, BASE: wrong}, plan.settings), client(0))


def test_U11_two_runs_of_one_job_are_equal_to_the_bit():
    one, two = after(build(job()), 8), after(build(job()), 8)

    assert one.facts == two.facts
    assert all(np.array_equal(one.tensors[name], value) for name, value in two.tensors.items())


@pytest.mark.parametrize("at", [1, 3, 6, 11])
def test_U12_a_state_that_was_saved_goes_on_with_the_right_rank_and_factors(tmp_path, at):
    method = build(job())
    state = after(method, at)
    write_tensors(tmp_path / "state", state.tensors, state.facts)
    for role, group in state.shared.items():
        write_tensors(tmp_path / role, group)
    revived = ServerState(read_tensors(tmp_path / "state"), read_facts(tmp_path / "state"),
                          {role: read_tensors(tmp_path / role) for role in state.shared})  # fmt: skip

    here, there = one_round(method, state), one_round(method, revived)

    assert here.facts == there.facts
    assert all(np.array_equal(here.tensors[name], there.tensors[name]) for name in here.tensors)


def test_the_first_stage_can_train_lora_instead_of_the_whole_model():
    method = build(job(initiating="lora"))
    state = method.start({name: drawn(shape, 4) for name, shape in adapter_shapes().items()})

    later = state
    for _ in range(4):
        assert BASE not in method.plan(later, profile(0)).payloads
        later = one_round(method, later)

    assert rank_in(state) == RANK
    assert not later.shared


def test_a_run_without_a_first_stage_starts_with_lora():
    method = build(job(t0=0))

    state = method.start({name: drawn(shape, 4) for name, shape in adapter_shapes().items()})

    assert method.plan(state, profile(0)).settings["stage"] == "annealing"


def test_clients_obey_the_message_and_not_the_round():
    method, session = build(job()), client(0)
    session.round = 1

    update = method.local_update(method.plan(after(method, 9), profile(0)), session)

    assert update.facts["rank"] == method.ranks_by_round.rank(9)


def test_the_stages_may_learn_at_rates_of_their_own():
    method = build(job(initiating_learning_rate=0.001, annealing_learning_rate=0.05))
    first, second = client(0), client(0)

    method.local_update(method.plan(after(method, 0), profile(0)), first)
    method.local_update(method.plan(after(method, 2), profile(0)), second)

    assert [s.trainings[0].local.learning_rate for s in (first, second)] == [0.001, 0.05]


def test_a_rank_that_grows_again_gets_components_that_can_learn():
    method = build(job(schedule="reverse", t_heat=1, t_cool=1))
    ranks, state = [], after(method, 2)
    for _ in range(9):
        ranks.append(rank_in(state))
        state = one_round(method, state)

    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (2, 8)
    assert all(state.tensors["base_model.model.q.lora_A.weight"].any(axis=1))


def test_an_aggregation_that_shifts_the_base_is_refused():
    with pytest.raises(BadInput, match="aggregation: sa-fedlora averages factors"):
        build(job(aggregation="stack"))


def test_the_report_tells_rank_and_lost_energy():
    state = after(build(job()), 7)

    assert state.report["stage"] == "annealing"
    assert state.report["rank"] >= state.report["next_rank"]
    assert 0 <= state.report["lost"] < 1
