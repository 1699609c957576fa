"""Tensors to and from safetensors files.

Nothing is pickled. A file's header has a maximum size and must account for every byte of the file. The
same tensors and facts give the same bytes on every machine, so a file is identified by its sha256.

A file is read and written one tensor at a time: memory is one tensor, whatever the adapter's
size. Reading uses `pread` and not a memory map, because a mapped file that is cut short kills the
process, and because mapped pages count as memory of a server that says it needs none.

The header of a safetensors file: what it may say, checked before a byte of data is believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, StrictInt, TypeAdapter

from lorabbit.errors import SHOWN, BadInput, CorruptPayload
from lorabbit.runtime.atomic_files import replacing
from lorabbit.types import Array, Facts, Json, Tensors

METADATA = "__metadata__"
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**48
"""Of a tensor, dimensions of zero left out: NumPy makes no larger array, even where it holds nothing."""
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""safetensors' names of the element types that travel."""
NAMES: Mapping[str, str] = {dtype.name: name for name, dtype in DTYPES.items()}
"""The same by NumPy's names."""


class TensorEntry(BaseModel):
    """One tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[StrictInt, ...]
    data_offsets: tuple[StrictInt, StrictInt]


_ENTRIES = TypeAdapter(dict[str, TensorEntry])
_TEXTS = TypeAdapter(dict[str, str])
_OBJECT = TypeAdapter(dict[str, object])


def parse(text: bytes, data_bytes: int, file: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of a header; raises CorruptPayload unless it accounts for every byte of the data."""
    try:
        raw = _OBJECT.validate_python(json.loads(text.decode(), object_pairs_hook=_without_duplicates))
        metadata = _TEXTS.validate_python(raw.pop(METADATA, {}))
        entries = _ENTRIES.validate_python(raw)
        "".join((*entries, *metadata, *metadata.values())).encode()  # half a surrogate pair cannot be written again
    except (ValueError, RecursionError) as error:
        raise CorruptPayload(f"{file} has a malformed safetensors header") from error
    _check_offsets(entries, data_bytes, file)
    return entries, metadata


def _check_offsets(entries: Mapping[str, TensorEntry], data_bytes: int, file: str) -> None:
    """Refuse unknown types, sizes that do not follow from the shape, overlaps, holes and missing or extra bytes."""
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        _check_entry(f"{file}: tensor {name[:SHOWN]!r}", entry)
        start, end = entry.data_offsets
        if start != expected:
            raise CorruptPayload(f"{file}: tensor {name[:SHOWN]!r} starts at byte {start}, not {expected}")
        expected = end
    if expected != data_bytes:
        raise CorruptPayload(f"{file} holds {data_bytes} bytes of tensors; its header names {expected}")


def _check_entry(what: str, entry: TensorEntry) -> None:
    """Refuse an unknown type, a shape that no array has, and a size that does not follow from it."""
    dtype = check_shape(what, entry.dtype, entry.shape)
    start, end = entry.data_offsets
    if end - start != math.prod(entry.shape) * dtype.itemsize:
        raise CorruptPayload(f"{what} does not have the size that its shape asks for")


def check_shape(what: str, kind: str, shape: tuple[int, ...]) -> np.dtype[np.generic]:
    """The element type of a name; raises CorruptPayload where it has none, or no array has the shape."""
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise CorruptPayload(f"{what} has the unknown type {kind[:SHOWN]!r}")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(1, side) for side in shape) > MAX_ELEMENTS:
        raise CorruptPayload(f"{what} has a shape that no array has")
    if min(shape, default=0) < 0:
        raise CorruptPayload(f"{what} has a shape with a negative side")
    return dtype


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a JSON object that names one key twice: readers would not agree on what it says."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


MAX_HEADER_BYTES = 8 * 2**20
"""Some 50,000 tensors: LoRA on every matrix of 126 dense blocks are 1,764, of 48 blocks of 128 experts each 37,248.
One that was made to cost takes 200 MiB to read."""
FACTS = "lorabbit.facts"
_LENGTH_BYTES = 8


