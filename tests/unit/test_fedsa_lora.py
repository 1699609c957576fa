import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.fedsa_lora import OWN, UNSENT, FedSaLora
from lorabbit.types import ADAPTER

A, B, HEAD = "m.lora_A.weight", "m.lora_B.weight", "classifier.weight"
FIRST = {A: np.ones((2, 3)), B: np.zeros((4, 2)), HEAD: np.ones((2, 4))}


def method_of(**settings):
    return build(JobSpec.model_validate({"method": {"name": "fedsa-lora", **settings}}))


def client(index, num_examples=1):
    session = QuadraticSession({name: np.full_like(value, index + 2.0) for name, value in FIRST.items()},
                               num_examples=num_examples, client=profile(index), steps=1000)  # fmt: skip
    session.load(FIRST)
    return session


def updated(method, state, session):
    return method.local_update(method.plan(state, session.client), session)


def test_b_never_leaves_the_client_and_a_is_averaged_by_examples():
    method = method_of()
    state = method.start(FIRST)

    updates = [updated(method, state, client(0, 1)), updated(method, state, client(1, 3))]
    after = method.aggregate(state, iter(updates))

    assert all(set(u.tensors) == {A, HEAD} for u in updates)
    np.testing.assert_allclose(after.tensors[A], np.full((2, 3), 0.25 * 2 + 0.75 * 3))


def test_a_client_goes_on_from_its_own_b():
    method, session = method_of(), client(0)
    state = method.start(FIRST)
    updated(method, state, session)
    kept = session.private_tensors[OWN][B]

    again = client(0)
    again.private_tensors = session.private_tensors
    again.eta = 0.0
    updated(method, state, again)

    assert set(session.private_tensors[OWN]) == {B}
    assert np.array_equal(again.tensors()[B], kept)


def test_a_client_is_scored_with_its_own_b_and_the_shared_a():
    method, session = method_of(), client(0)
    state = method.start(FIRST)
    updated(method, state, session)
    scored = client(0)
    scored.private_tensors = session.private_tensors

    method.restore(method.scoring(state, scored.client), scored)

    np.testing.assert_array_equal(scored.tensors()[A], FIRST[A])
    np.testing.assert_allclose(scored.tensors()[B], np.full((4, 2), 2.0))


def test_a_private_head_stays_with_b():
    method, session = method_of(head="private"), client(0)

    update = updated(method, method.start(FIRST), session)

    assert set(update.tensors) == {A}
    assert set(session.private_tensors[OWN]) == {B, HEAD}


def test_what_stays_is_never_sent_and_the_export_has_the_first_b():
    method = method_of()
    state = method.start(FIRST)
    after = method.aggregate(state, iter([updated(method, state, client(0))]))

    assert set(method.plan(after, profile(0)).payloads) == {ADAPTER}
    assert after.shared[UNSENT] is state.shared[UNSENT]
    assert not method.export(after).tensors[B].any()
    np.testing.assert_allclose(method.export(after).tensors[A], np.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ({"evaluation": {"on": "central"}}, r"evaluation\.on"),
        ({"aggregation": "svd"}, "aggregation"),
        ({"model": {"lora": {"client_ranks": [4]}}}, r"model\.lora\.client_ranks"),
        ({"model": {"trainable": "full"}}, r"method\.name"),
    ],
)
def test_what_it_cannot_do_is_bad_input(parts, path):
    with pytest.raises(BadInput, match=path):
        build(JobSpec.model_validate({"method": {"name": FedSaLora.name}, **parts}))
