"""FeDeRA against dense SVDs; its invariants by their ids in the specification."""

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import build
from lorabbit.methods.shared_model.federa import FeDeRA
from lorabbit.tensors import lora_math
from lorabbit.tensors.serialization import read_tensors, write_tensors
from lorabbit.types import ADAPTER, SHIFT, Plan

SHAPES = {"m.q": (12, 9), "m.v": (8, 16)}
HEAD = "classifier.weight"
RANK, SCALING = 4, 2.0
WEIGHTS = {
    m: np.random.default_rng(k).normal(size=shape).astype(np.float32) for k, (m, shape) in enumerate(SHAPES.items())
}
FACTORS = {
    f"{module}.lora_{factor}.weight": (RANK, d_in) if factor == "A" else (d_out, RANK)
    for module, (d_out, d_in) in SHAPES.items()
    for factor in "AB"
}


def job(*, client_ranks=None, local=None, dropout=0.0, **settings):
    return JobSpec.model_validate(
        {
            "model": {
                "lora": {"rank": RANK, "alpha": SCALING * RANK, "client_ranks": client_ranks, "dropout": dropout}
            },
            "method": {"name": "federa", **settings},
            "local": local or {},
        }
    )


def client(index, eta=0.1):
    rng = np.random.default_rng(100 + index)
    wants = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {**FACTORS, HEAD: (2, 3)}.items()}
    return QuadraticSession(
        wants, eta=eta, num_examples=10 + index, client=profile(index), scaling=SCALING, base=WEIGHTS
    )


def begin(method):
    return method.start(method.initialize(client(0)))


def one_round(method, state, *, clients=3, eta=0.1):
    sessions = [client(k, eta) for k in range(clients)]
    return method.aggregate(state, [method.local_update(method.plan(state, s.client), s) for s in sessions])


def effective(session):
    """The weights of a forward pass: the shifted base, and the factors that are loaded."""
    adapter = session.tensors()
    return {m: session.shifted()[m] + lora_math.read(adapter, m, SCALING).product() for m in SHAPES}


def exported(method, state):
    """The weights that a user of the export gets, on the unmodified base."""
    export = method.export(state)
    scaling = export.config["lora_alpha"] / export.config["r"]
    return {m: WEIGHTS[m] + lora_math.read(export.tensors, m, scaling).product() for m in SHAPES}


def test_I1_I2_the_model_starts_as_the_pre_trained_one():
    method, session = build(job()), client(1)

    method.restore(method.plan(begin(method), session.client), session)

    for module, weight in effective(session).items():
        np.testing.assert_allclose(weight, WEIGHTS[module], atol=1e-5 * np.abs(WEIGHTS[module]).max())


@pytest.mark.parametrize("module", SHAPES)
def test_I3_the_start_is_balanced_and_leaves_the_rest_of_the_spectrum(module):
    start = build(job()).initialize(client(0))
    a, b = (start[f"{module}.lora_{f}.weight"].astype(np.float64) for f in "AB")
    sigma = np.linalg.svd(WEIGHTS[module].astype(np.float64))[1]

    np.testing.assert_allclose(b.T @ b, np.diag(sigma[:RANK] / SCALING), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-5)
    assert np.linalg.norm(WEIGHTS[module] - SCALING * b @ a, 2) == pytest.approx(sigma[RANK], rel=1e-5)
    assert (b.shape, a.shape) == (FACTORS[f"{module}.lora_B.weight"], FACTORS[f"{module}.lora_A.weight"])


def test_I4_an_update_from_another_start_is_refused():
    method = build(job())
    state = begin(method)
    flipped = method.start({name: -value if name in FACTORS else value for name, value in state.tensors.items()})
    update = method.local_update(method.plan(flipped, profile(1)), client(1))

    with pytest.raises(Refused, match="another start"):
        method.aggregate(state, [update])


def test_I4_a_client_refuses_a_start_that_the_plan_does_not_name():
    method = build(job())
    plan = method.plan(begin(method), profile(0))
    wrong = {name: -value for name, value in plan.payloads[SHIFT].items()}

    with pytest.raises(Refused, match="not the one that the plan names"):
        method.restore(Plan(plan.phase, {**plan.payloads, SHIFT: wrong}, plan.settings), client(0))


def test_I4_the_signs_of_the_start_are_fixed():
    start = build(job()).initialize(client(0))

    for module in SHAPES:
        b = start[f"{module}.lora_B.weight"]
        assert (b[np.abs(b).argmax(axis=0), np.arange(RANK)] > 0).all()


def test_I5_unchanged_uploads_leave_the_pre_trained_model():
    method = build(job())
    state = begin(method)

    after = one_round(method, state, eta=1e-30)

    assert all(np.array_equal(after.tensors[name], state.tensors[name]) for name in FACTORS)
    for module, weight in exported(method, after).items():
        np.testing.assert_allclose(weight, WEIGHTS[module], atol=1e-5)


def test_I6_clients_count_by_their_examples_among_those_who_took_part():
    method = build(job())
    state = begin(method)
    updates = [method.local_update(method.plan(state, profile(k)), client(k)) for k in (0, 2)]

    after = method.aggregate(state, updates)

    for name in FACTORS:
        one, other = (u.tensors[name].astype(np.float64) for u in updates)
        np.testing.assert_allclose(after.tensors[name], (10 * one + 12 * other) / 22, rtol=1e-6)


def test_I7_only_factors_and_head_move():
    method, session = build(job()), client(0)
    plan = method.plan(begin(method), session.client)
    method.restore(plan, session)
    before = session.shifted()

    update = method.local_update(plan, session)

    assert set(update.tensors) == {*FACTORS, HEAD}
    assert all(np.array_equal(before[m], session.shifted()[m]) for m in SHAPES)
    assert all(not np.array_equal(update.tensors[n], plan.payloads[ADAPTER][n]) for n in FACTORS)


