"""Faults of this server that delay its job: no room on its disk, a store without writes, a job without files.

Broker, store and lease are looked at from outside, see `dependencies`; these are only found by trying.
"""

from __future__ import annotations

import threading

from lorabbit.errors import FilesMissing, StoreRefuses
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_server.engine.state import JobState
from lorabbit_server.engine.wait_reasons import WaitReason
from lorabbit_server.event_loop import is_out_of_space
from lorabbit_server.health.dependencies import STORE

SERVER = "server"
MIN_CLEAR_MS = 10_000
_NO_ROOM = "no deadline; the server tries again every second, and goes on once there is room"
_NO_WRITES = "no deadline; the server tries again every second, and goes on once Redis takes writes again"
_NO_FILES = "no deadline; start the server on the volume that has them, or cancel the job"


class ServerFaults:
    """The newest fault, for as long as it recurs. Safe to call from any thread."""

    def __init__(self, lease_ms: int) -> None:
        """A fault clears after two lease periods."""
        self._clear_after_ms = max(MIN_CLEAR_MS, 2 * lease_ms)
        self._fault: WaitReason | None = None
        self._recorded_ms = 0
        self._lock = threading.Lock()

    def record(self, error: Exception, now_ms: int) -> None:
        """Record an error that made the server release its lease, if it is one of these faults."""
        owner = SERVER
        if isinstance(error, FilesMissing):
            reason, ends = str(error), _NO_FILES
        elif isinstance(error, StoreRefuses):
            owner, reason, ends = STORE, str(error), _NO_WRITES
        elif is_out_of_space(error):
            reason, ends = f"the server's disk is full: {error}", _NO_ROOM
        else:
            return
        with self._lock:
            before = self._current(now_ms)
            since = before.since_ms if before is not None and before.ends == ends else now_ms
            self._fault, self._recorded_ms = WaitReason(owner=owner, reason=reason, since_ms=since, ends=ends), now_ms

    def check_files(self, state: JobState, payloads: PayloadStore) -> None:
        """Raise FilesMissing if files that a job needs are missing.

        A store that was restored from an older backup names files that were deleted since; a server on another volume
        than its predecessor's has none of them.
        """
        missing, wanted = _missing_files(state, payloads)
        if missing:
            raise FilesMissing(
                f"job {state.job} stands on {wanted} files, of which {len(missing)} are not in {payloads.folder} "
                f"({missing[0][:12]} is the first)"
            )
        with self._lock:
            if self._fault is not None and self._fault.ends in {_NO_FILES, _NO_WRITES}:  # a job is claimed by a write
                self._fault = None

    def current(self, now_ms: int) -> WaitReason | None:
        """The current fault, if any."""
        with self._lock:
            return self._current(now_ms)

    def _current(self, now_ms: int) -> WaitReason | None:
        return self._fault if now_ms - self._recorded_ms < self._clear_after_ms else None


def _missing_files(state: JobState, payloads: PayloadStore) -> tuple[list[str], int]:
    """The files that a job needs and that are missing, and the number of files that it needs."""
    if state.stage == "ended":
        return [], 0
    results = (task.offered for task in state.tasks.values() if task.status == "accepted")
    accepted = {offered.payload.sha256 for offered in results if offered is not None and offered.payload is not None}
    wanted = accepted.union(*(version.hashes for version in state.versions))
    return sorted(sha256 for sha256 in wanted if not payloads.has(sha256)), len(wanted)
