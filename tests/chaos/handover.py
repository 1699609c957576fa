"""The lease of two servers, as Redis tells it, and how long it took to move: all times are of Redis's own clock.

A dead or frozen server renews nothing, so its lease ends no later than one length after the moment of death, and
the standby takes it with its next try. `STARVED_SECONDS` come on top, which a process may have to wait for a core of a
busy machine, and the watcher for its own; they are finite, and for a drain far less than the lease that it need not
wait for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import redis

from lorabbit_server.server import TICK_SECONDS

KEY = "lorabbit:{server}:"
STARVED_SECONDS = 10.0
UNDER_WAY_SECONDS = 0.5
"""A renewal that the dead server had sent may reach Redis so much later, and two readings of its clock may differ."""


@dataclass(frozen=True)
class Reading:
    """What Redis says of the lease in one transaction."""

    at: float
    """Redis's clock, seconds."""
    holder: str | None
    ends: float
    """When the lease ends unless it is renewed, on the same clock; `at` where nobody holds it."""
    epoch: int


class Handover:
    """Watches a lease of `seconds` from the moment that `begin` is called."""

    def __init__(self, redis_url: str, seconds: float) -> None:
        """Connect."""
        self._redis = redis.Redis.from_url(redis_url, decode_responses=True)
        self._seconds = seconds
        self._death: Reading | None = None

    def begin(self) -> None:
        """Note who leads: now its death is certain, or it is told to stop."""
        self._death = self._read()
        assert self._death.holder is not None, "nobody holds the lease"

    def await_end_of_lease(self) -> None:
        """Wait until another server leads: not before the lease ended, and with its first try after that."""
        death, last, taken = self._await_move()
        assert last.ends <= death.at + self._seconds + UNDER_WAY_SECONDS, (
            "the lease was renewed after its holder's death"
        )
        assert taken >= last.ends - UNDER_WAY_SECONDS, f"taken {last.ends - taken:.2f} s before the lease ended"
        late = taken - (death.at + self._seconds)
        allowed = TICK_SECONDS + UNDER_WAY_SECONDS + STARVED_SECONDS
        assert late <= allowed, f"taken {late:.2f} s after the longest that the lease could last, not {allowed}"

    def await_release(self) -> None:
        """Wait until another server leads: at once, whatever is left of the lease."""
        allowed = TICK_SECONDS + STARVED_SECONDS
        death, _, taken = self._await_move()
        assert death.ends - death.at > 2 * allowed, "the lease is too short to tell that it was given up"
        assert taken - death.at <= allowed, f"taken {taken - death.at:.2f} s after SIGTERM, not {allowed}"

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def _await_move(self) -> tuple[Reading, Reading, float]:
        """What was read at death, the last reading of the old lease, and when the new one was taken."""
        assert self._death is not None
        last = self._death
        deadline = time.monotonic() + self._seconds + 60.0
        while time.monotonic() < deadline:
            now = self._read()
            if now.epoch != self._death.epoch:
                assert now.epoch == self._death.epoch + 1, f"epoch {now.epoch} after {self._death.epoch}"
                assert now.holder != self._death.holder, f"{now.holder} leads again"
                return self._death, last, now.ends - self._seconds
            if now.holder is not None:
                last = now
            time.sleep(0.02)
        raise AssertionError(f"nobody took the lease that ended at {last.ends:.2f}; Redis has {self._read()}")

    def _read(self) -> Reading:
        """Read everything in one transaction."""
        with self._redis.pipeline(transaction=True) as together:
            together.time()
            together.get(KEY + "lease")
            together.pttl(KEY + "lease")
            together.get(KEY + "epoch")
            (seconds, micros), holder, left_ms, epoch = together.execute()
        at = seconds + micros / 1e6
        return Reading(at, holder, at + max(0, left_ms) / 1000, int(epoch or 0))
