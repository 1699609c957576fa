import contextlib
import itertools
import json
import struct
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorabbit.compression.compressor import write_compressed
from lorabbit.errors import BadInput, CorruptPayload, Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import (
    FROM_CLIENT,
    FROM_SERVER,
    Commit,
    Deny,
    Grant,
    Hello,
    Metrics,
    Offer,
    PayloadRef,
    Verdict,
)
from lorabbit.tensors import serialization

SHA = "ab" * 32
FOR_TASK = {"job": "j", "task": "t", "client": "client-0"}
MESSAGES = [
    Hello(address="host-1", client=None, outbox=("t1",)),
    Offer(**FOR_TASK, payload=None, metrics=Metrics(num_examples=3, loss=0.5, facts={"labels": {"a": 1}})),
    Offer(**FOR_TASK, payload=PayloadRef(sha256=SHA, size_bytes=0, chunk_bytes=1024), metrics=Metrics(num_examples=0)),
    Grant(**FOR_TASK, sha256=SHA, missing=(0, 5)),
    Deny(**FOR_TASK, reason="stale"),
    Commit(**FOR_TASK, sha256=SHA),
    Verdict(**FOR_TASK, accepted=False, reason="not-finite"),
]
DTYPES = st.sampled_from([dtype for dtype in serialization.DTYPES.values() if dtype.kind != "V"])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
NAMES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20).filter(lambda n: n != "__metadata__")


@st.composite
def arrays(draw):
    dtype, shape = draw(DTYPES), draw(SHAPES)
    raw = draw(st.binary(min_size=int(np.prod(shape)) * dtype.itemsize, max_size=int(np.prod(shape)) * dtype.itemsize))
    if dtype == np.bool_:
        raw = bytes(byte & 1 for byte in raw)
    return np.frombuffer(raw, dtype).reshape(shape)


TENSORS = st.dictionaries(NAMES, arrays(), max_size=5)
FACTS = st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",)), max_size=8), st.integers() | st.text("ab"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tensors"


def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_a_message_survives_the_wire(message):
    assert codec.decode(message.type_name(), codec.encode(message)) == message


def test_every_message_type_names_its_version():
    assert all(model.type_name() == f"lorabbit.{model.kind}.v1" for model in (*FROM_CLIENT, *FROM_SERVER))


@pytest.mark.parametrize(
    ("type_name", "body", "reason"),
    [
        ("lorabbit.hello.v2", b"{}", "unknown-type"),
        ("", b"{}", "unknown-type"),
        ("lorabbit.hello.v1", b"not json", "malformed"),
        ("lorabbit.hello.v1", b'{"address": "A/../b"}', "malformed"),
        ("lorabbit.hello.v1", b'{"address": "a", "extra": 1}', "malformed"),
        ("lorabbit.hello.v1", b" " * (codec.MAX_MESSAGE_BYTES + 1), "too-large"),
    ],
)
def test_what_is_no_message_is_refused_by_name(type_name, body, reason):
    with pytest.raises(Refused) as refused:
        codec.decode(type_name, body)

    assert refused.value.reason == reason


@given(body=st.binary(max_size=200), model=st.sampled_from([*FROM_CLIENT, *FROM_SERVER]))
def test_no_bytes_break_the_reader_of_messages(body, model):
    with contextlib.suppress(Refused):
        assert isinstance(codec.decode(model.type_name(), body), model)


@given(tensors=TENSORS, facts=FACTS)
def test_tensors_and_facts_survive_a_file(tensors, facts):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"

        sha256 = serialization.write_tensors(path, tensors, facts)

        read = serialization.read_tensors(path)
        assert list(read) == sorted(tensors)
        for name, value in tensors.items():
            assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
            assert read[name].tobytes() == value.tobytes()
        assert serialization.read_facts(path) == facts
        assert sha256 == serialization.tensors_sha256(dict(reversed(tensors.items())), facts)
        assert [p.name for p in Path(folder).iterdir()] == ["tensors"]


