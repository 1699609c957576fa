"""FibecFed's mathematics on paper: the invariants F3 to F12 of its specification that need no model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.components import curriculum, layer_selection, sparse_masks
from lorabbit.methods.components.curriculum import CURRICULUM
from lorabbit.methods.components.layer_selection import OUTSIDE
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.fibecfed import FISHER, FibecFed
from lorabbit.types import ADAPTER, ClientUpdate, Plan, ServerState

BLOCKS, RANK, WIDTH = 4, 2, 3
SENSITIVE = np.array([0.4, 0.1, 0.2, 0.3])
HEAD = "base_model.model.classifier.weight"


def factor(block: int, which: str) -> str:
    return f"base_model.model.bert.encoder.layer.{block}.attention.self.query.lora_{which}.weight"


def adapter(value: float = 0.0) -> dict[str, Any]:
    tensors = {HEAD: np.full((2, WIDTH), value, np.float32)}
    for block in range(BLOCKS):
        tensors[factor(block, "A")] = np.full((RANK, WIDTH), value + 0.1 * (block + 1), np.float32)
        tensors[factor(block, "B")] = np.full((WIDTH, RANK), value, np.float32)
    return tensors


def method(rounds: int = 10, **knobs: Any) -> FibecFed:
    job = {"method": {"name": "fibecfed", **knobs}, "rounds": rounds, "local": {"batch_size": 2}}
    made = build(JobSpec.model_validate(job))
    assert isinstance(made, FibecFed)
    return made


class Start(QuadraticSession):
    """A client whose model begins where the job's seed put it, as a real one does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.load(adapter())


def client(index: int = 0, **parts: Any) -> Start:
    target = {name: value + index + 1 for name, value in adapter(0.5).items()}
    known: dict[str, Any] = {"client": profile(index), "num_examples": 10, "sensitivities": SENSITIVE}
    local = JobSpec.model_validate({"local": {"batch_size": 2, "optimizer": "sgd", "learning_rate": 0.1}}).local
    return Start(target, job_local=local, **{**known, **parts})


def again(session: Start, round_number: int, **parts: Any) -> Start:
    """The same client in another task: a fresh model, its own private state."""
    kept = {"private": dict(session.private), "private_tensors": dict(session.private_tensors)}
    index = session.client.index
    return client(index, round=round_number, num_examples=session.num_examples, **{**kept, **parts})


def prepared(made: FibecFed, sessions: list[Start]) -> ServerState:
    state = made.start(adapter())
    for session in sessions:
        session.round = 0
    return made.aggregate(state, [made.local_update(made.plan(state, s.client), s) for s in sessions])


def one_round(made: FibecFed, state: ServerState, sessions: list[Start]) -> tuple[ServerState, list[ClientUpdate]]:
    updates = [made.local_update(made.plan(state, s.client), s) for s in sessions]
    return made.aggregate(state, updates), updates


# ---- F3, F4: batches and pacing ----
def test_F3_batches_are_sorted_by_mean_score_and_hold_every_example_once() -> None:
    scores = np.random.default_rng(0).random(11)

    cut = curriculum.sorted_batches(scores, 4)
    means = [scores[batch].mean() for batch in cut]

    assert means == sorted(means)
    assert sorted(i for batch in cut for i in batch) == list(range(11))
    assert [len(batch) for batch in cut] == [4, 4, 3]


def test_F3_fewer_examples_than_a_batch_are_one_batch() -> None:
    assert curriculum.sorted_batches(np.array([2.0, 1.0]), 8) == [[1, 0]]


def test_F3_ties_keep_the_order_of_the_examples() -> None:
    assert curriculum.sorted_batches(np.zeros(5), 2) == [[0, 1], [2, 3], [4]]


def test_hard_to_easy_is_the_other_way_round() -> None:
    assert curriculum.sorted_batches(np.array([1.0, 3.0, 2.0]), 1, "hard") == [[1], [2], [0]]


def test_in_a_balanced_prefix_classes_take_turns_each_from_its_easiest_on() -> None:
    scores, classes = np.array([1.0, 2.0, 3.0, 10.0, 20.0]), np.array([0, 0, 0, 1, 1])

    assert curriculum.sorted_batches(scores, 2, classes=classes) == [[0, 3], [1, 4], [2]]


