"""FolderLock: one process per client folder, because two would execute and offer the same journal."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Self, TextIO

from lorabbit.errors import BadInput


class FolderLock:
    """Holds a folder until it is left; the kernel lets go of it when the process dies, however it dies."""

    def __init__(self, folder: Path) -> None:
        """Lock nothing yet."""
        self._path = folder / "lock"
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        """Take the folder, made where it is missing; raises BadInput when it is taken or cannot be used."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = self._path.parent
            raise BadInput(
                f"another client works in {folder}; give each client a folder of its own with LORABBIT_FOLDER"
            ) from None
        except OSError as error:
            raise BadInput(f"the client's folder {self._path.parent} cannot be used: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        if self._file is not None:
            self._file.close()
