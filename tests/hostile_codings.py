"""Coded updates that nobody honest writes: forged part by part, and what admission says of one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zstandard
from hypothesis import strategies as st

from lorabbit.compression.compressed_file import DeltaBase
from lorabbit.compression.compressor import write_compressed
from lorabbit.errors import Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.tensors import serialization
from lorabbit_server.aggregation.update_validation import ExpectedUpdate, UpdateTemplate, check_update

COUNT, BLOCK = 100, 64
START = {"w": np.linspace(-1, 1, COUNT, dtype=np.float32)}
TEMPLATE = UpdateTemplate.of(START)
INT8, INT4, TOP = (
    CompressionSpec(codec="int8", delta=True),
    CompressionSpec(codec="int4", delta=True),
    CompressionSpec(codec="top-k", delta=True),
)
PACKED = INT8.model_copy(update={"zstd": True})
KEPT = 5
JSON = st.recursive(
    st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.sampled_from(["F32", "BF16", "w", 2**62]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)
INDEXES = JSON | st.lists(st.tuples(st.text(max_size=3), st.sampled_from(["F32", "X"]), st.lists(st.integers())))
CLAIMS = st.text(max_size=40) | st.sampled_from(['{"codec":"int9"}', "{}", "[]", '{"block":0}', "9" * 5000])


def judged(content, coding=INT8, start=START):
    """The reason for which admission refuses a file, None where it passes."""
    with TemporaryDirectory() as folder:
        path, held = Path(folder) / "u", Path(folder) / "held"
        path.write_bytes(content)
        expected = ExpectedUpdate(UpdateTemplate.of(start), coding, (serialization.write_tensors(held, start), held))
        try:
            check_update(path, expected)
        except Refused as why:
            return why.reason
    return None


def honest(coding, tensors=START, start=START):
    """Bytes of an update that is what was asked for."""
    with TemporaryDirectory() as folder:
        path, held = Path(folder) / "u", Path(folder) / "held"
        origin = DeltaBase(serialization.write_tensors(held, start), serialization.read_tensors(held))
        write_compressed(path, tensors, coding, origin=origin)
        return path.read_bytes()


def forged(sections, coding=INT8, index=None, **metadata):
    """A coded file whose parts are what the forger likes."""
    plain = index if isinstance(index, bytes) else json.dumps(index or [["w", "F32", [COUNT]]]).encode()
    packed = zstandard.compress(plain)
    told = {"lorabbit.coding": coding.model_dump_json(exclude={"feedback"}, exclude_defaults=True), **metadata}
    header = json.dumps(
        {
            "__metadata__": told,
            "index": {"dtype": "U8", "shape": [len(packed)], "data_offsets": [0, len(packed)]},
            "sections": {
                "dtype": "U8", "shape": [len(sections)], "data_offsets": [len(packed), len(packed) + len(sections)]
            },
        }
    ).encode()  # fmt: skip
    return struct.pack("<Q", len(header)) + header + packed + sections


def section(body, *, compressed=False, claim=None):
    size = len(body) if claim is None else claim
    return struct.pack("<Q", size | (compressed << 63)) + body


def blocks(scales=(0x3C00, 0x3C00), numbers=bytes(COUNT)):
    return section(struct.pack(f"<{len(scales)}H", *scales) + numbers)


def places(indices, values=(1.0,) * KEPT):
    return section(struct.pack(f"<{len(indices)}I", *indices) + struct.pack(f"<{len(values)}f", *values))
