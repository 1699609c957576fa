"""Writing coded files, one tensor at a time, and making whole files of them again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from lorabbit.compression import compressed_file
from lorabbit.compression.compressed_file import (
    INDEX,
    MARK,
    ORIGIN,
    SECTIONS,
    CompressedTensors,
    DeltaBase,
    change_of,
    difference,
    index_of,
    is_lossless,
    layout_of,
    open_tensors,
)
from lorabbit.compression.quantizers import Floats, flushed, lossy
from lorabbit.errors import CorruptPayload
from lorabbit.job.spec import CompressionSpec
from lorabbit.runtime.atomic_files import replacing
from lorabbit.tensors import serialization
from lorabbit.tensors.serialization import METADATA, NAMES
from lorabbit.types import Array, Tensors

LENGTH_BYTES = 8
WRITTEN = frozenset({"codec", "block", "share", "delta", "zstd"})
"""Keys of a coding that a reader needs."""


def write_compressed(
    path: Path,
    tensors: Tensors,
    coding: CompressionSpec,
    *,
    origin: DeltaBase | None = None,
    residual: Tensors | None = None,
) -> dict[str, Array]:
    """Write tensors with a coding, atomically; returns by name what of each was not sent, where the coding feeds back.

    `residual` is what the last call returned. Raises BadInput for a type that cannot travel.
    """
    held = origin if coding.delta else None
    described = {name: serialization.describe(tensors, name) for name in sorted(tensors)}
    index = index_of({name: (NAMES[dtype.name], shape) for name, (dtype, shape) in described.items()})
    most = sum(
        compressed_file.PREFIX_BYTES + compressed_file.size_of(layout_of(coding, dtype, math.prod(shape)))
        for dtype, shape in described.values()
    )
    room = len(_header(coding, held, len(index), most))
    left: dict[str, Array] = {}
    with replacing(path, suffix=f".{uuid4().hex}.tmp", durable=False) as temporary, temporary.open("wb") as file:
        file.write(bytes(room) + index)
        written = 0
        for name, (dtype, shape) in described.items():
            beside = None if held is None else held.beside(name, dtype, shape)
            body, rest = _section(np.asarray(tensors[name], dtype), beside, (residual or {}).get(name), coding)
            written += file.write(body)
            if rest is not None:
                left[name] = rest.reshape(shape)
        file.seek(0)
        file.write(_header(coding, held, len(index), written, room=room))
    return left


def most_bytes(coding: CompressionSpec, tensors: Tensors, *, origin: DeltaBase | None = None) -> int:
    """Size of the file that `write_compressed` writes; with zstd, more than which it never has."""
    held = origin if coding.delta else None
    described = {name: serialization.describe(tensors, name) for name in tensors}
    index = index_of({name: (NAMES[dtype.name], shape) for name, (dtype, shape) in described.items()})
    most = sum(
        compressed_file.PREFIX_BYTES + compressed_file.size_of(layout_of(coding, dtype, math.prod(shape)))
        for dtype, shape in described.values()
    )
    return len(_header(coding, held, len(index), most)) + len(index) + most


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """How a whole file is made of a coded one and, where it tells a difference, of what that is to."""

    coded: Path
    origin: Path | None
    target: Path
    origin_sha256: str | None
    sha256: str
    size_bytes: int
    """Hash and size of the whole file."""


def restore(recipe: DecodeStep) -> None:
    """Make the whole file unless it is there; raises CorruptPayload where it is not the one that was announced.

    Then what it was made of is deleted as well: one of the two files is damaged, and the next try reads them anew.
    """
    if recipe.target.exists():
        return
    try:
        _restore(recipe)
    except CorruptPayload:
        for path in (recipe.coded, recipe.origin):
            if path is not None:
                path.unlink(missing_ok=True)
        raise


def _restore(recipe: DecodeStep) -> None:
    origin = None
    if recipe.origin is not None and recipe.origin_sha256 is not None:
        origin = DeltaBase.of(recipe.origin_sha256, recipe.origin)
    tensors = open_tensors(recipe.coded, origin)
    described = [tensors.describe(name) for name in tensors]
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in described)
    if not isinstance(tensors, CompressedTensors) or size > recipe.size_bytes:
        raise CorruptPayload(f"{recipe.coded.name} does not decode to the {recipe.size_bytes} bytes announced")
    beside = recipe.target.with_name(f"{uuid4().hex}.new")
    try:
        found = serialization.write_tensors(beside, tensors)
        if found != recipe.sha256:
            raise CorruptPayload(f"{recipe.coded.name} decodes to {found[:12]}, not to {recipe.sha256[:12]}")
        beside.replace(recipe.target)
    finally:
        beside.unlink(missing_ok=True)


def _section(
    value: Array, beside: Array | None, residual: Array | None, coding: CompressionSpec
) -> tuple[bytes, Floats | None]:
    """A tensor's section, and what of the tensor it does not tell where the coding feeds back."""
    if is_lossless(coding, value.dtype):
        return compressed_file.pack([difference(value, beside)], compress=coding.zstd), None
    wanted = change_of(value, beside)
    if coding.feedback and residual is not None and residual.shape == value.shape:
        wanted = wanted + residual.reshape(-1).astype(np.float32)
    wanted = flushed(wanted)
    if not wanted.size:
        return compressed_file.pack([], compress=False), None
    codec_ = lossy(coding)
    arrays = codec_.encode(wanted)
    rest = None
    if coding.feedback:
        clean = np.nan_to_num(wanted, nan=0.0, posinf=0.0, neginf=0.0)
        rest = clean - codec_.decode(codec_.encode(clean), clean.size)
    return compressed_file.pack(arrays, compress=coding.zstd), rest


def _header(coding: CompressionSpec, held: DeltaBase | None, index: int, written: int, *, room: int = 0) -> bytes:
    """The file's safetensors header for arrays of these sizes, with its length; filled with spaces to `room`."""
    metadata = {MARK: coding.model_dump_json(include=set(WRITTEN), exclude_defaults=True)}
    if held is not None:
        metadata[ORIGIN] = held.sha256
    header: dict[str, object] = {
        METADATA: metadata,
        INDEX: {"dtype": "U8", "shape": [index], "data_offsets": [0, index]},
        SECTIONS: {"dtype": "U8", "shape": [written], "data_offsets": [index, index + written]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(max(room - LENGTH_BYTES, len(text) + -len(text) % LENGTH_BYTES))
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
