"""A federation that runs already, in containers or in a cluster: its pool of clients is scaled to every size.

The clients are those that the deployment runs, each with a container of its own; the pool is brought back to
what it was afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorabbit.errors import LoRAbbitError
from lorabbit_cli.remote import Server
from lorabbit_cli.scaling.base import Pace, Scaler, scale
from lorabbit_cli.stress.limits import LimitReached
from lorabbit_cli.stress.usage import Meter, Reading

BATCH = 10
PATIENCE_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment to measure."""

    scaler: Scaler
    pool: str
    connect: Callable[[], Server]
    """Opens the server's HTTP interface."""
    meter: Meter
    """Reads what can be read of its tiers."""


class PoolFederation:
    """One size of a deployed pool; `Federation` says what each method does."""

    def __init__(self, deployed: Deployed, clients: int) -> None:
        """Prepare to scale the pool to so many clients."""
        self._deployed, self._clients = deployed, clients
        self._before: int | None = None
        self.description = f"{clients} containers, one client in each"

    def connect(self) -> Server:
        """Open the server's HTTP interface."""
        return self._deployed.connect()

    def start(self) -> None:
        """Scale the pool; raises LimitReached where the engine or the cluster has no room for more."""
        with self.connect() as server:
            server.jobs()
        scaler, pool = self._deployed.scaler, self._deployed.pool
        self._before = scaler.count(pool)
        try:
            scale(scaler, pool, self._clients, pace=Pace(BATCH, PATIENCE_SECONDS), tell=lambda _: None)
        except LoRAbbitError as error:
            raise LimitReached(f"containers: {error}") from error

    def meter(self) -> Mapping[str, Reading]:
        """Read what the deployment's engine tells of each tier."""
        return self._deployed.meter()

    def check(self) -> None:
        """Do nothing: a container that ends is started again by its engine, and the events tell."""

    def close(self) -> None:
        """Bring the pool back to what it was."""
        before, self._before = self._before, None
        if before is not None:
            scale(
                self._deployed.scaler,
                self._deployed.pool,
                before,
                pace=Pace(BATCH, PATIENCE_SECONDS),
                tell=lambda _: None,
            )