def test_F4_the_golden_vector() -> None:
    shares = [curriculum.competence("linear", t, 100, beta=0.3, alpha=0.6) for t in range(0, 70, 5)]

    assert [curriculum.batches_used(share, 10) for share in shares] == [3, 4, 5, 5, 6, 6, 7, 8, 8, 9, 9, 10, 10, 10]


@pytest.mark.parametrize(("beta", "alpha", "share"), [(0.3, 0.6, 78.7), (0.3, 0.8, 71.7), (0.5, 0.5, 87.3)])
def test_F4_the_mean_share_of_the_data_is_what_the_specification_counted(
    beta: float, alpha: float, share: float
) -> None:
    shares = [curriculum.competence("linear", t, 100, beta=beta, alpha=alpha) for t in range(100)]

    assert sum(shares) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("pacing", ["linear", "sqrt", "exp", "step"])
@pytest.mark.parametrize("batches", [1, 3, 17])
def test_F4_every_pacing_starts_at_beta_never_falls_and_ends_with_everything(pacing: Any, batches: int) -> None:
    used = [
        curriculum.batches_used(curriculum.competence(pacing, t, 20, beta=0.3, alpha=0.5), batches) for t in range(20)
    ]

    assert used[0] == max(1, math.ceil(0.3 * batches))
    assert used == sorted(used)
    assert used[10:] == [batches] * 10


def test_F4_with_a_beta_of_one_there_is_no_curriculum() -> None:
    assert all(curriculum.competence("linear", t, 10, beta=1.0, alpha=0.6) == 1.0 for t in range(10))


def test_the_client_trains_on_the_easiest_batches_of_the_servers_round() -> None:
    made = method(rounds=10, beta=0.2, alpha=1.0, warmup_steps=0)
    hard_first = np.arange(10)[::-1].astype(np.float64)
    session = client(difficulties={"fisher": hard_first})
    state = prepared(made, [session])

    for round_number, used in ((1, 1), (4, 3), (10, 5)):
        later = again(session, round_number)
        _, (update,) = one_round(made, state, [later])
        trained = sorted(i for batch in later.trainings[-1].batches or [] for i in batch)
        assert trained == list(range(10 - 2 * used, 10))
        assert (update.facts["m_k"], update.facts["batches"], update.facts["n_used"]) == (used, 5, 2 * used)


def test_batches_in_use_are_shuffled_by_the_task_unless_their_order_is_kept() -> None:
    orders = {}
    for keep in (False, True):
        made = method(beta=1.0, warmup_steps=0, keep_order=keep)
        session = client(num_examples=40)
        later = again(session, 1)
        one_round(made, prepared(made, [session]), [later])
        orders[keep] = later.trainings[-1].batches

    assert orders[True] == [[i, i + 1] for i in range(0, 40, 2)]
    assert orders[False] != orders[True]
    assert sorted(orders[False] or []) == orders[True]


@pytest.mark.parametrize(("every", "expected"), [(0, [0]), (2, [0, 2, 4]), (3, [0, 3])])
def test_difficulty_is_measured_once_and_again_only_when_due(every: int, expected: list[int]) -> None:
    made = method(rescore_every=every, warmup_steps=0)
    session = client()
    state = prepared(made, [session])
    measured = [0] if ("difficulty", "fisher") in session.asked else []

    for round_number in (1, 2, 3, 4):
        session = again(session, round_number)
        one_round(made, state, [session])
        if ("difficulty", "fisher") in session.asked:
            measured.append(round_number)

    assert measured == expected


def test_other_data_than_were_sorted_are_sorted_anew() -> None:
    made = method(warmup_steps=0)
    session = client()
    state = prepared(made, [session])
    grown = again(session, 1)
    grown.num_examples = 14

    one_round(made, state, [grown])

    assert ("difficulty", "fisher") in grown.asked
    assert len(grown.private_tensors[CURRICULUM]["difficulty"]) == 14


