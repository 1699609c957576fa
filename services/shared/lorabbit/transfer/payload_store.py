"""Payload store: tensor files named by their sha256, and those that are still arriving.

Chunks are written where they belong into ``<sha256>.part``, and ``<sha256>.have`` records which ones
are there, so a process that is killed goes on where it was. Nothing is believed before the whole has
the hash that it was announced under; then the file gets its name in one step. A power cut may leave
the record ahead of the data: the hash finds out, and the chunks are asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from lorabbit.errors import CorruptPayload
from lorabbit.protocol.messages import PayloadRef
from lorabbit.runtime import atomic_files
from lorabbit.tensors import serialization
from lorabbit.types import Facts, Tensors

CHUNK_BYTES = 2**20
SUFFIX = ".safetensors"
FLUSH_BYTES = 32 * 2**20
"""A durable store forces what arrives to the disk in steps of this size: the last one is then as short as any."""
_INDEX_BYTES = 4


@dataclass(slots=True)
class _Arriving:
    """Chunks of one payload that are here."""

    ref: PayloadRef
    have: set[int] = field(default_factory=set)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    hashed: int = 0
    """Leading chunks that are in the digest already: what arrives in order is read only once."""
    unforced: int = 0
    """Bytes written since the file was last forced to the disk."""


class PayloadStore:
    """Content-addressed files in a folder; for one thread of one process.

    `durable` means that a finished payload survives a power cut.
    """

    def __init__(self, folder: Path, *, durable: bool) -> None:
        """Use a folder, made where it is missing; what arrived before a crash is found again."""
        self.folder = folder
        self.durable = durable
        self._arriving: dict[str, _Arriving] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a payload lies, or would lie."""
        return self.folder / f"{sha256}{SUFFIX}"

    def has(self, sha256: str) -> bool:
        """Tell whether a payload is here, whole."""
        return self.path(sha256).exists()

    def stored(self) -> Iterator[str]:
        """Hashes of the payloads that are here, whole."""
        return (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))

    def add_tensors(
        self, tensors: Tensors, facts: Facts | None = None, *, chunk_bytes: int = CHUNK_BYTES
    ) -> PayloadRef:
        """Write tensors as a payload."""
        with self._temporary() as path:
            sha256 = serialization.write_tensors(path, tensors, facts)
            return self._keep(path, sha256, chunk_bytes)

    def add_file(self, path: Path, *, chunk_bytes: int = CHUNK_BYTES) -> PayloadRef:
        """Copy a file into the store."""
        return self.add_written(lambda copy: shutil.copyfile(path, copy), chunk_bytes=chunk_bytes)

    def add_written(self, write: Callable[[Path], object], *, chunk_bytes: int = CHUNK_BYTES) -> PayloadRef:
        """Let `write` make a file, and take it into the store."""
        with self._temporary() as path:
            write(path)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return self._keep(path, sha256, chunk_bytes)

    def missing(self, ref: PayloadRef) -> tuple[int, ...]:
        """Indices of the chunks that are not here yet; none when the payload is here, whole."""
        if self.has(ref.sha256):
            return ()
        have = self._open(ref).have
        return tuple(index for index in range(ref.chunks) if index not in have)

    def write_chunk(self, ref: PayloadRef, index: int, body: bytes) -> None:
        """Write one chunk; the same one again changes nothing. Raises CorruptPayload for a wrong index or size."""
        if not 0 <= index < ref.chunks:
            raise CorruptPayload(f"payload {ref.sha256[:12]} has no chunk {index}, only {ref.chunks}")
        start = index * ref.chunk_bytes
        expected = min(ref.chunk_bytes, ref.size_bytes - start)
        if len(body) != expected:
            raise CorruptPayload(f"chunk {index} of payload {ref.sha256[:12]} has {len(body)} bytes, not {expected}")
        if self.has(ref.sha256):
            return
        arriving = self._open(ref)
        if index in arriving.have:
            return
        with self._part(ref.sha256).open("r+b", buffering=0) as file:
            _write_all(file, body, start)
            arriving.unforced += len(body)
            if self.durable and arriving.unforced >= FLUSH_BYTES:
                os.fdatasync(file.fileno())
                arriving.unforced = 0
        with self._record(ref.sha256).open("ab", buffering=0) as file:
            file.write(index.to_bytes(_INDEX_BYTES, "little"))
        arriving.have.add(index)
        if index == arriving.hashed:
            arriving.digest.update(body)
            arriving.hashed += 1

    def finish(self, ref: PayloadRef) -> Path:
        """Check the whole and give it its name; a payload that is here already stays.

        Raises CorruptPayload, and forgets every chunk, when the bytes do not have the announced hash.
        """
        path = self.path(ref.sha256)
        if path.exists():
            return path
        lacking = self.missing(ref)
        if lacking:
            raise CorruptPayload(f"payload {ref.sha256[:12]} lacks {len(lacking)} of {ref.chunks} chunks")
        arriving = self._arriving.pop(ref.sha256)
        part = self._part(ref.sha256)
        with part.open("rb", buffering=0) as file:
            file.seek(arriving.hashed * ref.chunk_bytes)
            while block := file.read(CHUNK_BYTES):
                arriving.digest.update(block)
            found = arriving.digest.hexdigest()
            if found != ref.sha256:
                self.delete(ref.sha256)
                raise CorruptPayload(f"payload {ref.sha256[:12]} arrived with the hash {found[:12]}")
            if self.durable:
                os.fsync(file.fileno())
        self._name(part, path)
        self._record(ref.sha256).unlink(missing_ok=True)
        return path

    def delete(self, sha256: str) -> None:
        """Forget a payload, whole or arriving; one that is not here is fine."""
        self._arriving.pop(sha256, None)
        for path in (self.path(sha256), self._part(sha256), self._record(sha256)):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A file name that nobody else writes to; what is left there goes."""
        path = self.folder / f"{uuid4().hex}.new"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _keep(self, path: Path, sha256: str, chunk_bytes: int) -> PayloadRef:
        """Give a file that was written here its name."""
        size = path.stat().st_size
        if not self.has(sha256):
            if self.durable:
                atomic_files.sync(path)
            self._name(path, self.path(sha256))
        return PayloadRef(sha256=sha256, size_bytes=size, chunk_bytes=chunk_bytes)

    def _name(self, unnamed: Path, path: Path) -> None:
        unnamed.replace(path)
        if self.durable:
            atomic_files.sync(self.folder)

    def _open(self, ref: PayloadRef) -> _Arriving:
        """What is here of a payload; chunks of another size than `ref` cuts are forgotten."""
        arriving = self._arriving.get(ref.sha256)
        if arriving is not None and arriving.ref == ref:
            return arriving
        arriving = self._arriving[ref.sha256] = _Arriving(ref)
        record, part = self._record(ref.sha256), self._part(ref.sha256)
        heading = f"{ref.size_bytes} {ref.chunk_bytes}\n".encode()
        known = record.read_bytes() if record.exists() and part.exists() else b""
        if known.startswith(heading):
            indices = known[len(heading) :]
            whole = len(indices) - len(indices) % _INDEX_BYTES
            for start in range(0, whole, _INDEX_BYTES):
                arriving.have.add(int.from_bytes(indices[start : start + _INDEX_BYTES], "little"))
            record.write_bytes(known[: len(heading) + whole])
        else:
            with part.open("wb") as file:
                file.truncate(ref.size_bytes)
            record.write_bytes(heading)
        return arriving

    def _part(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.part"

    def _record(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.have"


def _write_all(file: BinaryIO, body: bytes, offset: int) -> None:
    """Write a chunk where it belongs, however many calls the system needs."""
    view = memoryview(body)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view = view[count:]
        offset += count
