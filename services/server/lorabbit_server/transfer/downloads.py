"""Downloads: publishes payloads to streams, and deletes streams and files that are no longer needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from lorabbit.errors import LoRAbbitError
from lorabbit.protocol.messages import PayloadRef
from lorabbit.runtime import failpoints
from lorabbit_server.context import ServerContext


class Downloads:
    """Publishes each payload once and withdraws it when no task needs it; for the loop thread."""

    def __init__(
        self, context: ServerContext, is_needed: Callable[[str], bool], on_failed: Callable[[str, Exception], None]
    ) -> None:
        """Call `is_needed`, from any thread, to learn whether the job may still read a payload.

        `on_failed` is called for a payload that cannot be published.
        """
        self._context, self._is_needed, self._on_failed = context, is_needed, on_failed
        self._announced: set[str] = set()
        self._published: set[str] = set()
        self._inherited: set[str] = set()
        """Streams that an earlier server may have made."""

    def inherit(self, hashes: Iterable[str]) -> None:
        """Take over the streams that a stopped server may have published."""
        self._inherited |= set(hashes)
        self._announced |= self._inherited
        self.delete_unneeded(frozenset())

    def announce(self, refs: Iterable[tuple[str, PayloadRef]]) -> list[tuple[str, PayloadRef]]:
        """Return the payloads that were not announced before; they are logged before their streams exist."""
        new = [(role, ref) for role, ref in refs if ref.sha256 not in self._announced]
        self._announced |= {ref.sha256 for _, ref in new}
        return new

    def publish(self, refs: Iterable[PayloadRef]) -> None:
        """Publish payloads that are not in a stream yet."""
        for ref in refs:
            if ref.sha256 not in self._published:
                failpoints.hit(failpoints.Failpoint.VERSION_COMMITTED)
                self._published.add(ref.sha256)
                self._context.publisher.publish(ref, partial(self._on_published, ref.sha256))

    def _on_published(self, sha256: str, error: LoRAbbitError | None) -> None:
        """Report a payload that could not be published, if it is still needed."""
        if error is not None and sha256 in self._published:
            self._on_failed(f"publishing payload {sha256[:12]}", error)

    def delete_unneeded(self, hashes: frozenset[str]) -> None:
        """Delete streams and files that are no longer needed, after queued work that may still read them."""
        stale = frozenset(sha256 for sha256 in self._published | self._inherited if not self._is_needed(sha256))
        self._published -= stale
        self._announced -= stale
        self._inherited -= stale
        for sha256 in stale:
            self._context.publisher.withdraw(sha256)

        def delete() -> None:
            for sha256 in hashes | stale:
                if not self._is_needed(sha256):
                    self._context.fence()
                    self._context.payloads.delete(sha256)

        self._context.loop.work(delete, _done, _done)

    def delete_leftovers(self) -> None:
        """Delete all files that are not needed, such as incomplete uploads of a killed server."""

        def delete() -> None:
            for path in self._context.payloads.folder.iterdir():
                sha256 = path.name.partition(".")[0]
                if not self._is_needed(sha256):
                    self._context.fence()
                    self._context.payloads.delete(sha256)
                    path.unlink(missing_ok=True)

        self._context.loop.work(delete, _done, _done)


def _done(_: object) -> None:
    """Deletion failures are ignored."""
