"""The loop: one thread that runs callbacks in order, with timers, woken at once.

Drivers hand everything to it (deliveries, confirmations, `post`ed functions) through one queue, so
whoever stands on it needs no lock. It waits for the next callback or the next timer, never for an
interval. With a clock of the test's own, `run_until_idle` replaces waiting by moving that clock.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from lorabbit.broker.base import Cancellable

Clock = Callable[[], float]


class Timer(Cancellable):
    """A function to run once, unless cancelled before."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        """Keep the function until it ran or is no longer wanted."""
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the function, and with it everything that it holds."""
        self.callback = None

    def fire(self) -> None:
        """Run the function if it is still wanted."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class BrokerLoop:
    """Callbacks in the order posted, and timers; `clock` counts seconds and never goes back."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Start empty; nothing runs before `run` or `run_until_idle`."""
        self._clock = clock
        # SimpleQueue.put is reentrant: a signal handler may post or stop while this thread is inside get().
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = itertools.count()
        self._stopped = False

    def post(self, callback: Callable[[], None]) -> None:
        """Run a function soon; callable from any thread and from signal handlers."""
        self._calls.put(callback)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Run a function once, later."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._sequence), timer))
        return timer

    def run(self) -> None:
        """Run callbacks until `stop`; what a callback raises ends the loop and is raised here."""
        try:
            while not self._stopped:
                self._run_due_timers()
                try:
                    callback = self._calls.get(timeout=self._seconds_to_next_timer())
                except Empty:
                    continue
                callback()
        finally:
            self._stopped = False

    def run_until_idle(self) -> None:
        """Run what is due now, and what follows from it, then return: the loop of tests with a clock of their own."""
        while not self._calls.empty() or self._timer_is_due():
            self._run_due_timers()
            while not self._calls.empty():
                self._calls.get()()

    def stop(self) -> None:
        """Make `run` return after the current callback; one that is not running yet returns at once."""
        self._stopped = True
        self._calls.put(_nothing)

    def _seconds_to_next_timer(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - self._clock())

    def _timer_is_due(self) -> bool:
        return bool(self._timers) and self._timers[0][0] <= self._clock()

    def _run_due_timers(self) -> None:
        """Run the timers that are due by now, but not the ones that they start."""
        if not self._timers:
            return
        now = self._clock()
        while self._timers and self._timers[0][0] <= now and not self._stopped:
            heapq.heappop(self._timers)[2].fire()


def _nothing() -> None:
    """Wake the loop."""


class RunsOnLoop:
    """The part of a broker that runs callbacks on its loop thread."""

    _loop: BrokerLoop

    def post(self, callback: Callable[[], None]) -> None:
        """Run a function on the loop thread soon; callable from any thread."""
        self._loop.post(callback)

    def after(self, seconds: float, callback: Callable[[], None]) -> Cancellable:
        """Run a function on the loop thread once, later."""
        return self._loop.after(seconds, callback)

    def run(self) -> None:
        """Run callbacks until `stop`."""
        self._loop.run()

    def stop(self) -> None:
        """Make `run` return after the current callback; callable from any thread and from signal handlers."""
        self._loop.stop()
