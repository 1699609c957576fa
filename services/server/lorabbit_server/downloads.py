"""Downloads: payloads in streams for the cohort, and files for as long as something needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lorabbit.messages import PayloadRef
from lorabbit_server.tools import Tools


class Downloads:
    """Publishes each payload once and withdraws it when no task needs it; for the loop thread."""

    def __init__(self, tools: Tools, needs: Callable[[str], bool]) -> None:
        """Ask `needs` whether the job as it stands may still read a payload."""
        self._tools, self._needs = tools, needs
        self._published: set[str] = set()

    def publish(self, refs: Iterable[PayloadRef]) -> None:
        """Publish payloads that are not in a stream yet."""
        for ref in refs:
            if ref.sha256 not in self._published:
                self._published.add(ref.sha256)
                self._tools.publisher.publish(ref)

    def sweep(self, gone: frozenset[str]) -> None:
        """Withdraw and delete payloads that nothing needs any more, behind the work that may still read them."""
        stale = frozenset(sha256 for sha256 in self._published if not self._needs(sha256))
        self._published -= stale
        self.withdraw(stale)

        def delete(_: object) -> None:
            for sha256 in gone | stale:
                if not self._needs(sha256):
                    self._tools.payloads.delete(sha256)

        self._tools.loop.work(lambda: None, delete, delete)

    def withdraw(self, hashes: Iterable[str]) -> None:
        """Delete streams; one that does not exist is fine."""
        for sha256 in hashes:
            self._tools.publisher.withdraw(sha256)
