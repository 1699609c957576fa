"""What a stress test needs from a server and its clients, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorabbit_bench.stress.resource_usage import UsageSample
from lorabbit_cli.api_client import ApiClient


class Deployment(Protocol):
    """A server with its broker and store, and clients in a number to choose."""

    description: str
    """How the clients are spread, for the report: in so many processes, in so many containers."""

    def connect(self) -> ApiClient:
        """Open the server's HTTP interface; a context."""

    def start(self) -> None:
        """Start everything, and begin to start the clients; raises LoRAbbitError."""

    def meter(self) -> Mapping[str, UsageSample]:
        """Read memory and processor time of each tier."""

    def check(self) -> None:
        """Raise RunFailed when a part has ended by itself."""

    def close(self) -> None:
        """Stop everything and leave nothing behind; whatever was started, and twice too."""
