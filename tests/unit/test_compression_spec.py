"""Which codings a job may ask for, and what an absent key means."""

from __future__ import annotations

import pytest

from lorabbit.errors import BadInput
from lorabbit.job.spec import KNOWN, CompressionSpec, JobSpec
from lorabbit.methods.registry import build


def job(up=None, down=None, method="fedavg", **more):
    transport = {"up": up or {}, "down": down or {}}
    return JobSpec.model_validate({"transport": transport, "method": {"name": method}, **more}, strict=False)


def test_nothing_asked_is_nothing_changed():
    transport = JobSpec().transport

    assert transport.uploads.is_plain
    assert transport.downloads.is_plain
    assert transport.uploads.needs == frozenset()


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "top-k"])
def test_a_lossy_upload_is_a_difference_unless_it_says_otherwise(codec):
    uploads = job({"codec": codec}).transport.uploads

    assert uploads.delta
    assert uploads.feedback == (codec == "top-k")
    assert uploads.needs == {codec, "delta"} <= set(KNOWN)


def test_a_download_is_no_difference_unless_it_says_so():
    assert not job(down={"codec": "int8"}).transport.downloads.delta
    assert job(down={"delta": True, "zstd": True}).transport.downloads.word == "fp32+delta+zstd"


GOOD = [
    ({"codec": "int8", "feedback": True}, {}, {}),
    ({"codec": "top-k", "share": 0.01, "zstd": True}, {"codec": "int8"}, {}),
    ({"codec": "int4"}, {}, {"method": "federa"}),
    ({"codec": "int4"}, {"delta": True, "zstd": True}, {"aggregation": "svd"}),
    ({"codec": "int8"}, {}, {"robust": {"kind": "median"}, "aggregation": "svd", "cohort": 4}),
    ({"codec": "int8", "delta": False}, {"codec": "bf16"}, {}),
    ({"zstd": True}, {"zstd": True}, {"method": "fedkd"}),
    ({"codec": "int8"}, {"delta": True, "zstd": True}, {"schedule": {"kind": "buffered"}}),
]


@pytest.mark.parametrize(("up", "down", "more"), GOOD)
def test_a_coding_that_makes_sense_is_taken(up, down, more):
    spec = job(up, down, **more)

    assert build(spec).job == spec


BAD = [
    ({}, {"codec": "top-k"}, {}, "transport.down.codec: an adapter of which only some values"),
    ({}, {"codec": "int8", "delta": True}, {}, "transport.down.delta: a client that lost one"),
    ({}, {"delta": True}, {}, "transport.down.delta: a difference in fp32 is as long"),
    ({}, {"feedback": True}, {}, "transport.down.feedback"),
    ({}, {"codec": "bf16"}, {"method": "federa"}, "transport.down.codec: federa's factors hold the main part"),
    ({}, {"codec": "bf16"}, {"schedule": {"kind": "buffered"}}, "transport.down.codec: what a late update"),
    ({"delta": True}, {}, {}, "transport.up.delta"),
    ({"codec": "int8", "delta": False}, {}, {"method": "federa"}, "transport.up.delta: federa's factors"),
    ({"codec": "top-k", "delta": False}, {}, {}, "transport.up.delta: top-k leaves most values out"),
    ({"codec": "top-k", "feedback": False}, {}, {}, "transport.up.feedback"),
    ({"feedback": True}, {}, {}, "transport.up.feedback: nothing is left unsent"),
    ({"codec": "top-k"}, {}, {"aggregation": "svd"}, "aggregation 'svd' gives the factors new coordinates"),
    ({"codec": "top-k"}, {}, {"method": "slora"}, "slora does not promise"),
    ({"codec": "int8"}, {}, {"method": "fedkd"}, "transport.up: clients of fedkd keep models of their own"),
    ({"codec": "int8", "share": 0.1}, {}, {}, "transport.up.share: int8 does not read it"),
    ({"codec": "bf16", "block": 32}, {}, {}, "transport.up.block: bf16 does not read it"),
    ({"codec": "int4", "feedback": True}, {}, {"robust": {"kind": "clip"}}, "transport.up.feedback: a client"),
]


@pytest.mark.parametrize(("up", "down", "more", "why"), BAD)
def test_a_coding_that_makes_no_sense_is_refused_with_the_reason(up, down, more, why):
    with pytest.raises(BadInput, match=why):
        build(job(up, down, **more))


@pytest.mark.parametrize("wrong", [{"codec": "int3"}, {"share": 0.6}, {"share": 0}, {"block": 1}, {"kind": "int8"}])
def test_a_coding_that_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError, match="transport"):
        job(wrong)


def test_the_word_names_what_is_on_the_wire():
    coding = CompressionSpec(codec="top-k", delta=True, feedback=True, zstd=True)

    assert coding.word == "top-k+delta+zstd"