def test_a_client_that_missed_round_0_measures_at_its_first_task() -> None:
    made = method(quorum=0.5, warmup_steps=0)
    state = prepared(made, [client(0)])
    late = client(1, round=2)

    one_round(made, state, [late])

    assert ("difficulty", "fisher") in late.asked
    assert CURRICULUM in late.private_tensors


def test_without_pacing_the_session_cuts_its_own_batches_and_nothing_is_measured() -> None:
    made = method(pacing="none", gal_ratio=1.0)
    session = client()
    later = again(session, 1)

    one_round(made, prepared(made, [session]), [later])

    assert session.asked == []
    assert later.trainings[-1].batches is None


# ---- F6: the choice of blocks ----
def test_F6_as_many_blocks_as_asked_sorted_and_unique() -> None:
    for share, number in ((0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4), (0.01, 1)):
        state = prepared(method(gal_ratio=share), [client()])
        chosen = state.facts["gal"]
        assert isinstance(chosen, list)
        assert len(chosen) == number
        assert chosen == sorted(set(chosen))
        assert all(0 <= block < BLOCKS for block in chosen)


def test_F6_the_most_sensitive_blocks_are_chosen_or_the_least() -> None:
    chosen = {pick: prepared(method(gal_pick=pick), [client()]).facts["gal"] for pick in ("top", "bottom")}

    assert chosen == {"top": [0, 3], "bottom": [1, 2]}


def test_F6_a_random_choice_hangs_on_the_jobs_seed() -> None:
    picks = {layer_selection.choose(range(8), np.ones(8), 4, pick="random", seed=seed) for seed in range(20)}

    assert len(picks) > 1
    assert layer_selection.choose(range(8), np.ones(8), 4, pick="random", seed=3) in picks


def test_F6_ties_go_to_the_lower_block() -> None:
    assert layer_selection.choose(range(4), np.ones(4), 2) == (0, 1)


def test_F6_a_client_whose_sensitivities_are_ten_times_larger_has_no_more_say() -> None:
    pair = [client(0), client(1, sensitivities=SENSITIVE[::-1], num_examples=30)]
    scaled = [client(0, sensitivities=10 * SENSITIVE), client(1, sensitivities=SENSITIVE[::-1], num_examples=30)]

    plain, loud = (prepared(method(), sessions) for sessions in (pair, scaled))

    assert plain.facts["gal"] == loud.facts["gal"]
    assert plain.report["importance"] == pytest.approx(loud.report["importance"])


def test_importance_is_weighted_by_examples() -> None:
    found = layer_selection.importance([(1, [1.0, 3.0]), (3, [1.0, 1.0])], (0, 1))

    np.testing.assert_allclose(found, [(0.25 + 3 * 0.5) / 4, (0.75 + 3 * 0.5) / 4])


def test_only_blocks_with_factors_are_candidates() -> None:
    assert layer_selection.blocks_of([factor(1, "A"), factor(1, "B"), factor(3, "A"), HEAD]) == (1, 3)
    np.testing.assert_allclose(layer_selection.importance([(5, [9.0, 1.0, 9.0, 3.0])], (1, 3)), [0.25, 0.75])


@pytest.mark.parametrize("bad", [[1.0], [1.0, -1.0, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0], "much", [None] * 4])
def test_an_answer_that_is_no_sensitivity_is_refused(bad: Any) -> None:
    with pytest.raises(Refused):
        layer_selection.importance([(5, bad)], (0, 1, 2, 3))


def test_energy_takes_the_fewest_blocks_that_hold_it() -> None:
    assert [layer_selection.enough_for_energy(SENSITIVE, share) for share in (0.4, 0.41, 0.7, 0.95)] == [1, 2, 2, 4]
    assert prepared(method(gal_ratio="energy", energy=0.9), [client()]).facts["gal"] == [0, 2, 3]


@pytest.mark.parametrize("rule", ["slq", "eigengap"])
def test_F13_a_measured_share_is_the_weighted_mean_within_its_bounds(rule: str) -> None:
    sessions = [client(0, share=0.2, num_examples=10), client(1, share=0.6, num_examples=30)]

    assert prepared(method(gal_ratio=rule), sessions).facts["gal"] == [0, 3]  # ceil(0.5 * 4)
    assert layer_selection.lossless([(1, 0.01)]) == 0.2
    assert layer_selection.lossless([(1, 1.0)]) == 0.9
    assert layer_selection.lossless([(10, 0.2), (30, 0.6), (99, None)]) == pytest.approx(0.5)
    assert layer_selection.lossless([]) == 0.5


