"""pFedLoRA's invariants, by their ids in the specification."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from personal import CLASSES, LOCAL, WIDTHS, Federation, job, session

from lorabbit.errors import BadInput
from lorabbit.methods.personal_model.pfedlora import ALIGN, A, B, PFedLora
from lorabbit.methods.personal_model.requirements import is_own
from lorabbit.methods.registry import build
from lorabbit.tensors import serialization
from lorabbit.types import ClientId, ClientUpdate, Plan, ServerState

STILL = {**LOCAL, "learning_rate": 1e-30, "weight_decay": 0.0}
WIDEST = max(WIDTHS)


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def opened(method, index=0):
    """A session that holds a global adapter, as in the middle of a task."""
    one = session(method.job, index)
    one.load(method.initialize(one))
    return one


def update(index, value, examples):
    tensors = {A: np.full((2, 4), value, np.float32), B: np.full((3, 2), -value, np.float32)}
    return ClientUpdate(ClientId(f"client-{index + 1}"), index, tensors, examples, 0.5, {"adapter_loss": value})


def test_J1_the_first_phase_leaves_the_adapter_and_the_second_the_own_model_to_the_bit():
    method = build(job())
    one = opened(method)
    given = one.tensors("adapter.")

    one.train(method._own_loss, moving=is_own)
    own = one.tensors("own.")
    assert same(one.tensors("adapter."), given)

    one.train(method._adapter_loss, moving=lambda name: name.startswith("adapter."), stream="adapter")
    assert any("running_mean" in name for name in own)
    assert same(one.tensors("own."), own)


def test_J2_both_phases_move_what_they_train():
    method = build(job())
    one = opened(method)
    before = one.tensors()

    one.train(method._own_loss, moving=is_own)
    one.train(method._adapter_loss, moving=lambda name: name.startswith("adapter."), stream="adapter")

    assert all(not np.array_equal(value, before[name]) for name, value in one.tensors().items())


def test_J3_the_adapter_has_one_shape_for_all_and_a_narrow_trunk_is_padded_with_zeros():
    method = build(job(local={**LOCAL, "weight_decay": 0.0}))
    narrow, wide = opened(method, 0), opened(method, 1)
    assert {n: v.shape for n, v in narrow.tensors("adapter.").items()} == {A: (2, WIDEST), B: (CLASSES, 2)}
    assert {n: v.shape for n, v in wide.tensors("adapter.").items()} == {A: (2, WIDEST), B: (CLASSES, 2)}
    before = narrow.tensors(A)[A]

    narrow.train(method._adapter_loss, moving=lambda name: name.startswith("adapter."))

    after = narrow.tensors(A)[A]
    assert np.array_equal(after[:, WIDTHS[0] :], before[:, WIDTHS[0] :])
    assert not np.array_equal(after[:, : WIDTHS[0]], before[:, : WIDTHS[0]])


def test_J4_the_payload_is_the_adapter_and_holds_no_byte_sequence_of_the_own_model(tmp_path):
    federation = Federation(job())
    sent = federation.update(1)
    serialization.write_tensors(tmp_path / "upload", sent.tensors)
    written = (tmp_path / "upload").read_bytes()

    header = int.from_bytes(written[:8], "little")
    assert len(written) - 8 - header == 4 * 2 * (WIDEST + CLASSES)
    own = federation.own(1)
    assert len(own) > 8
    for name, value in own.items():
        assert name.encode() not in written
        assert value.nbytes < 12 or value.tobytes() not in written


def test_J5_the_mean_is_weighted_by_examples_over_those_that_took_part():
    method, state = PFedLora(rank=2), ServerState({})

    mean = method.aggregate(state, [update(0, 1.0, 10), update(2, 4.0, 30)]).tensors

    assert np.array_equal(mean[A], np.full((2, 4), 0.25 * 1 + 0.75 * 4, np.float32))
    assert np.array_equal(mean[B], np.full((3, 2), -3.25, np.float32))


def test_J5_identical_uploads_are_a_fixed_point_and_one_upload_is_copied():
    method, state = PFedLora(rank=2), ServerState({})

    assert same(method.aggregate(state, [update(k, 0.3, 7 + k) for k in range(3)]).tensors, update(0, 0.3, 1).tensors)
    assert same(method.aggregate(state, [update(1, 0.7, 5)]).tensors, update(1, 0.7, 5).tensors)


def test_J5_the_report_tells_the_mean_loss_of_the_second_phase():
    told = PFedLora(rank=2).aggregate(ServerState({}), [update(0, 1.0, 10), update(2, 4.0, 30)]).report

    assert told == {"adapter_loss": 3.25}


def test_J6_the_second_phase_starts_from_what_was_received():
    federation = Federation(job(local=STILL))
    federation.round(1)
    given = {A: np.full((2, WIDEST), 0.5, np.float32), B: np.full((CLASSES, 2), -0.25, np.float32)}
    federation.state = ServerState(given)

    assert same(federation.update(0, 2).tensors, given)


def test_J7_an_own_model_stays_as_it_is_while_its_client_is_not_asked():
    federation = Federation(job())
    federation.round(1)
    before = federation.own(1)

    federation.round(2, (0, 2))

    assert same(federation.own(1), before)
    assert same(federation.open(1, 3).tensors("own."), before)


def test_J8_without_mu_own_models_are_those_of_standalone_to_the_bit():
    pfedlora, standalone = Federation(job(method={"mu": 0})), Federation(job("standalone"))
    for number in (1, 2):
        pfedlora.round(number)
        standalone.round(number)

    assert all(same(pfedlora.own(k), standalone.own(k)) for k in range(3))


def test_J8_with_mu_own_models_differ_from_standalone():
    pfedlora, standalone = Federation(job(method={"mu": 0.5})), Federation(job("standalone"))
    pfedlora.round(1)
    standalone.round(1)

    assert not same(pfedlora.own(0), standalone.own(0))


def test_J9_the_adapter_s_loss_reaches_the_trunk_and_not_the_head():
    method = build(job())
    one = opened(method)
    model = one.ensemble.members["own"].requires_grad_(requires_grad=True)
    batch = one.ensemble.forward_view(one._data.train.batch(np.arange(8)))

    batch.cross_entropy(method._adapter(batch)).backward()

    assert all(value.grad is None for value in model.classifier.parameters())
    assert float(model.trunk[0].weight.grad.abs().sum()) > 0


def test_J10_a_sum_begins_as_the_own_answer():
    method = build(job(method={"combine": "sum"}))
    one = opened(method)

    with torch.no_grad():
        batch = one.ensemble.forward_view(one._data.train.batch(np.arange(8)))
        assert torch.equal(method._sum(batch), batch.logits())


def test_J10_the_first_training_under_a_sum_is_that_of_standalone():
    added, standalone = Federation(job(method={"combine": "sum"})), Federation(job("standalone"))

    added.round(1)
    standalone.round(1)

    assert all(same(added.own(k), standalone.own(k)) for k in range(3))


def test_J13_each_client_s_optimizer_is_fresh_so_that_their_order_does_not_matter():
    results = []
    for order in itertools.permutations(range(3)):
        federation = Federation(job())
        federation.round(1, order)
        results.append(federation.state.tensors)

    assert all(same(results[0], other) for other in results[1:])


def test_J14_another_seed_gives_another_adapter():
    first, again, other = Federation(job()), Federation(job()), Federation(job(seed=1))

    assert same(first.state.tensors, again.state.tensors)
    assert not same(first.state.tensors, other.state.tensors)


def test_J15_an_adapter_survives_the_wire(tmp_path):
    tensors = Federation(job()).state.tensors

    serialization.write_tensors(tmp_path / "adapter", tensors)

    assert same(dict(serialization.read_tensors(tmp_path / "adapter")), tensors)


def test_the_adapter_is_drawn_with_the_variances_of_its_widths():
    one = session(job())
    tensors = build(job(method={"rank": 512})).initialize(one)

    assert np.std(tensors[A]) == pytest.approx(WIDEST**-0.5, rel=0.1)
    assert np.std(tensors[B]) == pytest.approx(512**-0.5, rel=0.1)


def test_mu_mixes_the_two_losses():
    method = build(job(method={"mu": 0.3}))
    one = opened(method)

    with torch.no_grad():
        batch = one.ensemble.forward_view(one._data.train.batch(np.arange(8)))
        first, second = batch.cross_entropy(method._adapter(batch)), batch.cross_entropy(batch.logits())
        assert float(method._own_loss(batch)) == pytest.approx(0.3 * float(first) + 0.7 * float(second), rel=1e-6)


def test_at_the_head_the_adapter_reads_the_input_of_the_last_layer():
    method = build(job(method={"site": "head"}))
    one = opened(method)
    tensors = one.tensors("adapter.")

    with torch.no_grad():
        batch = one.ensemble.forward_view(one._data.train.batch(np.arange(8)))
        by_hand = batch.representation().numpy() @ tensors[A].T @ tensors[B].T
        assert np.allclose(method._adapter(batch).numpy(), by_hand, atol=1e-6)


def test_answers_can_be_mixed_by_mu():
    method = build(job(method={"infer": "mix", "mu": 0.3}))
    one = opened(method)
    method.restore(Plan(payloads={"adapter": one.tensors("adapter.")}), one)

    with torch.no_grad():
        batch = one.ensemble.forward_view(one._data.test.batch(np.arange(8)))
        mixed = 0.3 * batch.softmax(method._adapter(batch)) + 0.7 * batch.softmax(batch.logits())
        answers = one.ensemble(**one._data.test.batch(np.arange(8)))

    assert torch.allclose(answers.logits.exp(), mixed, atol=1e-6)


def test_a_private_map_brings_a_narrow_trunk_to_the_width_and_stays_private():
    federation = Federation(job(method={"align": "linear"}))
    first = federation.update(0)
    drawn = federation.own(0)[ALIGN]

    federation.update(0, 2)

    assert drawn.shape == (WIDEST, WIDTHS[0])
    assert not np.array_equal(federation.own(0)[ALIGN], drawn)
    assert ALIGN not in first.tensors
    federation.update(1)
    assert ALIGN not in federation.own(1)


def test_the_second_phase_may_have_epochs_of_its_own():
    one = session(job())
    method = build(job(method={"adapter_epochs": 5}))

    sent = method.local_update(Plan(payloads={"adapter": method.initialize(one)}), one)

    assert (sent.facts["steps"], sent.facts["adapter_steps"]) == (2 * 3, 5 * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.6}, r"method\.mu: 0\.6 .*at most 0\.5"),
        ({"combine": "sum", "infer": "mix"}, r"method\.infer"),
        ({"combine": "sum", "mu": 0.3}, r"method\.mu: with combine 'sum' there is one loss"),
        ({"site": "body"}, r"method\.site"),
    ],
)
def test_what_the_maths_forbids_is_refused_with_the_reason(settings, message):
    with pytest.raises(BadInput, match=message):
        build(job(method=settings))


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, []), ({"infer": "mix"}, ["adapter"]), ({"combine": "sum"}, ["adapter"])]
)
def test_clients_are_sent_the_adapter_for_scoring_only_where_it_answers(settings, expected):
    federation = Federation(job(method=settings))

    plan = federation.method.scoring(federation.state, federation.open(0).client)

    assert list(plan.payloads) == expected
