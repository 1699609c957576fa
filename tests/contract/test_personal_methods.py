"""What every method with own models promises; a new one inherits these tests by being registered."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import for_each
from personal import LOCAL, Federation, job

from lorabbit.errors import BadInput
from lorabbit.methods.registry import METHODS, build
from lorabbit.tensors.serialization import read_facts, read_tensors, write_tensors
from lorabbit.types import ServerState

PERSONAL = sorted(name for name in METHODS if METHODS[name].personal)
IDLE = {**LOCAL, "learning_rate": 1e-30, "weight_decay": 0.0}


@pytest.fixture(params=PERSONAL)
def name(request):
    return request.param


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_the_same_inputs_give_the_same_bytes(name, tmp_path):
    digests = set()
    for run in range(2):
        federation = Federation(job(name))
        federation.round(1)
        federation.round(2)
        digests.add(write_tensors(tmp_path / f"{run}", federation.state.tensors, federation.state.facts))

    assert len(digests) == 1


def test_the_order_in_which_clients_train_does_not_matter(name):
    results = []
    for order in itertools.permutations(range(3)):
        federation = Federation(job(name))
        federation.round(1, order)
        results.append((federation.state.tensors, [federation.own(k) for k in range(3)]))

    assert all(same(results[0][0], tensors) for tensors, _ in results)
    assert all(same(results[0][1][k], own[k]) for _, own in results for k in range(3))


def test_what_idle_clients_bring_is_a_fixed_point(name):
    federation = Federation(job(name, local=IDLE), statistics=False)
    federation.round(1)
    before = federation.state.tensors

    federation.round(2)

    assert same(federation.state.tensors, before)


def test_server_state_survives_the_codec(name, tmp_path):
    here, there = Federation(job(name)), Federation(job(name))
    here.round(1)
    there.round(1)
    write_tensors(tmp_path / "state", there.state.tensors, there.state.facts)
    there.state = ServerState(dict(read_tensors(tmp_path / "state")), read_facts(tmp_path / "state"))

    here.round(2)
    there.round(2)

    assert same(here.state.tensors, there.state.tensors)
    assert here.state.facts == there.state.facts


def test_uploads_look_like_the_template_that_admission_checks(name):
    federation = Federation(job(name))
    for number in (1, 2):
        template = {k: federation.method.uploads(federation.state, federation.open(k).client) for k in range(3)}
        updates = federation.round(number)
        for index, update in updates.items():
            assert {n: (v.shape, v.dtype) for n, v in update.tensors.items()} == {
                n: (v.shape, v.dtype) for n, v in template[index].items()
            }


def test_no_tensor_of_the_own_model_travels(name):
    federation = Federation(job(name))

    for update in federation.round(1).values():
        assert not any(tensor.startswith("own.") for tensor in update.tensors)


def test_a_client_keeps_its_own_model_from_task_to_task(name):
    federation = Federation(job(name))
    federation.round(1)
    kept = federation.own(0)

    found = federation.open(0, 2).tensors("own.")

    assert same(found, kept)


def test_one_client_never_sees_the_model_of_another_with_its_architecture(name):
    together, alone = Federation(job(name)), Federation(job(name))
    together.round(1, (0, 2))
    alone.round(1, (2,))

    assert same(together.own(2), alone.own(2))


def test_scoring_changes_nothing_that_is_kept(name):
    federation = Federation(job(name))
    federation.round(1)
    before = federation.own(1)
    one = federation.open(1, 1)

    federation.method.restore(federation.method.scoring(federation.state, one.client), one)

    assert same(federation.own(1), before)


def test_a_client_that_never_took_part_can_be_scored(name):
    federation = Federation(job(name))
    federation.round(1, (0,))
    one = federation.open(1, 1)

    federation.method.restore(federation.method.scoring(federation.state, one.client), one)

    assert np.isfinite(one.ensemble(**one._data.test.batch(np.arange(4))).loss.item())


def test_a_client_that_comes_late_joins_from_the_global_state(name):
    federation = Federation(job(name))
    federation.round(1, (0, 1))

    updates = federation.round(2, (2,))

    assert np.isfinite(updates[2].loss)


def test_defaults_do_not_need_any_setting(name):
    assert (
        METHODS[name]().model_dump()
        == build(job(name, method={})).model_copy(update={"rank": 8} if name == "pfedlora" else {}).model_dump()
    )


@for_each(
    changes__message=[
        ({"model": {"task": "causal-lm"}}, r"model\.task"),
        ({"model": {"trainable": "bitfit"}}, r"model\.trainable"),
        ({"aggregation": "svd"}, "aggregation"),
        ({"evaluation": {"on": "central"}}, r"evaluation\.on"),
        ({"model": {"name": "null:1MB"}}, r"model\.name"),
        ({"model": {"variants": ["cnn:1", "null:1MB"]}}, r"model\.name"),
    ],
)
def test_a_job_without_own_classifiers_is_refused_with_the_reason(name, changes, message):
    with pytest.raises(BadInput, match=message):
        build(job(name, **changes))


def test_variants_are_refused_for_a_method_of_one_model():
    with pytest.raises(BadInput, match=r"model\.variants"):
        build(job("fedavg", model={"variants": ["cnn:1"]}))
