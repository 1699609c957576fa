"""Revocation: a server that leads removes clients that were revoked, and restores users that the broker lost.

Any server may be told to revoke a client; the one that leads looks at once where it was told itself, and now and
then in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from lorabbit.broker.base import Cancellable
from lorabbit_server.context import ServerContext

log = structlog.get_logger()


class RevocationWatcher(Cancellable):
    """See the module's docstring; for the loop thread."""

    def __init__(self, context: ServerContext, remove_clients: Callable[[Iterable[str]], None]) -> None:
        """Start to check for revoked clients, and create the broker users that are missing."""
        self._context, self._remove_clients = context, remove_clients
        self._seconds = context.settings.lease_seconds / 3
        self._timer: Cancellable | None = None
        if context.access.is_enrolled:
            context.access.on_revoked = lambda: context.loop.post(self._check)
            self._watch()
            self._restore()

    def cancel(self) -> None:
        """Stop checking."""
        self._remove_clients = lambda _: None
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        self._check()
        self._timer = self._context.loop.after(self._seconds, self._watch)

    def _check(self) -> None:
        """Remove the clients that were revoked since the last check."""
        self._remove_clients(self._context.access.take_note())

    def _restore(self) -> None:
        """Make the broker's users match the store; retry later when the broker's API is unavailable."""

        def again(error: Exception) -> None:
            log.warning("users-not-restored", why=str(error))
            self._context.loop.after(self._seconds, self._restore)

        self._context.loop.work(self._context.access.restore, lambda _: None, again)
