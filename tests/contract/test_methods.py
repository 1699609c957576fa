"""What every registered method promises; a new method inherits these tests by being registered."""

import itertools

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.serialization import read_facts, read_tensors, write_tensors
from lorabbit.types import ServerState

ROUNDS = 40
"""Long enough for methods of two stages to stay in their first one for a round."""
ADAPTER = {
    "m.lora_A.weight": np.array([[1.0, -2.0]], np.float32),
    "m.lora_B.weight": np.array([[0.5], [0.25]], np.float32),
    "classifier.weight": np.array([[0.1, 0.2]], np.float32),
}


SHARED = sorted(name for name in METHODS if not METHODS[name].personal)
"""Methods of one model; those with own models are in test_personal_methods.py."""


@pytest.fixture(params=SHARED)
def method(request):
    return build(JobSpec.model_validate({"method": {"name": request.param}, "rounds": ROUNDS}))


def begin(method):
    """The server state with which round 1 begins, from what clients send when they are asked."""
    session = clients(1)[0]
    session.load(ADAPTER)
    state = method.start(method.initialize(session))
    if not method.prepares:
        return state
    asked = clients()
    for session in asked:
        session.round = 0
    return method.aggregate(state, iter(updates_of(method, state, asked)))


def clients(number=3):
    return [
        QuadraticSession(
            {name: np.full_like(value, k + 1.0) for name, value in ADAPTER.items()},
            num_examples=10 * (k + 1),
            client=profile(k),
            scaling=2.0,
            whole={"m.weight": np.full((2, 2), k + 1.0, np.float32), "classifier.weight": np.ones((1, 2), np.float32)},
            base={"m": np.array([[3.0, 0.0], [0.0, 1.0]], np.float32)},
        )
        for k in range(number)
    ]


def updates_of(method, state, sessions):
    return [method.local_update(method.plan(state, s.client), s) for s in sessions]


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_the_same_inputs_give_the_same_bytes(method, tmp_path):
    digests = set()
    for run in range(2):
        state = begin(method)
        after = method.aggregate(state, iter(updates_of(method, state, clients())))
        digests.add(write_tensors(tmp_path / f"{run}", after.tensors, after.facts))

    assert len(digests) == 1


def test_the_order_in_which_clients_train_does_not_matter(method):
    state = begin(method)
    results = []
    for order in itertools.permutations(range(3)):
        sessions = clients()
        updates = {k: updates_of(method, state, [sessions[k]])[0] for k in order}
        results.append(method.aggregate(state, iter(updates[k] for k in sorted(updates))))

    assert all(same(results[0].tensors, r.tensors) for r in results)


def test_unchanged_uploads_are_a_fixed_point(method):
    state = begin(method)
    idle = clients()
    for session in idle:
        session.eta = 0.0

    after = method.aggregate(state, iter(updates_of(method, state, idle)))

    assert same(after.tensors, state.tensors)


def test_server_state_survives_the_codec(method, tmp_path):
    state = begin(method)
    write_tensors(tmp_path / "state", state.tensors, state.facts)
    for role, group in state.shared.items():
        write_tensors(tmp_path / f"shared-{role}", group)
    revived = ServerState(
        dict(read_tensors(tmp_path / "state")),
        read_facts(tmp_path / "state"),
        {role: dict(read_tensors(tmp_path / f"shared-{role}")) for role in state.shared},
    )

    here = method.aggregate(state, iter(updates_of(method, state, clients())))
    there = method.aggregate(revived, iter(updates_of(method, revived, clients())))

    assert same(here.tensors, there.tensors)
    assert here.facts == there.facts


def test_uploads_look_like_the_template_that_admission_checks(method):
    state = begin(method)

    for session in clients():
        template = method.uploads(state, session.client)
        (update,) = updates_of(method, state, [session])
        assert update.tensors.keys() == template.keys()
        for name, value in update.tensors.items():
            assert (value.shape, value.dtype) == (template[name].shape, template[name].dtype)


def test_updates_are_consumed_as_a_stream(method):
    state, alive = begin(method), []

    def stream():
        for session in clients():
            alive.append(session)
            yield updates_of(method, state, [session])[0]

    after = method.aggregate(state, stream())

    assert len(alive) == 3
    assert after.tensors.keys() == state.tensors.keys()


def test_private_state_never_travels(method):
    state, secret = begin(method), "a-secret-of-this-client"
    session = clients(1)[0]
    session.private["note"] = secret

    update = updates_of(method, state, [session])[0]

    assert secret not in repr(update.facts)


def test_defaults_do_not_need_any_setting(method):
    assert type(method)().model_dump() == method.model_dump()


def test_the_mean_of_equal_clients_is_any_one_of_them(method):
    state = begin(method)
    twins = [clients(1)[0], clients(1)[0]]
    one, other = updates_of(method, state, twins)

    after = method.aggregate(state, iter([one, other]))

    expected = weighted_mean([(1, one.tensors)])
    assert all(np.array_equal(after.tensors[name], value) for name, value in expected.items())
