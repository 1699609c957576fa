"""A client's private state for one job: values in a JSON file and tensors in safetensors files; never sent.

After a crash between writing the state and journaling the result, the task runs again and must not see its own effect.
So the JSON file holds the state before and after a task, with the task's id: the same task starts again from the state
before.

Each group of tensors is a file named by its hash, and the JSON file names the groups of both states. Replacing the JSON
file commits values and tensors together. Files that it does not name are deleted with the next commit. Unchanged groups
are not written again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from lorabbit.errors import LoRAbbitError
from lorabbit.runtime import failpoints
from lorabbit.runtime.atomic_files import replacing
from lorabbit.tensors import serialization
from lorabbit.types import Json, Tensors
from lorabbit_client.execution.privacy_ledger import PrivacyLedger

FILE = "private.json"
SUFFIX = ".safetensors"


class PrivateTensors(MutableMapping[str, Tensors]):
    """Groups of tensors by name; a group is read from disk when it is asked for, and replaced as a whole.

    To change a tensor, assign its group: what was read is a copy.
    """

    def __init__(self, folder: Path = Path(), files: Mapping[str, str] | None = None) -> None:
        """Take the folder and each group's content hash."""
        self._folder = folder
        self.files = dict(files or {})
        """Content hash of each group as it is on disk."""
        self._assigned: dict[str, Tensors] = {}
        self._read: dict[str, Tensors] = {}

    def __getitem__(self, group: str) -> Tensors:
        """Return a group; raises LoRAbbitError when its file is damaged."""
        if group in self._assigned:
            return self._assigned[group]
        if group not in self._read:
            self._read[group] = _read_group(self._folder, self.files[group])
        return self._read[group]

    def __setitem__(self, group: str, tensors: Tensors) -> None:
        """Replace a group."""
        self._assigned[group] = dict(tensors)

    def __delitem__(self, group: str) -> None:
        """Delete a group."""
        if group not in self:
            raise KeyError(group)
        self._assigned.pop(group, None)
        self.files.pop(group, None)

    def __contains__(self, group: object) -> bool:
        """Tell whether a group exists, without reading it."""
        return group in self._assigned or group in self.files

    def __iter__(self) -> Iterator[str]:
        """Iterate over the groups' names, sorted."""
        return iter(sorted(self._assigned.keys() | self.files.keys()))

    def __len__(self) -> int:
        """Count the groups."""
        return len(self._assigned.keys() | self.files.keys())

    def write(self, folder: Path) -> dict[str, str]:
        """Write the groups that changed, durably; returns every group's content hash."""
        for group, tensors in self._assigned.items():
            sha256 = serialization.tensors_sha256(tensors)
            if not (folder / f"{sha256}{SUFFIX}").exists():
                serialization.write_tensors(folder / f"{sha256}{SUFFIX}", tensors, durable=True)
            self.files[group] = sha256
        self._assigned.clear()
        self._read.clear()
        return dict(self.files)


@dataclass
class PrivateState:
    """What one client keeps for one job; a task changes it in place."""

    values: dict[str, Json] = field(default_factory=dict)
    tensors: PrivateTensors = field(default_factory=PrivateTensors)
    ledger: PrivacyLedger = field(default_factory=PrivacyLedger)
    """Releases of this client in all jobs; a repeated task does not restore the earlier ledger."""

    values_before: dict[str, Json] = field(init=False)
    files_before: dict[str, str] = field(init=False)
    """Content hash of each group that the task starts from."""

    def __post_init__(self) -> None:
        """Remember the state that the task starts from."""
        self.values_before = copy.deepcopy(self.values)
        self.files_before = dict(self.tensors.files)


def read_private(folder: Path, task: str) -> PrivateState:
    """Return the state that a task starts from; empty for a client's first task.

    Raises LoRAbbitError when the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return PrivateState()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        which = "before" if kept["task"] == task else "after"
        values = dict(kept[which])
        files = {str(group): str(sha256) for group, sha256 in kept.get("tensors", {}).get(which, {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoRAbbitError(f"private state {path} is damaged ({error}); remove the file to start afresh") from error
    return PrivateState(values, PrivateTensors(folder, files))


def write_private(folder: Path, task: str, state: PrivateState) -> None:
    """Store the states after and before a task; without any state, write nothing."""
    path = folder / FILE
    if not state.values and not state.tensors and not path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    before, after = state.files_before, state.tensors.write(folder)
    kept = {
        "task": task,
        "before": state.values_before,
        "after": state.values,
        "tensors": {"before": before, "after": after},
    }
    with replacing(path, before_rename=lambda: failpoints.hit(failpoints.Failpoint.PRIVATE_WRITTEN)) as temporary:
        temporary.write_text(json.dumps(kept, sort_keys=True), encoding="utf-8")
    failpoints.hit(failpoints.Failpoint.PRIVATE_COMMITTED)
    named = {*before.values(), *after.values()}
    for file_path in folder.glob(f"*{SUFFIX}*"):
        if file_path.name.partition(".")[0] not in named:
            file_path.unlink(missing_ok=True)


def _read_group(folder: Path, sha256: str) -> Tensors:
    """Read a group's file, and check its hash."""
    path = folder / f"{sha256}{SUFFIX}"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == sha256:
            return serialization.read_tensors(path)
        why = "its content is not what was written"
    except OSError as error:
        why = str(error.strerror or error)
    raise LoRAbbitError(f"private state {path} is damaged ({why}); remove {folder / FILE} to start afresh")
