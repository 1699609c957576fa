"""Atomic file replacement: a reader sees the old file or the new one, and never a part of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(
    path: Path, *, suffix: str = ".tmp", durable: bool = True, before_rename: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` when the block ends without an error.

    `suffix` is added to the name of the temporary file; concurrent writers of one path need different ones.
    `durable`: the new content and name are on the disk when the block has ended. `before_rename` is called once the
    content is complete; when it raises, `path` stays as it was.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        if durable:
            sync(temporary)
        if before_rename is not None:
            before_rename()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def replace_file(path: Path, body: bytes) -> None:
    """Replace the content of a file; it is on the disk when this returns."""
    with replacing(path) as temporary:
        temporary.write_bytes(body)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
