import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabbit.errors import CorruptPayload
from lorabbit.protocol.messages import PayloadRef
from lorabbit.transfer.payload_store import PayloadStore

CHUNK = 1024


def ref_of(content, chunk_bytes=CHUNK):
    return PayloadRef(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content), chunk_bytes=chunk_bytes)


def chunk(content, index):
    return content[index * CHUNK : (index + 1) * CHUNK]


@pytest.fixture(params=[True, False], ids=["durable", "fast"])
def store(request, tmp_path):
    return PayloadStore(tmp_path / "store", durable=request.param)


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_tensors_become_a_payload_under_their_hash(store):
    ref = store.add_tensors({"w": np.ones(3)}, {"round": 1}, chunk_bytes=CHUNK)

    content = store.path(ref.sha256).read_bytes()
    assert ref == ref_of(content)
    assert store.has(ref.sha256)
    assert store.missing(ref) == ()
    assert list(store.stored()) == [ref.sha256]
    assert len(files(store)) == 1


def test_the_same_tensors_are_one_file(store):
    first = store.add_tensors({"w": np.ones(3)})

    assert store.add_tensors({"w": np.ones(3)}) == first
    assert len(files(store)) == 1


def test_a_payload_is_cut_into_chunks_of_one_mebibyte_unless_told_otherwise(store):
    assert store.add_tensors({"w": np.ones(3)}).chunk_bytes == 1024 * 1024


def test_chunks_that_arrive_are_forced_to_the_disk_every_32_mebibytes(store, monkeypatch):
    content, forced = bytes(40 * 2**20), []
    monkeypatch.setattr("os.fdatasync", forced.append)
    ref = PayloadRef(sha256="0" * 64, size_bytes=len(content), chunk_bytes=8 * 2**20)

    counts = []
    for index in range(5):
        store.write_chunk(ref, index, content[: 8 * 2**20])
        counts.append(len(forced))

    assert counts == ([0, 0, 0, 1, 1] if store.durable else [0] * 5)


def test_a_file_is_copied_in(store, tmp_path):
    (tmp_path / "file").write_bytes(b"content")

    ref = store.add_file(tmp_path / "file", chunk_bytes=CHUNK)

    assert ref == ref_of(b"content")
    assert store.path(ref.sha256).read_bytes() == (tmp_path / "file").read_bytes()


@given(
    content=st.binary(max_size=5 * CHUNK),
    order=st.lists(st.integers(0, 5), max_size=12),
    restart_after=st.integers(0, 12),
)
def test_chunks_in_any_order_repeated_and_over_a_restart_make_the_whole(content, order, restart_after):
    with TemporaryDirectory() as folder:
        ref, store = ref_of(content), PayloadStore(Path(folder), durable=False)
        written = set()

        for turn, index in enumerate(order):
            if index < ref.chunks:
                store.write_chunk(ref, index, chunk(content, index))
                written.add(index)
            if turn == restart_after:
                store = PayloadStore(Path(folder), durable=False)
            assert store.missing(ref) == tuple(sorted(set(range(ref.chunks)) - written))
        for index in store.missing(ref):
            store.write_chunk(ref, index, chunk(content, index))

        assert store.finish(ref).read_bytes() == content
        assert files(store) == [f"{ref.sha256}.safetensors"]
        assert store.missing(ref) == ()
        assert store.finish(ref) == store.path(ref.sha256)


@given(position=st.integers(0, 3 * CHUNK - 1), flip=st.integers(1, 255), backwards=st.booleans())
def test_a_flipped_bit_is_found_and_everything_forgotten(position, flip, backwards):
    content = bytes(3 * CHUNK)
    corrupt = bytearray(content)
    corrupt[position] ^= flip
    with TemporaryDirectory() as folder:
        ref, store = ref_of(content), PayloadStore(Path(folder), durable=False)
        for index in reversed(range(3)) if backwards else range(3):
            store.write_chunk(ref, index, chunk(bytes(corrupt), index))

        with pytest.raises(CorruptPayload, match="hash"):
            store.finish(ref)

        assert files(store) == []
        assert store.missing(ref) == (0, 1, 2)


def test_an_empty_payload_is_one_empty_chunk(store):
    ref = ref_of(b"")

    assert store.missing(ref) == (0,)
    store.write_chunk(ref, 0, b"")

    assert store.finish(ref).read_bytes() == b""


@pytest.mark.parametrize(("index", "body"), [(-1, b"x" * CHUNK), (2, b"x"), (0, b"x"), (1, b"x" * CHUNK)])
def test_a_chunk_that_does_not_fit_is_refused(store, index, body):
    ref = ref_of(b"x" * (CHUNK + 1))

    with pytest.raises(CorruptPayload):
        store.write_chunk(ref, index, body)

    assert store.missing(ref) == (0, 1)


def test_a_payload_that_lacks_chunks_is_not_finished_and_not_forgotten(store):
    content = b"x" * (2 * CHUNK)
    ref = ref_of(content)
    store.write_chunk(ref, 1, chunk(content, 1))

    with pytest.raises(CorruptPayload, match="lacks 1 of 2"):
        store.finish(ref)

    assert store.missing(ref) == (0,)


def test_another_cut_of_the_same_payload_starts_over(store):
    content = b"x" * (2 * CHUNK)
    store.write_chunk(ref_of(content), 0, chunk(content, 0))

    other = ref_of(content, 2 * CHUNK)

    assert store.missing(other) == (0,)
    store.write_chunk(other, 0, content)
    assert store.finish(other).read_bytes() == content


def test_a_record_cut_in_the_middle_of_an_index_is_read_up_to_there(store):
    content = b"x" * (3 * CHUNK)
    ref = ref_of(content)
    store.write_chunk(ref, 0, chunk(content, 0))
    store.write_chunk(ref, 2, chunk(content, 2))
    record = store.folder / f"{ref.sha256}.have"
    record.write_bytes(record.read_bytes()[:-3])

    after = PayloadStore(store.folder, durable=store.durable)

    assert after.missing(ref) == (1, 2)
    for index in (1, 2):
        after.write_chunk(ref, index, chunk(content, index))
    assert after.finish(ref).read_bytes() == content


def test_what_is_deleted_is_gone_whole_or_arriving(store):
    whole = store.add_tensors({"w": np.ones(3)})
    content = b"x" * (2 * CHUNK)
    arriving = ref_of(content)
    store.write_chunk(arriving, 0, chunk(content, 0))

    for sha256 in (whole.sha256, arriving.sha256, "00" * 32):
        store.delete(sha256)

    assert files(store) == []
    assert store.missing(arriving) == (0, 1)
