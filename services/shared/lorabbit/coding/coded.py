"""Coded files: tensors as a coding writes them, in a safetensors file of two byte arrays.

`index` names the tensors with their types and shapes, compressed; `sections` has one section for each, in the order
of the index. The metadata say the coding, and the sha256 of the file that differences are to. Everything else that a
reader needs follows from these, so there is little left to lie about: a reader compares the index with what it
expects before it makes room for anything, and each tensor is decoded by itself when it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import zstandard
from pydantic import TypeAdapter, ValidationError

from lorabbit import codec
from lorabbit.coding import sections
from lorabbit.coding.origin import Origin
from lorabbit.coding.values import BYTE, Floats, Layout, flushed, lossy
from lorabbit.errors import CorruptPayload, Refused
from lorabbit.header import DTYPES, check_shape
from lorabbit.tensors import is_floating
from lorabbit.transport import Coding
from lorabbit.types import Array

MARK = "lorabbit.coding"
"""Key of a coded file's metadata."""
ORIGIN = "lorabbit.origin"
INDEX, SECTIONS = "index", "sections"
SMALLEST = np.finfo(np.float32).smallest_normal
_ENTRIES = TypeAdapter(list[tuple[str, str, tuple[int, ...]]])


class CodedTensors(codec.StoredTensors):
    """Tensors of a coded file, each decoded when it is asked for, as a writable array of its own."""

    def __init__(self, file: codec.FileTensors, origin: Origin | None) -> None:
        """Check the index and where each section lies; raises CorruptPayload, and Refused for an unknown origin."""
        self._file, self._name = file, file.name
        self.coding = _coding(file)
        told = file.metadata.get(ORIGIN)
        if told is not None and (origin is None or origin.sha256 != told):
            held = "nothing" if origin is None else origin.sha256[:12]
            raise Refused("origin", f"it tells the difference to {told[: codec.SHOWN]}, where {held} is held")
        self._origin = origin if told is not None else None
        self._entries = _index(file)
        self._places = self._find()

    def __getitem__(self, name: str) -> Array:
        """Decode one tensor."""
        dtype, shape = self._entries[name]
        start, length, compressed = self._places[name]
        body = self._file.read_bytes(SECTIONS, start, length)
        arrays = sections.unpack(memoryview(body), self._layout(dtype, shape), compressed=compressed)
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
            if at + sections.PREFIX_BYTES > total:
                raise CorruptPayload(f"{self._name} lacks the section of {name[: codec.SHOWN]!r}")
            prefix = int.from_bytes(self._file.read_bytes(SECTIONS, at, sections.PREFIX_BYTES), "little")
            length, compressed = prefix & ~sections.COMPRESSED, bool(prefix & sections.COMPRESSED)
            size = sections.size_of(self._layout(dtype, shape))
            at += sections.PREFIX_BYTES
            fits = length < size and self.coding.zstd if compressed else length == size
            if not fits or length > total - at:
                raise CorruptPayload(f"{self._name}: the section of {name[: codec.SHOWN]!r} cannot have {length} bytes")
            places[name] = (at, length, compressed)
            at += length
        if at != total:
            raise CorruptPayload(f"{self._name} has {total - at} bytes behind its last section")
        return places


def open_tensors(path: Path, origin: Origin | None = None) -> codec.StoredTensors:
    """Open a file, coded or not; raises CorruptPayload, and Refused where its origin is not the one held."""
    file = codec.read_tensors(path)
    return CodedTensors(file, origin) if MARK in file.metadata else file


def coding_of(tensors: Mapping[str, Array]) -> Coding:
    """How tensors were written: plain ones as they are."""
    return tensors.coding if isinstance(tensors, CodedTensors) else Coding()


def is_lossless(coding: Coding, dtype: np.dtype[np.generic]) -> bool:
    """Tell whether tensors of a type are written bit for bit: all but real numbers are."""
    return not coding.is_lossy or not is_floating(np.empty(0, dtype))


def layout_of(coding: Coding, dtype: np.dtype[np.generic], count: int) -> Layout:
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


def _coding(file: codec.FileTensors) -> Coding:
    """The coding that a file says it has; its two arrays are bytes in one dimension."""
    try:
        coding = Coding.model_validate_json(file.metadata[MARK])
    except ValidationError as error:
        raise CorruptPayload(f"{file.name} has a coding that nobody knows") from error
    if set(file) != {INDEX, SECTIONS} or any(d != BYTE or len(s) != 1 for d, s in map(file.describe, file)):
        raise CorruptPayload(f"{file.name} does not hold what a coded file holds")
    if (ORIGIN in file.metadata) and not coding.delta:
        raise CorruptPayload(f"{file.name} names an origin and tells no difference")
    return coding


def _index(file: codec.FileTensors) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Names, types and shapes, sorted by name."""
    body = file[INDEX].tobytes()
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size > codec.MAX_HEADER_BYTES:
            raise CorruptPayload(f"{file.name} has an index of {size} bytes")
        entries = _ENTRIES.validate_json(sections.expand(body, size))
    except (zstandard.ZstdError, ValidationError) as error:
        raise CorruptPayload(f"{file.name} has a malformed index") from error
    found = {}
    for name, kind, shape in entries:
        check_shape(f"{file.name}: tensor {name[: codec.SHOWN]!r}", kind, shape)
        found[name] = (DTYPES[kind], shape)
    if [name for name, _, _ in entries] != sorted(found):
        raise CorruptPayload(f"{file.name} has an index that is not in order")
    return found


def index_of(described: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Write the index: wire name of the type and shape by name. Raises BadInput where nobody would read it."""
    entries = [[name, kind, list(shape)] for name, (kind, shape) in sorted(described.items())]
    text = json.dumps(entries, separators=(",", ":")).encode()
    codec.check_header(text, len(entries))
    return sections.squeeze(text)
