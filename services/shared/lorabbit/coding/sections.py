"""Sections: the arrays of one tensor as bytes, compressed where that makes them smaller.

A section is eight bytes that tell its length and whether it is compressed, then that many bytes. What it must hold
when it is opened follows from the tensor, never from the section, so nothing larger is ever made of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import zstandard

from lorabbit.coding.values import Layout
from lorabbit.errors import CorruptPayload
from lorabbit.types import Array

PREFIX_BYTES = 8
COMPRESSED = 1 << 63
LEVEL = 3
MAX_WINDOW = 2**27
"""Bytes that a compressed section may ask to look back over: what zstd's own levels stay below."""


def size_of(layout: Layout) -> int:
    """Bytes of a section's arrays, its length not among them."""
    return sum(dtype.itemsize * count for dtype, count in layout)


def pack(arrays: Sequence[Array], *, compress: bool) -> bytes:
    """Write a section, its length before it."""
    plain = b"".join(_bytes(array) for array in arrays)
    if compress and plain:
        smaller = squeeze(b"".join(_planes(array) for array in arrays))
        if len(smaller) < len(plain):
            return (len(smaller) | COMPRESSED).to_bytes(PREFIX_BYTES, "little") + smaller
    return len(plain).to_bytes(PREFIX_BYTES, "little") + plain


def unpack(body: memoryview, layout: Layout, *, compressed: bool) -> list[Array]:
    """Read a section's arrays; raises CorruptPayload where it is not what the layout says."""
    size = size_of(layout)
    plain = expand(body, size) if compressed else bytearray(body)
    if len(plain) != size:
        raise CorruptPayload(f"a section has {len(plain)} bytes, not {size}")
    arrays, start = [], 0
    for dtype, count in layout:
        end = start + dtype.itemsize * count
        raw = np.frombuffer(plain, np.uint8, end - start, start)
        arrays.append(_joined(raw, dtype) if compressed else raw.view(dtype))
        start = end
    return arrays


def squeeze(plain: bytes) -> bytes:
    """Compress; the frame tells its size."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(plain)


def expand(body: bytes | memoryview, size: int) -> bytearray:
    """Decompress exactly so many bytes; raises CorruptPayload where there are more or fewer."""
    plain = bytearray(size)
    try:
        opener = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        with opener.stream_reader(io.BytesIO(body), read_across_frames=False) as reader:
            filled = 0
            while filled < size and (count := reader.readinto(memoryview(plain)[filled:])):
                filled += count
            surplus = reader.read(1)
    except zstandard.ZstdError as error:
        raise CorruptPayload(f"a section cannot be decompressed: {error}") from error
    if filled != size or surplus:
        raise CorruptPayload(f"a section does not hold the {size} bytes that it should")
    return plain


def _bytes(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _planes(array: Array) -> bytes:
    """All first bytes, then all second ones, and so on: like stands beside like."""
    width = array.dtype.itemsize
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, width).T.tobytes()


def _joined(planes: Array, dtype: np.dtype[np.generic]) -> Array:
    return np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
