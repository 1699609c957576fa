"""Versions of the server state on disk, and the payloads that plans are made of.

A `ServerState` is saved by the codec, so no method takes part in it. Files are named by their
content, and an object that came out of a version keeps its file: a group of tensors that a method
hands on from round to round is written once, and a plan that hands out the state's own tensors
costs no second file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lorabbit.compression.compressed_file import DeltaBase, open_tensors
from lorabbit.compression.compressor import write_compressed
from lorabbit.job.spec import CompressionSpec
from lorabbit.methods.api.method import Method
from lorabbit.protocol.messages import EncodedDownload, PayloadRef
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import ADAPTER, Facts, ServerState, Tensors
from lorabbit_server.engine.state import ModelVersion

REPORT = "report"
"""The fact that is stored in the version and not in its file."""
MAX_OBJECTS = 16
"""Number of plan tensors that are cached by identity."""


@dataclass(slots=True)
class _LoadedVersion:
    """One version in use."""

    version: ModelVersion
    state: ServerState
    own: dict[int, tuple[Tensors, PayloadRef]] = field(default_factory=dict)
    """Objects of the state by identity, each with its file."""
    made: OrderedDict[int, tuple[Tensors, PayloadRef]] = field(default_factory=OrderedDict)
    """The most recent objects from plans."""
    hashes: set[str] = field(default_factory=set)
    """Files that were written for plans."""


@dataclass(frozen=True, slots=True)
class _CompressedAdapter:
    """The compressed file of an adapter, and the adapter after decompression."""

    file: PayloadRef
    whole: PayloadRef


@dataclass(slots=True)
class ModelVersionStore:
    """Saves and loads the server states of one job."""

    method: Method
    payloads: PayloadStore
    chunk_bytes: int
    coding: CompressionSpec = field(default_factory=CompressionSpec)
    """Compression of downloads."""
    unclaimed: set[str] = field(default_factory=set)
    """Files of a server state that the job does not reference yet."""
    _loaded: list[_LoadedVersion] = field(default_factory=list)
    """Versions in use, the most recently loaded at the end."""
    _compressed: dict[tuple[str, str | None], _CompressedAdapter] = field(default_factory=dict)
    """By the sha256 of the adapter, and of the base of the difference."""
    _newest_adapter: PayloadRef | None = None
    """The adapter that plans for the newest version most likely use."""

    def save(self, state: ServerState) -> ModelVersion:
        """Write a server state and its export to files; they are durable when this returns."""
        written = {id(group): self._known(group) or self._write(group, {}) for group in state.shared.values()}
        facts = {name: fact for name, fact in state.facts.items() if name != REPORT}
        saved = self._write(state.tensors, facts)
        if not facts:
            written.setdefault(id(state.tensors), saved)
        export = self.method.export(state)

        def file_of(tensors: Tensors) -> PayloadRef:
            return written.get(id(tensors)) or self._known(tensors) or self._write(tensors, {})

        version = ModelVersion(
            state=saved,
            adapter=file_of(export.tensors),
            shared={role: file_of(group) for role, group in state.shared.items()},
            base=None if export.base is None else file_of(export.base),
            config=dict(export.config),
            report=state.report,
            direct=export.tensors is state.tensors,
        )
        self.unclaimed |= version.hashes
        self._compress_ahead(saved if not facts else version.adapter if version.direct else None)
        return version

    def load(self, version: ModelVersion) -> ServerState:
        """Return a server state with lazily read tensors; the same objects while it is in use."""
        entry = next((each for each in self._loaded if each.version == version), None)
        if entry is None:
            entry = self._open(version)
        else:
            self._loaded.remove(entry)
        self._loaded.append(entry)
        return entry.state

    def retain(self, versions: Iterable[ModelVersion]) -> frozenset[str]:
        """Evict versions that are no longer in use; returns the files that were written for their plans."""
        before = self.current
        in_use = list(versions)
        self._loaded = [entry for entry in self._loaded if entry.version in in_use]
        known = frozenset().union(*(entry.hashes for entry in self._loaded), *(version.hashes for version in in_use))
        known |= self.unclaimed
        self._compressed = {key: coded for key, coded in list(self._compressed.items()) if key[0] in known}
        return before - self.current

    def payload_refs(self, payloads: Mapping[str, Tensors]) -> dict[str, PayloadRef]:
        """Write the payloads of a plan for the last loaded state; the same object is written once.

        Where adapters are rounded on their way, the adapter is the one that clients will have.
        """
        payload_refs = {role: self._ref(tensors) for role, tensors in payloads.items()}
        if self.coding.is_lossy and ADAPTER in payload_refs:
            payload_refs[ADAPTER] = self._compress(payload_refs[ADAPTER], None).whole
        return payload_refs

    def encoded_download(self, whole: PayloadRef, origin: PayloadRef | None) -> EncodedDownload:
        """The compressed file of a payload from `payload_refs`; written if it does not exist."""
        for coded in list(self._compressed.values()):
            if self.coding.is_lossy and coded.whole == whole:
                return EncodedDownload(coded=coded.file)
        base = None if origin is None or origin == whole else origin
        return EncodedDownload(coded=self._compress(whole, base).file, origin=None if base is None else base.sha256)

    @property
    def current(self) -> frozenset[str]:
        """The files that plans for the versions in use reference; for any thread."""
        entries = list(self._loaded)
        coded = {ref.sha256 for each in list(self._compressed.values()) for ref in (each.file, each.whole)}
        return frozenset(coded).union(*(set(entry.hashes) | entry.version.hashes for entry in entries))

    def _open(self, version: ModelVersion) -> _LoadedVersion:
        path = self.payloads.path(version.state.sha256)
        facts = serialization.read_facts(path)
        shared = {role: self._group(ref) for role, ref in version.shared.items()}
        base: Facts = {REPORT: dict(version.report)} if version.report else {}
        state = ServerState(serialization.read_tensors(path), {**facts, **base}, shared)
        own = {id(group): (group, version.shared[role]) for role, group in shared.items()}
        if not facts:
            own[id(state.tensors)] = (state.tensors, version.state)
        elif version.direct:
            own[id(state.tensors)] = (state.tensors, version.adapter)
        return _LoadedVersion(version, state, own)

    def _group(self, ref: PayloadRef) -> Tensors:
        """The tensors of a file; shared with other versions in use."""
        for entry in self._loaded:
            for tensors, known in entry.own.values():
                if known.sha256 == ref.sha256:
                    return tensors
        return serialization.read_tensors(self.payloads.path(ref.sha256))

    def _known(self, tensors: Tensors) -> PayloadRef | None:
        """The file of an object that belongs to a version in use; for any thread."""
        for entry in reversed(list(self._loaded)):
            found = entry.own.get(id(tensors)) or entry.made.get(id(tensors))
            if found is not None:
                return found[1]
        return None

    def _ref(self, tensors: Tensors) -> PayloadRef:
        entry = self._loaded[-1]
        ref = self._known(tensors)
        if ref is None:
            ref = self._write(tensors, {})
            entry.made[id(tensors)] = (tensors, ref)
            if len(entry.made) > MAX_OBJECTS:
                entry.made.popitem(last=False)
        entry.hashes.add(ref.sha256)
        return ref

    def _compress_ahead(self, adapter: PayloadRef | None) -> None:
        """Compress an adapter on the worker thread, before the loop needs it."""
        origin, self._newest_adapter = self._newest_adapter, adapter
        if adapter is not None and not self.coding.is_plain:
            base = origin if self.coding.delta and origin != adapter else None
            self._compress(adapter, base)

    def _compress(self, adapter: PayloadRef, origin: PayloadRef | None) -> _CompressedAdapter:
        """Compress an adapter once."""
        key = (adapter.sha256, None if origin is None else origin.sha256)
        if key not in self._compressed:
            tensors = serialization.read_tensors(self.payloads.path(adapter.sha256))
            held = None if origin is None else DeltaBase.of(origin.sha256, self.payloads.path(origin.sha256))
            file = self.payloads.add_written(
                lambda path: write_compressed(path, tensors, self.coding, origin=held), chunk_bytes=self.chunk_bytes
            )
            whole = adapter
            if self.coding.is_lossy:
                whole = self._write(open_tensors(self.payloads.path(file.sha256)), {})
            self.unclaimed.add(file.sha256)
            self._compressed[key] = _CompressedAdapter(file, whole)
        return self._compressed[key]

    def _write(self, tensors: Tensors, facts: Facts) -> PayloadRef:
        ref = self.payloads.add_tensors(tensors, facts, chunk_bytes=self.chunk_bytes)
        self.unclaimed.add(ref.sha256)
        return ref
