import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lorabbit.errors import Refused
from lorabbit.tensors.arithmetic import count, size_bytes, squared_norm, subset, weighted_mean

ARRAYS = arrays(np.float32, (2, 3), elements=st.floats(-100, 100, width=32, allow_subnormal=False))


def test_a_weighted_mean_is_the_one_computed_by_hand():
    mean = weighted_mean([(1, {"w": np.array([1.0, 2.0])}), (3, {"w": np.array([5.0, 6.0])})])

    assert mean["w"].tolist() == [4.0, 5.0]


def test_the_mean_of_one_element_is_that_element_to_the_bit():
    value = np.random.default_rng(0).normal(size=100).astype(np.float32)

    mean = weighted_mean([(7, {"w": value})])

    assert mean["w"].dtype == np.float32
    assert np.array_equal(mean["w"], value)


@given(st.lists(ARRAYS, min_size=1, max_size=6))
def test_equal_tensors_are_a_fixed_point(values):
    mean = weighted_mean([(i + 1, {"w": values[0]}) for i in range(len(values))])

    assert np.array_equal(mean["w"], values[0])


@given(st.lists(st.tuples(st.integers(1, 1000), ARRAYS), min_size=1, max_size=6))
def test_a_mean_lies_between_its_elements_and_order_matters_only_by_rounding(weighted):
    stream = [(weight, {"w": value}) for weight, value in weighted]

    forward, backward = weighted_mean(stream), weighted_mean(reversed(stream))

    stack = np.stack([value for _, value in weighted])
    assert np.all(forward["w"] <= stack.max(0) + 1e-4)
    assert np.all(forward["w"] >= stack.min(0) - 1e-4)
    np.testing.assert_allclose(forward["w"], backward["w"], rtol=1e-6, atol=1e-5)


def test_bfloat16_is_averaged_in_double_precision_and_returned_as_bfloat16():
    a, b = (np.array([x], ml_dtypes.bfloat16) for x in (1.0, 2.0))

    mean = weighted_mean([(1, {"w": a}), (1, {"w": b})])

    assert mean["w"].dtype == ml_dtypes.bfloat16
    assert float(mean["w"][0]) == 1.5


def test_integer_tensors_keep_the_largest_value():
    mean = weighted_mean([(1, {"n": np.array(3)}), (9, {"n": np.array(5)}), (1, {"n": np.array(4)})])

    assert mean["n"] == 5
    assert mean["n"].dtype == np.int64


def test_the_inputs_of_a_mean_are_left_alone():
    value = np.array([3])

    weighted_mean([(1, {"n": value}), (1, {"n": np.array([9])})])

    assert value.tolist() == [3]


def test_different_names_are_refused_by_reason():
    with pytest.raises(Refused) as refused:
        weighted_mean([(1, {"a": np.zeros(1)}), (1, {"b": np.zeros(1)})])

    assert refused.value.reason == "names"


@pytest.mark.parametrize("stream", [[], [(0, {"w": np.ones(1)})]])
def test_a_mean_of_nothing_is_an_error(stream):
    with pytest.raises(ValueError, match="positive weight"):
        weighted_mean(stream)


def test_sizes_and_norms_are_those_of_the_raw_data():
    tensors = {"a": np.full((2, 3), 2.0, np.float32), "n": np.array(7)}

    assert size_bytes(tensors) == 2 * 3 * 4 + 8
    assert count(tensors) == 7
    assert squared_norm(tensors) == 24.0
    assert list(subset(tensors, ["n"])) == ["n"]
