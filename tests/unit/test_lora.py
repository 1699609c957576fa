import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabbit.tensors import lora_math
from lorabbit.tensors.lora_math import Factors


def random_factors(rank=4, d_in=9, d_out=7, seed=0, scaling=2.0):
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)), scaling)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_truncation_is_the_best_one_of_its_rank(rank, target, seed):
    factors = random_factors(rank, seed=seed)
    u, s, vt = np.linalg.svd(factors.product())
    best = (u[:, :target] * s[:target]) @ vt[:target] if target < len(s) else factors.product()

    cut = lora_math.truncate(factors, target)

    np.testing.assert_allclose(cut.factors.product(), best, atol=1e-9)
    assert cut.lost == pytest.approx(np.sqrt(np.sum(s[target:] ** 2)), abs=1e-9)
    assert cut.norm == pytest.approx(np.linalg.norm(s))


def test_truncated_factors_are_balanced_so_that_a_prefix_is_a_truncation():
    factors = random_factors(6)

    cut = lora_math.truncate(factors, 4).factors

    np.testing.assert_allclose(cut.a @ cut.a.T, cut.b.T @ cut.b, atol=1e-9)
    prefix = Factors(cut.a[:2], cut.b[:, :2], cut.scaling)
    np.testing.assert_allclose(prefix.product(), lora_math.truncate(factors, 2).factors.product(), atol=1e-9)


def test_truncation_to_another_scaling_leaves_the_product_alone():
    factors = random_factors(3, scaling=2.0)

    cut = lora_math.truncate(factors, 3, scaling=0.5).factors

    assert cut.scaling == 0.5
    np.testing.assert_allclose(cut.product(), factors.product(), atol=1e-9)


def test_truncation_does_not_depend_on_the_gauge():
    factors, rotation = random_factors(3), np.linalg.qr(np.random.default_rng(9).normal(size=(3, 3)))[0]
    turned = Factors(rotation @ factors.a, factors.b @ rotation.T, factors.scaling)

    here, there = lora_math.truncate(factors, 3).factors, lora_math.truncate(turned, 3).factors

    np.testing.assert_allclose(here.a, there.a, atol=1e-9)
    np.testing.assert_allclose(here.b, there.b, atol=1e-9)


def test_a_rank_above_the_product_is_filled_with_zero_components():
    cut = lora_math.truncate(random_factors(2), 5).factors

    assert cut.a.shape == (5, 9)
    assert cut.b.shape == (7, 5)
    assert not cut.a[2:].any()


def test_stacking_is_the_exact_weighted_sum_for_mixed_ranks_and_scalings():
    parts = [(0.2, random_factors(2, seed=1, scaling=1.0)), (0.8, random_factors(5, seed=2, scaling=3.0))]

    stacked = lora_math.stack(parts, scaling=0.5)

    np.testing.assert_allclose(stacked.product(), sum(p * f.product() for p, f in parts), atol=1e-12)


def test_norms_and_inner_products_are_those_of_the_dense_products():
    left, right = random_factors(2, seed=1), random_factors(5, seed=2, scaling=-1.0)

    assert lora_math.norm(left) == pytest.approx(np.linalg.norm(left.product()))
    assert lora_math.inner(left, right) == pytest.approx(np.sum(left.product() * right.product()))


@pytest.mark.parametrize("clients", [2, 9])
def test_the_aggregation_error_of_averaged_factors_is_the_dense_one(clients):
    """Nine clients have more components together than the weight has rows."""
    parts = [((k + 1) / (clients * (clients + 1) / 2), random_factors(2, seed=k)) for k in range(clients)]
    averaged = Factors(sum(p * f.a for p, f in parts), sum(p * f.b for p, f in parts), 2.0)
    mean = sum(p * f.product() for p, f in parts)

    error, size = lora_math.aggregation_error(parts, averaged)

    assert error == pytest.approx(np.linalg.norm(mean - averaged.product()))
    assert size == pytest.approx(np.linalg.norm(mean))


def test_equal_clients_have_no_aggregation_error():
    factors = random_factors(3)

    error, size = lora_math.aggregation_error([(0.5, factors), (0.5, factors)], factors)

    assert error < 1e-12 * size


def test_modules_are_those_with_both_factors():
    names = ["x.q.lora_A.weight", "x.q.lora_B.weight", "x.v.lora_A.weight", "classifier.weight"]

    assert lora_math.modules(names) == ["x.q"]
    assert [lora_math.is_factor(name) for name in names] == [True, True, True, False]


def test_reading_what_was_written_gives_the_same_factors():
    factors = random_factors()

    back = lora_math.read(lora_math.write("x.q", factors), "x.q", factors.scaling)

    assert np.array_equal(back.a, factors.a)
    assert np.array_equal(back.b, factors.b)
