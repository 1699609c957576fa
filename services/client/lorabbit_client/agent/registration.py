"""Registration of a client: sends `Hello` until the server answers, renews the lease, and says `Goodbye` at the end.

Everything that a client says of itself carries a name drawn by its process. Two processes at one address read each
other's messages; the server hears both, and tells the one that came later to stop.

What a client says of itself: its settings, and what this machine or container gives it, found without torch.
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

ITS_OWN = "give this one its own with"
FIRST_HELLO_SECONDS = 0.5
LONGEST_HELLO_SECONDS = 10.0
HEARTBEATS_PER_HELLO = 12
"""An idle client introduces itself again now and then, should the server have lost its registry."""


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
        beats: bool = True,
    ) -> None:
        """Tell of the results in the `outbox`, which is None without any task; one that never `beats` has no lease."""
        self._broker, self._settings, self._journal = broker, settings, journal
        self._send, self._outbox, self._beats = send, outbox, beats
        self._process = uuid.uuid4().hex
        self.client = settings.client or journal.identity()
        """The identity; None until the server gives one."""
        self.on_idle: Callable[[], None] | None = None
        """Called once this client has had no task for `settings.idle_seconds` since its last one."""
        self.on_taken: Callable[[str], None] | None = None
        """Called with a sentence when another process has this one's address or the identity that it was to have."""
        self._welcomed = False
        self._hello_seconds = FIRST_HELLO_SECONDS
        self._hello_is_out = False
        self._heartbeats = 0
        self._idle_seconds: float | None = None
        self._was_in_trouble = False
        self._timer: Cancellable | None = None

    def register(self) -> None:
        """Introduce this client, again and again until it is welcomed; one unconfirmed hello at a time."""
        if not self._hello_is_out:
            self._hello_is_out = True
            self._send(self._hello(), self._hello_was_sent)
        if not self._welcomed:
            self._timer = self._broker.after(self._hello_seconds, self.register)
            self._hello_seconds = min(LONGEST_HELLO_SECONDS, 2 * self._hello_seconds)

    def close(self) -> None:
        """Say goodbye where the server knows of this client."""
        if self._timer is not None:
            self._timer.cancel()
        if self._welcomed and self.client is not None:
            self._send(Goodbye(address=self._settings.address, client=self.client, process=self._process), None)

    def on_welcome(self, welcome: Welcome) -> None:
        """Take the identity, and keep it; one that was set and is another's now is not made up for by a third."""
        if self._settings.client not in {None, welcome.client} and self.on_taken is not None:
            self.on_taken(f"another client took the name {self._settings.client!r}; {ITS_OWN} LORABBIT_CLIENT")
            return
        if not self._welcomed or welcome.client != self.client:
            log.info("client-registered", address=self._settings.address, client=welcome.client)
        self.client = welcome.client
        self._journal.remember_identity(welcome.client)
        if self._welcomed:
            return
        self._welcomed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._beats:
            self._timer = self._broker.after(
                welcome.heartbeat_seconds, partial(self._send_heartbeat, welcome.heartbeat_seconds)
            )

    def on_address_taken(self, message: AddressTaken) -> None:
        """Stop where it is this process that came second; else say what is done here, since the other took tasks."""
        if message.process != self._process:
            self.register()
        elif self.on_taken is not None:
            self.on_taken(f"another client is at the address {self._settings.address!r}; {ITS_OWN} LORABBIT_ADDRESS")

    def has_work(self) -> None:
        """Begin to count anew how long there is nothing to do."""
        self._idle_seconds = 0.0

    def _hello(self) -> Hello:
        return Hello(
            address=self._settings.address,
            client=self.client,
            outbox=self._outbox() or (),
            process=self._process,
            **capabilities_of(self._settings).model_dump(),
        )

    def _hello_was_sent(self, error: LoRAbbitError | None) -> None:
        self._hello_is_out = False
        if error is not None:
            log.info("server-unreachable", address=self._settings.address, why=str(error))
            self._was_in_trouble = True

    def _send_heartbeat(self, seconds: float) -> None:
        """Renew the lease; after a break of the broker, or idle for long, say who we are instead."""
        self._timer = self._broker.after(seconds, partial(self._send_heartbeat, seconds))
        is_idle = self._outbox() is None
        self._count_idle(seconds, is_idle=is_idle)
        if self._broker.health() is not None:
            self._was_in_trouble = True  # what is sent now would only pile up
            return
        self._heartbeats += 1
        if self._was_in_trouble or (is_idle and self._heartbeats % HEARTBEATS_PER_HELLO == 0):
            self._was_in_trouble = False
            self.register()
        elif self.client is not None:
            self._send(Alive(address=self._settings.address, client=self.client, process=self._process), None)

    def _count_idle(self, seconds: float, *, is_idle: bool) -> None:
        """Add to the time without a task; a client that had none yet is not idle but early."""
        if not is_idle:
            self._idle_seconds = 0.0
        elif self._idle_seconds is not None:
            self._idle_seconds += seconds
            limit = self._settings.idle_seconds
            if limit is not None and self._idle_seconds >= limit and self.on_idle is not None:
                log.info("client-leaving", idle_seconds=self._idle_seconds)
                self._idle_seconds = None
                self.on_idle()
