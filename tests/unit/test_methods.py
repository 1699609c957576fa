"""Closed forms, hand-computed aggregates, fixed points and reductions of the methods."""

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.aggregation.client_side import FROZEN, is_a
from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.methods.shared_model.fedprox import FedProx
from lorabbit.methods.shared_model.ffa_lora import FfaLora
from lorabbit.types import ADAPTER, ServerState

LORA = {
    "m.lora_A.weight": np.array([[1.0, -2.0]]),
    "m.lora_B.weight": np.array([[0.5], [0.0]]),
    "classifier.weight": np.array([[0.1, 0.2]]),
}


def run_round(method, state, sessions):
    updates = [method.local_update(method.plan(state, s.client), s) for s in sessions]
    return method.aggregate(state, iter(updates))


def unlike_quadratics(steps=1000, **settings):
    """Two clients that want w = 0 (weight 1) and w = 4 (weight 3)."""
    return [
        QuadraticSession({"w": np.array([0.0])}, num_examples=1, client=profile(0), steps=steps, **settings),
        QuadraticSession({"w": np.array([4.0])}, num_examples=3, client=profile(1), steps=steps, **settings),
    ]


def test_fedavg_takes_the_closed_form_local_step():
    session = QuadraticSession({"w": np.array([2.0])}, a=0.5, eta=0.2, steps=3)
    state = FedAvg().start({"w": np.array([10.0])})

    update = FedAvg().local_update(FedAvg().plan(state, session.client), session)

    assert update.tensors["w"] == pytest.approx(2.0 + (1 - 0.2 * 0.5) ** 3 * 8.0)
    assert update.num_examples == 10


def test_fedavg_of_two_unlike_quadratics_rests_at_their_weighted_mean():
    state = ServerState({"w": np.array([3.0])})

    after = run_round(FedAvg(), state, unlike_quadratics())

    assert after.tensors["w"] == pytest.approx(0.25 * 0.0 + 0.75 * 4.0)


def test_fedprox_local_training_rests_between_target_and_global_tensors():
    # the minimizer of 1/2 a (w-b)^2 + mu/2 (w-w0)^2 is (a b + mu w0) / (a + mu)
    session = QuadraticSession({"w": np.array([2.0])}, a=1.0, steps=2000)
    method = FedProx(mu=3.0)

    update = method.local_update(method.plan(method.start({"w": np.array([10.0])}), session.client), session)

    assert update.tensors["w"] == pytest.approx((1.0 * 2.0 + 3.0 * 10.0) / 4.0)


def test_a_pull_that_makes_its_own_steps_diverge_is_bad_input():
    settings = {"method": {"name": "fedprox", "mu": 200}, "local": {"learning_rate": 0.01}}

    with pytest.raises(BadInput, match=r"method\.mu: 200\.0 times the learning rate 0\.01 must be below 1"):
        build(JobSpec.model_validate(settings))


def test_fedprox_with_mu_zero_is_fedavg_to_the_bit():
    state = ServerState({"w": np.array([3.3])})

    fedavg = run_round(FedAvg(), state, unlike_quadratics(steps=7))
    fedprox = run_round(FedProx(mu=0.0), state, unlike_quadratics(steps=7))

    assert np.array_equal(fedavg.tensors["w"], fedprox.tensors["w"])


def test_fedprox_drifts_less_the_stronger_it_pulls():
    drifts = []
    for mu in (0.0, 1.0, 5.0):
        session = QuadraticSession({"w": np.array([2.0])}, steps=5)
        method = FedProx(mu=mu)
        update = method.local_update(method.plan(method.start({"w": np.array([10.0])}), session.client), session)
        drifts.append(abs(float(update.tensors["w"][0]) - 10.0))

    assert drifts[0] > drifts[1] > drifts[2] > 0


def lora_client(index, num_examples, target):
    wants = {name: np.full_like(value, target) for name, value in LORA.items()}
    return QuadraticSession(wants, num_examples=num_examples, client=profile(index), steps=1000)


def test_ffa_lora_never_moves_a_and_never_uploads_it():
    method, session = FfaLora(), lora_client(0, 1, 7.0)
    state = method.start(LORA)

    update = method.local_update(method.plan(state, session.client), session)
    after = method.aggregate(state, iter([update]))

    assert not [name for name in update.tensors if is_a(name)]
    assert np.array_equal(method.adapter(after)["m.lora_A.weight"], LORA["m.lora_A.weight"])
    np.testing.assert_allclose(after.tensors["m.lora_B.weight"], np.full((2, 1), 7.0))


def test_ffa_lora_averages_products_exactly():
    method, state = FfaLora(), FfaLora().start(LORA)
    sessions = [lora_client(0, 1, 2.0), lora_client(1, 3, 6.0)]
    updates = [method.local_update(method.plan(state, s.client), s) for s in sessions]

    after = method.aggregate(state, iter(updates))

    a = LORA["m.lora_A.weight"]
    mean_of_products = sum(p * u.tensors["m.lora_B.weight"] @ a for p, u in zip((0.25, 0.75), updates, strict=True))
    np.testing.assert_allclose(after.tensors["m.lora_B.weight"] @ a, mean_of_products)


def test_ffa_lora_sends_a_under_a_role_of_its_own_that_never_changes():
    method, state = FfaLora(), FfaLora().start(LORA)

    before = method.plan(state, profile(0)).payloads
    after = method.plan(run_round(method, state, [lora_client(0, 1, 7.0)]), profile(0)).payloads

    assert set(before[FROZEN]) == {"m.lora_A.weight"}
    assert set(before[ADAPTER]) == {"m.lora_B.weight", "classifier.weight"}
    assert np.array_equal(before[FROZEN]["m.lora_A.weight"], after[FROZEN]["m.lora_A.weight"])


@pytest.mark.parametrize("trainable", ["full", "bitfit", "adapter", "head"])
def test_ffa_lora_is_refused_where_there_are_no_factors(trainable):
    job = JobSpec.model_validate({"method": {"name": "ffa-lora"}, "model": {"trainable": trainable}})

    with pytest.raises(BadInput, match=f"model.trainable is '{trainable}'"):
        build(job)


def test_an_unknown_method_is_answered_with_the_nearest_one():
    with pytest.raises(BadInput, match="no method 'fedprx'; did you mean 'fedprox'"):
        build(JobSpec.model_validate({"method": {"name": "fedprx"}}))


def test_a_misspelt_hyper_parameter_is_named_with_its_path():
    with pytest.raises(BadInput, match=r"method\.muu: unknown key; did you mean 'mu'"):
        build(JobSpec.model_validate({"method": {"name": "fedprox", "muu": 1}}))


def test_an_impossible_hyper_parameter_says_what_was_expected():
    with pytest.raises(BadInput, match=r"method\.mu: .*must be at least 0.0, not -1"):
        build(JobSpec.model_validate({"method": {"name": "fedprox", "mu": -1}}))


def test_every_method_says_what_it_is_and_where_it_comes_from():
    for method in METHODS.values():
        assert len(method.summary) > 20
        assert "arXiv" in method.paper
