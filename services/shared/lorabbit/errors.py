"""The one exception tree.

Whether a failure may be tried again is part of its type: `Retryable` says "the same call may
succeed later", everything else says "it never will". The command line turns each branch into an
exit code: 1 failed run, 2 bad input, 3 services unreachable, 4 not allowed.
"""

from __future__ import annotations

SHOWN = 100
"""Characters of a name from the wire that an error repeats."""


class LoRAbbitError(Exception):
    """Base of every error that LoRAbbit raises on purpose; its text is one clear sentence."""

    exit_code = 1


class BadInput(LoRAbbitError):
    """What the user gave cannot work: a job file, a data file, an option, a model name."""

    exit_code = 2


class RunFailed(LoRAbbitError):
    """A job ended without its result."""

    exit_code = 1


class CorruptPayload(LoRAbbitError):
    """Bytes from the wire or the disk are not what their manifest says."""


class Refused(LoRAbbitError):
    """A message or an update is not admitted; `reason` is the short name that is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the counted `reason` (kebab-case) beside the sentence in `detail`."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NotAllowed(LoRAbbitError):
    """A service does not know this user, or no longer: a token, a password or a client that was revoked."""

    exit_code = 4


class JoinRefused(NotAllowed):
    """A client may not join; `reason` is the short name that is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the counted `reason` (kebab-case); the text is the sentence in `detail`."""
        super().__init__(detail)
        self.reason = reason


class Fenced(LoRAbbitError):
    """Another server holds the lease: this one must stop writing."""


class Retryable(LoRAbbitError):
    """The same call may succeed later."""

    exit_code = 3


class BrokerUnavailable(Retryable):
    """The broker cannot be reached, or the connection broke."""


class BrokerFault(BrokerUnavailable):
    """The broker cannot use one of its queues: it has only just started, or lost that queue for good."""


class BrokerBusy(Retryable):
    """The broker refused a message because a queue is full, or its node was lost and no other one leads it yet."""


class NotDeclared(BrokerBusy):
    """The broker has no such exchange: no server declared it yet, or the broker lost everything it had."""


class BrokerRefused(LoRAbbitError):
    """The broker will never take a message as it is: a missing permission, a size beyond its limit."""


class StoreUnavailable(Retryable):
    """The state store cannot be reached."""


class StoreRefuses(StoreUnavailable):
    """The state store answers and takes no writes: out of memory, a replica, a disk that it cannot write."""


class FilesMissing(Retryable):
    """The store names files of a job that this server's volume does not have."""


class ServerUnavailable(Retryable):
    """The server's HTTP interface cannot be reached."""