# ---- F7: what travels ----
def test_F7_payloads_hold_the_factors_of_shared_blocks_and_the_head_alone() -> None:
    made = method()
    state = prepared(made, [client()])
    expected = {HEAD} | {factor(block, which) for block in (0, 3) for which in "AB"}

    _, (update,) = one_round(made, state, [again(client(), 1)])

    assert set(made.plan(state, profile(0)).payloads[ADAPTER]) == expected
    assert set(update.tensors) == set(made.uploads(state, profile(0))) == expected
    assert sum(v.nbytes for v in update.tensors.values()) == 4 * (2 * RANK * (WIDTH + WIDTH) + 2 * WIDTH)


def test_F7_round_0_carries_no_tensors_in_either_direction() -> None:
    made = method()
    state = made.start(adapter())
    session = client(round=0)

    plan = made.plan(state, session.client)
    update = made.local_update(plan, session)

    assert plan.payloads == {}
    assert made.uploads(state, session.client) == {}
    assert update.tensors == {}
    assert set(update.facts) == {"passes", "sensitivities"}


def test_F7_difficulties_and_fisher_information_stay_out_of_the_facts() -> None:
    secret = 0.123456789
    made = method(warmup_steps=0)
    session = client(
        difficulties={"fisher": np.full(10, secret)}, fishers={n: v * 0 + 7.5 for n, v in adapter().items()}
    )
    state = prepared(made, [session])
    later = again(session, 1, fishers=session.fishers)

    _, (update,) = one_round(made, state, [later])

    assert "0.1234567" not in repr((update.facts, state.facts))
    assert "7.5" not in repr((update.facts, state.facts))


# ---- F8, F9: masks ----
def test_F8_a_mask_holds_all_but_the_rows_of_the_largest_fisher_sums() -> None:
    fisher = np.array([[1.0, 1.0], [9.0, 0.0], [0.0, 3.0], [0.5, 0.0], [2.0, 2.0]], np.float32)

    mask = sparse_masks.mask(fisher, 0.5, "neuron")

    assert mask[:, 0].tolist() == [False, True, True, False, True]  # ceil(0.5 * 5) rows


def test_F8_by_elements_the_largest_weights_move() -> None:
    mask = sparse_masks.mask(np.array([[1.0, 4.0], [3.0, 2.0]], np.float32), 0.5, "element")

    assert mask.tolist() == [[False, True], [True, False]]


def test_a_factor_without_any_information_moves_whole() -> None:
    assert sparse_masks.mask(np.zeros((3, 2), np.float32), 0.5, "neuron").all()


def test_with_a_share_of_zero_private_blocks_stand_still() -> None:
    assert not sparse_masks.mask(np.zeros((3, 2), np.float32), 0.0, "neuron").any()


def test_F8_masked_rows_are_bit_identical_after_a_round_and_counted() -> None:
    made = method(update_share=0.4, warmup_steps=0)
    session = client()
    state = prepared(made, [session])
    fisher = {n: np.arange(v.size, dtype=np.float32).reshape(v.shape) for n, v in adapter().items()}
    later = again(session, 1, fishers=fisher)

    _, (update,) = one_round(made, state, [later])
    own = later.private_tensors[OUTSIDE]

    for block in (1, 2):
        a, b = (own[factor(block, which)] for which in "AB")
        start = adapter()
        assert np.array_equal(a[:1], start[factor(block, "A")][:1])  # ceil(0.4 * 2) = 1 of 2 rows moves
        assert np.array_equal(b[:1], start[factor(block, "B")][:1])  # ceil(0.4 * 3) = 2 of 3 rows move
        assert not np.any(a[1:] == start[factor(block, "A")][1:])
        assert not np.any(b[1:] == start[factor(block, "B")][1:])
    assert (update.facts["masked"], update.facts["maskable"]) == (4, 10)


