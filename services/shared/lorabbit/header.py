"""The header of a safetensors file: what it may say, checked before a byte of data is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, StrictInt, TypeAdapter

from lorabbit.errors import CorruptPayload

METADATA = "__metadata__"
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**48
"""Of a tensor, dimensions of zero left out: NumPy makes no larger array, even where it holds nothing."""
SHOWN = 100
"""Characters of a name from the wire that an error repeats."""

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


class Entry(BaseModel):
    """One tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[StrictInt, ...]
    data_offsets: tuple[StrictInt, StrictInt]


_ENTRIES = TypeAdapter(dict[str, Entry])
_TEXTS = TypeAdapter(dict[str, str])
_OBJECT = TypeAdapter(dict[str, object])


def parse(text: bytes, data_bytes: int, file: str) -> tuple[dict[str, Entry], dict[str, str]]:
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


def _check_offsets(entries: Mapping[str, Entry], data_bytes: int, file: str) -> None:
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


def _check_entry(what: str, entry: Entry) -> None:
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