@given(tensors=TENSORS)
def test_a_file_that_is_read_and_written_again_is_the_same_file(tensors):
    with TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        serialization.write_tensors(first, tensors)

        serialization.write_tensors(second, serialization.read_tensors(first))

        assert first.read_bytes() == second.read_bytes()


def test_the_bytes_are_those_of_the_safetensors_library(file, tmp_path):
    tensors = {name: np.arange(7, dtype=np.float32) + i for i, name in enumerate("bca")}

    serialization.write_tensors(file, tensors)

    safetensors.numpy.save_file(tensors, tmp_path / "library", {"format": "pt"})
    assert file.read_bytes() == (tmp_path / "library").read_bytes()


@given(tensors=TENSORS.filter(lambda t: not any(v.dtype.name.startswith("float8") for v in t.values())))
def test_the_safetensors_library_reads_our_files_and_we_read_its(tensors):
    with TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        serialization.write_tensors(ours, tensors)
        safetensors.numpy.save_file(tensors, theirs)

        for read in (safetensors.numpy.load_file(ours), serialization.read_tensors(theirs)):
            assert read.keys() == tensors.keys()
            assert all(read[name].tobytes() == value.tobytes() for name, value in tensors.items())


def test_bfloat16_stays_bfloat16(file):
    value = np.array([1.0, -2.5, 3e38], dtype=ml_dtypes.bfloat16)

    serialization.write_tensors(file, {"w": value})

    read = serialization.read_tensors(file)["w"]
    assert read.dtype == ml_dtypes.bfloat16
    assert file.stat().st_size % 8 == 6
    np.testing.assert_array_equal(read, value)


def test_views_and_foreign_byte_orders_are_written_as_values(file):
    transposed = np.arange(6, dtype=">f4").reshape(2, 3).T

    serialization.write_tensors(file, {"w": transposed})

    np.testing.assert_array_equal(serialization.read_tensors(file)["w"], [[0, 3], [1, 4], [2, 5]])


def test_a_tensor_that_was_read_may_be_changed_and_the_file_does_not(file):
    serialization.write_tensors(file, {"w": np.zeros(3)})
    tensors = serialization.read_tensors(file)

    tensors["w"][:] = 1

    assert tensors["w"].tolist() == [0, 0, 0]


def test_open_tensors_outlive_the_name_of_their_file(file):
    serialization.write_tensors(file, {"w": np.ones(2)})
    tensors = serialization.read_tensors(file)

    file.unlink()

    assert tensors["w"].tolist() == [1, 1]


def test_a_file_cut_short_after_opening_is_corrupt_and_not_a_crash(file):
    serialization.write_tensors(file, {"w": np.ones(100)})
    tensors = serialization.read_tensors(file)

    with file.open("r+b") as cut:
        cut.truncate(300)

    with pytest.raises(CorruptPayload, match="cut short"):
        tensors["w"]


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([1 + 2j]), np.array([object()])])
def test_what_is_no_tensor_does_not_travel(file, value):
    with pytest.raises(BadInput, match="'w'"):
        serialization.write_tensors(file, {"w": value})

    assert list(file.parent.iterdir()) == []