def test_F9_shared_blocks_and_the_head_get_no_mask() -> None:
    made = method(warmup_steps=0)
    session = client()
    later = again(session, 1)

    one_round(made, prepared(made, [session]), [later])

    assert set(later.trainings[-1].mask or {}) == {factor(block, which) for block in (1, 2) for which in "AB"}


def test_without_sparsity_private_blocks_are_tuned_densely_and_no_fisher_is_computed() -> None:
    made = method(sparse=False)
    session = client()
    later = again(session, 1)

    one_round(made, prepared(made, [session]), [later])

    assert later.trainings[-1].mask is None
    assert "fisher" not in {call[0] for call in later.asked}
    assert FISHER not in later.private_tensors


def test_the_first_masks_come_from_trial_steps_that_are_undone() -> None:
    made = method(warmup_steps=3)
    session = client()
    later = again(session, 1)
    one_round(made, prepared(made, [session]), [later])

    trial, real = later.trainings
    assert (trial.local.steps, trial.local.epochs, trial.stream) == (3, None, "warm-up")
    assert (real.local.steps, real.stream) == (None, "")

    undone = again(session, 1)
    one_round(replace_field(made, warmup_steps=0), prepared(made, [client()]), [undone])
    assert later.tensors().keys() == undone.tensors().keys()
    assert np.array_equal(later.tensors()[HEAD], undone.tensors()[HEAD])


def replace_field(made: FibecFed, **knobs: Any) -> FibecFed:
    return made.model_copy(update=knobs)


# ---- F10: momentum ----
def test_F10_without_momentum_the_present_fisher_stands() -> None:
    now = {"x": np.array([1.0, 2.0], np.float32)}

    assert np.array_equal(sparse_masks.smoothed({"x": np.array([9.0, 9.0], np.float32)}, now, 0.0)["x"], now["x"])


def test_F10_a_constant_fisher_is_a_fixed_point() -> None:
    now = {"x": np.array([0.3, 1e-8], np.float32)}

    np.testing.assert_allclose(sparse_masks.smoothed(now, now, 0.9)["x"], now["x"], rtol=1e-6)


def test_F10_the_kept_fisher_is_the_exponential_mean_and_never_negative() -> None:
    made = method(fisher_momentum=0.75, warmup_steps=0)
    session = client()
    state = prepared(made, [session])
    values = [4.0, 8.0, 0.0]
    expected = values[0]
    for round_number, value in enumerate(values, start=1):
        session = again(session, round_number, fishers={n: np.full_like(v, value) for n, v in adapter().items()})
        one_round(made, state, [session])
        expected = 0.75 * expected + 0.25 * value
        kept = session.private_tensors[FISHER]
        assert all(np.allclose(f, expected) and np.all(f >= 0) for f in kept.values())


# ---- F11: aggregation ----
def test_F11_the_shared_tensors_are_the_mean_weighted_by_examples() -> None:
    made = method(warmup_steps=0)
    sessions = [client(0, num_examples=10), client(1, num_examples=30)]
    state = prepared(made, sessions)
    later = [again(s, 1) for s in sessions]

    after, updates = one_round(made, state, later)

    for name, value in after.tensors.items():
        np.testing.assert_allclose(value, 0.25 * updates[0].tensors[name] + 0.75 * updates[1].tensors[name], rtol=1e-6)


def test_by_used_examples_a_client_counts_with_those_of_its_prefix() -> None:
    made = method(warmup_steps=0, weights="used", keep_order=True)
    sessions = [client(0, num_examples=10), client(1, num_examples=2)]
    state = prepared(made, sessions)

    after, updates = one_round(made, state, [again(s, 1) for s in sessions])

    used = [update.facts["n_used"] for update in updates]
    assert used == [4, 2]
    for name, value in after.tensors.items():
        mean = (4 * updates[0].tensors[name] + 2 * updates[1].tensors[name]) / 6
        np.testing.assert_allclose(value, mean, rtol=1e-6)


