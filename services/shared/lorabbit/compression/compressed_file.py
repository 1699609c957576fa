"""Coded files: tensors as a coding writes them, in a safetensors file of two byte arrays.

`index` names the tensors with their types and shapes, compressed; `sections` has one section for each, in the order
of the index. The metadata say the coding, and the sha256 of the file that differences are to. Everything else that a
reader needs follows from these, so there is little left to lie about: a reader compares the index with what it
expects before it makes room for anything, and each tensor is decoded by itself when it is asked for.

Origin: what both sides hold already, to which a coded file gives the difference.

Sections: the arrays of one tensor as bytes, compressed where that makes them smaller.

A section is eight bytes that tell its length and whether it is compressed, then that many bytes. What it must hold
when it is opened follows from the tensor, never from the section, so nothing larger is ever made of it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from pydantic import TypeAdapter, ValidationError

from lorabbit.compression.quantizers import BYTE, Floats, Layout, flushed, lossy
from lorabbit.errors import SHOWN, CorruptPayload, Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.tensors import serialization
from lorabbit.tensors.arithmetic import is_floating
from lorabbit.tensors.serialization import DTYPES, check_shape
from lorabbit.types import Array, Tensors


@dataclass(frozen=True, slots=True)
class DeltaBase:
    """A tensor file by its content: the adapter that a task named, or an earlier one."""

    sha256: str
    tensors: Tensors

    @classmethod
    def of(cls, sha256: str, path: Path) -> DeltaBase:
        """Open a file; raises CorruptPayload where it is none."""
        return cls(sha256, serialization.read_tensors(path))

    def beside(self, name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array | None:
        """The tensor of a name, cut to the leading part of a shape (a lower rank); None where there is none like it."""
        if name not in self.tensors:
            return None
        own_dtype, own = serialization.describe(self.tensors, name)
        if own_dtype != dtype or len(own) != len(shape) or any(a > b for a, b in zip(shape, own, strict=True)):
            return None
        value = self.tensors[name]
        return value if own == shape else value[tuple(slice(0, side) for side in shape)]


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
        smaller = compress_bytes(b"".join(_planes(array) for array in arrays))
        if len(smaller) < len(plain):
            return (len(smaller) | COMPRESSED).to_bytes(PREFIX_BYTES, "little") + smaller
    return len(plain).to_bytes(PREFIX_BYTES, "little") + plain


def unpack(body: memoryview, layout: Layout, *, compressed: bool) -> list[Array]:
    """Read a section's arrays; raises CorruptPayload where it is not what the layout says."""
    size = size_of(layout)
    plain = decompress_bytes(body, size) if compressed else bytearray(body)
    if len(plain) != size:
        raise CorruptPayload(f"a section has {len(plain)} bytes, not {size}")
    arrays, start = [], 0
    for dtype, count in layout:
        end = start + dtype.itemsize * count
        raw = np.frombuffer(plain, np.uint8, end - start, start)
        arrays.append(_joined(raw, dtype) if compressed else raw.view(dtype))
        start = end
    return arrays


def compress_bytes(plain: bytes) -> bytes:
    """Compress; the frame tells its size."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(plain)


def decompress_bytes(body: bytes | memoryview, size: int) -> bytearray:
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


MARK = "lorabbit.coding"
"""Key of a coded file's metadata."""
ORIGIN = "lorabbit.origin"
INDEX, SECTIONS = "index", "sections"
SMALLEST = np.finfo(np.float32).smallest_normal
_ENTRIES = TypeAdapter(list[tuple[str, str, tuple[int, ...]]])


class CompressedTensors(serialization.StoredTensors):
    """Tensors of a coded file, each decoded when it is asked for, as a writable array of its own."""

    def __init__(self, file: serialization.FileTensors, origin: DeltaBase | None) -> None:
        """Check the index and where each section lies; raises CorruptPayload, and Refused for an unknown origin."""
        self._file, self._name = file, file.name
        self.coding = _coding(file)
        told = file.metadata.get(ORIGIN)
        if told is not None and (origin is None or origin.sha256 != told):
            held = "nothing" if origin is None else origin.sha256[:12]
            raise Refused("origin", f"it tells the difference to {told[:SHOWN]}, where {held} is held")
        self._origin = origin if told is not None else None
        self._entries = _index(file)
        self._places = self._find()

    def __getitem__(self, name: str) -> Array:
        """Decode one tensor."""
        dtype, shape = self._entries[name]
        start, length, compressed = self._places[name]
        body = self._file.read_bytes(SECTIONS, start, length)
        arrays = unpack(memoryview(body), self._layout(dtype, shape), compressed=compressed)
        beside = None if self._origin is None else self._origin.beside(name, dtype, shape)
        if is_lossless(self.coding, dtype):
            return _restored(arrays[0], dtype, beside).reshape(shape)
        if not arrays:
            return np.empty(shape, dtype)
        change = lossy(self.coding).decode(arrays, math.prod(shape)).reshape(shape)
        with np.errstate(over="ignore", invalid="ignore"):
            whole = change if beside is None else beside.astype(np.float32) + change
            return flushed(whole, SMALLEST).astype(dtype)

    def __contains__(self, name: object) -> bool:
        """Answer without reading."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._entries)

    def describe(self, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
        """Element type and shape of a tensor, without decoding it."""
        return self._entries[name]

    def _layout(self, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Layout:
        return layout_of(self.coding, dtype, math.prod(shape))

    def _find(self) -> dict[str, tuple[int, int, bool]]:
        """Where each section's bytes start, how many they are, and whether they are compressed."""
        total = self._file.describe(SECTIONS)[1][0]
        places, at = {}, 0
        for name, (dtype, shape) in self._entries.items():
            if at + PREFIX_BYTES > total:
                raise CorruptPayload(f"{self._name} lacks the section of {name[:SHOWN]!r}")
            prefix = int.from_bytes(self._file.read_bytes(SECTIONS, at, PREFIX_BYTES), "little")
            length, compressed = prefix & ~COMPRESSED, bool(prefix & COMPRESSED)
            size = size_of(self._layout(dtype, shape))
            at += PREFIX_BYTES
            fits = length < size and self.coding.zstd if compressed else length == size
            if not fits or length > total - at:
                raise CorruptPayload(f"{self._name}: the section of {name[:SHOWN]!r} cannot have {length} bytes")
            places[name] = (at, length, compressed)
            at += length
        if at != total:
            raise CorruptPayload(f"{self._name} has {total - at} bytes behind its last section")
        return places


