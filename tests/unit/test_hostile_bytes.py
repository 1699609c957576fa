"""Bytes that nobody honest sends, at the edges that read them: a named refusal, never another exception."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hostile_files import HEADERS, SIDES, VALUES, judged, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabbit.errors import CorruptPayload, Refused
from lorabbit.protocol import codec
from lorabbit.protocol.messages import FROM_CLIENT, Hello, Offer, PayloadRef
from lorabbit.tensors import serialization
from lorabbit_server.aggregation.update_validation import (
    MAX_CHUNKS,
    ExpectedUpdate,
    UpdateTemplate,
    check_offer,
    check_update,
)

SHA = "ab" * 32
OFFER = {"job": "j", "task": "t", "client": "c", "payload": None, "metrics": {"num_examples": 1, "facts": {"x": 0}}}
TEMPLATE = UpdateTemplate.of({"w": np.zeros(1, np.float32)})
REASONS = {None, "corrupt", "names", "shape", "dtype", "not-finite", "norm"}


@settings(max_examples=150, deadline=None)
@given(header=HEADERS, data=st.binary(max_size=40))
def test_no_header_breaks_admission(header, data):
    assert judged(written(header, data)) in REASONS
    assert judged(written(header, data), TEMPLATE) in REASONS - {None} or set(header) == {"w"}


@settings(max_examples=150, deadline=None)
@given(shape=st.lists(SIDES, max_size=70), dtype=st.sampled_from(sorted(serialization.DTYPES)), size=st.integers(0, 40))
def test_no_shape_breaks_admission(shape, dtype, size):
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}

    assert judged(written(header, bytes(size))) in REASONS


@pytest.mark.parametrize(
    "shape", [[0, 2**63], [0, 2**40, 2**40], [1] * 65, [2**62, 0], [0] * 70, [0, 10**400]], ids=lambda s: str(s)[:20]
)
def test_a_shape_that_no_array_has_is_corrupt_though_it_holds_nothing(shape):
    size = 0 if 0 in shape else 4
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}

    assert judged(written(header, bytes(size))) == "corrupt"


def test_half_a_surrogate_pair_in_a_name_is_corrupt():
    assert judged(written(b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}')) == "corrupt"


def test_booleans_that_are_neither_0_nor_1_are_corrupt():
    header = {"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}

    assert judged(written(header, b"\x01\x02")) == "corrupt"


def test_a_refusal_repeats_little_of_a_name_a_million_letters_long():
    header = {"x" * 10**6: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "u"
        path.write_bytes(written(header, struct.pack("<f", np.inf)))

        with pytest.raises(Refused) as caught:
            check_update(path, ExpectedUpdate(TEMPLATE))
        with pytest.raises(Refused) as without_template:
            check_update(path, ExpectedUpdate())

    assert max(len(caught.value.detail), len(without_template.value.detail)) < 1000


def test_a_file_that_claims_a_terabyte_costs_no_memory():
    tracemalloc.start()
    reason = judged(written({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert reason == "corrupt"
    assert peak < 2**20


def test_a_payload_in_more_chunks_than_a_grant_can_name_is_refused():
    fine = PayloadRef(sha256=SHA, size_bytes=MAX_CHUNKS * 1024, chunk_bytes=1024)
    check_offer(fine, None, max_bytes=2**40)

    with pytest.raises(Refused, match="too-large"):
        check_offer(fine.model_copy(update={"size_bytes": fine.size_bytes + 1}), None, max_bytes=2**40)


# ---- messages ----
def offer_with(fact):
    return json.dumps(OFFER).replace('"x": 0', f'"x": {fact}').encode()


@pytest.mark.parametrize(
    "fact",
    ["NaN", "Infinity", "-Infinity", "1e400", "9" * 400, "9" * 5000, "[" * 300 + "]" * 300, '"\\ud800"'],
    ids=lambda fact: fact[:12],
)
def test_a_fact_that_nobody_can_write_again_is_malformed(fact):
    with pytest.raises(Refused) as caught:
        codec.decode(Offer.type_name(), offer_with(fact))

    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("depth", [10**4, 5 * 10**5])
def test_a_bomb_of_brackets_is_malformed(depth):
    with pytest.raises(Refused) as caught:
        codec.decode(Offer.type_name(), b"[" * depth)

    assert caught.value.reason == "malformed"


def test_a_message_as_large_as_may_be_costs_a_bounded_multiple_of_its_size():
    facts = json.dumps({f"{n}": [] for n in range(60_000)})
    body = offer_with(facts)
    assert len(body) < codec.MAX_MESSAGE_BYTES
    tracemalloc.start()
    with contextlib.suppress(Refused):
        codec.decode(Offer.type_name(), body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 100 * len(body)


@pytest.mark.parametrize("number", ["9" * 30, "-1", "1e300"])
def test_a_claim_of_more_examples_than_a_float_counts_is_malformed(number):
    body = json.dumps(OFFER).replace('"num_examples": 1', f'"num_examples": {number}').encode()

    with pytest.raises(Refused, match="num_examples"):
        codec.decode(Offer.type_name(), body)


@pytest.mark.parametrize("name", ["../x", "a/../b", "..", ".hidden", "/etc", "a\\b", "a\n", "a\u0000", "", "a" * 129])
@pytest.mark.parametrize("key", ["job", "task", "client"])
def test_an_id_that_could_be_a_path_is_malformed(name, key):
    with pytest.raises(Refused, match=key):
        codec.decode(Offer.type_name(), json.dumps({**OFFER, key: name}).encode())


@pytest.mark.parametrize(
    "more", [{"tags": ["t"] * 101}, {"tags": ["t" * 201]}, {"device": "d" * 201}, {"outbox": ["t"] * 10_001}]
)
def test_a_hello_longer_than_a_registry_should_keep_is_malformed(more):
    with pytest.raises(Refused, match="malformed"):
        codec.decode(Hello.type_name(), json.dumps({"address": "a", **more}).encode())


@settings(max_examples=150, deadline=None)
@given(model=st.sampled_from(FROM_CLIENT), data=st.data())
def test_what_is_accepted_can_be_written_and_read_again(model, data):
    known = {"job": "j", "task": "t", "client": "c", "address": "a", "payload": None, "metrics": OFFER["metrics"]}
    body = {name: known.get(name, 0) for name in model.model_fields}
    for name in data.draw(st.lists(st.sampled_from(sorted(body)), max_size=2)):
        body[name] = data.draw(VALUES)
    with contextlib.suppress(Refused):
        message = codec.decode(model.type_name(), json.dumps(body).encode())
        assert codec.decode(model.type_name(), codec.encode(message)) == message


@settings(max_examples=150, deadline=None)
@given(facts=VALUES)
def test_accepted_facts_survive_the_log_unchanged(facts):
    with contextlib.suppress(Refused):
        message = codec.decode(Offer.type_name(), offer_with(json.dumps(facts)))
        assert json.loads(message.metrics.model_dump_json())["facts"] == message.metrics.facts


def test_a_tensor_file_cut_anywhere_is_corrupt(tmp_path):
    path = tmp_path / "t"
    serialization.write_tensors(path, {"w": np.ones(5, np.float32)})
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptPayload):
            serialization.read_tensors(path)