def test_a_round_tells_the_error_of_averaging_shared_factors_apart() -> None:
    made = method(warmup_steps=0)
    sessions = [client(0, num_examples=10), client(1, num_examples=30)]
    state = prepared(made, sessions)

    after, updates = one_round(made, state, [again(s, 1) for s in sessions])

    missed = size = 0.0
    for block in after.facts["gal"]:
        a, b = factor(block, "A"), factor(block, "B")
        products = [update.tensors[b].astype(float) @ update.tensors[a] for update in updates]
        mean = 0.25 * products[0] + 0.75 * products[1]
        missed += float(np.sum((mean - after.tensors[b].astype(float) @ after.tensors[a]) ** 2))
        size += float(np.sum(mean**2))
    assert after.report["aggregation_error"] == pytest.approx(math.sqrt(missed / size), rel=1e-4)
    assert after.report["aggregation_error"] > 0
    assert "saved_batches" in after.report
    assert {update.facts["scaling"] for update in updates} == {2.0}


def test_F11_the_local_steps_are_those_of_gradient_descent_in_closed_form() -> None:
    made = method(beta=1.0, warmup_steps=0)
    session = client()
    later = again(session, 1)

    _, (update,) = one_round(made, prepared(made, [session]), [later])

    shrunk = (1 - 0.1) ** 5  # five batches of two
    np.testing.assert_allclose(update.tensors[HEAD], 1.5 + shrunk * (0.0 - 1.5), rtol=1e-5)


def test_F11_one_client_is_its_own_mean() -> None:
    made = method(warmup_steps=0)
    session = client()

    after, (update,) = one_round(made, prepared(made, [session]), [again(session, 1)])

    assert all(np.array_equal(after.tensors[name], update.tensors[name]) for name in after.tensors)


def test_by_the_flag_examples_in_use_are_the_weights() -> None:
    made = method(weights="used", gal_ratio=1.0)
    state = prepared(made, [client()])
    values = [adapter(0.0), adapter(4.0)]
    facts: list[dict[str, Any]] = [{"gal_version": 1, "n_used": n} for n in (1, 3)]
    updates = [ClientUpdate(profile(k).client, k, values[k], 50, 0.0, facts[k]) for k in range(2)]

    assert np.allclose(made.aggregate(state, updates).tensors[HEAD], 3.0)


def test_an_update_for_another_choice_of_blocks_is_refused() -> None:
    made = method()
    state = prepared(made, [client()])
    stale = ClientUpdate(profile(0).client, 0, state.tensors, 10, 0.0, {"gal_version": 7})

    with pytest.raises(Refused, match="gal-version"):
        made.aggregate(state, [stale])


# ---- F12: private state ----
def test_F12_a_fresh_client_starts_from_the_jobs_own_factors_and_a_known_one_from_its_own() -> None:
    made = method(warmup_steps=0, sparse=False)
    session = client(0)
    state = prepared(made, [session])
    first = again(session, 1)
    after, _ = one_round(made, state, [first])
    own = first.private_tensors[OUTSIDE]

    for known in (True, False):
        scored = again(first, 2) if known else client(0, round=2)
        made.restore(made.scoring(after, scored.client), scored)
        for name, value in own.items():
            assert np.array_equal(scored.tensors()[name], value if known else adapter()[name])
        assert np.array_equal(scored.tensors()[HEAD], after.tensors[HEAD])


# ---- another choice during the run ----
OTHERS = np.array([0.1, 0.4, 0.3, 0.2])
"""Sensitivities under which blocks 1 and 2 are chosen, instead of 0 and 3."""


def chosen_anew(made: FibecFed, sessions: list[Start]) -> tuple[ServerState, list[Start]]:
    """Round 0 with one choice, and round 1 after which the cohort makes another."""
    state = prepared(made, sessions)
    later = [again(session, 1, sensitivities=OTHERS) for session in sessions]
    state, _ = one_round(made, state, later)
    return state, later


def test_F6_when_it_is_time_the_cohort_chooses_anew_and_the_version_counts_on() -> None:
    made = method(gal_refresh_every=1)
    state, _ = chosen_anew(made, [client(0), client(1)])

    assert (state.facts["gal"], state.facts["gal_version"]) == ([1, 2], 2)
    assert {layer_selection.block_of(name) for name in state.tensors} == {None, 1, 2}
    assert state.report["gal"] == [1, 2]


