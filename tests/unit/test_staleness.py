"""Late updates in each rule's own terms: by value, by product, or refused; in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from lorabbit.aggregation import aggregator
from lorabbit.aggregation.rules import RULES
from lorabbit.aggregation.staleness import CorrectedProducts, CorrectedUpdate, StalenessCorrection
from lorabbit.job.spec import JobSpec
from lorabbit.methods.registry import METHODS, build
from lorabbit.tensors import lora_math
from lorabbit.types import SHIFT, ClientId, ClientUpdate, ServerState

RANK, INS, OUTS = 2, 5, 4
A, B = "m.lora_A.weight", "m.lora_B.weight"


def factors(seed, rank=RANK, *, zero=False):
    generator = np.random.default_rng(seed)
    up = np.zeros((OUTS, rank)) if zero else generator.standard_normal((OUTS, rank))
    return {
        A: generator.standard_normal((rank, INS)).astype(np.float32),
        B: up.astype(np.float32),
        "classifier.weight": generator.standard_normal((3, OUTS)).astype(np.float32),
    }


def product(tensors):
    return tensors[B].astype(np.float64) @ tensors[A].astype(np.float64)


def job(rule="factors", **what):
    return JobSpec(aggregation=rule, model={"lora": {"rank": RANK, "alpha": RANK}}, **what)


def folded(rule, head, update, correction, state=None):
    """What a method over a rule makes of one late update."""
    method = build(job(rule, schedule={"kind": "buffered", "buffer": 1}))
    state = state or method.start(head)
    facts = {"rank": RANK, "scaling": 1.0}
    corrected = method.corrected(update, correction)
    return method.aggregate(state, [ClientUpdate(ClientId("client-1"), 0, corrected, 10, 0.5, facts)])


@pytest.mark.parametrize("worth", [1.0, 0.5, 0.1])
def test_products_carry_the_discounted_change_of_the_product_over_to_the_newest_version(worth):
    start, head, update = factors(1), factors(2), factors(3)

    corrected = CorrectedProducts(update, StalenessCorrection(start, head, worth))

    expected = product(head) + worth * (product(update) - product(start))
    assert np.allclose(product(corrected), expected, atol=1e-5)
    assert corrected[A].shape == (3 * RANK, INS)
    by_value = CorrectedUpdate(update, StalenessCorrection(start, head, worth))
    assert np.array_equal(corrected["classifier.weight"], by_value["classifier.weight"])


def test_clients_of_a_lower_rank_are_carried_from_the_prefix_that_they_had():
    start, head, update = factors(1, 1), factors(2, 1), factors(3, 1)

    corrected = CorrectedProducts(update, StalenessCorrection(start, head, 0.5))

    assert np.allclose(product(corrected), product(head) + 0.5 * (product(update) - product(start)), atol=1e-5)


def test_factors_that_start_afresh_leave_the_discounted_product_of_the_update_alone():
    start, head, update = factors(1, zero=True), factors(2, zero=True), factors(3)

    corrected = CorrectedProducts(update, StalenessCorrection(start, head, 0.5))

    assert np.array_equal(corrected[A], update[A])
    assert np.allclose(corrected[B], 0.5 * update[B])


def test_a_carry_worth_nothing_leaves_the_newest_version():
    head = factors(2)

    assert np.allclose(
        product(CorrectedProducts(factors(3), StalenessCorrection(factors(1), head, 0.0))), product(head)
    )
    nothing = factors(5, zero=True)
    assert not np.any(product(CorrectedProducts(factors(3), StalenessCorrection(factors(1), nothing, 0.0))))


def test_svd_stacks_a_late_update_and_truncates_to_its_rank():
    start, head, update = factors(1), factors(2), factors(3)

    after = folded("svd", head, update, StalenessCorrection(start, head, 0.5))

    exact = product(head) + 0.5 * (product(update) - product(start))
    left, sigma, right = np.linalg.svd(exact)
    best = (left[:, :RANK] * sigma[:RANK]) @ right[:RANK]
    assert after.tensors[A].shape == (RANK, INS)
    assert np.allclose(product(after.tensors), best, atol=1e-4)


def test_stack_puts_the_discounted_product_of_a_late_update_into_the_newest_base():
    method = build(job("stack", schedule={"kind": "buffered", "buffer": 1}))
    first = factors(1, zero=True)
    before = folded("stack", first, factors(4), StalenessCorrection(first, first, 1.0), method.start(first))
    update = factors(3)

    after = folded("stack", None, update, StalenessCorrection(first, before.tensors, 0.5), before)

    shifted = {s: lora_math.read(state.shared[SHIFT], "m") for s, state in (("before", before), ("after", after))}
    moved = [shifted[s].b.astype(np.float64) @ shifted[s].a for s in ("before", "after")]
    assert np.allclose(moved[1] - moved[0], 0.5 * product(update), atol=1e-4)
    assert not np.any(after.tensors[B])


def test_an_update_in_time_is_folded_as_it_came():
    head, update = factors(2), factors(3)

    in_time = folded("factors", head, update, StalenessCorrection(head, head, 1.0))

    assert np.allclose(in_time.tensors[B], update[B], atol=1e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_says_what_becomes_of_late_updates(rule):
    refused, products = RULES[rule].late, RULES[rule].late_by_products

    assert not (refused and products)
    assert isinstance(
        aggregator.of(job(rule)).corrected({}, StalenessCorrection({}, {}, 1.0)),
        CorrectedProducts if products else CorrectedUpdate,
    )


@pytest.mark.parametrize("name", sorted(n for n in METHODS if "buffered" in METHODS[n].schedules))
def test_a_method_that_folds_late_updates_carries_them_by_its_own_rule(name):
    method = build(JobSpec(method={"name": name}, schedule={"kind": "buffered", "buffer": 1}))

    corrected = method.corrected(factors(3), StalenessCorrection(factors(1), factors(2), 0.5))

    assert isinstance(corrected, CorrectedUpdate)
    assert np.allclose(corrected[B], factors(2)[B] + 0.5 * (factors(3)[B] - factors(1)[B]), atol=1e-6)
    assert isinstance(method.start(factors(1)), ServerState)
