"""Door: keeps a server that leads in step with the store on who has joined and who was sent away.

Any server may be told to revoke a client; the one that leads looks here, at once where it was told itself and
else at each renewal of its lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from lorabbit_server.tools import Tools

log = structlog.get_logger()


class Door:
    """See the module's docstring; for the loop thread, except `notice`."""

    def __init__(self, tools: Tools, send_away: Callable[[Iterable[str]], None]) -> None:
        """Read who was revoked, and give the broker the users it lacks."""
        self._tools, self._send_away = tools, send_away
        self._is_open = True
        self.look()
        self._restore()

    def look(self) -> None:
        """Send away whoever was revoked since the last look."""
        if self._is_open:
            self._send_away(self._tools.access.take_note())

    def notice(self) -> None:
        """Look soon; from any thread."""
        self._tools.loop.post(self.look)

    def close(self) -> None:
        """Look no more."""
        self._is_open = False

    def _restore(self) -> None:
        """Bring the broker's users to what the store says, and again later where it cannot be asked."""

        def again(error: Exception) -> None:
            log.warning("users-not-restored", why=str(error))
            self._tools.loop.after(self._tools.settings.lease_seconds, self._restore)

        if self._is_open and self._tools.access.is_enrolled:
            self._tools.loop.work(self._tools.access.restore, lambda _: None, again)
