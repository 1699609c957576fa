"""Versions of the server state on disk, and the payloads that plans are made of.

A `ServerState` is saved by the codec, so no method takes part in it. Tensors that a plan shares
between clients are written once: files are named by their content, and a plan that hands out the
state's own tensors costs no second file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorabbit import codec
from lorabbit.messages import PayloadRef
from lorabbit.methods import Method
from lorabbit.payloads import PayloadStore
from lorabbit.types import Facts, ServerState, Tensors
from lorabbit_server.jobstate import Version


@dataclass(slots=True)
class Versions:
    """Saves and loads the server states of one job."""

    method: Method
    payloads: PayloadStore
    chunk_bytes: int
    unclaimed: set[str] = field(default_factory=set)
    """Files written for a server state that the job does not name yet."""
    _loaded: tuple[Version, ServerState] | None = None
    _refs: dict[int, tuple[Tensors, PayloadRef]] = field(default_factory=dict)

    def save(self, state: ServerState) -> Version:
        """Write a server state, and the adapter in it, durably; both are files when this returns."""
        saved = self._write(state.tensors, state.facts)
        tensors = self.method.adapter(state)
        same = tensors is state.tensors and not state.facts
        return Version(saved, saved if same else self._write(tensors, {}))

    def load(self, version: Version) -> ServerState:
        """Return a server state whose tensors are read when asked for; the last one loaded is kept."""
        if self._loaded is not None and self._loaded[0] == version:
            return self._loaded[1]
        path = self.payloads.path(version.state.sha256)
        state = ServerState(codec.read_tensors(path), codec.read_facts(path))
        self._refs.clear()
        if not state.facts:
            self._refs[id(state.tensors)] = (state.tensors, version.state)
        self._loaded = (version, state)
        return state

    def refs(self, payloads: Mapping[str, Tensors]) -> dict[str, PayloadRef]:
        """Write the tensors of a plan that are not files yet; the same object is written once."""
        return {role: self._ref(tensors) for role, tensors in payloads.items()}

    @property
    def current(self) -> frozenset[str]:
        """The files that plans on the loaded server state refer to."""
        return frozenset(ref.sha256 for _, ref in list(self._refs.values()))  # a copy: the worker asks too

    def _ref(self, tensors: Tensors) -> PayloadRef:
        known = self._refs.get(id(tensors))
        if known is None:
            known = self._refs[id(tensors)] = (tensors, self._write(tensors, {}))
        return known[1]

    def _write(self, tensors: Tensors, facts: Facts) -> PayloadRef:
        ref = self.payloads.add_tensors(tensors, facts, chunk_bytes=self.chunk_bytes)
        self.unclaimed.add(ref.sha256)
        return ref
