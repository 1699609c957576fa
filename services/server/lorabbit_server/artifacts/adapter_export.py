"""Adapter folders that PEFT or transformers loads as they are, one for each place in a run folder.

How the folder of a version looks follows from committed events: the files that the first client
described (`AdapterInitialized`), and what a version overrides of them (`RoundClosed`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from lorabbit.events import job_events as ev
from lorabbit.tensors import serialization, soft_prompts
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_server.artifacts.fenced_files import FencedFileWriter

WEIGHTS = {"transformers": "model.safetensors"}
"""Name of the tensors' file by format; PEFT's for every other."""
CONFIG = "adapter_config.json"
BASE_FOLDER = "base"
BASE_WEIGHTS = "model.safetensors"
EXPORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.json")
_Files = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class _ExportedVersion:
    """Files and configuration of one version."""

    adapter: str
    base: str | None
    config: _Files


@dataclass(slots=True)
class AdapterExporter:
    """See the module's docstring; `on_events` is for the loop thread, the work of `folder` for one worker thread."""

    payloads: PayloadStore
    files: FencedFileWriter
    _format: str = "peft"
    _described: _Files = field(default_factory=dict)
    _beside_base: _Files = field(default_factory=dict)
    _versions: dict[int, _ExportedVersion] = field(default_factory=dict)
    _bases: dict[Path, str] = field(default_factory=dict)
    """The base model that each folder holds, as far as this server wrote it."""

    def on_events(self, events: Iterable[ev.AnyEvent]) -> None:
        """Note what committed events say about the export of each version."""
        for event in events:
            match event:
                case ev.AdapterInitialized():
                    described = _object(event.facts.get("export"))
                    self._format, self._described = str(described.get("format")), _object(described.get("files"))
                    self._beside_base = _object(_object(event.facts.get("export_base")).get("files"))
                case ev.RoundClosed():
                    self._versions[event.round] = _ExportedVersion(event.sha256, event.base_payload, event.config)
                case _:
                    pass

    def folder(self, number: int, folder: Path, then: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """Return the work that writes the version of a round into a folder, where its files are still there."""
        version = self._versions.get(number)

        def work() -> None:
            if version is not None and self._write(version, folder):
                then()

        return work

    def _write(self, version: _ExportedVersion, folder: Path) -> bool:
        """Write an adapter folder, with its base model where it has one of its own; False when there is nothing."""
        source = self.payloads.path(version.adapter)
        if not source.exists() or not serialization.read_tensors(source):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        described = dict(self._described)
        if version.config:
            described[CONFIG] = {**_object(described.get(CONFIG)), **version.config}
        self._write_json(folder, described)
        self._write_weights(source, folder / WEIGHTS.get(self._format, "adapter_model.safetensors"))
        if version.base is not None and self._bases.get(folder) != version.base:
            self._write_base(self.payloads.path(version.base), folder / BASE_FOLDER)
            self._bases[folder] = version.base
        return True

    def _write_weights(self, source: Path, path: Path) -> None:
        """Copy a version's tensors; p-tuning's encoder travels, and PEFT reads the prompt that it makes."""
        tensors = serialization.read_tensors(source)
        if soft_prompts.has_encoder(tensors):
            self.files.write_tensors(path, soft_prompts.finished(tensors))
        else:
            self.files.copy(source, path)

    def _write_base(self, source: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._write_json(folder, self._beside_base)
        self.files.copy(source, folder / BASE_WEIGHTS)

    def _write_json(self, folder: Path, described: _Files) -> None:
        """Write the files that a client named and described."""
        for name, content in described.items():
            if EXPORT_NAME.fullmatch(name):
                self.files.write(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _object(value: object) -> dict[str, JsonValue]:
    """A JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}