def open_tensors(path: Path, origin: DeltaBase | None = None) -> serialization.StoredTensors:
    """Open a file, coded or not; raises CorruptPayload, and Refused where its origin is not the one held."""
    file = serialization.read_tensors(path)
    return CompressedTensors(file, origin) if MARK in file.metadata else file


def compression_of(tensors: Mapping[str, Array]) -> CompressionSpec:
    """How tensors were written: plain ones as they are."""
    return tensors.coding if isinstance(tensors, CompressedTensors) else CompressionSpec()


def is_lossless(coding: CompressionSpec, dtype: np.dtype[np.generic]) -> bool:
    """Tell whether tensors of a type are written bit for bit: all but real numbers are."""
    return not coding.is_lossy or not is_floating(np.empty(0, dtype))


def layout_of(coding: CompressionSpec, dtype: np.dtype[np.generic], count: int) -> Layout:
    """Arrays that a tensor of so many elements becomes."""
    if is_lossless(coding, dtype):
        return ((np.dtype(f"<u{dtype.itemsize}"), count),)
    return lossy(coding).layout(count) if count else ()


def difference(value: Array, beside: Array | None) -> Array:
    """Bits of a tensor, exclusive-or those of the one beside it where there is one."""
    kind = np.dtype(f"<u{value.dtype.itemsize}")
    bits = np.ascontiguousarray(value).reshape(-1).view(kind)
    if beside is None or value.dtype == np.bool_:
        return bits
    told: Array = np.bitwise_xor(bits, np.ascontiguousarray(beside).reshape(-1).view(kind))
    return told


def change_of(value: Array, beside: Array | None) -> Floats:
    """Values of a tensor less those of the one beside it, flat, in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = value.astype(np.float32)
        return (wide if beside is None else wide - beside.astype(np.float32)).reshape(-1)


def _restored(bits: Array, dtype: np.dtype[np.generic], beside: Array | None) -> Array:
    whole = difference(bits.view(dtype), beside).view(dtype)
    if dtype == np.bool_ and bits.size and bits.max() > 1:
        raise CorruptPayload("a section holds booleans that are neither 0 nor 1")
    return whole.copy()


def _coding(file: serialization.FileTensors) -> CompressionSpec:
    """The coding that a file says it has; its two arrays are bytes in one dimension."""
    try:
        coding = CompressionSpec.model_validate_json(file.metadata[MARK])
    except ValidationError as error:
        raise CorruptPayload(f"{file.name} has a coding that nobody knows") from error
    if set(file) != {INDEX, SECTIONS} or any(d != BYTE or len(s) != 1 for d, s in map(file.describe, file)):
        raise CorruptPayload(f"{file.name} does not hold what a coded file holds")
    if (ORIGIN in file.metadata) and not coding.delta:
        raise CorruptPayload(f"{file.name} names an origin and tells no difference")
    return coding


def _index(file: serialization.FileTensors) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Names, types and shapes, sorted by name."""
    body = file[INDEX].tobytes()
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size > serialization.MAX_HEADER_BYTES:
            raise CorruptPayload(f"{file.name} has an index of {size} bytes")
        entries = _ENTRIES.validate_json(decompress_bytes(body, size))
    except (zstandard.ZstdError, ValidationError) as error:
        raise CorruptPayload(f"{file.name} has a malformed index") from error
    found = {}
    for name, kind, shape in entries:
        check_shape(f"{file.name}: tensor {name[:SHOWN]!r}", kind, shape)
        found[name] = (DTYPES[kind], shape)
    if [name for name, _, _ in entries] != sorted(found):
        raise CorruptPayload(f"{file.name} has an index that is not in order")
    return found


def index_of(described: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Write the index: wire name of the type and shape by name. Raises BadInput where nobody would read it."""
    entries = [[name, kind, list(shape)] for name, (kind, shape) in sorted(described.items())]
    text = json.dumps(entries, separators=(",", ":")).encode()
    serialization.check_header(text, len(entries))
    return compress_bytes(text)