def test_I8_the_mean_of_products_misses_the_product_of_means_by_the_covariance():
    method = build(job())
    state = begin(method)
    updates = [method.local_update(method.plan(state, profile(k)), client(k)) for k in range(3)]
    p = np.array([u.num_examples for u in updates]) / sum(u.num_examples for u in updates)

    after = method.aggregate(state, updates)

    for module in SHAPES:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        mean = sum(w * u.tensors[b] @ u.tensors[a] for w, u in zip(p, updates, strict=True))
        missed = sum(
            w * (u.tensors[b] - after.tensors[b]) @ (u.tensors[a] - after.tensors[a])
            for w, u in zip(p, updates, strict=True)
        )
        np.testing.assert_allclose(mean - after.tensors[b] @ after.tensors[a], missed, atol=1e-5)


def test_I9_the_export_of_twice_the_rank_is_the_model_on_the_unmodified_base():
    method, session = build(job()), client(0)
    state = one_round(method, one_round(method, begin(method)))
    method.restore(method.scoring(state, session.client), session)

    export = method.export(state)

    assert (export.config, export.base) == ({"r": 2 * RANK, "lora_alpha": 2 * SCALING * RANK}, None)
    for module, weight in effective(session).items():
        np.testing.assert_allclose(exported(method, state)[module], weight, atol=1e-5)


def test_I10_installing_twice_takes_the_start_out_once():
    method, session = build(job()), client(0)
    plan = method.plan(begin(method), session.client)

    for _ in range(2):
        method.restore(plan, session)

    for module, weight in effective(session).items():
        np.testing.assert_allclose(weight, WEIGHTS[module], atol=1e-5)


def test_I11_the_start_survives_the_wire_to_the_bit(tmp_path):
    state = begin(build(job()))
    write_tensors(tmp_path / "shift", state.shared[SHIFT])

    back = read_tensors(tmp_path / "shift")

    assert all(np.array_equal(back[name], value) for name, value in state.shared[SHIFT].items())


def test_I12_the_control_differs_in_nothing_but_the_start():
    federa, control = build(job()), build(job(components="random"))
    ours, theirs = begin(federa), begin(control)

    for module, weight in exported(control, theirs).items():
        np.testing.assert_array_equal(weight, WEIGHTS[module])
    assert federa.plan(ours, profile(0)).settings.keys() == control.plan(theirs, profile(0)).settings.keys()
    assert np.array_equal(ours.tensors[HEAD], theirs.tensors[HEAD])


@pytest.mark.parametrize(
    ("parts", "path"),
    [({"local": {"weight_decay": 0.01}}, r"local\.weight_decay"), ({"dropout": 0.1}, r"model\.lora\.dropout")],
)
def test_I13_decay_and_dropout_are_refused(parts, path):
    with pytest.raises(BadInput, match=path):
        build(job(**parts))


def test_I14_clients_of_unlike_data_learn():
    method = build(job())
    state = begin(method)

    first, last = [client(k) for k in range(3)], [client(k) for k in range(3)]
    for session in first:
        method.restore(method.scoring(state, session.client), session)
    for _ in range(3):
        state = one_round(method, state)
    for session in last:
        method.restore(method.scoring(state, session.client), session)

    assert sum(s.loss() for s in last) < sum(s.loss() for s in first)


def test_without_the_residual_the_model_starts_changed():
    method, session = build(job(residual=False)), client(0)

    method.restore(method.plan(begin(method), session.client), session)

    assert all(not np.allclose(weight, WEIGHTS[m]) for m, weight in effective(session).items())


def test_the_minor_components_are_the_smallest_ones():
    start = build(job(components="minor")).initialize(client(0))
    sigma = np.linalg.svd(WEIGHTS["m.q"])[1]

    assert lora_math.norm(lora_math.read(start, "m.q", SCALING)) == pytest.approx(
        np.linalg.norm(sigma[-RANK:]), rel=1e-5
    )


def test_a_weak_client_starts_from_the_whole_model_and_trains_the_first_components():
    method, session = build(job(client_ranks=[RANK, 2])), client(1)
    state = one_round(method, begin(method))
    strong = client(0)
    method.restore(method.plan(state, strong.client), strong)

    method.restore(method.plan(state, session.client), session)
    update = method.local_update(method.plan(state, session.client), session)

    assert {update.tensors[f"{m}.lora_A.weight"].shape[0] for m in SHAPES} == {2}
    fresh = client(1)
    method.restore(method.plan(state, fresh.client), fresh)
    for module, weight in effective(fresh).items():
        np.testing.assert_allclose(weight, effective(strong)[module], atol=1e-5)


def test_components_that_nobody_trained_stay():
    method = build(job(client_ranks=[2]))
    state = begin(method)

    after = method.aggregate(state, [method.local_update(method.plan(state, profile(0)), client(0))])

    a = "m.q.lora_A.weight"
    np.testing.assert_array_equal(after.tensors[a][2:], state.tensors[a][2:])
    assert not np.array_equal(after.tensors[a][:2], state.tensors[a][:2])


def test_a_rank_above_the_weight_is_bad_input():
    method = FeDeRA()
    session = client(0)
    session.base = {m: WEIGHTS[m][:2] for m in SHAPES}

    with pytest.raises(BadInput, match=r"model\.lora\.rank: m\.q: .* has 2 components"):
        method.initialize(session)


def test_every_client_gets_the_same_start_object():
    method = build(job())
    state = begin(method)
    later = one_round(method, state)

    assert method.plan(state, profile(0)).payloads[SHIFT] is method.plan(later, profile(2)).payloads[SHIFT]
