"""Deadline: the one timer of a job, which the engine sets and the store remembers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lorabbit.broker.base import Cancellable
from lorabbit_server.steps import DeadlinePassed, Event, SetDeadline
from lorabbit_server.tools import Tools


class Deadline:
    """For the loop thread."""

    def __init__(self, tools: Tools, passed: Callable[[Event], None]) -> None:
        """Call `passed` with the event once the time has come."""
        self._tools, self._passed = tools, passed
        self._timer: Cancellable | None = None

    def set(self, command: SetDeadline) -> None:
        """Wait for this time, and for no other any more; a time that is over comes at once."""
        self.close()
        seconds = max(0, command.at_ms - self._tools.now_ms()) / 1000
        self._timer = self._tools.loop.after(seconds, partial(self._ring, command.round))

    def _ring(self, number: int) -> None:
        self._timer = None
        self._passed(DeadlinePassed(number, self._tools.now_ms()))

    def close(self) -> None:
        """Wait for nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
