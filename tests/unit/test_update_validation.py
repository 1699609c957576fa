"""Admission: an update is what the template says, or it is refused under a name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabbit.errors import Refused
from lorabbit.protocol.messages import PayloadRef
from lorabbit.tensors import serialization
from lorabbit_server.aggregation.update_validation import (
    HEADER_BYTES,
    ExpectedUpdate,
    UpdateTemplate,
    check_offer,
    check_update,
)

RIGHT = {"a": np.ones((2, 3), np.float32), "b": np.ones((4,), ml_dtypes.bfloat16), "n": np.ones((), np.int64)}
TEMPLATE = UpdateTemplate.of(RIGHT)


@pytest.fixture
def write(tmp_path):
    def written(tensors):
        path = tmp_path / "update.safetensors"
        serialization.write_tensors(path, tensors)
        return path

    return written


def refused(path, template=TEMPLATE):
    with pytest.raises(Refused) as caught:
        check_update(path, ExpectedUpdate(template))
    return caught.value.reason


def test_an_update_like_the_template_is_admitted(write):
    check_update(write(RIGHT), ExpectedUpdate(TEMPLATE))


def test_an_update_may_be_as_large_as_what_it_started_from(write):
    start = {"a": np.full(3, 1e7, np.float32)}

    check_update(write({"a": np.full(3, 2e9, np.float32)}), ExpectedUpdate(UpdateTemplate.of(start)))


def test_a_template_is_the_same_from_values_and_from_a_file(write):
    assert UpdateTemplate.of(serialization.read_tensors(write(RIGHT))) == TEMPLATE
    assert TEMPLATE.size_bytes == 6 * 4 + 4 * 2 + 8
    assert TEMPLATE.parameters == 6 + 4 + 1


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("names", {"a": None}),
        ("names", {"z": np.ones(1, np.float32)}),
        ("shape", {"a": np.ones((3, 2), np.float32)}),
        ("shape", {"a": np.ones((6,), np.float32)}),
        ("dtype", {"a": np.ones((2, 3), np.float16)}),
        ("dtype", {"b": np.ones((4,), np.float16)}),
        ("not-finite", {"a": np.full((2, 3), np.nan, np.float32)}),
        ("not-finite", {"b": np.full((4,), np.inf, ml_dtypes.bfloat16)}),
        ("norm", {"a": np.full((2, 3), 1e30, np.float32)}),
        ("norm", {"b": np.full((4,), -1e7, ml_dtypes.bfloat16)}),
    ],
)
def test_an_update_unlike_the_template_is_refused_by_name(write, reason, change):
    tensors = {name: value for name, value in {**RIGHT, **change}.items() if value is not None}

    assert refused(write(tensors)) == reason


def test_a_file_that_is_no_safetensors_file_is_corrupt(tmp_path):
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"\x00" * 100)

    assert refused(path) == "corrupt"


def test_the_first_adapter_may_be_anything_finite_but_nothing(write):
    check_update(write(RIGHT), ExpectedUpdate())

    assert refused(write({"a": np.array([np.inf], np.float32)}), None) == "not-finite"
    assert refused(write({}), None) == "names"


def test_where_clients_keep_models_of_their_own_the_first_adapter_may_hold_no_tensor(write):
    check_update(write({}), ExpectedUpdate(may_be_empty=True))

    assert UpdateTemplate.of({}).is_empty
    assert not TEMPLATE.is_empty


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 5), value=st.sampled_from([np.nan, np.inf, -np.inf]), name=st.sampled_from(["a", "b"]))
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(tmp_path_factory, place, value, name):
    tensors = {key: array.copy() for key, array in RIGHT.items()}
    tensors[name].flat[place % tensors[name].size] = value
    path = tmp_path_factory.mktemp("update") / "u.safetensors"
    serialization.write_tensors(path, tensors)

    assert refused(path) == "not-finite"


def offer(size, chunk=2**20):
    return PayloadRef(sha256="0" * 64, size_bytes=size, chunk_bytes=chunk)


def test_an_offer_larger_than_the_template_allows_is_refused_before_it_moves():
    check_offer(offer(TEMPLATE.size_bytes + HEADER_BYTES), TEMPLATE, max_bytes=2**40)

    with pytest.raises(Refused, match="too-large"):
        check_offer(offer(TEMPLATE.size_bytes + HEADER_BYTES + 1), TEMPLATE, max_bytes=2**40)


def test_an_offer_larger_than_the_servers_bound_is_refused_even_where_there_is_no_template():
    check_offer(offer(1_000), None, max_bytes=1_000)

    with pytest.raises(Refused, match="too-large"):
        check_offer(offer(1_001), None, max_bytes=1_000)


def test_chunks_that_no_broker_takes_are_refused():
    with pytest.raises(Refused, match="too-large"):
        check_offer(offer(10, 16 * 2**20), None, max_bytes=1_000)
