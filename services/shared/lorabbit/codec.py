"""Codec: messages to and from JSON, tensors to and from safetensors files.

Nothing is ever pickled, and nothing from the wire is believed before it is checked: a message is
validated whole, a tensor file's header is bounded and must account for every byte after it. The
same tensors and facts give the same bytes on every machine, so that a file is known by its sha256.

A file is read and written one tensor at a time: memory is one tensor, whatever the adapter's
size. Reading uses `pread` and not a memory map, because a mapped file that is cut short kills the
process, and because mapped pages count as memory of a server that says it needs none.
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

import numpy as np
from pydantic import JsonValue, ValidationError

from lorabbit.errors import BadInput, CorruptPayload, Refused
from lorabbit.header import DTYPES, METADATA, NAMES, SHOWN, Entry, parse
from lorabbit.messages import BY_TYPE, Message, Offer
from lorabbit.types import Array, Facts, Json, Tensors

MAX_MESSAGE_BYTES = 2**20
"""Control messages are small; anything larger is refused unread."""
MAX_HEADER_BYTES = 8 * 2**20
"""Some 50,000 tensors: LoRA on every matrix of 126 dense blocks are 1,764, of 48 blocks of 128 experts each 37,248.
One that was made to cost takes 200 MiB to read."""
MAX_NUMBER = 1e300
"""Of facts; their squares are no infinity in the sums of a few clients' weights."""
FACTS = "lorabbit.facts"
_LENGTH_BYTES = 8
__all__ = [
    "DTYPES",
    "FACTS",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "METADATA",
    "SHOWN",
    "FileTensors",
    "StoredTensors",
    "check_header",
    "decode",
    "describe",
    "encode",
    "read_facts",
    "read_tensors",
    "sync_folder",
    "tensors_sha256",
    "write_tensors",
]


def encode(message: Message) -> bytes:
    """Write a message as JSON; its type name travels beside it."""
    return message.model_dump_json().encode()


def decode(type_name: str, body: bytes) -> Message:
    """Read a message of the type that its sender named.

    Raises Refused: ``unknown-type`` (also a newer version's), ``too-large``, ``malformed``.
    """
    model = BY_TYPE.get(type_name)
    if model is None:
        raise Refused("unknown-type", f"there is no message type {type_name[:100]!r} in this version")
    if len(body) > MAX_MESSAGE_BYTES:
        raise Refused("too-large", f"{type_name} has {len(body)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        message = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Refused("malformed", f"{type_name}: {where[:SHOWN]}: {first['msg']}") from error
    if isinstance(message, Offer):
        _check_facts(message.metrics.facts)
    return message


def _check_facts(facts: JsonValue) -> None:
    """Refuse numbers that JSON cannot write again or that a float cannot hold; the parser bounds the depth."""
    if isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            _check_facts(value)
    elif isinstance(facts, int | float) and not abs(facts) < MAX_NUMBER:
        raise Refused("malformed", "a fact is no number of a size that a float holds")


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
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb", buffering=0) as file:

            def put(data: bytes | memoryview) -> None:
                digest.update(data)
                while data:
                    data = memoryview(data)[file.write(data) :]

            _serialise(tensors, facts or {}, put)
            if durable:
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)
    return digest.hexdigest()


def tensors_sha256(tensors: Tensors, facts: Facts | None = None) -> str:
    """Hash of the file that `write_tensors` would write, without writing it."""
    digest = hashlib.sha256()
    _serialise(tensors, facts or {}, digest.update)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names that were created, renamed or deleted in a folder survive a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _serialise(tensors: Tensors, facts: Facts, put: Callable[[bytes | memoryview], object]) -> None:
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


def _read_header(file: int, path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
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
