"""Codecs: bounds of what they lose, and that nothing else is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lorabbit.compression.compressed_file import DeltaBase, compression_of, open_tensors
from lorabbit.compression.compressor import DecodeStep, most_bytes, restore, write_compressed
from lorabbit.compression.quantizers import flushed, lossy
from lorabbit.errors import BadInput, CorruptPayload, Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.tensors import serialization

EXAMPLES = settings(max_examples=60, deadline=None)
LIMIT = 2.0**100
"""Far from where float32 ends: sums of a few such numbers are finite."""
VALUES = arrays.arrays(
    np.float32, st.integers(1, 300), elements=st.floats(-LIMIT, LIMIT, width=32, allow_subnormal=False)
)
LOSSY = st.sampled_from(
    [
        CompressionSpec(codec="bf16", delta=True),
        CompressionSpec(codec="int8", delta=True),
        CompressionSpec(codec="int8", delta=True, block=7),
        CompressionSpec(codec="int4", delta=True, zstd=True),
        CompressionSpec(codec="top-k", delta=True, share=0.1),
    ]
)
FACTORS = {
    "b.lora_A": np.linspace(-1, 1, 8 * 33, dtype=np.float32).reshape(8, 33),
    "b.lora_B": np.linspace(-2, 3, 5 * 8, dtype=np.float32).reshape(5, 8),
    "head.bias": np.array([0.5, -0.25], np.float32),
    "steps": np.array([7, 9], np.int64),
    "mask": np.array([True, False, True]),
    "nothing": np.zeros((0, 4), np.float32),
    "one": np.array(3.0, np.float32),
}


def there_and_back(values, coding):
    found = lossy(coding)
    return found.decode(found.encode(flushed(values)), values.size)


def largest_scale(blocks, levels):
    """What the formula allows: rounded up to eight bits."""
    return np.abs(blocks.astype(np.float64)).max(axis=1) / levels * (1 + 2**-7)


@EXAMPLES
@given(values=VALUES, codec_name=st.sampled_from(["int8", "int4"]), block=st.integers(2, 70))
def test_a_block_loses_at_most_half_a_step_of_its_scale(values, codec_name, block):
    levels = {"int8": 127, "int4": 7}[codec_name]

    found = there_and_back(values, CompressionSpec(codec=codec_name, block=block))

    padded = np.zeros(-(-values.size // block) * block)
    padded[: values.size] = values
    largest = largest_scale(padded.reshape(-1, block), levels)
    lost = np.zeros(padded.size)
    lost[: values.size] = np.abs(values.astype(np.float64) - found)
    assert (lost.reshape(-1, block) <= largest[:, None] / 2 * (1 + 2**-20) + 2.0**-100).all()


@EXAMPLES
@given(values=VALUES)
def test_bf16_loses_at_most_a_256th_of_each_value(values):
    found = there_and_back(values, CompressionSpec(codec="bf16"))

    assert (np.abs(values.astype(np.float64) - found) <= 2**-8 * np.abs(values.astype(np.float64)) + 2.0**-100).all()


@EXAMPLES
@given(values=VALUES, share=st.floats(0.01, 0.5))
def test_top_k_sends_the_largest_values_as_they_are_and_no_other(values, share):
    kept = min(values.size, max(1, int(np.ceil(share * values.size - 1e-9))))

    found = there_and_back(values, CompressionSpec(codec="top-k", share=share))

    sent = found != 0
    assert np.array_equal(found[sent], values[sent])
    assert sent.sum() <= kept
    assert np.abs(found).sum(dtype=np.float64) == pytest.approx(
        np.sort(np.abs(values).astype(np.float64))[::-1][:kept].sum(), rel=1e-6
    )


def test_of_equal_values_top_k_takes_the_first():
    found = there_and_back(np.array([1, -2, 2, 2, 1], np.float32), CompressionSpec(codec="top-k", share=0.4))

    assert found.tolist() == [0, -2, 2, 0, 0]


@EXAMPLES
@given(values=VALUES, share=st.floats(0.01, 0.5))
def test_what_top_k_leaves_out_is_smaller_by_the_share_at_least(values, share):
    """Stich et al., Sparsified SGD with Memory, 2018: |x - top_k(x)|^2 <= (1 - k/d) |x|^2.

    The codec writes magnitudes up to the smallest normal float32 as zero.
    """
    flushed = values.size * (float(np.finfo(np.float32).tiny) / LIMIT) ** 2
    kept = min(values.size, max(1, int(np.ceil(share * values.size - 1e-9))))
    wide = values.astype(np.float64) / LIMIT

    left = wide - there_and_back(values, CompressionSpec(codec="top-k", share=share)).astype(np.float64) / LIMIT

    assert (left**2).sum() <= (1 - kept / values.size) * (wide**2).sum() * (1 + 1e-9) + flushed


@EXAMPLES
@given(
    changes=st.lists(
        arrays.arrays(np.float32, 40, elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
        min_size=1,
        max_size=8,
    ),
    coding=st.sampled_from(
        [
            CompressionSpec(codec="top-k", delta=True, share=0.1, feedback=True),
            CompressionSpec(codec="int4", delta=True, feedback=True),
        ]
    ),
)
def test_what_was_sent_and_what_is_left_are_together_what_was_to_be_sent(changes, coding):
    start = {"w": np.zeros(40, np.float32)}
    sent, residual = np.zeros(40), {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "u"
        origin = held(Path(folder), start)
        for change in changes:
            residual = write_compressed(path, {"w": change}, coding, origin=origin, residual=residual)
            sent += open_tensors(path, origin)["w"]

    wanted = np.sum(np.asarray(changes, np.float64), axis=0)
    assert np.abs(sent + residual["w"] - wanted).max() <= len(changes) * 800 * 2**-23


def test_feedback_brings_every_value_across_in_the_end(tmp_path):
    coding = CompressionSpec(codec="top-k", delta=True, share=0.1, feedback=True)
    origin = held(tmp_path, {"w": np.zeros(20, np.float32)})
    change, residual, sent = np.arange(1, 21, dtype=np.float32), {}, np.zeros(20)
    for number in range(40):
        wanted = change if number == 0 else np.zeros_like(change)
        residual = write_compressed(tmp_path / "u", {"w": wanted}, coding, origin=origin, residual=residual)
        sent += open_tensors(tmp_path / "u", origin)["w"]

    assert np.array_equal(sent, change)
    assert not residual["w"].any()


# ---- files ----
def held(folder, tensors):
    path = folder / "held"
    return DeltaBase(serialization.write_tensors(path, tensors), serialization.read_tensors(path))


def moved(tensors, by=0.01):
    return {name: value + np.float32(by) if value.dtype == np.float32 else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "coding", [CompressionSpec(zstd=True), CompressionSpec(delta=True, zstd=True)], ids=lambda coding: coding.word
)
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_lossless_file_comes_back_to_the_bit(tmp_path, coding, kind):
    given_ = {name: value.astype(kind) if value.dtype == np.float32 else value for name, value in FACTORS.items()}
    origin = held(tmp_path, given_)
    new = {name: value + kind(0.01) if value.dtype == kind else value for name, value in given_.items()}

    write_compressed(tmp_path / "c", new, coding, origin=origin)

    found = open_tensors(tmp_path / "c", origin)
    assert compression_of(found) == coding
    assert serialization.tensors_sha256(found) == serialization.tensors_sha256(new)


@EXAMPLES
@given(values=arrays.arrays(np.uint32, st.integers(0, 50)), before=arrays.arrays(np.uint32, 50))
def test_a_difference_brings_any_bits_across_whatever_they_mean(values, before):
    with TemporaryDirectory() as folder:
        origin = held(Path(folder), {"w": before[: values.size].view(np.float32)})
        path = Path(folder) / "c"
        write_compressed(path, {"w": values.view(np.float32)}, CompressionSpec(delta=True, zstd=True), origin=origin)

        assert np.array_equal(open_tensors(path, origin)["w"].view(np.uint32), values)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_what_is_no_real_number_is_never_rounded(tmp_path, name, delta):
    origin = held(tmp_path, FACTORS)

    write_compressed(tmp_path / "c", moved(FACTORS), CompressionSpec(codec=name, delta=delta), origin=origin)

    found = open_tensors(tmp_path / "c", origin)
    assert dict(found).keys() == FACTORS.keys()
    for each in ("steps", "mask", "nothing"):
        assert np.array_equal(found[each], FACTORS[each])
    for each, value in moved(FACTORS).items():
        assert found[each].dtype == value.dtype
        assert found[each].shape == value.shape


def test_a_small_change_of_large_factors_loses_little_where_the_factors_themselves_would_lose_much(tmp_path):
    large = {"w": np.linspace(50, 100, 64, dtype=np.float32)}
    origin, new = held(tmp_path, large), moved(large, 1e-3)
    lost = {}
    for delta in (True, False):
        write_compressed(tmp_path / "c", new, CompressionSpec(codec="int8", delta=delta), origin=origin)
        lost[delta] = np.abs(open_tensors(tmp_path / "c", origin)["w"] - new["w"]).max()

    assert lost[True] < 1e-5
    assert lost[False] > 1e-1


def test_a_client_of_lower_rank_tells_the_difference_to_the_leading_components(tmp_path):
    origin = held(tmp_path, FACTORS)
    part = {"b.lora_A": FACTORS["b.lora_A"][:3] + 1, "b.lora_B": FACTORS["b.lora_B"][:, :3] + 1}

    write_compressed(tmp_path / "c", part, CompressionSpec(codec="int8", delta=True), origin=origin)

    found = open_tensors(tmp_path / "c", origin)
    assert np.abs(found["b.lora_A"] - part["b.lora_A"]).max() <= 1 / 127
    assert found["b.lora_B"].shape == (5, 3)


def test_the_size_is_known_before_and_zstd_never_makes_it_larger(tmp_path):
    origin = held(tmp_path, FACTORS)
    for name in ("bf16", "int8", "int4", "top-k"):
        coding = CompressionSpec(codec=name, delta=True)
        write_compressed(tmp_path / "c", moved(FACTORS), coding, origin=origin)
        assert (tmp_path / "c").stat().st_size == most_bytes(coding, FACTORS, origin=origin)
    noise = {"w": np.random.default_rng(0).integers(0, 2**32, 999, dtype=np.uint32).view(np.float32)}
    write_compressed(tmp_path / "c", noise, CompressionSpec(zstd=True))
    assert (tmp_path / "c").stat().st_size <= most_bytes(CompressionSpec(zstd=True), noise)


def test_the_same_tensors_give_the_same_bytes_and_a_file_any_safetensors_reader_opens(tmp_path):
    origin = held(tmp_path, FACTORS)
    for path in (tmp_path / "1", tmp_path / "2"):
        write_compressed(path, moved(FACTORS), CompressionSpec(codec="int4", delta=True), origin=origin)

    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert set(serialization.read_tensors(tmp_path / "1")) == {"index", "sections"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_decoded_values_are_those_of_the_formula_on_every_machine(tmp_path):
    write_compressed(
        tmp_path / "c", {"w": np.array([1, -0.3, 0.1, 0], np.float32)}, CompressionSpec(codec="int8", block=2)
    )

    scales = [130 * 2**-14, 207 * 2**-18]  # 1/127 = 129.01 2^-14 and 0.1/127 = 206.4 2^-18, up to eight bits
    expected = [126 * scales[0], -38 * scales[0], 127 * scales[1], 0]
    assert open_tensors(tmp_path / "c")["w"].tolist() == np.array(expected, np.float32).tolist()


def test_another_origin_than_the_one_told_is_refused(tmp_path):
    origin = held(tmp_path, FACTORS)
    write_compressed(tmp_path / "c", moved(FACTORS), CompressionSpec(codec="int8", delta=True), origin=origin)

    for wrong in (None, DeltaBase("0" * 64, origin.tensors)):
        with pytest.raises(Refused, match="origin"):
            open_tensors(tmp_path / "c", wrong)


def test_a_tensor_of_a_type_that_cannot_travel_is_bad_input_and_leaves_nothing(tmp_path):
    with pytest.raises(BadInput, match="complex64"):
        write_compressed(tmp_path / "c", {"w": np.zeros(2, np.complex64)}, CompressionSpec(codec="int8"))

    assert list(tmp_path.iterdir()) == []


# ---- whole files of coded ones ----
def recipe(folder, new, coding, origin, **more):
    write_compressed(folder / "coded", new, coding, origin=origin)
    whole = folder / "whole"
    sha256 = serialization.write_tensors(whole, open_tensors(folder / "coded", origin))
    size = whole.stat().st_size
    whole.unlink()
    known = {
        "coded": folder / "coded", "origin": folder / "held", "target": folder / "whole",
        "origin_sha256": origin.sha256, "sha256": sha256, "size_bytes": size,
    }  # fmt: skip
    return DecodeStep(**{**known, **more})


def test_a_whole_file_is_made_of_a_coded_one_and_checked_against_its_hash(tmp_path):
    made = recipe(tmp_path, moved(FACTORS), CompressionSpec(delta=True, zstd=True), held(tmp_path, FACTORS))

    restore(made)
    restore(made)

    assert hashlib.sha256((tmp_path / "whole").read_bytes()).hexdigest() == made.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "held", "whole"]


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size_bytes": 64}])
def test_a_coded_file_that_does_not_give_what_was_announced_is_deleted_with_what_it_needs(tmp_path, wrong):
    made = recipe(tmp_path, moved(FACTORS), CompressionSpec(delta=True, zstd=True), held(tmp_path, FACTORS), **wrong)

    with pytest.raises(CorruptPayload):
        restore(made)

    assert list(tmp_path.iterdir()) == []
