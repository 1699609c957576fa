import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.adalora import AdaLora, _kept
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.lora_math import Factors
from lorabbit.types import ClientUpdate

SHAPES = {"m.q": (7, 9), "m.v": (8, 6)}
HEAD = "classifier.weight"
RANK = 4


def adapter(seed=0):
    rng = np.random.default_rng(seed)
    tensors = {HEAD: rng.normal(size=(2, 3)).astype(np.float32)}
    for module, (d_out, d_in) in SHAPES.items():
        tensors |= lora_math.write(module, Factors(rng.normal(size=(RANK, d_in)).astype(np.float32),
                                              rng.normal(size=(d_out, RANK)).astype(np.float32)))  # fmt: skip
    return tensors


def method_of(rounds=10, **settings):
    return build(JobSpec.model_validate({
        "rounds": rounds, "model": {"lora": {"rank": RANK, "alpha": 8}},
        "method": {"name": "adalora", "r_min": 2, **settings},
    }))  # fmt: skip


def client(index):
    return QuadraticSession(adapter(50 + index), num_examples=10 * (index + 1), client=profile(index), scaling=2.0)


def updates_of(method, state):
    sessions = [client(k) for k in range(3)]
    return [method.local_update(method.plan(state, s.client), s) for s in sessions]


def after(method, rounds):
    state = method.start(adapter())
    for _ in range(rounds):
        state = method.aggregate(state, iter(updates_of(method, state)))
    return state


def ranks(state):
    return {module: lora_math.read(state.tensors, module).rank for module in SHAPES}


def test_while_the_budget_is_whole_it_is_fedavg():
    method = method_of(t_heat=3)
    state = method.start(adapter())
    updates = updates_of(method, state)

    folded = method.aggregate(state, iter(updates))

    expected = weighted_mean((u.num_examples, u.tensors) for u in updates)
    assert all(np.array_equal(folded.tensors[name], value) for name, value in expected.items())


@pytest.mark.parametrize("importance", ["norm", "sensitivity"])
def test_the_components_that_are_left_follow_the_schedule(importance):
    method = method_of(importance=importance)

    totals = [sum(ranks(after(method, rounds)).values()) for rounds in range(1, 11)]

    assert totals == [2 * method.budget.rank(min(t, 9)) for t in range(1, 11)]
    assert (totals[0], totals[-1]) == (2 * RANK, 2 * 2)


def test_the_most_important_components_are_kept_and_each_module_keeps_one():
    importance = {"a": [9.0, 8.0, 7.0], "b": [0.1, 0.3, 0.2]}

    assert _kept(importance, 3) == {"a": [0, 1], "b": [1]}
    assert _kept(importance, 1) == {"a": [0], "b": [1]}


def test_norms_drop_the_components_of_least_product():
    method = method_of(importance="norm", rounds=4, t_heat=0, t_cool=1, beta=0.0, r_min=1)
    state = method.start(adapter())
    folded = method.aggregate(state, updates := updates_of(method, state))
    mean = weighted_mean((u.num_examples, u.tensors) for u in updates)

    norms = sorted(
        (np.linalg.norm(mean[f"{m}.lora_B.weight"][:, i]) * np.linalg.norm(mean[f"{m}.lora_A.weight"][i]), m, i)
        for m in SHAPES
        for i in range(RANK)
    )
    budget = sum(ranks(folded).values())
    for _, module, place in norms[: 2 * RANK - budget]:
        row = mean[f"{module}.lora_A.weight"][place]
        assert not (folded.tensors[f"{module}.lora_A.weight"] == row).all(axis=1).any()


def test_sensitivity_is_the_mean_of_weight_times_gradient():
    method, session = method_of(beta=0.0), client(0)
    state = method.start(adapter())

    update = method.local_update(method.plan(state, session.client), session)

    w, g2 = (
        update.tensors,
        {n: np.square(update.tensors[n] - session.b[n]) for n in update.tensors if lora_math.is_factor(n)},
    )
    a, b = "m.q.lora_A.weight", "m.q.lora_B.weight"
    expected = (np.abs(w[a]) * np.sqrt(g2[a])).mean(axis=1) + (np.abs(w[b]) * np.sqrt(g2[b])).mean(axis=0)
    np.testing.assert_allclose(update.facts["importance"]["m.q"], expected, rtol=1e-4)


def test_only_what_is_left_travels_and_clients_fill_it_up_with_zeros():
    method = method_of(importance="norm")
    state, session = after(method, 10), client(0)

    update = method.local_update(method.plan(state, session.client), session)

    assert {n: v.shape for n, v in update.tensors.items()} == {n: v.shape for n, v in state.tensors.items()}
    assert session.rank == max(ranks(state).values())


def test_the_export_has_one_rank_and_the_scaling_of_the_job():
    state = after(method := method_of(importance="norm"), 10)

    export = method.export(state)

    assert export.config == {"r": max(ranks(state).values()), "lora_alpha": 2 * max(ranks(state).values())}
    for module in SHAPES:
        ours, theirs = lora_math.read(state.tensors, module, 2.0), lora_math.read(export.tensors, module, 2.0)
        np.testing.assert_array_equal(theirs.product(), ours.product())


def test_a_client_that_measured_something_else_is_refused():
    method = method_of()
    state = method.start(adapter())
    update = updates_of(method, state)[0]
    forged = ClientUpdate(update.client, 0, update.tensors, 1, 0.0, {"importance": {"m.q": [1.0]}, "scaling": 2.0})

    with pytest.raises(Refused, match="did not measure 4 components"):
        method.aggregate(state, [forged])


def test_a_budget_above_the_rank_is_bad_input():
    with pytest.raises(BadInput, match=r"method\.r_min: r_min is 8, above r_max"):
        method_of(r_min=8)
    assert isinstance(method_of(), AdaLora)


def test_a_client_without_examples_measures_nothing():
    method, empty = method_of(), client(0)
    empty.num_examples = 0
    state = method.start(adapter())

    silent = method.local_update(method.plan(state, empty.client), empty)
    others = updates_of(method, state)[1:]
    after = method.aggregate(state, [silent, *others])

    assert "importance" not in silent.facts
    assert after.facts["importance"] == method.aggregate(state, others).facts["importance"]
