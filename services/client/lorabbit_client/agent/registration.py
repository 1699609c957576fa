"""Registration of a client: sends `Hello` until the server answers, renews the lease, and says `Goodbye` at the end.

Every message carries a random name of the process. Two processes at one address consume each other's messages; the
server receives both, and tells the later one to stop.

`capabilities_of` reads a client's capabilities from its settings and from the machine or container, without torch.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

import lorabbit
from lorabbit.broker.base import Broker, Cancellable, OnDone
from lorabbit.config.settings import ClientSettings
from lorabbit.errors import LoRAbbitError
from lorabbit.job.spec import KNOWN
from lorabbit.protocol.messages import AddressTaken, Alive, Goodbye, Hello, Message, Welcome
from lorabbit.types import ClientCapabilities
from lorabbit_client.agent.journal import Journal

GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder for each GPU that NVIDIA's driver holds."""
TEGRA = Path("/dev/nvhost-gpu")
"""The GPU of a Jetson board."""
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Memory limit of a container (cgroup v2); ``max`` where there is none."""


def capabilities_of(settings: ClientSettings) -> ClientCapabilities:
    """Return what a client declares: its settings, and the device and memory of this machine or container."""
    found = {
        "device": device(settings.device),
        "memory_bytes": memory_bytes(),
        "version": lorabbit.__version__,
        "codings": KNOWN,
    }
    return ClientCapabilities.model_validate(dict(settings) | found)


def device(setting: str) -> str:
    """Name the device that a client's setting leads to: ``auto`` is a GPU where the driver shows one."""
    if setting != "auto":
        return setting
    has_gpu = TEGRA.exists() or (GPUS.is_dir() and any(GPUS.iterdir()))
    return "cuda" if has_gpu else "cpu"


def memory_bytes() -> int:
    """Memory that this process may take: the machine's, or less where a container's limit is lower."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = LIMIT.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


log = structlog.get_logger()

REMEDY = "give this one its own with"
HELLO_RETRY_SECONDS = 0.5
HELLO_RETRY_MAX_SECONDS = 10.0
HEARTBEATS_PER_HELLO = 12
"""An idle client sends hello again now and then, in case the server lost its registry."""


class Registration:
    """See the module's docstring; for the loop thread."""

    def __init__(  # noqa: PLR0913 - whose registration it is, through what it speaks, and what it has to tell
        self,
        broker: Broker,
        settings: ClientSettings,
        journal: Journal,
        send: Callable[[Message, OnDone | None], None],
        outbox: Callable[[], tuple[str, ...] | None],
        *,
        heartbeats: bool = True,
    ) -> None:
        """Report the tasks in the `outbox`, which is None without any task; without `heartbeats` there is no lease."""
        self._broker, self._settings, self._journal = broker, settings, journal
        self._send, self._outbox, self._heartbeats_enabled = send, outbox, heartbeats
        self._process = uuid.uuid4().hex
        self.client = settings.client or journal.identity()
        """The identity; None until the server gives one."""
        self.on_idle: Callable[[], None] | None = None
        """Called once this client has had no task for `settings.idle_seconds` since its last one."""
        self.on_conflict: Callable[[str], None] | None = None
        """Called with a message when another process has this address or the configured identity."""
        self._is_registered = False
        self._hello_retry_seconds = HELLO_RETRY_SECONDS
        self._hello_is_unconfirmed = False
        self._heartbeat_count = 0
        self._idle_seconds: float | None = None
        self._needs_hello = False
        self._timer: Cancellable | None = None

    def register(self) -> None:
        """Send hello until the server answers; at most one hello is unconfirmed."""
        if not self._hello_is_unconfirmed:
            self._hello_is_unconfirmed = True
            self._send(self._hello(), self._on_hello_sent)
        if not self._is_registered:
            self._timer = self._broker.after(self._hello_retry_seconds, self.register)
            self._hello_retry_seconds = min(HELLO_RETRY_MAX_SECONDS, 2 * self._hello_retry_seconds)

    def close(self) -> None:
        """Say goodbye if the client is registered."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_registered and self.client is not None:
            self._send(Goodbye(address=self._settings.address, client=self.client, process=self._process), None)

    def on_welcome(self, welcome: Welcome) -> None:
        """Store the identity; a configured identity is never replaced."""
        if self._settings.client not in {None, welcome.client} and self.on_conflict is not None:
            self.on_conflict(f"another client took the name {self._settings.client!r}; {REMEDY} LORABBIT_CLIENT")
            return
        if not self._is_registered or welcome.client != self.client:
            log.info("client-registered", address=self._settings.address, client=welcome.client)
        self.client = welcome.client
        self._journal.save_identity(welcome.client)
        if self._is_registered:
            return
        self._is_registered = True
        if self._timer is not None:
            self._timer.cancel()
        if self._heartbeats_enabled:
            self._timer = self._broker.after(
                welcome.heartbeat_seconds, partial(self._send_heartbeat, welcome.heartbeat_seconds)
            )

    def on_address_taken(self, message: AddressTaken) -> None:
        """Stop if this process came second; otherwise send hello, since the other process consumed tasks."""
        if message.process != self._process:
            self.register()
        elif self.on_conflict is not None:
            self.on_conflict(f"another client is at the address {self._settings.address!r}; {REMEDY} LORABBIT_ADDRESS")

    def reset_idle_time(self) -> None:
        """Restart the count of idle time."""
        self._idle_seconds = 0.0

    def _hello(self) -> Hello:
        return Hello(
            address=self._settings.address,
            client=self.client,
            outbox=self._outbox() or (),
            process=self._process,
            **capabilities_of(self._settings).model_dump(),
        )

    def _on_hello_sent(self, error: LoRAbbitError | None) -> None:
        self._hello_is_unconfirmed = False
        if error is not None:
            log.info("server-unreachable", address=self._settings.address, why=str(error))
            self._needs_hello = True

    def _send_heartbeat(self, seconds: float) -> None:
        """Renew the lease; after a broken connection, or idle for long, send hello instead."""
        self._timer = self._broker.after(seconds, partial(self._send_heartbeat, seconds))
        is_idle = self._outbox() is None
        self._count_idle(seconds, is_idle=is_idle)
        if self._broker.health() is not None:
            self._needs_hello = True  # what is sent now would only pile up
            return
        self._heartbeat_count += 1
        if self._needs_hello or (is_idle and self._heartbeat_count % HEARTBEATS_PER_HELLO == 0):
            self._needs_hello = False
            self.register()
        elif self.client is not None:
            self._send(Alive(address=self._settings.address, client=self.client, process=self._process), None)

    def _count_idle(self, seconds: float, *, is_idle: bool) -> None:
        """Add to the idle time; before its first task a client does not count as idle."""
        if not is_idle:
            self._idle_seconds = 0.0
        elif self._idle_seconds is not None:
            self._idle_seconds += seconds
            limit = self._settings.idle_seconds
            if limit is not None and self._idle_seconds >= limit and self.on_idle is not None:
                log.info("client-leaving", idle_seconds=self._idle_seconds)
                self._idle_seconds = None
                self.on_idle()
