"""The baselines with own models: aggregates by hand, losses against their formulas in NumPy, reductions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from personal import CLASSES, REPRESENTATION, Federation, job, session

from lorabbit.errors import BadInput
from lorabbit.methods.personal_model.fd import Fd
from lorabbit.methods.personal_model.fedkd import FedKd, _cut, _energy_rank, _Mean
from lorabbit.methods.personal_model.fedproto import FedProto
from lorabbit.methods.personal_model.fml import Fml
from lorabbit.methods.personal_model.lg_fedavg import LgFedAvg
from lorabbit.methods.personal_model.requirements import shared_model
from lorabbit.methods.personal_model.standalone import Standalone
from lorabbit.methods.registry import build
from lorabbit.types import ClientId, ClientProfile, ClientUpdate, Plan, ServerState


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def sent(index, tensors, examples=1):
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    return ClientUpdate(ClientId(f"client-{index + 1}"), index, arrays, examples, 0.5)


def profile(index):
    return ClientProfile(ClientId(f"client-{index + 1}"), index)


def look(one, rows=8):
    """A batch of a session, without gradient."""
    return one.ensemble.forward_view(one._data.train.batch(np.arange(rows)))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(labels)), labels].mean()


def kl(student, teacher):
    told, said = log_softmax(teacher), log_softmax(student)
    return (np.exp(told) * (told - said)).sum(-1).mean()


# ---- standalone ----
def test_standalone_sends_nothing_and_folds_nothing():
    federation = Federation(job("standalone"))

    updates = federation.round(1)

    assert isinstance(federation.method, Standalone)
    assert all(update.tensors == {} for update in updates.values())
    assert federation.state.tensors == {}
    assert federation.state.report == {"trained": 3}


def test_standalone_is_plain_gradient_descent_on_the_own_loss():
    local = {"steps": 1, "batch_size": 12, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": None}
    federation = Federation(job("standalone", local=local), statistics=False)
    start = federation.open(0)
    model = start.ensemble.members["own"].requires_grad_(requires_grad=True)
    model.trunk[3].p = 0.0
    weight = model.classifier[2].weight
    start.ensemble(**start._data.train.batch(np.arange(12))).loss.backward()
    expected = (weight - 0.1 * weight.grad).detach().numpy()

    federation.models.own(0, fresh=False).model.trunk[3].p = 0.0
    one = federation.open(0)
    one.ensemble.members["own"].trunk[3].p = 0.0
    federation.method.local_update(Plan(), one)

    assert np.allclose(federation.own(0)["own.classifier.2.weight"], expected, atol=1e-6)


# ---- LG-FedAvg ----
def test_lg_fedavg_averages_last_layers_by_examples():
    updates = [sent(0, {"head.bias": [0.0, 4.0]}, 1), sent(1, {"head.bias": [4.0, 0.0]}, 3)]

    mean = LgFedAvg().aggregate(ServerState({}), updates).tensors

    assert mean["head.bias"].tolist() == [3.0, 1.0]


def test_lg_fedavg_sends_the_last_layer_and_keeps_the_trunk():
    federation = Federation(job("lg-fedavg"))
    updates = federation.round(1)

    shapes = {name: value.shape for name, value in updates[0].tensors.items()}

    assert shapes == {"head.weight": (CLASSES, REPRESENTATION), "head.bias": (CLASSES,)}
    assert np.array_equal(updates[0].tensors["head.weight"], federation.own(0)["own.classifier.2.weight"])


def test_lg_fedavg_scores_the_own_trunk_with_the_global_last_layer():
    federation = Federation(job("lg-fedavg"))
    federation.round(1)
    one = federation.open(0)

    federation.method.restore(federation.method.scoring(federation.state, one.client), one)

    found = one.tensors("own.")
    assert np.array_equal(found["own.classifier.2.weight"], federation.state.tensors["head.weight"])
    assert np.array_equal(found["own.trunk.0.weight"], federation.own(0)["own.trunk.0.weight"])


def test_lg_fedavg_refuses_a_last_layer_of_another_shape():
    federation = Federation(job("lg-fedavg"))
    wider = {"head.weight": np.zeros((CLASSES, 9), np.float32), "head.bias": np.zeros(CLASSES, np.float32)}

    with pytest.raises(BadInput, match=r"model\.variants.*\[3, 5\].*\[3, 9\]"):
        federation.method.restore(Plan(payloads={"adapter": wider}), federation.open(0))


# ---- FML ----
def test_fml_s_loss_is_the_sum_of_both_formulas():
    method = build(job("fml", method={"alpha": 0.3, "beta": 0.8}))
    one = session(method.job)
    method.initialize(one)

    with torch.no_grad():
        batch = look(one)
        own, shared = batch.logits().numpy(), batch.logits("shared").numpy()
        found = float(method._loss(batch))

    labels = batch.labels.numpy()
    expected = 0.3 * cross_entropy(own, labels) + 0.7 * kl(own, shared)
    expected += 0.8 * cross_entropy(shared, labels) + 0.2 * kl(shared, own)
    assert found == pytest.approx(expected, rel=1e-5)


def test_fml_with_labels_alone_trains_the_own_model_as_standalone_does():
    local = {"epochs": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": None}
    taught = Federation(job("fml", method={"alpha": 1, "beta": 1}, local=local), statistics=False)
    alone = Federation(job("standalone", local=local), statistics=False)
    for federation in (taught, alone):
        for index in range(3):
            without_dropout(federation, index)

    assert all(
        np.allclose(value, alone.own(k)[name], atol=1e-7) for k in range(3) for name, value in taught.own(k).items()
    )


def without_dropout(federation, index):
    """One update of a client; two models draw more dropout than one does, so there is none."""
    one = federation.open(index)
    one.ensemble.members["own"].trunk[3].p = 0.0
    federation.method.local_update(federation.method.plan(federation.state, one.client), one)


def test_fml_shares_the_small_model_alone_and_averages_it():
    federation = Federation(job("fml"))
    updates = federation.round(1)
    examples = [updates[k].num_examples for k in range(3)]
    name = "shared.classifier.2.weight"

    expected = np.average([updates[k].tensors[name] for k in range(3)], axis=0, weights=examples)

    assert isinstance(federation.method, Fml)
    assert all(tensor.startswith("shared.") for tensor in updates[0].tensors)
    assert np.allclose(federation.state.tensors[name], expected, atol=1e-7)


@pytest.mark.parametrize("name", ["fml", "fedkd"])
@pytest.mark.parametrize(
    ("model", "chosen", "expected"),
    [
        ({"variants": ["cnn:1", "cnn:2"]}, None, "cnn:5"),
        ({"variants": ["tiny:bert", "tiny:roberta"]}, None, "tiny:bert"),
        ({"name": "cnn:3"}, None, "cnn:5"),
        ({"name": "cnn:3"}, "cnn:4", "cnn:4"),
    ],
)
def test_the_shared_model_is_the_chosen_or_a_small_one(name, model, chosen, expected):
    method = build(job(name, model=model, method={"shared_model": chosen}))

    assert shared_model(method.job, method.shared_model) == expected


# ---- FedKD ----
def test_fedkd_keeps_the_least_rank_that_holds_the_energy():
    update = np.diag([3.0, 4.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # squares 16, 9, 1: shares 0.615, 0.962, 1

    assert [_energy_rank(update, kept) for kept in (0.6, 0.62, 0.96, 0.97)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    "update", [np.ones(7), np.zeros((8, 8)), np.eye(8), np.ones((1, 9))], ids=["vector", "zero", "flat", "one row"]
)
def test_fedkd_leaves_whole_what_factors_would_not_make_smaller(update):
    assert _energy_rank(update, 0.95) is None


def test_fedkd_s_factors_are_the_best_approximation_of_their_rank():
    update = np.random.default_rng(0).standard_normal((6, 5))
    values = np.linalg.svd(update, compute_uv=False)

    factors = _cut("w", update, 2)

    lost = update - factors["left.w"].astype(np.float64) @ factors["right.w"]
    assert np.linalg.norm(lost) == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)


def test_fedkd_adds_the_weighted_mean_of_updates_in_either_form():
    update = np.arange(6, dtype=np.float64).reshape(2, 3)
    mean = _Mean({"w": (2, 3)})

    mean.add(sent(0, {"update.w": update}, 1))
    mean.add(sent(1, _cut("w", 5 * update, 2), 3))

    assert np.allclose(mean.value()["w"], (1 * update + 3 * 5 * update) / 4, atol=1e-5)


def test_fedkd_reads_a_kernel_of_a_convolution_as_a_matrix():
    update = np.outer([1.0, 2.0, 3.0], np.arange(1.0, 19.0)).reshape(3, 2, 3, 3)

    factors = _cut("k", update, 1)

    mean = _Mean({"k": update.shape})
    mean.add(sent(0, factors, 2))
    assert _energy_rank(update, 0.95) == 1
    assert np.allclose(mean.value()["k"], update, atol=1e-5)


def test_fedkd_raises_the_share_of_energy_from_start_to_end():
    method = build(job("fedkd", rounds=4, method={"t_start": 0.8, "t_end": 1.0}))
    state = method.start({"shared.w": np.zeros((8, 8), np.float32)})
    shares = []
    for _ in range(4):
        state = method.aggregate(state, [sent(0, {"update.shared.w": np.ones((8, 8))})])
        shares.append(state.report["threshold"])

    assert shares == pytest.approx([0.85, 0.9, 0.95, 1.0])
    assert state.facts["ranks"] == {"shared.w": 1}
    assert {n: v.shape for n, v in method.uploads(state, profile(0)).items()} == {
        "left.shared.w": (8, 1),
        "right.shared.w": (1, 8),
    }


def test_fedkd_s_loss_weighs_distillation_by_the_task_losses():
    method = build(job("fedkd"))
    one = session(method.job)
    method.initialize(one)
    method._map(one)

    with torch.no_grad():
        batch = look(one)
        own, shared = batch.logits().numpy(), batch.logits("shared").numpy()
        mapped = batch.representation("shared").numpy() @ one.tensors("own.hidden")["own.hidden"].T
        hidden = np.square(batch.representation().numpy() - mapped).mean()
        found = float(method._loss(batch))

    labels = batch.labels.numpy()
    task = cross_entropy(own, labels) + cross_entropy(shared, labels)
    assert found == pytest.approx(task + (kl(own, shared) + kl(shared, own) + hidden) / task, rel=1e-5)


def test_fedkd_s_map_is_private_and_kept():
    federation = Federation(job("fedkd"))
    first = federation.update(0)

    assert isinstance(federation.method, FedKd)
    assert federation.own(0)["own.hidden"].shape == (REPRESENTATION, REPRESENTATION)
    assert not any("hidden" in name for name in first.tensors)


def test_fedkd_refuses_a_share_that_falls():
    with pytest.raises(BadInput, match=r"method\.t_end"):
        build(job("fedkd", method={"t_start": 0.98, "t_end": 0.95}))


# ---- FD ----
FIRST = {"logits": [[3.0, 1.0, 0.0], [1.0, 5.0, 0.0], [0.0, 0.0, 0.0]], "held": [1.0, 1.0, 0.0]}
SECOND = {"logits": [[0.0, 0.0, 0.0], [3.0, 1.0, 2.0], [9.0, 8.0, 7.0]], "held": [0.0, 1.0, 1.0]}


def folded(updates):
    start = {"logits": np.zeros((3, 3), np.float32), "held": np.zeros(3, np.float32)}
    method = Fd()
    return method, method.aggregate(method.start(start), updates)


def test_fd_means_logits_over_the_clients_that_hold_a_class():
    _, state = folded([sent(0, FIRST, 10), sent(1, SECOND, 90)])

    assert state.tensors["logits"].tolist() == [[3.0, 1.0, 0.0], [2.0, 3.0, 1.0], [9.0, 8.0, 7.0]]
    assert state.facts["holders"] == [1, 2, 1]


def test_fd_keeps_the_mean_of_a_class_that_nobody_brings():
    method, state = folded([sent(0, FIRST), sent(1, SECOND)])

    later = method.aggregate(state, [sent(1, {"logits": np.ones((3, 3)), "held": [0.0, 1.0, 1.0]})])

    assert later.tensors["logits"].tolist() == [[3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert later.facts["formed"] == [1, 2, 2]


def teacher(one, state, index, *, kept=None, when=1):
    """What a client is taught, which sent `kept` in a round."""
    method = Fd()
    if kept is not None:
        one.private_tensors["fd"] = {name: np.asarray(value, np.float32) for name, value in kept.items()}
        one.private["fd"] = when
    return method._teacher(method.plan(state, profile(index)), one)


def test_fd_s_teacher_leaves_the_client_s_own_part_out():
    _, state = folded([sent(0, FIRST), sent(1, SECOND)])

    taught = teacher(session(job("fd")), state, 0, kept=FIRST)

    assert taught["taught"].ravel().tolist() == [0.0, 1.0, 1.0]
    assert taught["teacher"].tolist() == [[0.0, 0.0, 0.0], [3.0, 1.0, 2.0], [9.0, 8.0, 7.0]]


def test_fd_s_teacher_is_the_mean_for_a_client_that_was_not_in_it():
    _, state = folded([sent(0, FIRST), sent(1, SECOND)])

    stranger = teacher(session(job("fd"), 2), state, 2)
    not_accepted = teacher(session(job("fd"), 0), state, 0, kept=FIRST, when=7)

    assert stranger["teacher"].tolist() == state.tensors["logits"].tolist()
    assert not_accepted["teacher"].tolist() == state.tensors["logits"].tolist()


def test_fd_adds_the_distance_from_the_teacher_where_there_is_one():
    method = build(job("fd", method={"gamma": 0.4}))
    one = session(method.job)
    table = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
    one.load({"teacher": table, "taught": np.array([[1.0], [0.0], [1.0]], np.float32)})

    with torch.no_grad():
        batch = look(one)
        found = float(method._loss(batch))

    logits, labels = batch.logits().numpy(), batch.labels.numpy()
    told = np.where((labels != 1)[:, None], table[labels], logits)
    assert found == pytest.approx(cross_entropy(logits, labels) + 0.4 * kl(logits, told), rel=1e-5)


# ---- FedProto ----
def test_fedproto_s_prototypes_are_means_over_all_examples_of_a_class():
    start = ServerState({"prototypes": np.full((3, 2), 9.0, np.float32), "examples": np.array([0, 0, 4], np.float32)})
    one = sent(0, {"prototypes": [[1.0, 2.0], [4.0, 0.0], [0.0, 0.0]], "examples": [10, 1, 0]})
    other = sent(1, {"prototypes": [[0.0, 0.0], [0.0, 8.0], [0.0, 0.0]], "examples": [0, 3, 0]})

    state = FedProto().aggregate(start, [one, other])

    assert state.tensors["prototypes"].tolist() == [[1.0, 2.0], [1.0, 6.0], [9.0, 9.0]]
    assert state.tensors["examples"].tolist() == [5.0, 2.0, 4.0]


def test_fedproto_answers_with_the_nearest_prototype_that_exists():
    method = build(job("fedproto"))
    one = session(method.job)
    with torch.no_grad():
        seen = look(one).representation().numpy()
    prototypes = np.stack([seen[0] + 0.5, seen[0] + 0.1, seen[0]]).astype(np.float32)
    payload = {"prototypes": prototypes, "examples": np.array([1.0, 1.0, 0.0], np.float32)}

    method.restore(Plan(payloads={"adapter": payload}), one)

    answers = one.ensemble(**one._data.train.batch(np.arange(1))).logits[0].exp()
    distances = np.square(seen[0] - prototypes[:2]).sum(-1)
    assert answers.numpy()[:2] == pytest.approx(np.exp(-distances) / np.exp(-distances).sum(), rel=1e-4)
    assert float(answers[2]) < 1e-30


def test_fedproto_answers_by_the_own_layer_before_there_is_a_prototype():
    method = build(job("fedproto"))
    one = session(method.job)

    method.restore(Plan(payloads={"adapter": method.initialize(one)}), one)

    assert one.ensemble.predict is None


def test_fedproto_s_loss_holds_representations_near_their_prototypes():
    method = build(job("fedproto", method={"lam": 2.0}))
    one = session(method.job)
    table = np.arange(CLASSES * REPRESENTATION, dtype=np.float32).reshape(CLASSES, REPRESENTATION)
    one.load({"prototypes": table, "known": np.array([[1.0], [0.0], [1.0]], np.float32)})

    with torch.no_grad():
        batch = look(one)
        found = float(method._loss(batch))

    labels, seen = batch.labels.numpy(), batch.representation().numpy()
    away = np.where((labels != 1)[:, None], seen - table[labels], 0.0)
    expected = cross_entropy(batch.logits().numpy(), labels) + 2.0 * np.square(away).mean()
    assert found == pytest.approx(expected, rel=1e-5)


def test_fedproto_refuses_representations_of_another_width():
    federation = Federation(job("fedproto"))
    payload = {"prototypes": np.zeros((3, 9), np.float32), "examples": np.ones(3, np.float32)}

    with pytest.raises(BadInput, match=r"model\.variants.*width 5.*9"):
        federation.method.local_update(Plan(payloads={"adapter": payload}), federation.open(0))


# ---- reductions ----
@pytest.mark.parametrize(("name", "neutral"), [("fd", {"gamma": 0}), ("fedproto", {"lam": 0})])
def test_without_their_term_own_models_are_those_of_standalone_to_the_bit(name, neutral):
    shared, alone = Federation(job(name, method=neutral)), Federation(job("standalone"))
    for number in (1, 2):
        shared.round(number)
        alone.round(number)

    assert all(same(shared.own(k), alone.own(k)) for k in range(3))


@pytest.mark.parametrize("name", ["fd", "fedproto", "fml", "fedkd", "lg-fedavg"])
def test_with_their_term_own_models_differ_from_standalone(name):
    shared, alone = Federation(job(name)), Federation(job("standalone"))
    for number in (1, 2):
        shared.round(number)
        alone.round(number)

    assert all(math.isfinite(float(np.sum(value))) for value in shared.own(0).values())
    assert not same({n: v for n, v in shared.own(0).items() if n != "own.hidden"}, alone.own(0))
