"""The event loop: guarded callbacks on the broker's loop thread, and one worker thread for slow work.

A callback that finds the lease lost, the store unavailable or the disk full must not end the process: the guard
passes the error to the server, which releases the lease and tries again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog

from lorabbit.broker.base import Broker, Cancellable
from lorabbit.errors import Fenced, LoRAbbitError, Retryable
from lorabbit.state.base import Conflict

log = structlog.get_logger()
Result = TypeVar("Result")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


def is_out_of_space(error: Exception) -> bool:
    """Whether the disk is full; the operation succeeds once there is space."""
    return isinstance(error, OSError) and error.errno in NO_ROOM


def is_transient(error: Exception) -> bool:
    """Whether the work may succeed later or on another server."""
    return isinstance(error, Fenced | Conflict | Retryable) or is_out_of_space(error)


class EventLoop:
    """Posts guarded callbacks to the broker's loop thread."""

    def __init__(
        self, broker: Broker, on_transient: Callable[[Exception], None], *, worker: Executor | None = None
    ) -> None:
        """Call `on_transient` with errors that a lost lease or an unavailable service caused."""
        self._broker, self._on_transient = broker, on_transient
        self._worker = worker or ThreadPoolExecutor(max_workers=1, thread_name_prefix="heavy")
        self._closed = False

    def guard(self, callback: Callable[[], None]) -> None:
        """Call now."""
        if self._closed:
            return
        try:
            callback()
        except (LoRAbbitError, OSError) as error:
            if not is_transient(error):
                raise
            self._on_transient(error)

    def post(self, callback: Callable[[], None]) -> None:
        """Call soon; from any thread."""
        self._broker.post(lambda: self.guard(callback))

    def after(self, seconds: float, callback: Callable[[], None]) -> Cancellable:
        """Call later."""
        return self._broker.after(seconds, lambda: self.guard(callback))

    def work(
        self,
        job: Callable[[], Result],
        then: Callable[[Result], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Run work on the worker thread, in order; `then` or `failed` is called on the loop.

        Neither is after work that was fenced off.
        """

        def run() -> None:
            try:
                result = job()
            except Fenced as error:
                log.info("work-fenced", why=str(error))  # it is another server's; the next commit tells the service
            except Exception as error:  # noqa: BLE001 - whatever it was, its owner must hear of it
                told = self._on_transient if is_out_of_space(error) or isinstance(error, Retryable) else failed
                self.post(partial(told, error))
            else:
                self.post(lambda: then(result))

        if not self._closed:
            self._worker.submit(run)

    def close(self) -> None:
        """Stop; waits for running work."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