@pytest.mark.parametrize(("every", "rounds", "measured"), [(0, 4, []), (2, 5, [2, 4]), (2, 4, [2]), (3, 7, [3, 6])])
def test_blocks_are_measured_anew_every_so_many_rounds_and_not_after_the_last(
    every: int, rounds: int, measured: list[int]
) -> None:
    made, session = method(rounds=rounds, gal_refresh_every=every), client()
    state, told = prepared(made, [session]), []

    for number in range(1, rounds + 1):
        session = again(session, number)
        state, (update,) = one_round(made, state, [session])
        told += [number] if "sensitivities" in update.facts else []

    assert told == measured
    assert state.facts["gal_version"] == 1 + len(measured)


def test_a_block_that_leaves_goes_on_from_its_last_mean_and_one_that_enters_from_the_start() -> None:
    made = method(gal_refresh_every=1)
    sessions = [client(0), client(1)]
    before = prepared(made, sessions)
    updates = [
        made.local_update(made.plan(before, s.client), s)
        for s in (again(one, 1, sensitivities=OTHERS) for one in sessions)
    ]
    state = made.aggregate(before, updates)
    mean = {n: (updates[0].tensors[n] + updates[1].tensors[n]) / 2 for n in updates[0].tensors}
    stranger = client(2, round=2)

    made._load(made.plan(state, stranger.client), stranger)

    held = stranger.tensors()
    for which in "AB":
        np.testing.assert_allclose(held[factor(0, which)], mean[factor(0, which)], rtol=1e-6)
        assert np.array_equal(held[factor(1, which)], adapter()[factor(1, which)])


def test_own_factors_of_a_block_that_was_shared_since_are_given_up_and_others_kept() -> None:
    made = method(gal_refresh_every=1, update_share=1.0)
    state, (one,) = chosen_anew(made, [client(0)])
    away = {name: value + 7 for name, value in one.private_tensors[OUTSIDE].items()}
    assert {layer_selection.block_of(name) for name in away} == {1, 2}
    one.private_tensors[OUTSIDE] = away
    state, _ = one_round(made, state, [again(client(1), 2, sensitivities=SENSITIVE)])
    back = again(one, 3)

    made._load(made.plan(state, back.client), back)

    assert state.facts["gal"] == [0, 3]
    left = state.shared["left"]
    assert all(np.array_equal(back.tensors()[name], left[name]) for name in away)


def test_own_factors_tuned_since_their_block_left_are_kept_through_further_choices() -> None:
    made = method(gal_refresh_every=1, update_share=1.0)
    state, (one,) = chosen_anew(made, [client(0)])
    tuned = again(one, 2, sensitivities=np.array([0.1, 0.4, 0.2, 0.3]))
    state, _ = one_round(made, state, [tuned])
    own, back = tuned.private_tensors[OUTSIDE][factor(0, "A")], again(tuned, 3)

    made._load(made.plan(state, back.client), back)

    assert state.facts["gal"] == [1, 3]
    assert np.array_equal(back.tensors()[factor(0, "A")], own)


def test_blocks_that_left_get_masks_of_their_own_at_once() -> None:
    made = method(gal_refresh_every=1)
    state, (one,) = chosen_anew(made, [client(0)])
    later = again(one, 2)

    one_round(made, state, [later])

    assert set(later.trainings[-1].mask or {}) == {factor(block, which) for block in (0, 3) for which in "AB"}
    assert set(later.private_tensors[FISHER]) == set(later.private_tensors[OUTSIDE])


def test_a_personal_score_puts_shared_factors_over_own_ones_of_a_block_that_entered() -> None:
    made = method(gal_refresh_every=1)
    state, (one,) = chosen_anew(made, [client(0)])
    scored = again(one, 1)

    made.restore(made.scoring(state, scored.client), scored)

    assert all(np.array_equal(scored.tensors()[name], value) for name, value in state.tensors.items())


def test_adversarial_noise_is_asked_for_and_its_passes_are_counted() -> None:
    session = client()
    state = prepared(method(noise_direction="adversarial", probes=4, pacing="none"), [session])

    assert ("sensitivity", 0.05, 4, 4, "relative", "adversarial") in session.asked
    assert state.report["passes"] == 4


