"""Health of the dependencies: broker, store and lease, with the time at which each problem began.

The HTTP interface calls `check`, so it must return within seconds: the store is probed over a separate connection
without retries. RabbitMQ reports an alarm only to a connection that publishes, so an idle server publishes an
unroutable message from time to time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lorabbit.broker.base import Broker, Outgoing
from lorabbit.errors import StoreUnavailable
from lorabbit.state.base import StateStore
from lorabbit_server.engine.wait_reasons import WaitReason

BROKER, STORE, LEASE = "broker", "store", "lease"
PROBE_SECONDS = 1.0
UNROUTABLE = "-"
"""No queue has this name, so the broker returns what is sent to it."""
_ENDS = {
    BROKER: "no deadline; the server tries for ever, and goes on once the broker takes messages again",
    STORE: "no deadline; the server tries for ever, and goes on once the store answers again",
    LEASE: "a server that is there takes it within seconds; start one with `lorabbit server`",
}


@dataclass(frozen=True, slots=True)
class HealthSnapshot:
    """Result of one check."""

    troubles: tuple[WaitReason, ...]
    leader: str | None
    """Holder of the lease; None if nobody or unknown."""

    def of(self, owner: str) -> WaitReason | None:
        """The problem of one dependency, if any."""
        return next((wait for wait in self.troubles if wait.owner == owner), None)


class DependencyHealth:
    """See the module's docstring. Safe to call from any thread."""

    def __init__(self, broker: Broker, probe: StateStore, now_ms: Callable[[], int]) -> None:
        """Check this broker, and the store through `probe`."""
        self._broker, self._probe, self._now = broker, probe, now_ms
        self._since: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop, self._answered = threading.Event(), threading.Event()
        self._answered.set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Check periodically, so that the start time of a problem is known."""
        self._thread = threading.Thread(target=self._run, name="dependency-health", daemon=True)
        self._thread.start()

    def _probe_broker(self) -> None:
        """Send a message that the broker returns, one at a time; for the loop thread."""
        self._broker.send(Outgoing("", UNROUTABLE, "lorabbit.probe", b""), lambda _: self._answered.set())

    def close(self) -> None:
        """Stop checking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> HealthSnapshot:
        """Check now."""
        with self._lock:
            reasons: dict[str, str | None] = {BROKER: self._broker.health(), STORE: None, LEASE: None}
            leader = None
            try:
                leader = self._probe.lease_holder()
            except StoreUnavailable as error:
                reasons[STORE] = f"the store is unreachable: {error}"
            else:
                reasons[LEASE] = "no server leads: nobody holds the lease" if leader is None else None
            troubles = [self._wait_reason(name, what) for name, what in reasons.items() if self._track(name, what)]
            return HealthSnapshot(tuple(troubles), leader)

    def _track(self, name: str, what: str | None) -> bool:
        """Record the start or the end of a problem; returns whether there is one."""
        if what is None:
            self._since.pop(name, None)
            return False
        self._since.setdefault(name, self._now())
        return True

    def _wait_reason(self, name: str, what: str | None) -> WaitReason:
        return WaitReason(owner=name, reason=str(what), since_ms=self._since[name], ends=_ENDS[name])

    def _run(self) -> None:
        while not self._stop.wait(PROBE_SECONDS):
            self.check()
            if self._answered.is_set():
                self._answered.clear()
                self._broker.post(self._probe_broker)
