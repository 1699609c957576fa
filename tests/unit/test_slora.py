import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.slora import SPARSE, SLora
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import count
from lorabbit.types import SHIFT

Q, V = "base_model.model.q", "base_model.model.v"
SHAPES = {Q: (20, 30), V: (25, 16)}
HEAD = "base_model.model.classifier.weight"
RANK, SCALING = 2, 2.0
WEIGHTS = {
    m: np.random.default_rng(k).normal(size=shape).astype(np.float32) for k, (m, shape) in enumerate(SHAPES.items())
}
WHOLE = {"q.weight": WEIGHTS[Q], "v.weight": np.ascontiguousarray(WEIGHTS[V].T),
         "classifier.weight": np.zeros((2, 3), np.float32), "norm.weight": np.ones(5, np.float32)}  # fmt: skip
"""As a model keeps them: v lies the other way, as in GPT-2."""
FIRST = {HEAD: np.zeros((2, 3), np.float32)} | {
    f"{m}.lora_{f}.weight": np.zeros((RANK, i) if f == "A" else (o, RANK), np.float32)
    for m, (o, i) in SHAPES.items() for f in "AB"
}  # fmt: skip


def method_of(rounds=6, aggregation="factors", **settings):
    return build(JobSpec.model_validate({
        "rounds": rounds, "aggregation": aggregation, "model": {"lora": {"rank": RANK, "alpha": SCALING * RANK}},
        "method": {"name": "slora", "sparse_rounds": 2, **settings},
    }))  # fmt: skip


def client(index, steps=3):
    rng = np.random.default_rng(10 + index)
    wants = {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in WHOLE.items()}
    session = QuadraticSession({n: np.full_like(v, index + 1.0) for n, v in FIRST.items()}, steps=steps,
                               whole=wants, base=WEIGHTS, scaling=SCALING, num_examples=1 + index,
                               client=profile(index))  # fmt: skip
    session.select("whole")
    session.load(WHOLE)
    session.select("adapter")
    return session


def one_round(method, state, clients=3):
    updates = []
    for index in range(clients):
        session = client(index)
        updates.append(method.local_update(method.plan(state, session.client), session))
    return method.aggregate(state, iter(updates))


def after(method, rounds):
    state = method.start(FIRST)
    for _ in range(rounds):
        state = one_round(method, state)
    return state


def dense(method, state, module):
    flat = np.zeros(WEIGHTS[module].size)
    flat[method.positions(module, *SHAPES[module])] = state.tensors[module + SPARSE]
    return flat.reshape(SHAPES[module])


def test_the_first_stage_moves_the_masked_entries_and_the_head_alone():
    method, session = method_of(), client(0)
    update = method.local_update(method.plan(method.start(FIRST), session.client), session)

    moved = {name: value != WHOLE[name] for name, value in session._values["whole"].items()}

    where = np.zeros(SHAPES[Q], bool).reshape(-1)
    where[method.positions(Q, *SHAPES[Q])] = True
    np.testing.assert_array_equal(moved["q.weight"], where.reshape(SHAPES[Q]))
    assert not moved["norm.weight"].any()
    assert moved["classifier.weight"].all()
    assert set(update.tensors) == {Q + SPARSE, V + SPARSE, HEAD}


def test_a_weight_that_lies_the_other_way_is_masked_at_the_same_places():
    method, session = method_of(), client(0)
    update = method.local_update(method.plan(method.start(FIRST), session.client), session)

    places = method.positions(V, *SHAPES[V])
    difference = (session._values["whole"]["v.weight"].T - WEIGHTS[V]).reshape(-1)

    np.testing.assert_allclose(update.tensors[V + SPARSE], difference[places], atol=1e-6)
    assert np.count_nonzero(difference) == len(places)


def test_both_stages_send_the_same_number_of_values():
    method = method_of()

    assert count(after(method, 0).tensors) == count(after(method, 2).tensors)


def test_the_mean_of_sparse_updates_is_the_sparse_part_of_the_mean():
    method = method_of()
    state = method.start(FIRST)
    updates = [method.local_update(method.plan(state, profile(k)), client(k)) for k in range(3)]

    folded = method.aggregate(state, iter(updates))

    expected = sum((k + 1) / 6 * u.tensors[Q + SPARSE].astype(np.float64) for k, u in enumerate(updates))
    np.testing.assert_allclose(folded.tensors[Q + SPARSE], expected, rtol=1e-5, atol=1e-6)


def test_lora_starts_from_the_best_approximation_of_what_was_learnt():
    method = method_of()
    state = after(method, 1)
    sessions = [client(k) for k in range(3)]
    updates = [method.local_update(method.plan(state, s.client), s) for s in sessions]
    total = {m: sum((k + 1) / 6 * np.asarray(u.tensors[m + SPARSE], np.float64) for k, u in enumerate(updates))
             for m in SHAPES}  # fmt: skip

    begun, tails = method.aggregate(state, iter(updates)), []

    for module, shape in SHAPES.items():
        flat = np.zeros(WEIGHTS[module].size)
        flat[method.positions(module, *shape)] = total[module]
        u, s, vt = np.linalg.svd(flat.reshape(shape))
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(lora_math.read(begun.tensors, module, SCALING).product(), best, atol=1e-5)
        tails.append(np.sum(s[RANK:] ** 2))
    size = sum(np.sum(total[module] ** 2) for module in SHAPES)
    assert begun.report["lost"] == pytest.approx(np.sqrt(sum(tails) / size), rel=1e-4)


def test_the_adapter_of_the_first_stage_is_the_one_that_would_start_now():
    method = method_of()
    state = after(method, 1)

    product = lora_math.read(method.adapter(state), Q, SCALING).product()

    u, s, vt = np.linalg.svd(dense(method, state, Q))
    np.testing.assert_allclose(product, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5)


def test_a_client_continues_from_what_all_have_learnt():
    method, session = method_of(), client(0)
    state = after(method, 1)

    method.restore(method.scoring(state, session.client), session)

    session.select("whole")
    np.testing.assert_allclose(session.tensors()["q.weight"] - WEIGHTS[Q], dense(method, state, Q), atol=1e-6)
    np.testing.assert_allclose(session.tensors()["v.weight"].T - WEIGHTS[V], dense(method, state, V), atol=1e-6)


def test_the_second_stage_folds_by_the_aggregation_of_the_job():
    method = method_of(aggregation="exact")

    state = after(method, 4)

    assert SHIFT in state.shared
    assert state.report["aggregation_error"] < 1e-6


def test_a_mask_covers_the_density_that_a_job_asks_for():
    assert len(method_of(density=0.5).positions(Q, 20, 30)) == 300


def test_a_rank_above_the_smaller_side_of_a_weight_is_bad_input():
    wide = {name: np.zeros((17, value.shape[1]) if ".lora_A." in name else (len(value), 17), np.float32)
            for name, value in FIRST.items() if ".lora_" in name}  # fmt: skip

    with pytest.raises(
        BadInput, match=rf"model\.lora\.rank: {V}: a 25 x 16 weight has 16 components, not 17; lower it"
    ):
        method_of().initialize(QuadraticSession(wide))


def test_a_first_stage_as_long_as_the_job_is_bad_input():
    with pytest.raises(BadInput, match=r"method\.sparse_rounds"):
        method_of(rounds=2)
    assert isinstance(method_of(), SLora)