def test_a_global_score_leaves_private_blocks_untouched() -> None:
    made = method(warmup_steps=0, sparse=False, evaluate="global")
    session = client(0)
    state = prepared(made, [session])
    first = again(session, 1)
    after, _ = one_round(made, state, [first])
    scored = again(first, 2)

    made.restore(made.scoring(after, scored.client), scored)

    assert {name: value.tolist() for name, value in scored.tensors().items()} == {
        name: value.tolist() for name, value in made.adapter(after).items()
    }
    assert np.array_equal(made.adapter(after)[factor(1, "A")], adapter()[factor(1, "A")])


def test_private_blocks_start_anew_after_too_many_missed_rounds() -> None:
    made = method(warmup_steps=0, sparse=False, reset_gap=2)
    session = client(0)
    state = prepared(made, [session])
    first = again(session, 1)
    one_round(made, state, [first])

    for round_number, gap, own in ((4, 2, True), (5, 3, False)):
        later = again(first, round_number, eta=0.0)
        plan = made.plan(state, later.client)
        assert made._load(plan, later) == gap
        kept = first.private_tensors[OUTSIDE][factor(1, "A")]
        assert np.array_equal(later.tensors()[factor(1, "A")], kept) == own


# ---- what was saved ----
def test_the_report_counts_the_work_that_was_saved() -> None:
    made = method(rounds=10, beta=0.4, alpha=1.0, warmup_steps=0, update_share=0.5, n_fisher=4)
    session = client()
    state = prepared(made, [session])

    after, _ = one_round(made, state, [again(session, 1)])
    report = after.report

    assert (report["m_k"], report["batches"], report["steps"], report["steps_full"]) == (2, 5, 2, 5)
    assert report["saved_batches"] == pytest.approx(0.6)
    assert report["passes"] == 2 * 2 + 4 + 4  # trained, first Fisher, refreshed Fisher
    assert report["saved_passes"] == pytest.approx(1 - 12 / 10)
    free = 2 * 12 + 2 * (1 * 3 + 2 * 2)  # two whole blocks; of the others one row of A, two rows of B
    assert report["saved_updates"] == pytest.approx(1 - 2 * free / (5 * 48))


def test_a_client_without_examples_answers_and_changes_nothing() -> None:
    made = method()
    empty = client(1, num_examples=0)
    state = prepared(made, [client(0), empty])

    update = made.local_update(made.plan(state, empty.client), again(empty, 1))

    assert update.num_examples == 0
    assert all(np.array_equal(update.tensors[name], value) for name, value in state.tensors.items())


# ---- settings ----
@pytest.mark.parametrize(
    ("job", "path"),
    [
        ({"model": {"trainable": "full"}}, "method.name"),
        ({"method": {"name": "fibecfed", "gal_ratio": 1.5}}, "method.gal_ratio"),
        ({"method": {"name": "fibecfed", "gal_ratio": "half"}}, "method.gal_ratio"),
        ({"method": {"name": "fibecfed", "pacing": "slow"}}, "method.pacing"),
        ({"evaluation": {"on": "central"}}, "method.evaluate"),
        ({"method": {"name": "fibecfed", "gal_refresh_every": 2, "gal_ratio": 1.0}}, "method.gal_refresh_every"),
        ({"method": {"name": "fibecfed", "gal_refresh_every": 2, "gal_pick": "random"}}, "method.gal_refresh_every"),
        ({"aggregation": "svd"}, "aggregation"),
    ],
)
def test_what_cannot_work_is_refused_by_its_path(job: dict[str, Any], path: str) -> None:
    spec = JobSpec.model_validate({"method": {"name": "fibecfed"}, **job})

    with pytest.raises(BadInput, match=f"^{path}"):
        build(spec)


def test_plans_name_the_blocks_and_their_version() -> None:
    made = method()
    state = prepared(made, [client()])

    plan: Plan = made.plan(state, profile(0))

    assert plan.settings == {"gal_version": 1, "gal": [0, 3], "left": {}}
