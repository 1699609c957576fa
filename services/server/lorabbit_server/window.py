"""Window: how many payloads may be on their way up at one time.

Without it a thousand clients would send at once, and what the server has not read yet would fill the
broker's memory until it blocks everybody. Payloads enter in the order of their offers. One that is
slow no longer counts after a while, so that clients behind thin lines do not wait for each other.
"""

from __future__ import annotations

MOST_BYTES = 64 * 2**20
AT_LEAST = 8
"""So many payloads are let in, however large."""
SLOW_MS = 5_000


class Window:
    """See the module's docstring; payloads by name, sizes in bytes."""

    def __init__(self) -> None:
        """Start empty."""
        self._inside: dict[str, tuple[int, int]] = {}
        """Size, and when it came in."""
        self._bytes = 0
        self._outside: dict[str, int] = {}

    def enter(self, name: str, size: int, now_ms: int) -> bool:
        """Let a payload in, or have it wait behind those that wait; one that is inside stays there."""
        if name in self._inside:
            return True
        if self._outside or not self._has_room(size):
            self._outside.setdefault(name, size)
            return False
        self._let_in(name, size, now_ms)
        return True

    def leave(self, name: str) -> None:
        """Forget a payload that is here, or that nobody wants any more."""
        self._outside.pop(name, None)
        inside = self._inside.pop(name, None)
        if inside is not None:
            self._bytes -= inside[0]

    def advance(self, now_ms: int) -> list[str]:
        """Take out what is slow, and let in what there is room for then; returns the names of the latter."""
        for name, (_, since_ms) in list(self._inside.items()):
            if now_ms - since_ms < SLOW_MS:
                break
            self.leave(name)
        entered = []
        for name, size in list(self._outside.items()):
            if not self._has_room(size):
                break
            del self._outside[name]
            self._let_in(name, size, now_ms)
            entered.append(name)
        return entered

    def _has_room(self, size: int) -> bool:
        return len(self._inside) < AT_LEAST or self._bytes + size <= MOST_BYTES

    def _let_in(self, name: str, size: int, now_ms: int) -> None:
        self._inside[name] = (size, now_ms)
        self._bytes += size
