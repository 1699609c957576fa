"""Downloads: payloads in streams for the cohort, and files for as long as something needs them."""

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
        """Ask `needs`, from any thread, whether the job as it stands may still read a payload.

        `on_failed` hears what could not be published, ever, and why.
        """
        self._context, self._is_needed, self._on_failed = context, is_needed, on_failed
        self._announced: set[str] = set()
        self._published: set[str] = set()
        self._inherited: set[str] = set()
        """Streams that an earlier server may have made."""

    def inherit(self, hashes: Iterable[str]) -> None:
        """Take over what a stopped server may have published and not withdrawn, needed or not."""
        self._inherited |= set(hashes)
        self._announced |= self._inherited
        self.delete_unneeded(frozenset())

    def announce(self, refs: Iterable[tuple[str, PayloadRef]]) -> list[tuple[str, PayloadRef]]:
        """Return those, with their roles, that were not announced before: what gets a stream is in the log first."""
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
        """Tell that nobody will ever read a payload, as long as somebody waits for it."""
        if error is not None and sha256 in self._published:
            self._on_failed(f"publishing payload {sha256[:12]}", error)

    def delete_unneeded(self, hashes: frozenset[str]) -> None:
        """Withdraw and delete payloads that nothing needs any more, behind the work that may still read them."""
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
        """Delete every file that nothing needs: what a killed server left, uploads that broke off among it."""

        def delete() -> None:
            for path in self._context.payloads.folder.iterdir():
                sha256 = path.name.partition(".")[0]
                if not self._is_needed(sha256):
                    self._context.fence()
                    self._context.payloads.delete(sha256)
                    path.unlink(missing_ok=True)

        self._context.loop.work(delete, _done, _done)


def _done(_: object) -> None:
    """Nothing depends on a file being gone."""
