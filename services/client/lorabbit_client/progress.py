"""Progress of one task on its way to the server, of which only the newest is worth anything.

One message at a time is with the broker. What is told meanwhile waits and is replaced by what is told later, so a task
that trains for hours while the broker is away keeps two messages, and not two for every second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorabbit.broker.base import OnDone
from lorabbit.errors import LoRAbbitError
from lorabbit.messages import Message, TaskProgress


class Progress:
    """See the module's docstring; for the loop thread."""

    def __init__(self, send: Callable[[Message, OnDone | None], None], ids: Mapping[str, str]) -> None:
        """Tell of the task whose `job`, `task` and `client` are in `ids`."""
        self._send, self._ids = send, ids
        self._newest: TaskProgress | None = None
        self._is_out = False

    def tell(self, fraction: float, loss: float | None) -> None:
        """Tell how much is done, and the loss where it is finite."""
        finite = loss if loss is not None and abs(loss) < float("inf") else None
        self._newest = TaskProgress(**self._ids, fraction=min(1.0, max(0.0, fraction)), loss=finite)
        self._advance()

    def stop(self) -> None:
        """Tell nothing more: the work is over."""
        self._newest = None

    def _advance(self) -> None:
        if self._is_out or self._newest is None:
            return
        newest, self._newest = self._newest, None
        self._is_out = True
        self._send(newest, self._sent)

    def _sent(self, _: LoRAbbitError | None) -> None:
        """Go on whether the broker took it or not: the next one is newer."""
        self._is_out = False
        self._advance()