class StoredTensors(Mapping[str, Array]):
    """Tensors on a disk, each read when it is asked for, as a writable array of its own."""

    @abstractmethod
    def describe(self, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
        """Element type and shape of a tensor, without reading it."""

    @property
    def scalars(self) -> int:
        """Numbers in all tensors, without reading one."""
        return sum(math.prod(self.describe(name)[1]) for name in self)


class FileTensors(StoredTensors):
    """Tensors of a safetensors file, each read when it is asked for, as a writable array of its own.

    The file stays readable as long as this object lives, even when its name is deleted.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header; raises CorruptPayload where it does not describe the file."""
        self._path = path
        self.name = path.name
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._entries, self.metadata, self._data_start = _read_header(self._file, path)

    def __getitem__(self, name: str) -> Array:
        """Read one tensor."""
        dtype, shape = self.describe(name)
        start, end = self._entries[name].data_offsets
        raw = np.empty(end - start, dtype=np.uint8)
        _read_into(self._file, raw.data, self._data_start + start, self._path)
        if dtype == np.bool_ and raw.size and raw.max() > 1:
            raise CorruptPayload(f"{self._path.name}: tensor {name[:SHOWN]!r} holds booleans that are neither 0 nor 1")
        return raw.view(dtype).reshape(shape)

    def __contains__(self, name: object) -> bool:
        """Answer without reading."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, sorted."""
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._entries)

    def describe(self, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
        """Element type and shape of a tensor, without reading it."""
        entry = self._entries[name]
        return DTYPES[entry.dtype], entry.shape

    def read_bytes(self, name: str, start: int, length: int) -> bytearray:
        """Read a part of a tensor's bytes; raises CorruptPayload where it has not so many."""
        first, end = self._entries[name].data_offsets
        if min(start, length) < 0 or start + length > end - first:
            raise CorruptPayload(f"{self.name}: tensor {name[:SHOWN]!r} has no {length} bytes from byte {start} on")
        body = bytearray(length)
        _read_into(self._file, memoryview(body), self._data_start + first + start, self._path)
        return body


def read_tensors(path: Path) -> FileTensors:
    """Open a safetensors file; raises CorruptPayload when its header is not to be believed."""
    return FileTensors(path)


def read_facts(path: Path) -> dict[str, Json]:
    """Return the facts that `write_tensors` stored beside the tensors; empty where there are none."""
    text = FileTensors(path).metadata.get(FACTS, "{}")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptPayload(f"{path.name}: its facts are not JSON") from error
    if not isinstance(facts, dict):
        raise CorruptPayload(f"{path.name}: its facts are no JSON object")
    return facts


def write_tensors(path: Path, tensors: Tensors, facts: Facts | None = None, *, durable: bool = False) -> str:
    """Write tensors and facts as a safetensors file, atomically; returns the file's sha256.

    A tensor is asked for twice, once for the header and once for its values, so a mapping that computes them
    costs no memory. `durable` means on the disk when this returns. Raises BadInput for a type that cannot travel, and
    for so many tensors that nobody would read them.
    """
    digest = hashlib.sha256()
    with replacing(path, durable=durable) as temporary, temporary.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            while data:
                data = memoryview(data)[file.write(data) :]

        _serialize(tensors, facts or {}, put)
    return digest.hexdigest()


def tensors_sha256(tensors: Tensors, facts: Facts | None = None) -> str:
    """Hash of the file that `write_tensors` would write, without writing it."""
    digest = hashlib.sha256()
    _serialize(tensors, facts or {}, digest.update)
    return digest.hexdigest()


def _serialize(tensors: Tensors, facts: Facts, put: Callable[[bytes | memoryview], object]) -> None:
    """Hand the bytes of a safetensors file over, part by part.

    The widest types come first, then names in order: every tensor is aligned to its element size, as readers that
    map the file need it.
    """
    described = {name: describe(tensors, name) for name in tensors}
    names = sorted(described, key=lambda name: (-described[name][0].itemsize, name))
    metadata = {"format": "pt"}  # transformers reads no file without it
    if facts:
        metadata[FACTS] = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    header: dict[str, object] = {METADATA: metadata}
    offset = 0
    for name in names:
        dtype, shape = described[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    check_header(text, len(names))
    put(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for name in names:
        dtype, shape = described[name]
        value = np.ascontiguousarray(tensors[name], dtype=dtype)
        if value.size:
            put(value.reshape(-1).view(np.uint8).data)


def check_header(text: bytes, tensors: int) -> None:
    """Raise BadInput where the names and shapes of so many tensors are more than any reader takes."""
    if len(text) > MAX_HEADER_BYTES:
        raise BadInput(
            f"the names, shapes and facts of {tensors} tensors take {len(text)} bytes, and may take "
            f"{MAX_HEADER_BYTES}; train fewer matrices (model.lora.targets, model.lora.layers)"
        )


def describe(tensors: Tensors, name: str) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """Element type on the wire and shape of a tensor, without reading it where it is stored.

    Raises BadInput for a type that cannot travel.
    """
    if name == METADATA:
        raise BadInput(f"a tensor cannot be called {METADATA}")
    if isinstance(tensors, StoredTensors):
        return tensors.describe(name)
    value = tensors[name]
    wire = NAMES.get(value.dtype.name)
    if wire is None:
        raise BadInput(f"tensor {name!r} is {value.dtype}, which cannot travel; use one of {', '.join(NAMES)}")
    return DTYPES[wire], value.shape


def _read_header(file: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
    """Entries, metadata and where the data starts; every byte of the file is accounted for."""
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, _LENGTH_BYTES, 0), "little")
    if size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise CorruptPayload(f"{path.name} is no safetensors file: its header would have {length} of {size} bytes")
    text = bytearray(length)
    _read_into(file, memoryview(text), _LENGTH_BYTES, path)
    entries, metadata = parse(bytes(text), size - _LENGTH_BYTES - length, path.name)
    return entries, metadata, _LENGTH_BYTES + length


def _read_into(file: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from a place in a file."""
    while target:
        count = os.preadv(file, [target], offset)
        if count == 0:
            raise CorruptPayload(f"{path.name} was cut short while it was read")
        target = target[count:]
        offset += count