def test_a_tensor_may_not_take_the_name_of_the_metadata(file):
    with pytest.raises(BadInput, match="__metadata__"):
        serialization.write_tensors(file, {"__metadata__": np.zeros(1)})


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 2**63) + b"{}",
        raw_file(b"[]"),
        raw_file(b"null"),
        raw_file(b"{not json"),
        raw_file(b"\xff\xfe"),
        raw_file(b"[" * 100_000),
        raw_file({"w": F32}),
        raw_file({"w": F32}, b"12345"),
        raw_file({"w": {**F32, "dtype": "PICKLE"}}, b"1234"),
        raw_file({"w": {**F32, "shape": [2]}}, b"1234"),
        raw_file({"w": {**F32, "shape": [-1]}}, b"1234"),
        raw_file({"w": {**F32, "shape": [True]}}, b"1234"),
        raw_file({"w": {**F32, "data_offsets": [4, 8]}}, b"12345678"),
        raw_file({"w": {**F32, "more": 1}}, b"1234"),
        raw_file({"v": F32, "w": F32}, b"1234"),
        raw_file({"w": {**F32, "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"1234"),
        raw_file({"__metadata__": {"a": 1}, "w": F32}, b"1234"),
        raw_file(b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", b"1234"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_corrupt(file, content):
    file.write_bytes(content)

    with pytest.raises(CorruptPayload):
        serialization.read_tensors(file)


@given(content=st.binary(max_size=300), position=st.integers(0, 299), flip=st.integers(1, 255))
def test_no_bytes_break_the_reader_of_tensors(content, position, flip):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        serialization.write_tensors(path, {"a": np.ones(4, np.float32), "b": np.zeros((2, 2), np.int8)})
        flipped = bytearray(path.read_bytes())
        flipped[position % len(flipped)] ^= flip
        for candidate in (content, bytes(flipped)):
            path.write_bytes(candidate)
            with contextlib.suppress(CorruptPayload):
                tensors = serialization.read_tensors(path)
                assert all(tensors[name].size >= 0 for name in tensors)
                serialization.read_facts(path)


def test_a_header_may_not_be_larger_than_the_bound(file):
    file.write_bytes(
        struct.pack("<Q", serialization.MAX_HEADER_BYTES + 1) + b" " * (serialization.MAX_HEADER_BYTES + 1)
    )

    with pytest.raises(CorruptPayload, match="header"):
        serialization.read_tensors(file)


def factors(layers, matrices):
    """Pairs of factors that hold nothing, under names as PEFT gives them."""
    empty = np.zeros((0, 18432), np.float32)
    sides = ("lora_A", "lora_B")
    names = itertools.product(range(layers), matrices, sides)
    return {f"base_model.model.model.layers.{n}.{matrix}.{side}.weight": empty for n, matrix, side in names}


DENSE = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
OF_128_EXPERTS = DENSE[:4] + [f"mlp.experts.{n}.{part}_proj" for n in range(128) for part in ("gate", "up", "down")]


@pytest.mark.parametrize(("layers", "matrices"), [(126, DENSE), (48, OF_128_EXPERTS)], ids=["dense", "experts"])
def test_adapters_of_every_matrix_of_large_models_have_room_in_a_header(file, layers, matrices):
    adapter = factors(layers, matrices)

    serialization.write_tensors(file, adapter)

    assert len(serialization.read_tensors(file)) == len(adapter) == 2 * layers * len(matrices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "write", [serialization.write_tensors, partial(write_compressed, coding=CompressionSpec(codec="bf16"))]
)
def test_nobody_writes_a_header_that_nobody_reads(file, write):
    with pytest.raises(BadInput, match="train fewer matrices"):
        write(file, factors(140, OF_128_EXPERTS))

    assert list(file.parent.iterdir()) == []


def test_writing_holds_one_tensor_at_a_time(file):
    alive = []

    class Computed(dict):
        def __getitem__(self, name):
            alive.append(name)
            return np.full(3, float(name))

    serialization.write_tensors(file, Computed({"1": None, "2": None}))

    assert alive == ["1", "2", "1", "2"]
    assert serialization.read_tensors(file)["2"].tolist() == [2, 2, 2]


def test_an_offer_whose_bytes_by_role_do_not_add_up_is_malformed():
    whole = Offer(**FOR_TASK, payload=None, metrics=Metrics(num_examples=1), bytes_down=3, bytes_by_role={"base": 3})
    body = codec.encode(whole)

    assert codec.decode(Offer.type_name(), body) == whole
    with pytest.raises(Refused, match="adds up to 3, not 4"):
        codec.decode(Offer.type_name(), body.replace(b'"bytes_down":3', b'"bytes_down":4'))
