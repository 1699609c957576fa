"""Files of a run folder: replaced atomically, and only by the server that holds the lease.

On a shared volume a server may sleep through its lease at any instruction, and wake when another one leads or the job
is over. So a file is written beside its place, the lease is checked, and only then the file is renamed; whoever takes
over removes first what lies beside (`inherit`), and one that slept between check and renaming has nothing to rename.
Lines are added to a text that was opened before the check: whoever takes over puts another file in its place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lorabbit.runtime.atomic_files import replacing
from lorabbit.tensors import serialization
from lorabbit.types import Tensors

SUFFIX = ".part"


def _alone() -> None:
    """Nobody else writes here."""


@dataclass(frozen=True, slots=True)
class FencedFileWriter:
    """See the module's docstring; for one thread. Every call but `inherit` raises what `fence` raises."""

    durable: bool
    epoch: int = 0
    """Of the server that writes: two of them share no file that is unfinished."""
    fence: Callable[[], None] = _alone
    """Raises Fenced where another server leads."""

    def inherit(self, folder: Path) -> None:
        """Remove what a replaced server was about to put in its place."""
        for path in folder.rglob(f"*{SUFFIX}*"):
            path.unlink(missing_ok=True)

    def write(self, path: Path, text: str) -> None:
        """Write a text."""
        with self._replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def copy(self, source: Path, path: Path) -> None:
        """Copy a file."""
        with self._replacing(path) as temporary:
            shutil.copyfile(source, temporary)

    def write_tensors(self, path: Path, tensors: Tensors) -> None:
        """Write tensors as a safetensors file."""
        with self._replacing(path) as temporary:
            serialization.write_tensors(temporary, tensors)

    def append(self, path: Path, text: str) -> None:
        """Add lines to a text; a power cut leaves whole files, and here a part of the last line at worst."""
        with path.open("a", encoding="utf-8") as file:
            self.fence()
            file.write(text)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())

    def _replacing(self, path: Path) -> AbstractContextManager[Path]:
        """Yield a temporary path that becomes `path`, unless another server leads by then."""
        return replacing(path, suffix=f".{self.epoch}{SUFFIX}", durable=self.durable, before_rename=self.fence)
