"""A federation that runs already, in containers or in a cluster: its pool of clients is scaled to every size.

The clients are those that the deployment runs, each with a container of its own; the pool is brought back to
what it was afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lorabbit.errors import RunFailed
from lorabbit_bench.stress.resource_limits import LimitReached
from lorabbit_bench.stress.resource_usage import Meter, UsageSample
from lorabbit_cli.api_client import ApiClient
from lorabbit_cli.scaling.base import OverQuota, RolloutPolicy, Scaler, scale

PACE = RolloutPolicy(batch=10, patience_seconds=240.0)


@dataclass(frozen=True, slots=True)
class DeployedPool:
    """A deployment to measure."""

    scaler: Scaler
    pool: str
    connect: Callable[[], ApiClient]
    """Opens the server's HTTP interface."""
    meter: Meter
    """Reads what can be read of its tiers."""

    def resize_to(self, clients: int) -> None:
        """Bring the pool to so many clients; raises BadInput and RunFailed as `scale` does."""
        scale(self.scaler, self.pool, clients, pace=PACE, tell=lambda _: None)


class PoolDeployment:
    """One size of a deployed pool; `Deployment` says what each method does."""

    def __init__(self, deployed: DeployedPool, clients: int) -> None:
        """Prepare to scale the pool to so many clients."""
        self._deployed, self._clients = deployed, clients
        self.description = f"{clients} containers, one client in each"

    def connect(self) -> ApiClient:
        """Open the server's HTTP interface."""
        return self._deployed.connect()

    def start(self) -> None:
        """Scale the pool; raises LimitReached where the engine or the cluster has no room for more."""
        with self.connect() as server:
            server.jobs()
        try:
            self._deployed.resize_to(self._clients)
        except (OverQuota, RunFailed) as error:
            raise LimitReached(f"containers: {error}") from error

    def meter(self) -> Mapping[str, UsageSample]:
        """Read what the deployment's engine tells of each tier."""
        return self._deployed.meter()

    def check(self) -> None:
        """Do nothing: a container that ends is started again by its engine, and the events tell."""

    def close(self) -> None:
        """Do nothing: the next size grows from here, and `deployed` brings the pool back after the last."""


@contextmanager
def deployed_pool(scaler: Scaler, pool: str, connect: Callable[[], ApiClient], meter: Meter) -> Iterator[DeployedPool]:
    """A deployment whose pool is afterwards what it was before."""
    before = scaler.count(pool)
    found = DeployedPool(scaler, pool, connect, meter)
    try:
        yield found
    finally:
        found.resize_to(before)
