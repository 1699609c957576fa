"""Coded updates that nobody honest sends: a named refusal, no other exception, and no more memory than was expected."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hostile_codings import (
    CLAIMS,
    COUNT,
    INDEXES,
    INT4,
    INT8,
    KEPT,
    PACKED,
    START,
    TOP,
    blocks,
    forged,
    honest,
    judged,
    places,
    section,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabbit.errors import Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.tensors import serialization
from lorabbit_server.aggregation.update_validation import ExpectedUpdate, check_update

EXAMPLES = settings(max_examples=150, deadline=None)
REASONS = {None, "corrupt", "names", "shape", "dtype", "not-finite", "norm", "coding", "origin"}


@pytest.mark.parametrize(
    "coding", [INT8, INT4, TOP, PACKED, CompressionSpec(codec="bf16", delta=True)], ids=lambda c: c.word
)
def test_an_honest_update_passes(coding):
    assert judged(honest(coding, {"w": START["w"] + 1}), coding) is None
    assert judged(forged(blocks())) is None
    assert judged(forged(places([3, 1, 1, 1, 1]), TOP), TOP) is None


@EXAMPLES
@given(data=st.data(), coding=st.sampled_from([INT8, INT4, TOP, PACKED]))
def test_no_flipped_bytes_break_admission(data, coding):
    content = bytearray(honest(coding, {"w": START["w"] + 1}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))

    assert judged(bytes(content), coding) in REASONS


@EXAMPLES
@given(sections=st.binary(max_size=300), coding=st.sampled_from([INT8, INT4, TOP, PACKED]))
def test_no_sections_break_admission(sections, coding):
    assert judged(forged(sections, coding), coding) in REASONS


@EXAMPLES
@given(body=st.binary(max_size=200), claim=st.integers(0, 2**63 - 1) | st.integers(0, 300), compressed=st.booleans())
def test_no_claim_about_a_section_breaks_admission(body, claim, compressed):
    assert judged(forged(section(body, compressed=compressed, claim=claim), PACKED), PACKED) in REASONS


@EXAMPLES
@given(index=INDEXES)
def test_no_index_breaks_admission(index):
    assert judged(forged(blocks(), index=json.dumps(index).encode())) in REASONS


@EXAMPLES
@given(text=CLAIMS)
def test_no_claim_about_the_coding_breaks_admission(text):
    assert judged(forged(blocks(), **{"lorabbit.coding": text})) in REASONS - {None}


@pytest.mark.parametrize(
    ("sections", "coding", "reason"),
    [
        (blocks(scales=(0x7FC0, 0x3C00)), INT8, "not-finite"),
        (blocks(scales=(0x7F80, 0x3C00)), INT8, "not-finite"),
        (blocks(scales=(0xBC00, 0x3C00)), INT8, "corrupt"),
        (blocks(numbers=b"\x80" + bytes(COUNT - 1)), INT8, "corrupt"),
        (blocks(scales=(0x3C00,) * 3), INT8, "corrupt"),
        (blocks(scales=(0x3C00,)), INT8, "corrupt"),
        (blocks() + b"\0", INT8, "corrupt"),
        (b"", INT8, "corrupt"),
        (section(struct.pack("<2H", 0x3C00, 0x3C00) + bytes(COUNT // 2)), INT4, "corrupt"),
        (places([COUNT - 4, 1, 1, 1, 1]), TOP, "corrupt"),
        (places([2**32 - 1] * KEPT), TOP, "corrupt"),
        (places([0, 1, 0, 1, 1]), TOP, "corrupt"),
        (places([0, 1, 1, 1], (1.0,) * 4), TOP, "corrupt"),
        (places([0, 1, 1, 1, 1], (1.0, 2.0, float("nan"), 0.0, 1.0)), TOP, "not-finite"),
        (places([0, 1, 1, 1, 1], (1.0, 2.0, float("inf"), 0.0, 1.0)), TOP, "not-finite"),
    ],
    ids=[
        "a scale that is no number", "an infinite scale", "a negative scale", "a number below the levels",
        "a scale too many", "a scale too few", "a byte too many", "no section", "a nibble that nobody writes",
        "a place behind the end", "places that overflow", "a place twice", "a value too few", "a value that is none",
        "an infinite value",
    ],
)  # fmt: skip
def test_what_a_codec_never_writes_is_refused_by_name(sections, coding, reason):
    assert judged(forged(sections, coding), coding) == reason


def test_a_finite_change_that_makes_an_infinite_value_is_refused():
    largest = {"w": np.full(COUNT, 3e38, np.float32)}
    held = serialization.tensors_sha256(largest)

    assert judged(forged(blocks(scales=(0x7F00,) * 2, numbers=b"\x7f" * COUNT), **{"lorabbit.origin": held}),
                  start=largest) == "not-finite"  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        CompressionSpec(),
        INT4,
        INT8.model_copy(update={"block": 32}),
        PACKED,
        CompressionSpec(codec="int8", delta=False),
    ],
    ids=lambda coding: coding.word,
)
def test_a_coding_that_the_job_did_not_ask_for_is_refused(asked):
    assert judged(honest(INT8), asked) == "coding"


def test_tensors_as_they_are_may_always_come(tmp_path):
    serialization.write_tensors(tmp_path / "u", START)

    assert judged((tmp_path / "u").read_bytes(), INT8) is None


def test_a_first_adapter_may_not_come_coded(tmp_path):
    (tmp_path / "u").write_bytes(forged(blocks()))

    with pytest.raises(Refused, match="coding"):
        check_update(tmp_path / "u", ExpectedUpdate())


def test_a_difference_to_something_else_than_was_sent_is_refused():
    assert judged(honest(INT8, start={"w": np.ones(COUNT, np.float32)})) == "origin"
    assert judged(forged(blocks(), **{"lorabbit.origin": "x" * 10**6})) == "origin"


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ([["v", "F32", [COUNT]]], "names"),
        ([["w", "F32", [10, 10]]], "shape"),
        ([["w", "BF16", [COUNT]]], "dtype"),
        ([["w", "F32", [COUNT]]] * 2, "corrupt"),
        ([["w", "F32", [2**48, 2**48]]], "corrupt"),
        ([["w", "F32", [-1]]], "corrupt"),
        ([["w", "PICKLE", [1]]], "corrupt"),
    ],
)
def test_an_index_that_is_not_the_expected_one_is_refused_by_name(index, reason):
    assert judged(forged(blocks(), index=index)) == reason


def memory_of(content, coding):
    tracemalloc.start()
    reason = judged(content, coding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return reason, peak


def test_a_section_that_would_decompress_to_a_gigabyte_costs_no_memory():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**26))
    assert len(bomb) < COUNT * 100
    wide = [["w", "F32", [2**28]]]

    reason, peak = memory_of(forged(section(bomb, compressed=True), PACKED, index=wide), PACKED)
    assert (reason, peak < 2**23) == ("shape", True)
    reason, peak = memory_of(forged(section(zstandard.compress(bytes(10**5)), compressed=True), PACKED), PACKED)
    assert (reason, peak < 2**22) == ("corrupt", True)


def test_an_index_that_would_decompress_to_a_gigabyte_costs_no_memory():
    reason, peak = memory_of(forged(blocks(), index=b" " * 2**25), INT8)

    assert (reason, peak < 2**27) == ("corrupt", True)


def test_a_frame_that_asks_for_a_window_of_two_gigabytes_is_corrupt():
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False, write_content_size=False)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = frame.compress(b"x" * 60) + frame.flush()

    assert judged(forged(section(body, compressed=True), PACKED), PACKED) == "corrupt"
