"""Closed forms of the aggregation rules, on dense products that the rules themselves never form."""

import weakref
from collections import UserDict

import numpy as np
import pytest
from doubles import QuadraticSession, profile

from lorabbit.aggregation import client_side
from lorabbit.aggregation.aggregator import HELD, Aggregation
from lorabbit.aggregation.base_delta import compressed
from lorabbit.aggregation.rules import RULES, FactorShape, mean_of_components
from lorabbit.errors import BadInput, Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.methods.shared_model.fedavg import FedAvg
from lorabbit.tensors import lora_math
from lorabbit.tensors.arithmetic import weighted_mean
from lorabbit.tensors.lora_math import Factors
from lorabbit.tensors.serialization import read_tensors, write_tensors
from lorabbit.types import ADAPTER, SHIFT, ClientUpdate, ServerState

SHAPES = {"m.q": (7, 9), "m.v": (12, 6)}
"""d_out, d_in."""
HEAD = "classifier.weight"


def setting(rule, rank=4, scaling=2.0, client_ranks=None):
    return Aggregation(RULES[rule], rank, scaling, client_ranks, seed=3)


def adapter(rank=4, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    tensors = {HEAD: rng.normal(size=(2, 3)).astype(dtype)}
    for module, (d_out, d_in) in SHAPES.items():
        tensors |= lora_math.write(module, Factors(rng.normal(size=(rank, d_in)).astype(dtype),
                                              rng.normal(size=(d_out, rank)).astype(dtype)))  # fmt: skip
    return tensors


def update(index, *, rank=4, num_examples=1, scaling=2.0, dtype=np.float64):
    facts = {"rank": rank, "scaling": scaling}
    tensors = adapter(rank, seed=index + 1, dtype=dtype)
    return ClientUpdate(profile(index).client, index, tensors, num_examples, 0.0, facts)


def dense(tensors, module, scaling=2.0):
    return lora_math.read(tensors, module, scaling).product()


def dense_mean(updates, module):
    total = sum(u.num_examples for u in updates)
    return sum(u.num_examples / total * dense(u.tensors, module, u.facts["scaling"]) for u in updates)


def whole_product(setting, state, module):
    """What a state adds to the pristine base: its factors and its shift."""
    product = dense(setting.adapter(state), module, setting.scaling)
    return product + dense(state.shared[SHIFT], module, setting.scaling) if SHIFT in state.shared else product


def test_factors_are_the_weighted_mean_to_the_bit():
    updates = [update(k, num_examples=3 + k, dtype=np.float32) for k in range(3)]

    after = setting("factors").fold(ServerState(adapter()), iter(updates))

    expected = weighted_mean((u.num_examples, u.tensors) for u in updates)
    assert all(np.array_equal(after.tensors[name], value) for name, value in expected.items())


def test_a_frozen_a_makes_the_mean_of_products_the_product_of_means():
    rule, start = setting("freeze-a"), setting("freeze-a").start(adapter())
    frozen = start.shared[client_side.FROZEN]
    updates = [update(k, num_examples=1 + k) for k in range(3)]
    sent = [ClientUpdate(u.client, u.index, {n: v for n, v in u.tensors.items() if n not in frozen}, u.num_examples,
                         0.0, u.facts) for u in updates]  # fmt: skip

    after = rule.fold(start, sent)

    for module in SHAPES:
        expected = sum((1 + k) / 6 * dense({**u.tensors, **frozen}, module) for k, u in enumerate(sent))
        np.testing.assert_allclose(dense(rule.adapter(after), module), expected, atol=1e-9)
    assert after.report["aggregation_error"] < 1e-9


@pytest.mark.parametrize("module", SHAPES)
def test_svd_of_mixed_ranks_is_the_truncation_of_the_dense_mean(module):
    updates = [update(k, rank=rank, num_examples=2 + k) for k, rank in enumerate((6, 4, 2))]

    after = setting("svd", rank=5).fold(ServerState(adapter(5)), updates)

    u, s, vt = np.linalg.svd(dense_mean(updates, module), full_matrices=False)
    np.testing.assert_allclose(dense(after.tensors, module), (u[:, :5] * s[:5]) @ vt[:5], atol=1e-9)


def test_a_weaker_client_of_svd_gets_the_best_approximation_of_its_rank():
    rule = setting("svd", client_ranks=(4, 2))
    after = rule.fold(ServerState(adapter()), [update(0), update(1, rank=2)])

    plan = rule.plan(after, profile(1))

    best = lora_math.truncate(lora_math.read(after.tensors, "m.q", 2.0), 2).factors.product()
    np.testing.assert_allclose(dense(plan.payloads[ADAPTER], "m.q"), best, atol=1e-9)
    assert plan.settings == {"rank": 2}


@pytest.mark.parametrize("rule", ["stack", "exact"])
@pytest.mark.parametrize("module", SHAPES)
def test_rules_that_shift_the_base_reproduce_the_dense_mean_round_after_round(rule, module):
    fold, first = setting(rule), [update(k, num_examples=1 + k) for k in range(3)]
    second = [update(k + 10, num_examples=2) for k in range(3)]

    one = fold.fold(ServerState(adapter()), first)
    two = fold.fold(one, second)

    before = dense(one.shared[SHIFT], module)
    np.testing.assert_allclose(whole_product(fold, one, module), dense_mean(first, module), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        whole_product(fold, two, module), before + dense_mean(second, module), rtol=1e-5, atol=1e-4
    )
    assert two.report["aggregation_error"] < 1e-6


def test_stacking_takes_unlike_ranks_and_scalings():
    updates = [update(0, rank=4, scaling=2.0), update(1, rank=2, scaling=0.5), update(2, rank=1, scaling=3.0)]

    after = setting("stack").fold(ServerState(adapter()), updates)

    for module in SHAPES:
        np.testing.assert_allclose(
            whole_product(setting("stack"), after, module), dense_mean(updates, module), rtol=1e-5, atol=1e-5
        )


def test_clients_of_stack_restart_from_new_factors_that_add_nothing():
    rule, updates = setting("stack"), [update(0), update(1)]

    one = rule.fold(ServerState(adapter()), updates)
    two = rule.fold(one, updates)
    again = rule.fold(one, updates)

    a = "m.q.lora_A.weight"
    assert not one.tensors["m.q.lora_B.weight"].any()
    assert not np.array_equal(one.tensors[a], two.tensors[a])
    assert np.array_equal(two.tensors[a], again.tensors[a])
    assert np.abs(one.tensors[a]).max() <= 1 / 3


def test_zero_padding_weights_clients_by_the_norm_of_their_update():
    updates = [update(0, rank=4, num_examples=100), update(1, rank=2, num_examples=1)]
    norms = [np.sqrt(sum(np.sum(dense(u.tensors, m) ** 2) for m in SHAPES)) for u in updates]
    share = norms[0] / sum(norms)

    after = setting("zero-padded").fold(ServerState(adapter()), updates)

    strong, weak = (u.tensors["m.q.lora_A.weight"] for u in updates)
    np.testing.assert_allclose(after.tensors["m.q.lora_A.weight"][:2], share * strong[:2] + (1 - share) * weak)
    np.testing.assert_allclose(after.tensors["m.q.lora_A.weight"][2:], share * strong[2:])


@pytest.mark.parametrize("rule", ["svd", "zero-padded"])
def test_a_round_of_weak_clients_leaves_components_that_can_learn(rule):
    weak = update(0, rank=1)

    after = setting(rule).fold(ServerState(adapter()), [weak])

    assert all(after.tensors["m.q.lora_A.weight"].any(axis=1))
    assert not after.tensors["m.q.lora_B.weight"][:, 1:].any()
    np.testing.assert_allclose(dense(after.tensors, "m.q"), dense(weak.tensors, "m.q"), atol=1e-9)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_head_is_averaged_by_examples_under_every_rule(rule):
    fold = setting(rule)
    start = fold.start(adapter())
    updates = [update(0, num_examples=1), update(1, num_examples=3)]
    kept = [ClientUpdate(u.client, u.index, {n: u.tensors[n] for n in start.tensors}, u.num_examples, 0.0, u.facts)
            for u in updates]  # fmt: skip

    after = fold.fold(start, kept)

    expected = 0.25 * updates[0].tensors[HEAD] + 0.75 * updates[1].tensors[HEAD]
    np.testing.assert_allclose(after.tensors[HEAD], expected)


def test_the_error_of_averaged_factors_is_the_dense_one():
    updates = [update(0, num_examples=1), update(1, num_examples=3)]

    after = setting("factors").fold(ServerState(adapter()), updates)

    missed = sum(np.sum((dense_mean(updates, m) - dense(after.tensors, m)) ** 2) for m in SHAPES)
    size = sum(np.sum(dense_mean(updates, m) ** 2) for m in SHAPES)
    assert after.report["aggregation_error"] == pytest.approx(np.sqrt(missed / size), rel=1e-5)


def test_no_rule_misses_less_than_the_mean_it_was_given():
    updates = [update(k) for k in range(3)]

    errors = {
        rule: setting(rule).fold(ServerState(adapter()), updates).report["aggregation_error"]
        for rule in ("factors", "svd", "stack", "exact")
    }

    assert max(errors["stack"], errors["exact"]) < 1e-6 < errors["svd"] < errors["factors"]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_a_shift_never_has_more_rank_than_its_weight(shape):
    rng = np.random.default_rng(1)
    factors = Factors(rng.normal(size=(40, shape[1])), rng.normal(size=(shape[0], 40)), 0.5)

    small = compressed(factors)

    assert small.rank == 4
    np.testing.assert_allclose(small.product(), factors.product(), atol=1e-12)


@pytest.mark.parametrize("rule", ["stack", "exact"])
def test_an_export_is_one_adapter_of_summed_rank_with_the_same_scaling(rule):
    fold = setting(rule)
    state = fold.fold(ServerState(adapter(dtype=np.float32)), [update(k, dtype=np.float32) for k in range(2)])

    tensors, config = fold.export(state)

    assert config["lora_alpha"] / config["r"] == 2.0
    for module in SHAPES:
        assert tensors[f"{module}.lora_B.weight"].shape[1] == config["r"]
        np.testing.assert_allclose(dense(tensors, module), whole_product(fold, state, module), rtol=1e-5, atol=1e-5)
    assert np.array_equal(tensors[HEAD], state.tensors[HEAD])


def test_a_rule_that_leaves_the_base_alone_exports_the_adapter_as_it_is():
    state = ServerState(adapter())

    assert setting("svd").export(state) == (state.tensors, {})


def test_components_are_averaged_over_the_clients_that_trained_them():
    kept = lora_math.read(adapter(), "m.q", 2.0)
    strong, weak = (lora_math.read(update(k, rank=r).tensors, "m.q", 2.0) for k, r in enumerate((3, 1)))

    folded = mean_of_components([(1.0, strong), (3.0, weak)], FactorShape(4, 2.0, kept=kept)).factors

    np.testing.assert_allclose(folded.a[0], 0.25 * strong.a[0] + 0.75 * weak.a[0])
    np.testing.assert_array_equal(folded.a[1:3], strong.a[1:3])
    np.testing.assert_array_equal(folded.a[3], kept.a[3])


def test_factors_of_unlike_scaling_are_not_averaged():
    with pytest.raises(Refused, match="scaling"):
        setting("factors").fold(ServerState(adapter()), [update(0), update(1, scaling=1.0)])


def test_updates_are_read_one_module_at_a_time(tmp_path):
    paths = [tmp_path / f"{k}" for k in range(3)]
    for k, path in enumerate(paths):
        write_tensors(path, update(k, dtype=np.float32).tensors)
    updates = [ClientUpdate(profile(k).client, k, read_tensors(p), 1, 0.0) for k, p in enumerate(paths)]
    in_memory = [update(k, dtype=np.float32) for k in range(3)]

    lazily, at_once = (setting("svd").fold(ServerState(adapter()), given) for given in (updates, in_memory))

    assert all(np.array_equal(lazily.tensors[name], value) for name, value in at_once.tensors.items())


class Walked:
    """Updates that can be walked again, of which this tells how many are alive at once."""

    def __init__(self, number):
        self.number, self.alive, self.most = number, weakref.WeakSet(), 0

    def __iter__(self):
        for k in range(self.number):
            each = Counted(update(k).tensors)
            self.alive.add(each)
            self.most = max(self.most, len(self.alive))
            yield ClientUpdate(profile(k).client, k, each, 1, 0.0)


class Counted(UserDict):
    __hash__ = object.__hash__


@pytest.mark.parametrize("rule", ["factors", "zero-padded", "svd"])
def test_of_many_clients_no_more_than_a_few_updates_are_open_at_once(rule):
    many = Walked(HELD + 40)

    after = setting(rule).fold(ServerState(adapter()), many)

    assert many.most <= HELD + 3
    at_once = setting(rule).fold(ServerState(adapter()), [ClientUpdate(profile(k).client, k, update(k).tensors, 1, 0.0)
                                                          for k in range(HELD + 40)])  # fmt: skip
    assert all(np.array_equal(after.tensors[name], value) for name, value in at_once.tensors.items())


def test_updates_of_unlike_names_are_refused():
    odd = update(1)
    without = ClientUpdate(odd.client, 1, {n: v for n, v in odd.tensors.items() if n != HEAD}, 1, 0.0, odd.facts)

    with pytest.raises(Refused, match="names"):
        setting("factors").fold(ServerState(adapter()), [update(0), without])


def job(**parts):
    return JobSpec.model_validate({"model": {"lora": {"rank": 4, "alpha": 8, **parts.pop("lora", {})}}, **parts})


@pytest.mark.parametrize("rule", ["factors", "freeze-a", "exact"])
def test_mixed_ranks_are_refused_with_the_reason_where_a_rule_needs_one_rank(rule):
    with pytest.raises(BadInput, match=f"aggregation '{rule}' needs one rank, since .*stack, svd, zero-padded"):
        build(job(aggregation=rule, lora={"client_ranks": [4, 2]}))


def test_a_client_of_more_rank_than_the_server_is_refused():
    with pytest.raises(BadInput, match=r"client_ranks: 16 is more than model\.lora\.rank"):
        build(job(aggregation="svd", lora={"client_ranks": [16, 2]}))


def test_an_aggregation_of_factors_is_refused_where_there_are_none():
    with pytest.raises(BadInput, match=r"aggregation: 'svd' combines LoRA factors, but model\.trainable is 'full'"):
        build(JobSpec.model_validate({"aggregation": "svd", "model": {"trainable": "full"}}))


def lora_client(index, num_examples=1):
    wants = {name: np.full_like(value, index + 1.0) for name, value in adapter().items()}
    return QuadraticSession(wants, num_examples=num_examples, client=profile(index), base={}, scaling=2.0)


@pytest.mark.parametrize("rule", ["zero-padded", "svd", "stack"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_clients_train_and_upload_the_rank_they_were_given(name, rule):
    method = build(job(aggregation=rule, lora={"client_ranks": [4, 2]}, method={"name": name}))
    state = method.start(adapter())
    for _ in range(2):
        updates = []
        for session in (lora_client(0), lora_client(1)):
            session.base = {module: np.zeros(shape) for module, shape in SHAPES.items()}
            updates.append(method.local_update(method.plan(state, session.client), session))
            template = method.uploads(state, session.client)
            assert {n: v.shape for n, v in updates[-1].tensors.items()} == {n: v.shape for n, v in template.items()}
        assert [u.facts["rank"] for u in updates] == [4, 2]
        state = method.aggregate(state, iter(updates))
        assert method.scoring(state, profile(1)).payloads[ADAPTER]["m.q.lora_B.weight"].shape == (7, 4)


def test_the_default_plan_is_the_state_itself():
    method = METHODS["fedavg"]()
    state = method.start(adapter())

    plan = method.plan(state, profile(0))

    assert plan.payloads[ADAPTER] is state.tensors
    assert not plan.settings


def test_fedavg_with_a_frozen_a_is_ffa_lora():
    frozen, ffa = build(job(aggregation="freeze-a")), build(job(method={"name": "ffa-lora"}))
    results = []
    for method in (frozen, ffa):
        state = method.start(adapter())
        updates = [method.local_update(method.plan(state, profile(k)), lora_client(k)) for k in range(2)]
        results.append(method.adapter(method.aggregate(state, iter(updates))))

    assert isinstance(frozen, FedAvg)
    assert all(np.array_equal(results[0][name], value) for name, value in results[1].items())
